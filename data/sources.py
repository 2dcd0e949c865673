"""Where the photographs and their captions are: one `Source` for COCO, Karpathy's files and plain
folders.

A source lists photographs in a fixed order, each with its id, its name below the root, its split
and its captions; it opens no photograph. The readers stand beside (`coco`, `karpathy`, `folder`),
each `read*(dataset, root, annotations, images) -> Source`; what they share is here. Every mistake
in the input is a `DataError`.

A photograph's name is the one that it has on the disk. A caption file may write it in another
Unicode normal form, in other case, or with backslashes: `on_disk` finds it.

Splits are `train`, `val`, `test`, or `all` where a COCO file names none. `dev` is what a run may be
tuned on: val where there is a test split to report, else about a tenth of the train photographs,
chosen by their file names.
"""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data import DataError

SPLITS = {  # Karpathy's names and those of Hugging Face's imagefolder
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True, slots=True)
class Image:
    """One photograph and what is known of it."""

    id: int  # int64: cocoid, imgid, or image_id(name)
    name: str  # POSIX path relative to the source's root
    path: Path  # where the file is: root / name
    split: str  # "train" "val" "test", or "all" where a COCO file names none
    captions: tuple[str, ...]  # as written; none is allowed, extraction needs none


@dataclass(frozen=True)
class Source:
    """The photographs of a dataset, in the order of their caption file (a folder's: of their
    names).
    """

    dataset: str
    root: Path  # the folder that names are relative to
    images: tuple[Image, ...] = field(repr=False)
    # named by the captions, not on the disk; in `images` too
    missing: tuple[Image, ...] = field(repr=False)
    annotations: Path | None  # the caption file, or the folder of COCO's two
    # what the reader left out, a line each, to be printed
    notes: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.images:
            raise DataError(
                f"{self.dataset} has no images in {self.annotations or self.root}; check the path"
            )
        first: dict[int, Image] = {}
        for image in self.images:
            other = first.setdefault(image.id, image)
            if other is not image:
                raise DataError(
                    f"{other.name} and {image.name} have the same id, {image.id}, in "
                    f"{self.annotations or self.root}; "
                    "give each photograph its own (in a folder the id comes from the name: "
                    "rename one)"
                )

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The splits that the source itself names, of `train`, `val`, `test`, `all`."""
        present = {image.split for image in self.images}
        return tuple(split for split in ("train", "val", "test", "all") if split in present)

    @cached_property
    def _drawn(self) -> frozenset[int]:
        """Ids of the dev photographs that are taken out of train; none where val serves as dev."""
        if {"val", "test"} <= set(self.splits):
            return frozenset()
        hashed = {i: _name_hash(i.name) for i in self.images if i.split in ("train", "all")}
        drawn = [image for image, value in hashed.items() if int(value[:8], 16) % 10 == 0]
        if len(drawn) in (
            0,
            len(hashed),
        ):  # a tiny set: one photograph, as long as it leaves another to train on
            drawn = sorted(hashed, key=lambda i: (hashed[i], i.name))[:1] if len(hashed) > 1 else []
        return frozenset(image.id for image in drawn)

    def select(self, split: str) -> list[Image]:
        """The photographs of `split` (train dev val test all), in source order; never an empty
        list.

        `dev` is val where there are val and test. Otherwise it is the train photographs (and those
        of a COCO file without splits) with int(sha256(file name without folders)[:8], 16) % 10 ==
        0, and `train` leaves them out. Where that takes none or all of a tiny set, dev is the one
        with the smallest hash; of one photograph, none.
        Raises DataError for a split that does not exist or has nobody in it.
        """
        if split == "all":
            chosen = list(self.images)
        elif split == "train":
            chosen = [
                i for i in self.images if i.split in ("train", "all") and i.id not in self._drawn
            ]
        elif split == "dev" and {"val", "test"} <= set(self.splits):
            chosen = self.select("val")
        elif split == "dev":
            chosen = [i for i in self.images if i.id in self._drawn]
        else:
            chosen = [i for i in self.images if i.split == split]
        if not chosen:
            raise DataError(
                f"split {split!r} has no images in {self.dataset} at {self.root}; "
                f"its splits: {', '.join(self.splits)}"
                + (" (and dev, taken from train)" if self._drawn else "")
            )
        return chosen

    def reported(self) -> str:
        """The split to score when none is asked for: test, else val, else all of an unsplit COCO
        file, else dev.
        """
        return next((split for split in ("test", "val", "all") if split in self.splits), "dev")

    @cached_property
    def by_id(self) -> dict[int, Image]:
        return {image.id: image for image in self.images}

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over the sorted (id, file name) pairs: which photographs these are, in any
        order or folder.
        """
        pairs = sorted((image.id, _plain(image.name)) for image in self.images)
        return hashlib.sha256(
            "".join(f"{id_}\t{name}\0" for id_, name in pairs).encode()
        ).hexdigest()


def image_id(name: str) -> int:
    """The id of a photograph that has no other: the first 63 bits of SHA-256 of its relative POSIX
    path (UTF-8).
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def same_photograph(a: str, b: str) -> bool:
    """Whether two names can be one photograph: folders, the Unicode normal form and case do not
    matter, and 2014 and 2017 name a COCO photograph differently."""
    return _plain(a) == _plain(b) or loose(_plain(_slashes(a))) == loose(_plain(_slashes(b)))


def _plain(name: str) -> str:
    """The name as `Source.digest` counts it, which old runs recorded."""
    return re.sub(r"^COCO_(train|val|test)20\d\d_", "", name.rpartition("/")[2])


def _name_hash(name: str) -> str:
    return hashlib.sha256(name.rpartition("/")[2].encode()).hexdigest()


# What the readers share.


def _slashes(name: str) -> str:
    """A name with the slashes of POSIX: metadata made on Windows has backslashes."""
    return name.replace("\\", "/")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _suffix_lowered(name: str) -> str:
    stem, suffix = os.path.splitext(_composed(name))
    return stem + suffix.lower()


def loose(name: str) -> str:
    """The same for names that differ in case or Unicode normal form."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


class Listing:
    """Which files are under a root. A folder is listed once, so 100,000 questions need no stat."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[str, set[str]] = {}
        self.real: dict[str, str | None] = {
            "": ""
        }  # the folder on the disk of a folder as it is written
        self.loose: dict[str, dict[str, list[str]]] = {}  # by folder and loose name

    def __contains__(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        return file in self.names(folder)

    def find(self, name: str) -> str | None:
        """The file that `name` means: itself, else the one whose name differs only in the slashes,
        the Unicode normal form or case. None where there is none, or several that are equally
        near."""
        if name in self:
            return name
        if "\\" in name:
            name = "/".join(part for part in _slashes(name).split("/") if part not in ("", "."))
        folder, _, file = name.rpartition("/")
        real = self._folder(folder)
        near = None if real is None else self._nearest(real, file)
        return None if near is None else f"{real}/{near}" if real else near

    def similar(self, name: str) -> list[str]:
        """Files in the folder of `name` that have its name but for case, normal form and suffix."""
        folder, _, file = _slashes(name).rpartition("/")
        real, stem = self._folder(folder), loose(os.path.splitext(file)[0])
        names = self.names(real) if real is not None else ()
        return sorted(each for each in names if loose(os.path.splitext(each)[0]) == stem)

    def names(self, folder: str) -> set[str]:
        if folder not in self.folders:
            self.folders[folder] = self._list(folder)
        return self.folders[folder]

    def _list(self, folder: str) -> set[str]:
        try:
            with os.scandir(self.root / folder) as entries:  # a link that leads nowhere is no file
                return {
                    entry.name
                    for entry in entries
                    if not entry.is_symlink() or os.path.exists(entry.path)
                }
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def _folder(self, name: str) -> str | None:
        if name not in self.real:
            written, _, last = name.rpartition("/")
            above = self._folder(written)
            found = None if above is None else self._nearest(above, last)
            self.real[name] = None if found is None else f"{above}/{found}" if above else found
        return self.real[name]

    def _nearest(self, folder: str, name: str) -> str | None:
        names = self.names(folder)
        if name in names or not names:
            return name if name in names else None
        if folder not in self.loose:
            self.loose[folder] = {}
            for each in names:
                self.loose[folder].setdefault(loose(each), []).append(each)
        near = self.loose[folder].get(loose(name), ())
        for form in (
            _composed,
            _suffix_lowered,
            loose,
        ):  # the normal form alone, the suffix's case too, any case
            if same := [each for each in near if form(each) == form(name)]:
                return same[0] if len(same) == 1 else None
        return None


def on_disk(wanted: Sequence[Sequence[str]], disk: Listing) -> list[str | None]:
    """For each photograph, by the names that it may have (likeliest first), its name on the disk;
    None where it is absent.

    A name that is there as written comes before one that `Listing.find` finds. Two names that
    differ in more than the normal form never mean one file: it belongs to the name that is written
    as it is, else to neither.
    """
    found = [next((name for name in names if name in disk), None) for names in wanted]
    near: dict[int, tuple[str, str]] = {}  # number: the name that was found, and how it was written
    for number, names in enumerate(wanted):
        if found[number] is None:
            for written in names:
                if name := disk.find(written):
                    near[number] = name, _composed(_slashes(written))
                    break
    if near:
        exact = {name for name in found if name is not None}
        forms: dict[str, set[str]] = {}
        for name, form in near.values():
            forms.setdefault(name, {_composed(name)} if name in exact else set()).add(form)
        for number, (name, form) in near.items():
            if len(forms[name]) == 1 or (name in exact and form == _composed(name)):
                found[number] = name
    return found


def read_text(file: Path) -> str:
    """The text of a caption file: UTF-8, with or without a byte order mark; else DataError."""
    with open(file, "rb") as opened:
        start = opened.read(2)
    # a byte order mark, or a letter of two bytes
    if start in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise DataError(f"{file} is UTF-16; save it as UTF-8")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def parse_json(file: Path) -> object:
    """What a JSON file holds; else DataError naming it."""
    try:
        return json.loads(read_text(file))
    except (
        ValueError,
        RecursionError,
    ) as error:  # broken, a number of thousands of digits, lists in lists in lists
        raise DataError(f"{file} is not whole JSON: {error}; download or write it again") from error


def read_json(file: Path) -> dict:
    """A caption file's JSON object, known to have a list of objects as `images`; else DataError
    naming the file.
    """
    content = parse_json(file)
    check_entries(content, "images", file)
    assert isinstance(content, dict)  # by check_entries
    return content


def check_entries(content: object, key: str, file: Path) -> None:
    """DataError unless `content` is an object whose `key` is a list of objects."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(
            f'{file} has no list of objects "{key}"; it is not the caption file this dataset reads'
        )


def check_id(value: object, where: str) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise DataError(f"{where}: the image id {value!r} is not a whole number of 64 bits")
    return value


def check_name(name: object, where: str) -> str:
    """Return `name` as a clean POSIX path below a root.

    Raises DataError if it is invalid, leads out of the root, or is not UTF-8.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(
            f"{where}: {name!r} is not a file name; it must be a path relative to the root"
        )
    parts = name.split("/")
    if not parts[0] or ".." in _slashes(name).split("/"):
        raise DataError(
            f"{where}: {name!r} leads out of the root; names are relative to the root, without '..'"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the file name {name!r} is not UTF-8; rename the file") from error
    return (
        "/".join(part for part in parts if part not in ("", "."))
        if "" in parts or "." in parts
        else name
    )


def check_split(value: object, where: str) -> str:
    """The split that `value` means, one of SPLITS in any case; DataError for an unknown one."""
    split = SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise DataError(f"{where}: no split {value!r}; there are {', '.join(SPLITS)}")
    return split


def check_captioned(images: Iterable[Image], split: str) -> None:
    """DataError where some of `images` have no caption: how many, and the first five."""
    bare = [image for image in images if not image.captions]
    if not bare:
        return
    first = ", ".join(f"image {image.id} ({image.name})" for image in bare[:5])
    said = f"{first} has no caption in split {split!r}"
    if len(bare) > 1:
        said = (
            f"{len(bare):,} images have no caption in split {split!r}: "
            f"{first}{', ...' if len(bare) > 5 else ''}"
        )
    raise DataError(
        f"{said}; give each one (in a folder: a line of metadata.jsonl, or a .txt beside it "
        "with --captions-from txt), "
        "or leave it out of the images"
    )


def check_caption(caption: object, where: str) -> str:
    if not isinstance(caption, str):
        raise DataError(f"{where}: the caption is {json.dumps(caption)[:80]}, not a string")
    if any("\ud800" <= sign <= "\udfff" for sign in caption):
        raise DataError(
            f"{where}: the caption {ascii(caption)[:80]} has half a character (a lone "
            "surrogate); write it again"
        )
    return caption
