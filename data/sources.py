"""Where the photographs and their captions are: one `Source` for COCO, Karpathy's files and plain folders.

A source lists photographs in a fixed order, each with its id, its name below the root, its split and its captions;
it opens no photograph. The readers stand beside (`coco`, `karpathy`, `folder`), each `read*(dataset, root,
annotations, images) -> Source`; what they share is here. Every mistake in the input is a `DataError`.

Splits are `train`, `val`, `test`, or `all` where a COCO file names none. `dev` is what a run may be tuned on: val
where there is a test split to report, else about a tenth of the train photographs, chosen by their file names.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data import DataError

DATASETS = ("coco2014", "coco2017", "coco", "karpathy", "folder", "sample")
SPLITS = {"train": "train", "restval": "train", "val": "val", "validation": "val", "dev": "val", "test": "test"}


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
    """The photographs of a dataset, in the order of their caption file (a folder's: of their names)."""

    dataset: str
    root: Path  # the folder that names are relative to
    images: tuple[Image, ...] = field(repr=False)
    missing: tuple[Image, ...] = field(repr=False)  # named by the captions, not on the disk; in `images` too
    annotations: Path | None  # the caption file, or the folder of COCO's two

    def __post_init__(self) -> None:
        if not self.images:
            raise DataError(f"{self.dataset} has no images in {self.annotations or self.root}; check the path")
        first: dict[int, Image] = {}
        for image in self.images:
            other = first.setdefault(image.id, image)
            if other is not image:
                raise DataError(
                    f"{other.name} and {image.name} have one id, {image.id}, in {self.annotations or self.root}; "
                    "give each photograph its own (in a folder the id comes from the name: rename one)"
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
        if len(drawn) in (0, len(hashed)):  # a tiny set: one photograph, as long as it leaves another to train on
            drawn = sorted(hashed, key=lambda i: (hashed[i], i.name))[:1] if len(hashed) > 1 else []
        return frozenset(image.id for image in drawn)

    def select(self, split: str) -> list[Image]:
        """The photographs of `split` (train dev val test all), in source order; never an empty list.

        `dev` is val where there are val and test. Otherwise it is the train photographs (and those of a COCO file
        without splits) with int(sha256(file name without folders)[:8], 16) % 10 == 0, and `train` leaves them out.
        Where that takes none or all of a tiny set, dev is the one with the smallest hash; of one photograph, none.
        Raises DataError for a split that does not exist or has nobody in it.
        """
        if split == "all":
            chosen = list(self.images)
        elif split == "train":
            chosen = [i for i in self.images if i.split in ("train", "all") and i.id not in self._drawn]
        elif split == "dev" and {"val", "test"} <= set(self.splits):
            chosen = self.select("val")
        elif split == "dev":
            chosen = [i for i in self.images if i.id in self._drawn]
        else:
            chosen = [i for i in self.images if i.split == split]
        if not chosen:
            raise DataError(
                f"split {split!r} has no images in {self.dataset} at {self.root}; "
                f"its splits: {', '.join(self.splits)}" + (" (and dev, taken from train)" if self._drawn else "")
            )
        return chosen

    def reported(self) -> str:
        """The split to score when none is asked for: test, else val, else all of an unsplit COCO file, else dev."""
        return next((split for split in ("test", "val", "all") if split in self.splits), "dev")

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over the sorted (id, file name) pairs: which photographs these are, in any order or folder."""
        pairs = sorted((image.id, _plain(image.name)) for image in self.images)
        return hashlib.sha256("".join(f"{id_}\t{name}\0" for id_, name in pairs).encode()).hexdigest()


def open_source(
    dataset: str, root: Path | None, annotations: Path | None = None, images: Path | None = None
) -> Source:
    """Open `dataset` (one of DATASETS) under `root`.

    annotations: the caption file, where it is not the one found under the root (coco needs it; for coco2014 and
        coco2017 the folder of the two).
    images: the folder of the photographs, where that is not the root.
    Raises DataError for a missing place or a caption file that cannot be trusted. Photographs that a caption file
    names and the disk lacks are no error here: see `Source.missing`.
    """
    from data import coco, folder, karpathy  # here, since the readers import this module

    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"no dataset {dataset!r}; {hint}there are {', '.join(DATASETS)}")
    if root is None and images is None:
        raise DataError(f"{dataset} needs a root: pass --root, the folder of the photographs and their captions")
    try:
        if dataset == "sample":
            from data.sample import ensure_sample

            ensure_sample(Path(root or images))
        for place, flag in ((root, "--root"), (images, "--images")):
            if place is not None and not Path(place).is_dir():
                raise DataError(f"{place} is not a folder; {flag} names the folder of {dataset}")
        if annotations is not None and not Path(annotations).exists():
            raise DataError(f"{annotations} does not exist; --annotations names the captions of {dataset}")
        readers = {"coco": coco.read, "karpathy": karpathy.read, "folder": folder.read, "sample": karpathy.read}
        read = readers.get(dataset, coco.read_official)
        return read(dataset, *(None if place is None else Path(place) for place in (root, annotations, images)))
    except OSError as error:
        raise DataError(f"{dataset}: {error.filename or root or images}: {error.strerror or error}") from error


def image_id(name: str) -> int:
    """The id of a photograph that has no other: the first 63 bits of SHA-256 of its relative POSIX path (UTF-8)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def same_photograph(a: str, b: str) -> bool:
    """Whether two names can be one photograph: 2014 and 2017 name a COCO photograph differently, folders aside."""
    return _plain(a) == _plain(b)


def _plain(name: str) -> str:
    return re.sub(r"^COCO_(train|val|test)20\d\d_", "", name.rpartition("/")[2])


def _name_hash(name: str) -> str:
    return hashlib.sha256(name.rpartition("/")[2].encode()).hexdigest()


# What the readers share.


class Listing:
    """Which files are under a root: `name in listing`. A folder is listed once, so 100,000 questions need no stat."""

    def __init__(self, root: Path) -> None:
        self.root, self.folders = root, {}

    def __contains__(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if folder not in self.folders:
            self.folders[folder] = self._names(folder)
        return file in self.folders[folder]

    def _names(self, folder: str) -> set[str]:
        try:
            with os.scandir(self.root / folder) as entries:  # a link that leads nowhere is no file
                return {entry.name for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)}
        except (FileNotFoundError, NotADirectoryError):
            return set()


def read_text(file: Path) -> str:
    """The text of a caption file: UTF-8, with or without a byte order mark; else DataError."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def parse_json(file: Path) -> object:
    """What a JSON file holds; else DataError naming it."""
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:  # broken, a number of thousands of digits, lists in lists in lists
        raise DataError(f"{file} is not whole JSON: {error}; download or write it again") from error


def read_json(file: Path) -> dict:
    """A caption file's JSON object, known to have a list of objects as `images`; else DataError naming the file."""
    content = parse_json(file)
    check_entries(content, "images", file)
    return content


def check_entries(content: object, key: str, file: Path) -> None:
    """DataError unless `content` is an object whose `key` is a list of objects."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f'{file} has no list of objects "{key}"; it is not the caption file this dataset reads')


def check_id(value: object, where: str) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise DataError(f"{where}: the image id {value!r} is not a whole number of 64 bits")
    return value


def check_name(name: object, where: str) -> str:
    """`name` as a clean POSIX path below a root; DataError where it is none, climbs out, or is not UTF-8."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{where}: {name!r} is not a file name; it must be a path relative to the root")
    parts = name.split("/")
    if not parts[0] or ".." in parts:
        raise DataError(f"{where}: {name!r} leads out of the root; names are relative to the root, without '..'")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the file name {name!r} is not UTF-8; rename the file") from error
    return "/".join(part for part in parts if part not in ("", ".")) if "" in parts or "." in parts else name


def check_split(value: object, where: str) -> str:
    """The split that `value` means (restval is train, validation and dev are val); DataError for an unknown one."""
    split = SPLITS.get(value.lower()) if isinstance(value, str) else None
    if split is None:
        raise DataError(f"{where}: no split {value!r}; there are train, val (validation, dev), test and restval")
    return split


def check_captioned(images: Iterable[Image], split: str) -> None:
    """DataError naming the first of `images` that has no caption."""
    for image in images:
        if not image.captions:
            raise DataError(
                f"image {image.id} ({image.name}) has no caption in split {split!r}; "
                "give it one (in a folder: a line of metadata.jsonl), or leave it out of the images"
            )


def check_caption(caption: object, where: str) -> str:
    if not isinstance(caption, str):
        raise DataError(f"{where}: the caption is {json.dumps(caption)[:80]}, not a string")
    if any("\ud800" <= sign <= "\udfff" for sign in caption):
        raise DataError(f"{where}: the caption {ascii(caption)[:80]} has half a character (a lone surrogate); write it again")
    return caption
