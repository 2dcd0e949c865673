"""Any folder of photographs, at any depth, in the form of Hugging Face's imagefolder.

    root/**/*.jpg                       hidden files and folders are left out; order is that of the relative path
    root/train/ validation/ test/       splits, where top-level folders are called so (val and dev mean validation)
    root/metadata.jsonl or .csv         captions, and splits in a column; also in the split folders, for their files

A metadata row has `file_name` (relative to the metadata's folder) and, as it likes, `split` and one of `caption`,
`captions`, `text`: a string, in JSON also a list of strings. Several rows may name one file; a CSV cell under
`captions` may hold a JSON list. Without splits everything is train. Where only some photographs have a split, the
others are train as long as nothing is called train; beside photographs called train that is a DataError.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from data import DataError
from data.sources import SPLITS, Image, Source, check_caption, check_name, check_split, image_id, read_text

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
CAPTION_COLUMNS = ("caption", "captions", "text")


def read(dataset: str, root: Path | None, annotations: Path | None, images: Path | None) -> Source:
    """Read a folder. An image's id is `image_id` of its relative path; a row without its file is in `missing`."""
    if annotations is not None:
        raise DataError(f"{dataset} reads metadata.jsonl or metadata.csv beside the photographs; "
                        f"for {annotations} use --dataset coco or karpathy")  # fmt: skip
    base = images or root
    names = photographs_under(base)
    captions: dict[str, list[str]] = {name: [] for name in names}
    splits = {name: SPLITS[top] for name in names if (top := _top_folder(name)) in SPLITS}
    metadata = list(_metadata_files(base))
    for file in metadata:
        folder = file.parent.relative_to(base).as_posix()
        for where, row in _rows(file):
            name = check_name(row.get("file_name"), where)
            name = name if folder == "." else f"{folder}/{name}"
            captions.setdefault(name, []).extend(_captions(row, where))
            named = [check_split(row["split"], where)] if row.get("split") else []
            named += [SPLITS[_top_folder(name)]] if _top_folder(name) in SPLITS else []
            for split in named:
                if splits.setdefault(name, split) != split:
                    raise DataError(f"{where}: {name} is in split {split} and in {splits[name]}; keep one of them")
    loose = next((name for name in sorted(captions) if name not in splits), None)
    if loose is not None and "train" in splits.values():
        raise DataError(f"{loose} in {base} is in no split, others are in train; move it into a split's folder, "
                        "name its split in metadata, or take it away")  # fmt: skip
    found = tuple(
        Image(image_id(name), name, base / name, splits.get(name, "train"), tuple(captions[name]))
        for name in sorted(captions)
    )
    missing = tuple(i for i in found if not names.get(i.name) and not i.path.is_file())
    return Source(dataset, base, found, missing, metadata[0] if len(metadata) == 1 else None)


def _top_folder(name: str) -> str:
    return name.partition("/")[0].lower() if "/" in name else ""


def photographs_under(root: Path) -> dict[str, bool]:
    """Names of the image files below `root`, and whether each is a file (a link may lead nowhere).

    Links to folders are followed, each real folder once and real paths first, so a loop of links ends.
    """
    found, seen, folders, links = {}, set(), [""], []
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
                elif entry.name.lower().endswith(SUFFIXES):
                    found[check_name(name, str(root))] = os.path.isfile(entry.path) if link else entry.is_file()
    return found


def _metadata_files(root: Path) -> Iterator[Path]:
    """The metadata files of the root and of its split folders, at most one in each."""
    tops = sorted(entry for entry in root.iterdir() if entry.name.lower() in SPLITS and entry.is_dir())
    for folder in (root, *tops):
        files = [folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()]
        if len(files) > 1:
            raise DataError(f"{folder} has metadata.jsonl and metadata.csv; keep one of them")
        yield from files


def _rows(file: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a metadata file, each with "file, line N" for errors."""
    text = read_text(file)
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if None in row:
                    raise DataError(f"{where}: more cells than the header has; put a caption with commas in quotes")
                yield where, row
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.reader.line_num}: not CSV: {error}") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f'{file}, line {number}: not an object like {{"file_name": "a.jpg", "caption": "..."}}')
        yield f"{file}, line {number}", row


def _captions(row: dict, where: str) -> list[str]:
    """The captions of a metadata row; an empty cell is none."""
    column = next((column for column in CAPTION_COLUMNS if row.get(column) not in (None, "")), None)
    value = row[column] if column else []
    if column == "captions" and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: {value[:60]!r} begins like a JSON list of captions, but is none") from error
    return [check_caption(caption, where) for caption in (value if isinstance(value, list) else [value])]
