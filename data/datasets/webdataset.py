"""Read WebDataset tars: samples of files with the same key.

    shards/000.tar:  cat.jpg  cat.txt  cat.json  dog.jpg  dog.txt  ...

`--root` is a folder with tars, one tar, or a pattern with braces such as `shards/{000..127}.tar`,
local or remote; the package webdataset (the extra [webdataset]) expands it and defines the key: the
name up to the first dot after the last slash. A sample without a photograph is ignored, and the
notes count such samples.

captions    `.txt`: one per line. `.json`: `caption`, `captions` and `text`: a string, or a list of
            strings. Equal captions of a sample count once.
id          `image_id` or `id` of the `.json`, if it is an integer; else `image_id` of the name.
name        TAR/FILE, relative to the deepest folder that contains all tars: 000.tar/cat.jpg
split       as in a folder of photographs, from the folders of the name and the name of the tar:
            train-000.tar, val/000.tar

Photographs are read directly from the tar, by their position. The positions and captions of a tar
are read once and kept in the user's cache folder, as long as the tar does not change.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from data import DataError
from data.datasets.folder import folder_split
from data.files import atomic_write, user_cache
from data.image_formats import SUFFIXES
from data.remote import Blob, as_path, file_system, is_remote, store_errors
from data.sources import Image, Source, check_caption, check_id, check_name, image_id

INSTALL = "pip install -e '.[webdataset]'"
TEXT_SUFFIXES = ("txt", "json")
CAPTION_KEYS = ("caption", "captions", "text")
ID_KEYS = ("image_id", "id")
THREADS = 8  # tars that are read at the same time
BLOCK = 1 << 23  # bytes that are requested at a time from a remote tar
KEPT_FORMAT = 2  # a change of the reader that changes the samples of a tar needs another number


class Sample(NamedTuple):
    """A photograph in a tar. start, size: the range of its bytes. id: that of its .json, if any."""

    name: str
    start: int
    size: int
    captions: list[str]
    id: int | None


class TarIndex(NamedTuple):
    """The photographs of a tar, and the numbers of samples and of other files by a message."""

    samples: list[Sample]
    ignored: dict[str, int]


def read(dataset: str, root: Path | None, annotations: Path | None, images: Path | None) -> Source:
    """Read the index of each tar.

    Raises DataError if a tar is damaged, a .json is invalid, or the splits contradict each other.
    """
    if annotations is not None or images is not None or root is None:
        raise DataError(
            f"{dataset} reads photographs and captions from the tars of --root; remove "
            "--annotations and --images"
        )
    places = tars_of(root)
    base = _common_folder(places)
    with ThreadPoolExecutor(THREADS) as pool:
        indexes = list(pool.map(kept_index, places))
    photographs: list[Image] = []
    unsplit: list[str] = []
    ignored: Counter[str] = Counter()
    for place, index in zip(places, indexes, strict=True):
        ignored.update(index.ignored)
        tar = check_name(place.removeprefix(base).lstrip("/"), place)
        for sample in index.samples:
            name = f"{tar}/{sample.name}"
            split = folder_split(posixpath.dirname(name), root)
            if split is None:
                unsplit.append(name)
            id_ = image_id(name) if sample.id is None else sample.id
            path = cast(Path, Blob(place, sample.name, sample.start, sample.size))
            photographs.append(Image(id_, name, path, split or "train", tuple(sample.captions)))
    if unsplit and any(
        folder_split(posixpath.dirname(i.name), root) == "train" for i in photographs
    ):
        raise DataError(
            f"{unsplit[0]} in {root} is in no split, others are in train; give all tars a split in "
            "their name, such as train-000.tar"
        )
    notes = tuple(f"{count:,} {what}" for what, count in sorted(ignored.items()))
    return Source(dataset, as_path(base), tuple(photographs), (), root, notes)


def tars_of(root: Path) -> list[str]:
    """Return the paths of the tars of `--root`, sorted by the order of the pattern or by name.

    Raises DataError if there is none, or if the package webdataset is absent.
    """
    pattern = str(root)
    if "{" in pattern or "::" in pattern:
        return _package().shardlists.expand_urls(pattern)
    with store_errors(root):
        if not root.is_dir():
            return [pattern]
        tars = sorted(str(path) for path in root.glob("*.tar"))
    if not tars:
        raise DataError(
            f"{root} contains no .tar; pass a folder of tars, a tar, or a pattern such as "
            "'shards/{000..127}.tar' to --root"
        )
    return tars


def _package() -> Any:
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise DataError(f"--dataset webdataset needs a package: {INSTALL}") from error
    return webdataset


def _common_folder(places: Sequence[str]) -> str:
    """Return the deepest folder that contains all tars, local or remote."""
    scheme, separator, _ = places[0].rpartition("://")
    folders = {posixpath.dirname(place.removeprefix(scheme + separator)) for place in places}
    try:
        common = posixpath.commonpath(folders)
    except ValueError as error:
        raise DataError(
            f"{places[0]} and other tars of --root are partly absolute paths; use one kind"
        ) from error
    return scheme + separator + common or "."


# --------------------------------------------------------------------------------- index of one tar


def kept_index(place: str) -> TarIndex:
    """Return the index of a tar, from the user's cache folder if it was read before."""
    folder, version = user_cache(), _version(place)
    digest = hashlib.sha256(json.dumps([KEPT_FORMAT, place, version]).encode()).hexdigest()
    file = folder / "tars" / f"{digest[:32]}.json.gz" if folder else None
    if file and file.exists():
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError, KeyError):
            record = json.loads(gzip.decompress(file.read_bytes()))
            return TarIndex([Sample(*sample) for sample in record["samples"]], record["ignored"])
    index = index_tar(place)
    if file:
        record = {"samples": index.samples, "ignored": index.ignored}
        with contextlib.suppress(OSError):  # a full or read-only disk: the tar is read again
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as temporary:
                temporary.write_bytes(gzip.compress(json.dumps(record).encode(), 1))
    return index


def _version(place: str) -> list[Any]:
    """A record that changes when the tar changes. Raises DataError if there is no such tar."""
    try:
        if not is_remote(place):
            status = os.stat(place)
            return [os.path.abspath(place), status.st_size, status.st_mtime_ns]
        fs, path = file_system(place)
        with store_errors(place):
            try:
                return sorted([str(key), str(value)] for key, value in fs.info(path).items())
            except FileNotFoundError as error:
                raise DataError(f"{place} does not exist; check --root") from error
    except OSError as error:
        raise DataError(f"{place}: {error.strerror or error}; check --root") from error


def index_tar(place: str) -> TarIndex:
    """Read all headers and captions of a tar, but no photograph.

    Raises DataError if the tar is damaged or compressed, or if the captions are invalid.
    """
    key_of = _package().tariterators.base_plus_ext
    photographs: dict[str, list[tuple[str, int, int]]] = {}  # by key: name, start and size
    texts: dict[str, dict[str, bytes]] = {}  # by key and suffix
    names: set[str] = set()
    ignored: Counter[str] = Counter()
    for member, content in _members(place):
        key, suffix = key_of(member.name)
        if key is None:
            continue
        if not member.isreg():
            ignored["entries of the tars are links or devices and are ignored"] += 1
            continue
        if member.name in names:
            raise DataError(f"{place} contains {member.name} twice; remove one of them")
        names.add(member.name)
        suffix = suffix.lower()
        if f".{suffix}" in SUFFIXES:
            name = check_name(member.name, place)
            photographs.setdefault(key, []).append((name, member.offset_data, member.size))
        elif suffix in TEXT_SUFFIXES:
            texts.setdefault(key, {})[suffix] = content
        else:
            ignored[_why_ignored(suffix)] += 1
    samples = []
    for key, members in photographs.items():
        if len(members) > 1:
            several = ", ".join(name for name, _, _ in members)
            raise DataError(f"{place}: the key {key} has several photographs, {several}; keep one")
        captions, id_ = _texts(texts.pop(key, {}), f"{place}/{key}")
        samples.append(Sample(*members[0], captions, id_))
    if texts:
        ignored["samples of the tars have no photograph and are ignored"] = len(texts)
    return TarIndex(samples, dict(ignored))


def _why_ignored(suffix: str) -> str:
    """Return the note of a file. It has no part of the file name except the last suffix."""
    _, dot, last = suffix.rpartition(".")
    if not dot:
        return f"files of the tars are ignored: .{suffix}"
    return f"files *.*.{last} of the tars are ignored: the key of a file ends at its first dot"


def _members(place: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield the entries of a tar except folders, and the content of files of TEXT_SUFFIXES."""
    with store_errors(place), _open(place) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not member.isdir():
                        is_text = member.isreg() and member.name.lower().endswith(TEXT_SUFFIXES)
                        opened = tar.extractfile(member) if is_text else None
                        yield member, opened.read() if opened else b""
                # tarfile takes a damaged header for the end of the tar
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError(f"no header at byte {tar.offset:,}")
        except (tarfile.TarError, EOFError) as error:
            raise DataError(
                f"{place} is not a complete tar ({error}); copy it again. A compressed tar must be "
                "unpacked with gunzip"
            ) from error


def _open(place: str) -> IO[bytes]:
    if not is_remote(place):
        return open(place, "rb")
    fs, path = file_system(place)
    return fs.open(path, "rb", block_size=BLOCK, cache_type="readahead")


def _texts(files: dict[str, bytes], where: str) -> tuple[list[str], int | None]:
    """Return the captions and the id of a sample. where: the tar and the key, for messages."""
    captions: list[str] = []
    id_ = None
    if "txt" in files:
        lines = _decode(files["txt"], f"{where}.txt").split("\n")
        captions += [line.strip() for line in lines if line.strip()]
    if "json" in files:
        try:
            record = json.loads(_decode(files["json"], f"{where}.json"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}.json is not JSON: {error}; write it again") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}.json is not a JSON object; write captions by name")
        for name in CAPTION_KEYS:
            value = record.get(name)
            values: Iterable[Any] = value if isinstance(value, list) else [value]
            captions += [item for item in values if item is not None]
        ids = [record[name] for name in ID_KEYS if type(record.get(name)) is int]
        id_ = check_id(ids[0], f"{where}.json") if ids else None
    return [check_caption(caption, where) for caption in _unique(captions) if caption != ""], id_


def _unique(values: Iterable[Any]) -> list[Any]:
    unique: list[Any] = []
    for value in values:
        if value not in unique:
            unique.append(value)
    return unique


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 at byte {error.start}; write it again") from error
