"""Any folder of photographs, at any depth, in the form of Hugging Face's imagefolder, or with
caption files of other forms.

    root/**/*.jpg                       every suffix that Pillow reads; hidden files and folders are
                                        left out; the order is that of the relative path
    **/train/ validation/ test-2017/    splits, where a folder at any depth has one name of
                                        `data.sources.SPLITS` in its own, between blanks, digits,
                                        dots, dashes or underscores
    **/metadata.jsonl or .csv           captions, and splits in a column, of photographs named
                                        relative to its own folder
    **/captions.txt                     Kaggle's: CSV with the columns image and caption
    **/Flickr8k.token.txt               Flickr8k's: lines `name.jpg#0<TAB>caption`; where
                                        Flickr_8k.trainImages.txt, devImages or testImages stand
                                        beside it, they name the splits and the photographs
    **/*.txt                            with --captions-from txt: the captions of the photograph of
                                        the same name, one a line

A metadata row has `file_name` and, as it likes, `split` and one of `caption`, `captions`, `text`: a
string, in JSON also a list of strings. Several rows may name one file; a CSV cell under `captions`
may hold a JSON list. The photographs of captions.txt and Flickr8k.token.txt are beside the file or
beside its folder, there or in one of PHOTO_FOLDERS. A caption that two files give to one photograph
counts once.

Without splits everything is train. Where only some photographs have a split, the others are train
as long as nothing is called train; beside photographs called train that is a DataError.
"""

import csv
import functools
import io
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data import DataError
from data.image_formats import HEIC, SUFFIXES
from data.sources import (
    SPLITS,
    Image,
    Listing,
    Source,
    check_caption,
    check_name,
    check_split,
    image_id,
    loose,
    on_disk,
    read_text,
)

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("caption", "captions", "text")
KAGGLE, FLICKR8K = "captions.txt", "flickr8k.token.txt"
FLICKR8K_SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
PHOTO_FOLDERS = (
    "",
    "Images",
    "images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
)  # "Flicker" is the official spelling
CAPTION_SUFFIXES = (
    ".json",
    ".jsonl",
    ".csv",
)  # of caption files in general: no photographs that were left out
SIDECARS = (".txt", ".json", ".caption")


@dataclass(frozen=True)
class Options:
    """Options of --dataset folder."""

    captions_from: str = field(
        default="auto",
        metadata={
            "help": "auto: find caption files by name; txt: the .txt file beside each photograph",
            "choices": ("auto", "txt"),
        },
    )


class Files(NamedTuple):
    """The files below a folder by relative name, hidden ones left out: `photographs`, by name
    whether each is a file (a link may lead nowhere), and all `others`."""

    photographs: dict[str, bool]
    others: list[str]

    def left_out(self, named: Iterable[str] = ()) -> str:
        """How many files are neither photographs nor captions nor `named`, by suffix, and what
        would read them; empty where none is."""
        stems, named = {loose(_stem(name)) for name in self.photographs}, {*named}
        flickr8k = {
            posixpath.dirname(name) for name in self.others if _is(name, FLICKR8K)
        }  # with more texts beside it
        counts: Counter[str] = Counter()
        for name in self.others:
            suffix = _suffix(name)
            captions = suffix in CAPTION_SUFFIXES or _is(name, KAGGLE)
            sidecar = suffix in SIDECARS and loose(_stem(name)) in stems
            if not (
                name in named
                or captions
                or sidecar
                or (suffix == ".txt" and posixpath.dirname(name) in flickr8k)
            ):
                counts[suffix or "without suffix"] += 1
        if not counts:
            return ""
        total, heic = sum(counts.values()), [suffix for suffix in HEIC if suffix in counts]
        most = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
        parts = ", ".join(f"{suffix} {count:,}" for suffix, count in most)
        hint = f"; pip install -e '.[heic]' reads {', '.join(heic)}" if heic else ""
        return f"{total:,} file{'' if total == 1 else 's'} left out: {parts}{hint}"


class Row(NamedTuple):
    """What a caption file says of a photograph: the names it may have (likeliest first), captions,
    perhaps its split.
    """

    file: Path
    where: str
    names: tuple[str, ...]
    captions: tuple[str, ...]
    split: str | None = None


def read(
    dataset: str,
    root: Path | None,
    annotations: Path | None,
    images: Path | None,
    captions_from: str = "auto",
) -> Source:
    """Read a folder. An image's id is `image_id` of its relative path; a row without its file is in
    `missing`.
    """
    if annotations is not None:
        raise DataError(
            f"{dataset} reads metadata.jsonl, metadata.csv, captions.txt or "
            "Flickr8k.token.txt beside the "
            f"photographs; for {annotations} use --dataset coco or karpathy"
        )
    base = images or root
    assert base is not None  # open_source refuses a dataset without any folder
    files, disk = list_files(base), Listing(base)
    captions: dict[str, list[str]] = {name: [] for name in files.photographs}
    splits = {
        name: split
        for name in files.photographs
        if (split := _folder_split(posixpath.dirname(name), base))
    }

    caption_files, rows, notes = _metadata(base, files.others)
    given_splits = False
    for file, listed in _caption_lists(base, files.others, notes):
        caption_files.append(file)
        if split_of := _flickr8k_splits(file, base, disk):
            given_splits, listed = True, _with_splits(file, listed, split_of)
        rows += _placed(listed, base, disk, notes)
    first_file: dict[tuple[str, str], Path] = {}
    for row, there in zip(rows, on_disk([row.names for row in rows], disk), strict=True):
        name = there or row.names[0]
        known = captions.setdefault(name, [])
        known += [
            each
            for each in row.captions
            if first_file.setdefault((name, each), row.file) == row.file
        ]
        named = [row.split] if row.split else []
        named += filter(None, [_folder_split(posixpath.dirname(name), base)])
        for split in named:
            if splits.setdefault(name, split) != split:
                raise DataError(
                    f"{row.where}: {name} is in split {split} and in {splits[name]}; keep one "
                    "of them"
                )

    if given_splits and (unchosen := [name for name in captions if name not in splits]):
        notes.append(
            f"{_photographs(len(unchosen), 'is', 'are')} in none of Flickr_8k's files "
            "of splits and left out: "
            f"{_first(unchosen)}"
        )
        captions = {name: of_photo for name, of_photo in captions.items() if name in splits}
    if captions_from == "txt":
        captions = _sidecar_captions(base, files, disk, captions)
    elif captions and not any(captions.values()) and (beside := _sidecars(files, disk)):
        notes.append(
            f"{_photographs(len(beside), 'has a .txt beside it', 'have a .txt beside them')}; "
            "train and evaluate read "
            "their captions with --captions-from txt"
        )

    if not all(captions.values()) and (unread := _unread(base, files, caption_files)):
        what = "may hold captions and are" if len(unread) > 1 else "may hold captions and is"
        notes.append(
            f"{len(unread):,} file{'s' if len(unread) > 1 else ''} {what} not read: "
            f"{_first(unread)}; read are "
            "metadata.jsonl, metadata.csv, captions.txt and Flickr8k.token.txt"
        )

    left_out = files.left_out(captions)
    if not captions:
        raise DataError(
            f"{dataset} has no images in {base} ({left_out or 'no file that is one'}); check "
            "the path"
        )
    unsplit = next((name for name in sorted(captions) if name not in splits), None)
    if unsplit is not None and "train" in splits.values():
        raise DataError(
            f"{unsplit} in {base} is in no split, others are in train; move it "
            "into a split's folder, "
            "name its split in metadata, or delete it"
        )
    found = tuple(
        Image(image_id(name), name, base / name, splits.get(name, "train"), tuple(captions[name]))
        for name in sorted(captions)
    )
    missing = tuple(i for i in found if not files.photographs.get(i.name) and not i.path.is_file())
    annotations = caption_files[0] if len(caption_files) == 1 else None
    return Source(
        dataset, base, found, missing, annotations, tuple(filter(None, [left_out, *notes]))
    )


@functools.lru_cache(1 << 16)
def _folder_split(folder: str, base: Path) -> str | None:
    """The split that the names in a folder's path tell, as Hugging Face's imagefolder reads them;
    DataError for two.
    """
    found: dict[str, str] = {}
    for name in folder.split("/"):
        told = {SPLITS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in SPLITS}
        if len(told) == 1:  # "train-test" tells none
            found[told.pop()] = name
    if len(found) > 1:
        raise DataError(
            f"{base / folder} lies in folders of two splits, {' and '.join(found.values())}; "
            "rename one of them"
        )
    return next(iter(found), None)


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _is(name: str, file: str) -> bool:
    return posixpath.basename(name).lower() == file.lower()


def is_caption_list(name: str) -> bool:
    """Whether a file of this name is read as one of Kaggle's or Flickr8k's, whatever photographs
    are beside it.
    """
    return any(_is(name, each) for each in (KAGGLE, FLICKR8K, *FLICKR8K_SPLITS.values()))


def _photographs(count: int, *verbs: str) -> str:
    """The count with the noun, and the verb for one or that for several."""
    return f"{count:,} photograph{'' if count == 1 else 's'}" + (
        f" {verbs[count != 1]}" if verbs else ""
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def list_files(root: Path) -> Files:
    """The files below `root`. Links to folders are followed, each real folder once and real paths
    first, so a loop of links ends."""
    found: dict[str, bool] = {}
    others, seen, folders = [], set(), [""]
    links: list[str] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                name = f"{folder}/{entry.name}" if folder else entry.name
                link = entry.is_symlink()
                if os.path.isdir(entry.path) if link else entry.is_dir():
                    (links if link else folders).append(name)
                elif _suffix(name) in SUFFIXES:
                    found[check_name(name, str(root))] = (
                        os.path.isfile(entry.path) if link else entry.is_file()
                    )
                else:
                    others.append(name)
    return Files(found, sorted(others))


# ----------------------------------------------------------------------------------------- metadata


def _metadata(base: Path, others: Iterable[str]) -> tuple[list[Path], list[Row], list[str]]:
    """The metadata files of all folders, at most one in each, their rows, and notes."""
    names = [name for name in others if posixpath.basename(name) in METADATA]
    names.sort(key=lambda name: (name.count("/"), name))
    folders = Counter(map(posixpath.dirname, names))
    for twice in (folder for folder, count in folders.items() if count > 1):
        raise DataError(f"{base / twice} has metadata.jsonl and metadata.csv; keep one of them")
    rows, notes = [], []
    for name in names:
        folder = posixpath.dirname(name)
        columns: dict[str, None] = {}
        for where, row in _rows(base / name):
            columns |= dict.fromkeys(row)
            if "file_name" not in row:
                raise DataError(f"{where}: {_lacks('file_name', row)}")
            photo = check_name(row["file_name"], where)
            split = check_split(row["split"], where) if row.get("split") else None
            rows.append(
                Row(
                    base / name,
                    where,
                    (posixpath.join(folder, photo),),
                    tuple(_captions(row, where)),
                    split,
                )
            )
        if columns.keys() - {"file_name", "split"} and not columns.keys() & {*CAPTION_COLUMNS}:
            notes.append(
                f"{base / name} gives no captions: it "
                f"{_lacks('caption, captions or text', columns)}"
            )
    return [base / name for name in names], rows, notes


def _lacks(column: str, columns: Iterable[str]) -> str:
    return f"has no column {column}; its columns: {', '.join(columns) or 'none'}"


def _rows(file: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a metadata file, columns in small letters, each with "file, line N" for
    errors.
    """
    text = read_text(file)
    if not text.strip():
        raise DataError(f"{file} is empty; write its rows, or delete it")
    if file.suffix == ".csv":
        yield from _csv_rows(file, io.StringIO(text, newline=""), "file_name")
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(
                f'{file}, line {number}: not an object like {{"file_name": "a.jpg", "caption": '
                f'"..."}}'
            )
        columns: dict[str, object] = {}
        # one that is written so comes first
        for key in sorted(row, key=lambda key: key != key.strip().lower()):
            columns.setdefault(key.strip().lower(), row[key])
        yield f"{file}, line {number}", columns


def _header(line: str, separator: str) -> list[str]:
    return [column.strip().strip('"').strip().lower() for column in line.split(separator)]


def _refuse_separator(file: Path, header: str, *needed: str) -> None:
    """DataError where the first line has the columns that are needed, by another separator than a
    comma.
    """
    for sign in (";", "\t", "|"):
        if {*needed} <= {*_header(header, sign)}:
            name = "a tab" if sign == "\t" else repr(sign)
            raise DataError(
                f"{file}: its columns are separated by {name}, this reads commas; save it with "
                "commas"
            )


def _quoted(lines: Iterable[str]) -> Iterator[str]:
    """Lines of the CSV columns image and caption, with quotes around captions that have commas and
    no quotes: there all after the first comma is the caption."""
    inside = False  # a quoted caption of several lines
    for line in lines:
        name, _, caption = line.partition(",")
        if inside or name.startswith('"') or caption.startswith('"'):
            inside ^= line.count('"') % 2 == 1
        elif "," in caption:
            caption = caption.rstrip("\r\n").replace('"', '""')
            line = f'{name},"{caption}"\n'
        yield line


def _csv_rows(file: Path, lines: Iterable[str], needed: str) -> Iterator[tuple[str, dict]]:
    """The rows of CSV, columns in small letters; DataError where `needed` is not among them."""
    reader = csv.DictReader(lines, strict=True)
    try:
        columns = [(column or "").strip().lower() for column in reader.fieldnames or ()]
        if needed not in columns:
            _refuse_separator(file, ",".join(columns), needed)
            raise DataError(f"{file}: {_lacks(needed, columns)}")
        for column, count in Counter(columns).items():
            if column and count > 1:
                raise DataError(
                    f"{file} has column {column} {count} times; give each caption its own row"
                )
        reader.fieldnames = columns
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if None in row:
                raise DataError(
                    f"{where}: more cells than the header has; put a caption with commas in quotes"
                )
            yield where, row
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.reader.line_num}: not CSV: {error}") from error


def _captions(row: dict, where: str) -> list[str]:
    """The captions of a metadata row; an empty cell is none."""
    column = next((column for column in CAPTION_COLUMNS if row.get(column) not in (None, "")), None)
    value = row[column] if column else []
    if column == "captions" and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: {value[:60]!r} begins like a JSON list of captions, but is none"
            ) from error
    return [
        check_caption(caption, where) for caption in (value if isinstance(value, list) else [value])
    ]


# ------------------------------------------------------------------- captions.txt, Flickr8k's files


def _caption_lists(
    base: Path, others: Iterable[str], notes: list[str]
) -> Iterator[tuple[Path, list[Row]]]:
    """Each captions.txt and Flickr8k.token.txt, with its rows by the bare names that it has."""
    for name in others:
        if _is(name, KAGGLE):
            file = base / name
            text = read_text(file)
            first = text.partition("\n")[0]
            header = _header(first, ",")
            if not {"image", "caption"} <= {*header}:
                _refuse_separator(file, first, "image", "caption")
                notes.append(
                    f"{file} is not read: its first line is {first[:60]!r}, not image,caption"
                )
                continue
            listed = []
            lines = io.StringIO(text, newline="")
            for where, row in _csv_rows(
                file, _quoted(lines) if header == ["image", "caption"] else lines, "image"
            ):
                caption = check_caption(row["caption"] or "", where)
                listed.append(
                    Row(
                        file,
                        where,
                        (check_name(row["image"].strip(), where),),
                        (caption,) if caption else (),
                    )
                )
            yield file, listed
        elif _is(name, FLICKR8K):
            yield base / name, list(_token_rows(base / name))


def _token_rows(file: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            name, tab, caption = line.partition("\t")
            name, sign, _ = name.rpartition("#")
            if not (tab and sign):
                raise DataError(
                    f"{where}: {line[:60]!r} is not a name, #, a number, a tab and a caption"
                )
            yield Row(
                file,
                where,
                (check_name(name.strip(), where),),
                (check_caption(caption.strip(), where),),
            )


def _places(file: Path, base: Path, name: str) -> tuple[str, ...]:
    """Names below `base` that a photograph of a caption list may have."""
    folder = file.parent.relative_to(base).as_posix()
    folders = [folder] if folder == "." else [folder, posixpath.dirname(folder)]
    return tuple(
        posixpath.normpath(posixpath.join(each, place, name))
        for each in folders
        for place in PHOTO_FOLDERS
    )


def _placed(listed: list[Row], base: Path, disk: Listing, notes: list[str]) -> list[Row]:
    """The rows of one caption list by the photographs' names below `base`. Those of names that are
    neither there nor a photograph's, as one of Flickr8k's own is, are left out, which is noted."""
    if not listed:
        return []
    file = listed[0].file
    found = on_disk([_places(file, base, row.names[0]) for row in listed], disk)
    home = next((posixpath.dirname(name) for name in found if name), None)
    if home is None:
        folders = ", ".join(place or "the folder itself" for place in PHOTO_FOLDERS)
        mend = (
            ("unpack Flickr8k_Dataset.zip, which makes Flicker8k_Dataset/, into it")
            if _is(file.name, FLICKR8K)
            else ("put Images/ beside the file")
        )
        raise DataError(
            f"{file} names {_photographs(len({row.names for row in listed}))}, "
            f"none of which is in {base} "
            f"({folders}); {mend}"
        )
    rows, broken = [], []
    for row, name in zip(listed, found, strict=True):
        if name is None and _suffix(row.names[0]) not in (*SUFFIXES, *HEIC):
            broken.append(row.names[0])
        else:
            rows.append(row._replace(names=(name or posixpath.join(home, row.names[0]),)))
    if broken:
        notes.append(f"{len(broken):,} captions in {file} are left out, of what is no photograph: "
                     f"{_first(list(dict.fromkeys(broken)))}")  # fmt: skip
    return rows


def _flickr8k_splits(file: Path, base: Path, disk: Listing) -> dict[str, str]:
    """The split of each photograph by its bare name, where Flickr_8k.trainImages.txt, devImages or
    testImages stand beside Flickr8k.token.txt."""
    found: dict[str, str] = {}
    if not _is(file.name, FLICKR8K):
        return found
    for split, beside in FLICKR8K_SPLITS.items():
        there = disk.find((file.parent.relative_to(base) / beside).as_posix())
        if there is None:
            continue
        for name in read_text(base / there).split():
            if found.setdefault(check_name(name, str(base / there)), split) != split:
                raise DataError(
                    f"{base / there}: {name} is in {FLICKR8K_SPLITS[found[name]]} too; keep "
                    "one of them"
                )
    return found


def _with_splits(file: Path, listed: list[Row], splits: dict[str, str]) -> list[Row]:
    """The rows with the splits of their photographs, and a row for each photograph of a split that
    has none.
    """
    rows = [row._replace(split=splits.get(row.names[0])) for row in listed]
    bare = splits.keys() - {row.names[0] for row in listed}
    return rows + [Row(file, str(file), (name,), (), splits[name]) for name in sorted(bare)]


# ---------------------------------------------------------------------- captions beside photographs


def _unread(base: Path, files: Files, read: Sequence[Path]) -> list[str]:
    """Files that by their names may hold captions, besides those that were read."""
    stems = {loose(_stem(name)) for name in files.photographs}
    found = []
    for name in files.others:
        suffix, beside = _suffix(name), loose(_stem(name)) in stems
        by_name = (
            suffix == ".caption" if beside else suffix in (*CAPTION_SUFFIXES, ".tsv", ".token")
        )
        if by_name and base / name not in read:
            found.append(name)
    return found


def _sidecars(files: Files, disk: Listing) -> dict[str, str]:
    """The .txt of each photograph that has one of its name beside it."""
    if not any(_suffix(name) == ".txt" for name in files.others):
        return {}
    return {name: text for name in files.photographs if (text := disk.find(f"{_stem(name)}.txt"))}


def _sidecar_captions(
    base: Path, files: Files, disk: Listing, names: Iterable[str]
) -> dict[str, list[str]]:
    beside = _sidecars(files, disk)
    if not beside:
        raise DataError(
            f"--captions-from txt: no photograph in {base} has a .txt of its name beside it"
        )
    captions = {}
    for name in names:
        lines = read_text(base / beside[name]).split("\n") if name in beside else ()
        captions[name] = [
            check_caption(line.strip(), str(base / beside[name])) for line in lines if line.strip()
        ]
    return captions
