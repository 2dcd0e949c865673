"""`Source`: the photographs and captions of a dataset, and the functions that all readers share.

A source lists photographs in a fixed order. Each photograph has an id, a name relative to the root,
a split and captions. A source opens no image file. The readers are in `data.datasets` (`coco`,
`karpathy`, `folder`). Each reader is a function `read*(dataset, root, annotations, images) ->
Source` and raises `DataError` for invalid input.

The name of a photograph is its name on disk. A caption file may write the name in another Unicode
normal form, in another case or with backslashes; `on_disk` maps it to the name on disk.

The splits are `train`, `val` and `test`, or `all` if a COCO file names no splits. `dev` is the
split for tuning: val if the dataset has val and test, else about a tenth of the train photographs,
chosen by a hash of the file name.
"""

import contextlib
import csv
import gc
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from data import DataError
from data.remote import folder_names, is_remote

SPLITS = {  # the split names of Karpathy's files and of Hugging Face's imagefolder
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True, slots=True)
class Image:
    """One photograph of a source."""

    id: int  # int64: the cocoid or imgid of the file, else image_id(name)
    name: str  # POSIX path relative to the source's root
    path: Path  # root / name; under a remote root and in a tar a `Blob` (`photograph_path`)
    split: str  # "train", "val", "test", or "all" if a COCO file names no splits
    captions: tuple[str, ...]  # as written in the file; may be empty


@dataclass(frozen=True)
class Source:
    """The photographs of a dataset, in the order of the caption file (a folder: sorted by name)."""

    dataset: str
    root: Path  # the folder that names are relative to
    images: tuple[Image, ...] = field(repr=False)
    # images that the caption file names and that are not on disk; `images` includes them
    missing: tuple[Image, ...] = field(repr=False)
    annotations: Path | None  # the caption file, or the folder of COCO's two caption files
    # messages for the user about files that the reader ignored
    notes: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.images:
            raise DataError(
                f"{self.dataset} has no images in {self.annotations or self.root}; check the path"
            )
        by_id: dict[int, Image] = {}
        for image in self.images:
            other = by_id.setdefault(image.id, image)
            if other is not image:
                raise DataError(
                    f"{other.name} and {image.name} have the same id, {image.id}, in "
                    f"{self.annotations or self.root}; give each photograph a different id (in a "
                    "folder the id is a hash of the name: rename one of them)"
                )

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The splits that the images have, of `train`, `val`, `test` and `all`."""
        present = {image.split for image in self.images}
        return tuple(split for split in ("train", "val", "test", "all") if split in present)

    @cached_property
    def _dev_is_val(self) -> bool:
        return {"val", "test"} <= set(self.splits)

    @cached_property
    def _dev_ids(self) -> frozenset[int]:
        """The ids of the dev photographs taken out of train; empty if val is used as dev."""
        if self._dev_is_val:
            return frozenset()
        hashes = {i: _name_hash(i.name) for i in self.images if i.split in ("train", "all")}
        dev = [image for image, digest in hashes.items() if int(digest[:8], 16) % 10 == 0]
        if len(dev) in (0, len(hashes)):  # a very small dataset
            by_hash = sorted(hashes, key=lambda image: (hashes[image], image.name))
            dev = by_hash[:1] if len(hashes) > 1 else []
        return frozenset(image.id for image in dev)

    def select(self, split: str) -> list[Image]:
        """Return the images of a split (train, dev, val, test or all), in source order.

        `dev` equals val if the dataset has val and test. Otherwise `dev` consists of the train
        images (or the images of a COCO file without splits) with
        int(sha256(file name without folders)[:8], 16) % 10 == 0, and `train` excludes them. If this
        rule selects none or all of the images, `dev` is the one image with the smallest hash. A
        dataset of one image has no `dev`.

        Raises DataError if the split does not exist or has no images.
        """
        if split == "all":
            images = list(self.images)
        elif split == "train":
            images = [
                i for i in self.images if i.split in ("train", "all") and i.id not in self._dev_ids
            ]
        elif split == "dev" and not self._dev_is_val:
            images = [i for i in self.images if i.id in self._dev_ids]
        else:
            name = "val" if split == "dev" else split
            images = [i for i in self.images if i.split == name]
        if not images:
            raise DataError(
                f"split {split!r} has no images in {self.dataset} at {self.root}; "
                f"its splits: {', '.join(self.splits)}"
                + (" (and dev, taken from train)" if self._dev_ids else "")
            )
        return images

    def reported(self) -> str:
        """The default split to score: test, else val, else all (COCO without splits), else dev."""
        return next((split for split in ("test", "val", "all") if split in self.splits), "dev")

    @cached_property
    def by_id(self) -> dict[int, Image]:
        """The images by id."""
        return {image.id: image for image in self.images}

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the sorted (id, file name) pairs, independent of order and folders."""
        pairs = sorted((image.id, _plain(image.name)) for image in self.images)
        return hashlib.sha256(
            "".join(f"{id_}\t{name}\0" for id_, name in pairs).encode()
        ).hexdigest()


def image_id(name: str) -> int:
    """Return the id of an image without one in the dataset: a hash of its relative POSIX path.

    The hash is the first 63 bits of SHA-256 of the path in UTF-8.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def same_photograph(a: str, b: str) -> bool:
    """Return whether two names may refer to the same photograph.

    Folders, the Unicode normal form, case and the COCO prefix of 2014 are ignored.
    """
    return _plain(a) == _plain(b) or loose(_plain(_slashes(a))) == loose(_plain(_slashes(b)))


def _plain(name: str) -> str:
    """The name as it enters `Source.digest`. Old runs recorded that digest: do not change."""
    return re.sub(r"^COCO_(train|val|test)20\d\d_", "", name.rpartition("/")[2])


def _name_hash(name: str) -> str:
    return hashlib.sha256(name.rpartition("/")[2].encode()).hexdigest()


def _slashes(name: str) -> str:
    """Replace backslashes, which metadata written on Windows contains."""
    return name.replace("\\", "/")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _suffix_lowered(name: str) -> str:
    stem, suffix = os.path.splitext(_composed(name))
    return stem + suffix.lower()


def loose(name: str) -> str:
    """Return a key that is equal for names that differ only in case or Unicode normal form."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


class Listing:
    """The files under a root. Each folder is listed once, so that a lookup needs no `stat`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[str, set[str]] = {}  # by folder
        self._disk_folders: dict[str, str | None] = {"": ""}  # by the folder as it is written
        self._by_loose: dict[str, dict[str, list[str]]] = {}  # by folder and loose name

    def __contains__(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        return file in self.names(folder)

    def find(self, name: str) -> str | None:
        """Return the name on disk of the file `name`.

        If there is no file with exactly this name, return the one whose name differs only in
        backslashes, Unicode normal form or case. Return None if there is no such file, or if
        several files match equally well.
        """
        if name in self:
            return name
        if "\\" in name:
            name = "/".join(part for part in _slashes(name).split("/") if part not in ("", "."))
        folder, _, file = name.rpartition("/")
        return self._join(self._folder(folder), file)

    def similar(self, name: str) -> list[str]:
        """Return the files in the folder of `name` with the same stem.

        Case, Unicode normal form and suffix are ignored.
        """
        folder, _, file = _slashes(name).rpartition("/")
        disk_folder, stem = self._folder(folder), loose(os.path.splitext(file)[0])
        names = self.names(disk_folder) if disk_folder is not None else ()
        return sorted(other for other in names if loose(os.path.splitext(other)[0]) == stem)

    def names(self, folder: str) -> set[str]:
        """Return the names of the files in a folder on disk; empty if there is no such folder."""
        if folder not in self._names:
            self._names[folder] = self._list(folder)
        return self._names[folder]

    def _list(self, folder: str) -> set[str]:
        if is_remote(self.root):
            return folder_names(self.root / folder if folder else self.root)
        try:
            with os.scandir(self.root / folder) as entries:
                return {
                    entry.name
                    for entry in entries
                    if not entry.is_symlink() or os.path.exists(entry.path)  # no broken links
                }
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def _folder(self, name: str) -> str | None:
        """The folder on disk of a folder as it is written; None if there is no match."""
        if name not in self._disk_folders:
            parent, _, last = name.rpartition("/")
            self._disk_folders[name] = self._join(self._folder(parent), last)
        return self._disk_folders[name]

    def _join(self, folder: str | None, name: str) -> str | None:
        """The path of the file in `folder` that matches `name`; None if there is no match."""
        match = None if folder is None else self._match(folder, name)
        return match if match is None or not folder else f"{folder}/{match}"

    def _match(self, folder: str, name: str) -> str | None:
        names = self.names(folder)
        if name in names or not names:
            return name if name in names else None
        if folder not in self._by_loose:
            self._by_loose[folder] = {}
            for other in names:
                self._by_loose[folder].setdefault(loose(other), []).append(other)
        candidates = self._by_loose[folder].get(loose(name), ())
        # First ignore the normal form, then also the case of the suffix, then all case.
        for form in (_composed, _suffix_lowered, loose):
            if matches := [other for other in candidates if form(other) == form(name)]:
                return matches[0] if len(matches) == 1 else None
        return None


def on_disk(candidates: Sequence[Sequence[str]], disk: Listing) -> list[str | None]:
    """Return the name on disk of each photograph; None if it is not on disk.

    candidates: for each photograph the names that it may have, the most probable first.

    An exact match comes before a match of `Listing.find`. Two names that differ in more than the
    Unicode normal form never share one file: the file belongs to the exact name, else to neither.
    """
    names_on_disk = [next((n for n in names if n in disk), None) for names in candidates]
    inexact: dict[int, tuple[str, str]] = {}  # by index: the name on disk, the name as written
    for index, names in enumerate(candidates):
        if names_on_disk[index] is None:
            for written in names:
                if name := disk.find(written):
                    inexact[index] = name, _composed(_slashes(written))
                    break
    if inexact:
        exact = {name for name in names_on_disk if name is not None}
        forms: dict[str, set[str]] = {}  # by name on disk: the different names as written
        for name, form in inexact.values():
            forms.setdefault(name, {_composed(name)} if name in exact else set()).add(form)
        for index, (name, form) in inexact.items():
            if len(forms[name]) == 1 or (name in exact and form == _composed(name)):
                names_on_disk[index] = name
    return names_on_disk


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Context manager: pause Python's garbage collector.

    It doubles the time to read large files, because it searches millions of new objects.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_text(file: Path, encoding: str | None = None) -> str:
    """Return the text of a file, without its byte order mark.

    encoding: the value of --encoding; None: UTF-8, for files that this option does not concern.

    Raises DataError if the file has another encoding.
    """
    if encoding not in (None, "utf-8"):
        return _read_encoded(file, encoding)
    with file.open("rb") as opened:
        start = opened.read(2)
    hint = "" if encoding is None else ", or pass --encoding NAME, such as gb18030"
    # a byte order mark of UTF-16, or a character of two bytes
    if start in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise DataError(f"{file} is UTF-16; save it as UTF-8{hint}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 at byte {error.start}; save it as UTF-8{hint}"
        ) from error


def _read_encoded(file: Path, encoding: str) -> str:
    try:
        return file.read_bytes().decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not {encoding} at byte {error.start}; pass another --encoding"
        ) from error
    except LookupError as error:
        raise DataError(f"--encoding {encoding}: {error}") from error


def csv_rows(
    file: Path, lines: Iterable[str], check: Callable[[list[str]], None] = lambda columns: None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield "file, line N" and the row by lower-case column, for each row of CSV lines.

    check: raises DataError if a column is missing.
    """
    reader = csv.DictReader(lines, strict=True)
    try:
        columns = [(column or "").strip().lower() for column in reader.fieldnames or ()]
        check(columns)
        for column, count in Counter(columns).items():
            if column and count > 1:
                raise DataError(
                    f"{file} has the column {column} {count} times; write one text per row"
                )
        reader.fieldnames = columns
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if None in row:
                raise DataError(
                    f"{where}: more cells than the header; put texts with commas in quotes"
                )
            yield where, row
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.reader.line_num}: not CSV: {error}") from error


def parse_json(file: Path, object_hook: Callable[[dict], Any] | None = None) -> object:
    """Return the content of a JSON file. Raises DataError if it is not valid JSON.

    object_hook: as in json.loads, such as a function that stores long lists in less memory.
    """
    text = read_text(file)
    try:
        return json.loads(text, object_hook=object_hook)
    # RecursionError: deeply nested lists. ValueError: also a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is not complete JSON: {error}; download or write it again"
        ) from error


def read_json(
    file: Path, key: str = "images", what: str = "a caption file of this dataset"
) -> dict:
    """Return the JSON object of a file.

    what: what the file must be, for the message.

    Raises DataError if its entry `key` is not a list of objects.
    """
    content = parse_json(file)
    check_entries(content, key, file, what)
    assert isinstance(content, dict)  # check_entries verified it
    return content


def check_entries(
    content: object, key: str, file: Path, what: str = "a caption file of this dataset"
) -> None:
    """Raise DataError unless `content` is an object whose `key` is a list of objects."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f'{file} has no list of objects "{key}"; it is not {what}')


def check_id(value: object, where: str, what: str = "image") -> int:
    """Return an id. Raises DataError unless it is an integer of 64 bits.

    where: the place in the file, for the message; the same in the functions below.
    what: the kind of the id, for the message.
    """
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise DataError(f"{where}: the {what} id {value!r} is not an integer of 64 bits")
    return value


def check_name(name: object, where: str) -> str:
    """Return a file name as a normalized POSIX path relative to the root.

    Raises DataError if the name is invalid, points outside the root, or is not UTF-8.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(
            f"{where}: {name!r} is not a file name; it must be a path relative to the root"
        )
    parts = name.split("/")
    if not parts[0] or ".." in _slashes(name).split("/"):
        raise DataError(
            f"{where}: {name!r} is outside the root; names are relative to the root, without '..'"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the file name {name!r} is not UTF-8; rename the file") from error
    if "" in parts or "." in parts:
        return "/".join(part for part in parts if part not in ("", "."))
    return name


def check_split(value: object, where: str) -> str:
    """Return the split of a name, a key of SPLITS in any case. Raises DataError if unknown."""
    split = SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise DataError(f"{where}: unknown split {value!r}; known splits: {', '.join(SPLITS)}")
    return split


def check_captioned(images: Iterable[Image], split: str) -> None:
    """Raise DataError if some images have no caption. The message names the first five."""
    uncaptioned = [image for image in images if not image.captions]
    if not uncaptioned:
        return
    first = ", ".join(f"image {image.id} ({image.name})" for image in uncaptioned[:5])
    problem = f"{first} has no caption in split {split!r}"
    if len(uncaptioned) > 1:
        problem = (
            f"{len(uncaptioned):,} images have no caption in split {split!r}: "
            f"{first}{', ...' if len(uncaptioned) > 5 else ''}"
        )
    raise DataError(
        f"{problem}; add captions (in a folder: a line of metadata.jsonl, or a .txt file with the "
        "name of the photograph and --captions-from txt; in a tar: such a .txt file), or pass the "
        "ids of these images with --exclude-ids FILE"
    )


def check_caption(caption: object, where: str, what: str = "caption") -> str:
    """Return a caption. Raises DataError unless it is a string without lone surrogates.

    what: the name of the text, for the message.
    """
    if not isinstance(caption, str):
        raise DataError(f"{where}: the {what} is {json.dumps(caption)[:80]}, not a string")
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise DataError(
            f"{where}: the {what} {ascii(caption)[:80]} contains a lone surrogate, "
            f"which is half a character; write the {what} again"
        )
    return caption
