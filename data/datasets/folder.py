"""Read any folder of photographs: Hugging Face's imagefolder, or caption files of other formats.

    root/**/*.jpg                       every suffix that Pillow reads; without hidden files and
                                        folders; sorted by relative path
    **/train/ validation/ test-2017/    splits: the name of a folder at any depth contains a name of
                                        `data.sources.SPLITS`, separated by spaces, digits, dots,
                                        dashes or underscores
    **/metadata.jsonl or .csv           captions, and a column of splits; file names are relative to
                                        the folder of this file
    **/captions.txt                     Kaggle's format: CSV with the columns image and caption
    **/Flickr8k.token.txt               Flickr8k's format: lines `name.jpg#0<TAB>caption`. The files
                                        Flickr_8k.trainImages.txt, devImages and testImages in the
                                        same folder, if any, define the splits and the photographs
    **/*.txt                            with --captions-from txt: the captions of the photograph
                                        with the same name, one per line

A metadata row has `file_name` and optionally `split` and one of `caption`, `captions` and `text`: a
string, or in JSON also a list of strings. Several rows may have the same file name. A CSV cell of
`captions` may contain a JSON list. For visual question answering, a row has `question` and `answer`
or `answers` (a list). For classification, it has `label` and may have `text`. The id of a question
or of a labelled text is its number from 1.

The photographs of captions.txt and Flickr8k.token.txt are in the folder of the file or in its
parent, or in one of PHOTO_FOLDERS there. If two files contain the same caption for a photograph,
the caption counts once.

Without splits, all photographs are train. If only some photographs have a split, the others are
train; this is a DataError if some photographs are explicitly train.
"""

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
from data.datasets.mvsa import LabelledText
from data.datasets.vqa import Question, QuestionSource
from data.image_formats import HEIC, SUFFIXES
from data.remote import files_below, is_remote, photograph_path
from data.sources import (
    SPLITS,
    Image,
    Listing,
    check_caption,
    check_name,
    check_split,
    csv_rows,
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
# "Flicker" is the official spelling
PHOTO_FOLDERS = ("", "Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset")
CAPTION_SUFFIXES = (".json", ".jsonl", ".csv")  # not reported as ignored files
SIDECAR_SUFFIXES = (".txt", ".json", ".caption")


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
    encoding: str = field(
        default="utf-8",
        metadata={"help": "encoding of metadata.jsonl and metadata.csv, such as gb18030"},
    )


class Files(NamedTuple):
    """The files below a folder by relative name, without hidden files.

    photographs: by name, whether it is a file; False for a broken link.
    others: the names of all other files.
    """

    photographs: dict[str, bool]
    others: list[str]

    def left_out(self, named: Iterable[str] = ()) -> str:
        """Return a message with the number of ignored files by suffix; empty if there are none.

        Ignored files are neither photographs, nor caption files, nor in `named`.
        """
        stems, named = {loose(_stem(name)) for name in self.photographs}, {*named}
        # Flickr8k's folder contains other text files too.
        flickr8k = {posixpath.dirname(name) for name in self.others if _is(name, FLICKR8K)}
        counts: Counter[str] = Counter()
        for name in self.others:
            suffix = _suffix(name)
            is_captions = suffix in CAPTION_SUFFIXES or _is(name, KAGGLE)
            is_sidecar = suffix in SIDECAR_SUFFIXES and loose(_stem(name)) in stems
            in_flickr8k = suffix == ".txt" and posixpath.dirname(name) in flickr8k
            if not (name in named or is_captions or is_sidecar or in_flickr8k):
                counts[suffix or "without suffix"] += 1
        if not counts:
            return ""
        total, heic = sum(counts.values()), [suffix for suffix in HEIC if suffix in counts]
        by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        suffixes = ", ".join(f"{suffix} {count:,}" for suffix, count in by_count)
        hint = f"; to read {', '.join(heic)}: pip install -e '.[heic]'" if heic else ""
        return f"{total:,} file{'' if total == 1 else 's'} ignored: {suffixes}{hint}"


class Row(NamedTuple):
    """A row of a caption file.

    where: the file and line, for error messages.
    names: the names that the photograph may have, the most probable first.
    """

    file: Path
    where: str
    names: tuple[str, ...]
    captions: tuple[str, ...]
    split: str | None = None
    question: str | None = None
    answers: tuple[str, ...] = ()
    text: str = ""
    label: str | None = None


@dataclass(frozen=True)
class FolderSource(QuestionSource):
    """The photographs of a folder, which may have captions, questions and labelled texts."""

    texts: tuple[LabelledText, ...] = field(default=(), repr=False)


def read(
    dataset: str,
    root: Path | None,
    annotations: Path | None,
    images: Path | None,
    captions_from: str = "auto",
    encoding: str = "utf-8",
) -> FolderSource:
    """Read a folder. The id of an image is `image_id` of its relative path.

    captions_from: "auto" finds caption files by name; "txt" reads the .txt file of each photograph.
    encoding: encoding of metadata.jsonl and metadata.csv.

    Raises DataError if a caption file is invalid, if the splits contradict each other, or if there
    are no photographs.
    """
    if annotations is not None:
        raise DataError(
            f"{dataset} reads metadata.jsonl, metadata.csv, captions.txt or Flickr8k.token.txt "
            f"in the folder of the photographs; for {annotations} use --dataset coco or karpathy"
        )
    base = images or root
    assert base is not None  # open_source refuses a dataset without any folder
    files, disk = list_files(base), Listing(base)
    captions: dict[str, list[str]] = {name: [] for name in files.photographs}
    splits = {
        name: split
        for name in files.photographs
        if (split := folder_split(posixpath.dirname(name), base))
    }

    caption_files, rows, notes = _metadata(base, files.others, encoding)
    has_split_lists = False
    for file, listed in _caption_lists(base, files.others, notes):
        caption_files.append(file)
        if split_of := _flickr8k_splits(file, base, disk):
            has_split_lists, listed = True, _with_splits(file, listed, split_of)
        rows += _resolve_names(listed, base, disk, notes)
    questions, texts = _add_rows(rows, captions, splits, base, disk)

    if has_split_lists and (unsplit := [name for name in captions if name not in splits]):
        notes.append(
            f"{_photographs(len(unsplit), 'is', 'are')} in none of Flickr_8k's split files and "
            f"ignored: {_first(unsplit)}"
        )
        captions = {name: texts for name, texts in captions.items() if name in splits}
    if captions_from == "txt":
        captions = _sidecar_captions(base, files, disk, captions)
    elif captions and not any(captions.values()) and (sidecars := _sidecars(files, disk)):
        verbs = "has a .txt file of its name", "have a .txt file of their name"
        notes.append(
            f"{_photographs(len(sidecars), *verbs)}; train and evaluate read these captions with "
            "--captions-from txt"
        )
    if not all(captions.values()) and (unread := _unread(base, files, caption_files)):
        subject, verb = ("files", "are") if len(unread) > 1 else ("file", "is")
        notes.append(
            f"{len(unread):,} {subject} may contain captions but {verb} not read: "
            f"{_first(unread)}; captions are read from metadata.jsonl, metadata.csv, captions.txt "
            "and Flickr8k.token.txt"
        )

    ignored = files.left_out(captions)
    if not captions:
        raise DataError(
            f"{dataset} has no images in {base} ({ignored or 'the folder has no files'}); check "
            "the path"
        )
    unsplit_name = next((name for name in sorted(captions) if name not in splits), None)
    if unsplit_name is not None and "train" in splits.values():
        raise DataError(
            f"{unsplit_name} in {base} is in no split, others are in train; move it into a "
            "split's folder, add its split to the metadata, or delete it"
        )
    photographs = tuple(
        Image(
            image_id(name),
            name,
            photograph_path(base, name),
            splits.get(name, "train"),
            tuple(captions[name]),
        )
        for name in sorted(captions)
    )
    missing = tuple(
        image
        for image in photographs
        if not files.photographs.get(image.name) and (is_remote(base) or not image.path.is_file())
    )
    annotations = caption_files[0] if len(caption_files) == 1 else None
    all_notes = tuple(filter(None, [ignored, *notes]))
    return FolderSource(
        dataset,
        base,
        photographs,
        missing,
        annotations,
        all_notes,
        tuple(questions),
        texts=tuple(texts),
    )


def _add_rows(
    rows: Sequence[Row],
    captions: dict[str, list[str]],
    splits: dict[str, str],
    base: Path,
    disk: Listing,
) -> tuple[list[Question], list[LabelledText]]:
    """Add the rows to `captions` and `splits` by name. Return their questions and labelled texts.

    Raises DataError for two splits.
    """
    questions: list[Question] = []
    texts: list[LabelledText] = []
    first_file: dict[tuple[str, str], Path] = {}  # by name and caption: the first file with it
    names_on_disk = on_disk([row.names for row in rows], disk)
    for row, name_on_disk in zip(rows, names_on_disk, strict=True):
        name = name_on_disk or row.names[0]
        captions.setdefault(name, []).extend(
            caption
            for caption in row.captions
            if first_file.setdefault((name, caption), row.file) == row.file
        )
        if row.question is not None:
            best = max(row.answers, key=row.answers.count, default="")
            id_ = len(questions) + 1
            questions.append(Question(id_, image_id(name), row.question, row.answers, best))
        if row.label is not None:
            texts.append(LabelledText(len(texts) + 1, image_id(name), row.text, row.label))
        for split in (row.split, folder_split(posixpath.dirname(name), base)):
            if split and splits.setdefault(name, split) != split:
                raise DataError(
                    f"{row.where}: {name} is in split {split} and in {splits[name]}; keep one "
                    "of them"
                )
    return questions, texts


@functools.lru_cache(1 << 16)
def folder_split(folder: str, base: Path) -> str | None:
    """Return the split that a folder's path names, as in Hugging Face's imagefolder.

    Raises DataError if the path names two splits.
    """
    folders: dict[str, str] = {}  # by split
    for name in folder.split("/"):
        splits = {SPLITS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in SPLITS}
        if len(splits) == 1:  # a name such as "train-test" is ambiguous and ignored
            folders[splits.pop()] = name
    if len(folders) > 1:
        raise DataError(
            f"{base / folder} is in folders of two splits, {' and '.join(folders.values())}; "
            "rename one of them"
        )
    return next(iter(folders), None)


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _is(name: str, file: str) -> bool:
    return posixpath.basename(name).lower() == file.lower()


def is_caption_list(name: str) -> bool:
    """Return whether a file is read as a caption list or split list of Kaggle or Flickr8k."""
    return any(_is(name, other) for other in (KAGGLE, FLICKR8K, *FLICKR8K_SPLITS.values()))


def _photographs(count: int, *verbs: str) -> str:
    """Return the count with its noun and, if given, the singular or the plural verb."""
    return f"{count:,} photograph{'' if count == 1 else 's'}" + (
        f" {verbs[count != 1]}" if verbs else ""
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def list_files(root: Path) -> Files:
    """Return the files below `root`, and follow links to folders.

    Each folder is visited once, and real paths come before links, so that cyclic links end.
    """
    if is_remote(root):
        return _remote_files(root)
    photographs: dict[str, bool] = {}
    others, visited, folders = [], set(), [""]
    links: list[str] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                name = f"{folder}/{entry.name}" if folder else entry.name
                link = entry.is_symlink()
                if os.path.isdir(entry.path) if link else entry.is_dir():
                    (links if link else folders).append(name)
                elif _suffix(name) in SUFFIXES:
                    photographs[check_name(name, str(root))] = (
                        os.path.isfile(entry.path) if link else entry.is_file()
                    )
                else:
                    others.append(name)
    return Files(photographs, sorted(others))


def _remote_files(root: Path) -> Files:
    names = [name for name in files_below(root) if not re.search(r"(^|/)\.", name)]
    is_photograph = {name: _suffix(name) in SUFFIXES for name in names}
    photographs = {check_name(name, str(root)): True for name in names if is_photograph[name]}
    return Files(photographs, sorted(name for name in names if not is_photograph[name]))


# ----------------------------------------------------------------------------------------- metadata


def _metadata(
    base: Path, others: Iterable[str], encoding: str
) -> tuple[list[Path], list[Row], list[str]]:
    """Return the metadata files (at most one per folder), their rows, and notes for the user."""
    names = [name for name in others if posixpath.basename(name) in METADATA]
    names.sort(key=lambda name: (name.count("/"), name))
    folders = Counter(map(posixpath.dirname, names))
    for folder, count in folders.items():
        if count > 1:
            raise DataError(
                f"{base / folder} has metadata.jsonl and metadata.csv; keep one of them"
            )
    rows, notes = [], []
    for name in names:
        folder = posixpath.dirname(name)
        columns: dict[str, None] = {}
        for where, row in _rows(base / name, encoding):
            columns |= dict.fromkeys(row)
            if "file_name" not in row:
                raise DataError(f"{where}: {_no_column('file_name', row)}")
            name_in_folder = check_name(row["file_name"], where)
            split = check_split(row["split"], where) if row.get("split") else None
            path = posixpath.join(folder, name_in_folder)
            captions = tuple(_captions(row, where))
            parts = *_question(row, where), *_label(row, where)
            rows.append(Row(base / name, where, (path,), captions, split, *parts))
        expected = {*CAPTION_COLUMNS, "question", "label"}
        if columns.keys() - {"file_name", "split"} and not columns.keys() & expected:
            notes.append(
                f"{base / name} contains no captions: it "
                f"{_no_column('caption, captions or text', columns)}"
            )
    return [base / name for name in names], rows, notes


def _no_column(column: str, columns: Iterable[str]) -> str:
    return f"has no column {column}; its columns: {', '.join(columns) or 'none'}"


def _rows(file: Path, encoding: str) -> Iterator[tuple[str, dict]]:
    """Yield "file, line N" and the row by lower-case column, for each row of a metadata file."""
    text = read_text(file, encoding)
    if not text.strip():
        raise DataError(f"{file} is empty; add rows, or delete it")
    if file.suffix == ".csv":
        lines = io.StringIO(text, newline="")
        yield from csv_rows(file, lines, functools.partial(_check_column, file, "file_name"))
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
        # A lower-case key has priority over the same key in another case.
        for key in sorted(row, key=lambda key: key != key.strip().lower()):
            columns.setdefault(key.strip().lower(), row[key])
        yield f"{file}, line {number}", columns


def _header(line: str, separator: str) -> list[str]:
    return [column.strip().strip('"').strip().lower() for column in line.split(separator)]


def _refuse_separator(file: Path, header: str, *needed: str) -> None:
    """Raise DataError if the header has the needed columns, but not separated by commas."""
    for separator in (";", "\t", "|"):
        if {*needed} <= {*_header(header, separator)}:
            name = "a tab" if separator == "\t" else repr(separator)
            raise DataError(f"{file}: its columns are separated by {name}; save it with commas")


def _quoted(lines: Iterable[str]) -> Iterator[str]:
    """Quote captions with commas in CSV lines of the two columns image and caption.

    The caption is everything after the first comma.
    """
    inside = False  # a quoted caption that spans several lines
    for line in lines:
        name, _, caption = line.partition(",")
        if inside or name.startswith('"') or caption.startswith('"'):
            inside ^= line.count('"') % 2 == 1
        elif "," in caption:
            caption = caption.rstrip("\r\n").replace('"', '""')
            line = f'{name},"{caption}"\n'
        yield line


def _check_column(file: Path, needed: str, columns: Sequence[str]) -> None:
    if needed not in columns:
        _refuse_separator(file, ",".join(columns), needed)
        raise DataError(f"{file}: {_no_column(needed, columns)}")


def _captions(row: dict, where: str) -> list[str]:
    """Return the captions of a metadata row. An empty cell is no caption."""
    column = next((column for column in CAPTION_COLUMNS if row.get(column) not in (None, "")), None)
    return [check_caption(caption, where) for caption in _cell(row, column, where)]


def _cell(row: dict, column: str | None, where: str) -> list:
    """Return the values of a cell. A text in a column with a plural name may be a JSON list."""
    value = row[column] if column else []
    is_plural = column in ("captions", "answers")
    if is_plural and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: {value[:60]!r} begins like a JSON list, but is not valid JSON"
            ) from error
    return value if isinstance(value, list) else [value]


def _question(row: dict, where: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the question of a metadata row and its answers; None if it has no question."""
    if row.get("question") in (None, ""):
        return None, ()
    question = check_caption(row["question"], where, "question")
    column = next((column for column in ("answers", "answer") if column in row), None)
    answers = [check_caption(answer, where, "answer") for answer in _cell(row, column, where)]
    if column and not all(answer.strip() for answer in answers or [""]):
        raise DataError(f"{where}: the question {question[:60]!r} has no answer")
    return question, tuple(answers)


def _label(row: dict, where: str) -> tuple[str, str | None]:
    """Return the text and the label of a metadata row; None if it has no label."""
    label = row.get("label")
    if label is None or (isinstance(label, str) and not label.strip()):
        return "", None
    if type(label) not in (str, int):
        raise DataError(f"{where}: the label is {label!r}, not a text or a whole number")
    texts = _captions(row, where)
    if len(texts) > 1:
        raise DataError(f"{where}: {len(texts)} texts have one label; write one text per row")
    return texts[0] if texts else "", check_caption(str(label), where, "label").strip()


# ------------------------------------------------------------------- captions.txt, Flickr8k's files


def _caption_lists(
    base: Path, others: Iterable[str], notes: list[str]
) -> Iterator[tuple[Path, list[Row]]]:
    """Yield each captions.txt and Flickr8k.token.txt with its rows, which have the file's names."""
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
            quoted = _quoted(lines) if header == ["image", "caption"] else lines
            check = functools.partial(_check_column, file, "image")
            for where, row in csv_rows(file, quoted, check):
                caption = check_caption(row["caption"] or "", where)
                names = (check_name(row["image"].strip(), where),)
                listed.append(Row(file, where, names, (caption,) if caption else ()))
            yield file, listed
        elif _is(name, FLICKR8K):
            yield base / name, list(_token_rows(base / name))


def _token_rows(file: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            name, tab, caption = line.partition("\t")
            name, number_sign, _ = name.rpartition("#")
            if not (tab and number_sign):
                raise DataError(
                    f"{where}: {line[:60]!r} is not a name, #, a number, a tab and a caption"
                )
            names = (check_name(name.strip(), where),)
            yield Row(file, where, names, (check_caption(caption.strip(), where),))


def _possible_names(file: Path, base: Path, name: str) -> tuple[str, ...]:
    """Return the names below `base` that a photograph of a caption list may have."""
    folder = file.parent.relative_to(base).as_posix()
    parents = [folder] if folder == "." else [folder, posixpath.dirname(folder)]
    return tuple(
        posixpath.normpath(posixpath.join(parent, photo_folder, name))
        for parent in parents
        for photo_folder in PHOTO_FOLDERS
    )


def _resolve_names(listed: list[Row], base: Path, disk: Listing, notes: list[str]) -> list[Row]:
    """Return the rows of a caption list with the photographs' names below `base`.

    Rows are omitted, with a note, if the name is neither on disk nor the name of a photograph.
    Flickr8k contains one such name.
    """
    if not listed:
        return []
    file = listed[0].file
    names = on_disk([_possible_names(file, base, row.names[0]) for row in listed], disk)
    photo_folder = next((posixpath.dirname(name) for name in names if name), None)
    if photo_folder is None:
        folders = ", ".join(folder or "the folder itself" for folder in PHOTO_FOLDERS)
        fix = (
            "unpack Flickr8k_Dataset.zip there, which creates Flicker8k_Dataset/"
            if _is(file.name, FLICKR8K)
            else "put the folder Images/ into the folder of this file"
        )
        raise DataError(
            f"{file} names {_photographs(len({row.names for row in listed}))}, "
            f"none of which is in {base} ({folders}); {fix}"
        )
    rows, invalid = [], []
    for row, name in zip(listed, names, strict=True):
        if name is None and _suffix(row.names[0]) not in (*SUFFIXES, *HEIC):
            invalid.append(row.names[0])
        else:
            rows.append(row._replace(names=(name or posixpath.join(photo_folder, row.names[0]),)))
    if invalid:
        notes.append(
            f"{len(invalid):,} captions in {file} are ignored, because these are not names of "
            f"photographs: {_first(list(dict.fromkeys(invalid)))}"
        )
    return rows


def _flickr8k_splits(file: Path, base: Path, disk: Listing) -> dict[str, str]:
    """Return the splits by file name, from the split files in the folder of Flickr8k.token.txt."""
    splits: dict[str, str] = {}
    if not _is(file.name, FLICKR8K):
        return splits
    for split, split_file in FLICKR8K_SPLITS.items():
        path = disk.find((file.parent.relative_to(base) / split_file).as_posix())
        if path is None:
            continue
        for name in read_text(base / path).split():
            if splits.setdefault(check_name(name, str(base / path)), split) != split:
                raise DataError(
                    f"{base / path}: {name} is also in {FLICKR8K_SPLITS[splits[name]]}; keep "
                    "one of them"
                )
    return splits


def _with_splits(file: Path, listed: list[Row], splits: dict[str, str]) -> list[Row]:
    """Return the rows with their splits, and a row for each photograph of a split without a row."""
    rows = [row._replace(split=splits.get(row.names[0])) for row in listed]
    uncaptioned = splits.keys() - {row.names[0] for row in listed}
    return rows + [Row(file, str(file), (name,), (), splits[name]) for name in sorted(uncaptioned)]


# ---------------------------------------------------------------- one caption file per photograph


def _unread(base: Path, files: Files, caption_files: Sequence[Path]) -> list[str]:
    """Return the files that were not read but may contain captions, judged by their names."""
    stems = {loose(_stem(name)) for name in files.photographs}
    unread = []
    for name in files.others:
        suffix, has_photograph = _suffix(name), loose(_stem(name)) in stems
        by_name = (
            suffix == ".caption"
            if has_photograph
            else suffix in (*CAPTION_SUFFIXES, ".tsv", ".token")
        )
        if by_name and base / name not in caption_files:
            unread.append(name)
    return unread


def _sidecars(files: Files, disk: Listing) -> dict[str, str]:
    """Return the .txt file with the same name of each photograph that has one."""
    if not any(_suffix(name) == ".txt" for name in files.others):
        return {}
    return {name: text for name in files.photographs if (text := disk.find(f"{_stem(name)}.txt"))}


def _sidecar_captions(
    base: Path, files: Files, disk: Listing, names: Iterable[str]
) -> dict[str, list[str]]:
    sidecars = _sidecars(files, disk)
    if not sidecars:
        raise DataError(
            f"--captions-from txt: no photograph in {base} has a .txt file of the same name"
        )
    captions: dict[str, list[str]] = {name: [] for name in names}
    for name in captions:
        if name in sidecars:
            file = base / sidecars[name]
            lines = map(str.strip, read_text(file).split("\n"))
            captions[name] = [check_caption(line, str(file)) for line in lines if line]
    return captions
