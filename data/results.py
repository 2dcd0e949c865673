"""Files of generated texts and of reference captions.

Generated captions are in COCO results format: [{"image_id": 391895, "caption": "a man rides a
motorcycle"}, ...], one caption per image. Answers to questions are in VQA results format:
[{"question_id": 1, "answer": "yes"}, ...]. References are a COCO captions file or a split of a
Karpathy file. COCO's evaluation server accepts results of all images of val2014 and of test2014,
in the files that `write_server` writes.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data import DataError
from data.datasets.coco import read as read_coco
from data.datasets.karpathy import read as read_karpathy
from data.files import atomic_write, atomic_write_text
from data.sources import Image, check_caption, check_id, parse_json, read_text

SERVER_IMAGES = {"val": 40_504, "test": 40_775}  # of COCO 2014
# 81,279 captions have about 2 MB. This limit is below the limits of all servers so far.
SERVER_ZIP_BYTES = 100_000_000


class Fields(NamedTuple):
    """The names of the two fields of each entry of a results file."""

    id: str
    text: str


CAPTIONS = Fields("image_id", "caption")  # COCO results format
ANSWERS = Fields("question_id", "answer")  # VQA results format


def read_results(file: Path, names: Fields = CAPTIONS) -> dict[int, str]:
    """Return the texts of a results file by id, in the order of the file.

    Raises DataError if the file is invalid or has two texts for one id.
    """
    entries = parse_json(file)
    what = names.id.removesuffix("_id")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(
            f'{file} is not a results file: a list of {{"{names.id}": 1, "{names.text}": "a dog"}}'
        )
    if not entries:
        raise DataError(f"{file} contains no {names.text}s")
    texts: dict[int, str] = {}
    for number, entry in enumerate(entries):
        if names.id not in entry or names.text not in entry:
            raise DataError(
                f"{file}: entry {number} has no {names.id} or no {names.text}: {str(entry)[:80]}"
            )
        id_ = check_id(entry[names.id], f"{file}, entry {number}", what)
        text = check_caption(entry[names.text], f"{file}, {what} {id_}", names.text)
        if id_ in texts:
            raise DataError(
                f"{file}: {what} {id_} has two {names.text}s, {texts[id_][:60]!r} and {text[:60]!r}"
            )
        texts[id_] = text
    return texts


def read_ranks(file: Path) -> dict[tuple[int, int], list[int]]:
    """Return the ranks of the options of each round, by image id and number of the round (from 1).

    The format is that of VisDial's evaluation server: [{"image_id", "round_id", "ranks"}].

    Raises DataError if the file is invalid or has two lists of ranks for one round.
    """
    entries = parse_json(file)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(
            f'{file} is not a file of ranks: a list of {{"image_id": 1, "round_id": 1, "ranks": '
            "[3, 1, 2]}"
        )
    if not entries:
        raise DataError(f"{file} contains no ranks")
    ranks_by_round: dict[tuple[int, int], list[int]] = {}
    for number, entry in enumerate(entries):
        where = f"{file}, entry {number}"
        key = (
            check_id(entry.get("image_id"), where),
            check_id(entry.get("round_id"), where, "round"),
        )
        ranks = entry.get("ranks")
        if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks):
            raise DataError(f'{where}: "ranks" is not a list of whole numbers')
        if key in ranks_by_round:
            raise DataError(f"{file}: image {key[0]}, round {key[1]} has two lists of ranks")
        ranks_by_round[key] = ranks
    return ranks_by_round


def write_results(file: Path, texts: Mapping[int, str], names: Fields = CAPTIONS) -> None:
    """Write texts by id as a results file, atomically."""
    entries = [{names.id: id_, names.text: text} for id_, text in texts.items()]
    atomic_write_text(file, json.dumps(entries, ensure_ascii=False))


def read_references(file: Path, split: str | None = None) -> list[Image]:
    """Return the images of a captions file with their captions. The image files need not exist.

    split: the split of a file with splits: train (includes restval), val or test; None: test, else
        val.
    """
    try:
        # A caption cannot contain this text, because JSON escapes its quotes.
        karpathy = b'"sentences"' in file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file}: {error.strerror}; expected a captions file of COCO or Karpathy"
        ) from error
    read = read_karpathy if karpathy else read_coco
    source = read("karpathy" if karpathy else "coco", file.parent, file, None)
    if split == "train":  # all of it, including the images that pipeline.train uses as dev
        return [image for image in source.images if image.split in ("train", "all")]
    return source.select(split or source.reported())


def read_ids(file: Path) -> list[int]:
    """Return the image ids of a file, without repetitions: one id per line, or a JSON list."""
    text = read_text(file).strip()
    try:
        ids = json.loads(text) if text.startswith("[") else [int(line) for line in text.split()]
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is neither one image id per line nor a JSON list of image ids: {error}"
        ) from error
    if not ids:
        raise DataError(f"{file} contains no image ids")
    return list(dict.fromkeys(check_id(image_id, f"{file}") for image_id in ids))


def read_text_list(file: Path) -> list[str]:
    """Texts, a JSON list (or object whose keys or values they are, by number) or one per line.

    Raises DataError if the file is JSON (by its suffix or first character) but not such a list.
    """
    text = read_text(file)
    if file.suffix.lower() != ".json" and not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.splitlines() if line.strip()]
    content = parse_json(file)
    if isinstance(content, list) and len(content) == 2 and isinstance(content[0], dict):
        content = content[0]  # openvqa's answer_dict.json: [number by answer, answer by number]
    if isinstance(content, dict):
        by_number = all(isinstance(value, int) for value in content.values())
        numbers = content
        content = (
            sorted(numbers, key=lambda text: numbers[text]) if by_number else [*numbers.values()]
        )
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise DataError(f"{file} is neither a list of texts nor one text per line")
    return [check_caption(text, f"{file}", "text") for text in content]


def choose(images: Sequence[Image], ids: Iterable[int], where: Path, ids_file: Path) -> list[Image]:
    """Return the images with these ids, in the order of the ids.

    where, ids_file: the sources of the images and of the ids, for the message.

    Raises DataError if an id is not among the images.
    """
    by_id = {image.id: image for image in images}
    chosen = []
    for image_id in ids:
        if image_id not in by_id:
            raise DataError(
                f"image {image_id} of {ids_file} is not in {where} ({len(by_id):,} images)"
            )
        chosen.append(by_id[image_id])
    return chosen


def write_server(
    folder: Path, name: str, captions: Mapping[int, str], images: Sequence[Image]
) -> list[Path]:
    """Write the files that COCO's caption server accepts, and return their paths.

    name: the name of the algorithm, a part of the file names.
    captions: one caption for each of `images`, by id.
    images: all images of val2014 or of test2014. The file names identify the split.

    Writes captions_{val,test}2014_NAME_results.json. If both files are in `folder`, also writes a
    zip archive of them. Raises DataError if the captions violate the rules of the server.
    """
    check_server_name(name)
    split = server_split(images)
    missing = [image.id for image in images if image.id not in captions]
    if missing:
        raise DataError(
            f"the server requires a caption for each image of {split}2014; images without a "
            f"caption: {len(missing):,}, for example {missing[0]}"
        )
    extra = captions.keys() - {image.id for image in images}
    if extra:
        raise DataError(
            f"the server accepts only images of {split}2014; captions of other images: "
            f"{len(extra):,}, for example {min(extra)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    written, archive = server_files(folder, name, split)
    write_results(written, captions)
    files = [server_files(folder, name, each)[0] for each in SERVER_IMAGES]
    if not all(file.exists() for file in files):
        return [written]
    with atomic_write(archive) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as opened:
            for file in files:
                opened.write(file, file.name)
        if (size := temporary.stat().st_size) > SERVER_ZIP_BYTES:
            raise DataError(
                f"{archive} would have {size:,} bytes, the server accepts {SERVER_ZIP_BYTES:,}"
            )
    return [written, archive]


def server_files(folder: Path, name: str, split: str) -> tuple[Path, Path]:
    """Return the paths of the results file of a split (val or test), and of the zip archive."""
    return folder / f"captions_{split}2014_{name}_results.json", folder / f"{name}_results.zip"


def check_server_name(name: str) -> None:
    """Raise DataError unless a method name can be part of file names."""
    if not re.fullmatch(r"[A-Za-z0-9.-]+", name):
        raise DataError(
            f"--server {name!r}: pass a name of letters, digits, dots and hyphens; it becomes part "
            "of file names"
        )


def server_split(images: Sequence[Image]) -> str:
    """Return the split (val or test) of which these are all images.

    Raises DataError if they are not all images of val2014 or of test2014.
    """
    names = [re.match(r"COCO_(val|test)2014_", image.name.rpartition("/")[2]) for image in images]
    splits = {match[1] if match else "" for match in names}
    split = splits.pop() if len(splits) == 1 else ""
    if not split or len(images) != SERVER_IMAGES[split]:
        raise DataError(
            f"the server accepts all {SERVER_IMAGES['val']:,} images of val2014 or all "
            f"{SERVER_IMAGES['test']:,} of test2014; these are {len(images):,} images, for example "
            f"{images[0].name}. For test2014, pass image_info_test2014.json"
        )
    return split
