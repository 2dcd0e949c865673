"""Captions to score and what to score them against, as files.

COCO results format: [{"image_id": 391895, "caption": "a man rides a motorcycle"}, ...], one caption
an image. References are a COCO captions file, or one by Karpathy, of which a split is taken. COCO's
evaluation server takes results of all of val2014 and of all of test2014, by the names that
`write_server` gives them.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data import DataError
from data.datasets.coco import read as read_coco
from data.datasets.karpathy import read as read_karpathy
from data.files import atomic_write, atomic_write_text
from data.sources import Image, check_caption, check_id, parse_json, read_text

SERVER_IMAGES = {"val": 40_504, "test": 40_775}  # of COCO 2014
SERVER_ZIP_BYTES = (
    100_000_000  # far above 81,279 captions, which are some 2 MB, and below what any server took
)


def read_results(file: Path) -> dict[int, str]:
    """The captions of a file in COCO results format, by image id, in its order."""
    entries = parse_json(file)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(
            f'{file} is not in COCO results format: a list of {{"image_id": 1, "caption": "a dog"}}'
        )
    if not entries:
        raise DataError(f"{file} holds no captions")
    captions: dict[int, str] = {}
    for number, entry in enumerate(entries):
        if "image_id" not in entry or "caption" not in entry:
            raise DataError(
                f"{file}: entry {number} has no image_id or no caption: {str(entry)[:80]}"
            )
        image_id = check_id(entry["image_id"], f"{file}, entry {number}")
        caption = check_caption(entry["caption"], f"{file}, image {image_id}")
        if image_id in captions:
            raise DataError(
                f"{file}: image {image_id} has two captions, {captions[image_id][:60]!r} and "
                f"{caption[:60]!r}"
            )
        captions[image_id] = caption
    return captions


def write_results(file: Path, captions: Mapping[int, str]) -> None:
    """Captions by image id in COCO results format, whole or not at all."""
    entries = [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()]
    atomic_write_text(file, json.dumps(entries, ensure_ascii=False))


def read_references(file: Path, split: str | None = None) -> list[Image]:
    """The images of a captions file with their captions; of a file that names splits, those of
    `split`.

    split: train (restval is part of it), val or test; None: test, else val. The photographs need
        not be there.
    """
    try:
        # no caption has it so: there its quotes are escaped
        karpathy = b'"sentences"' in file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file}: {error.strerror}; it should be a captions file, COCO's or Karpathy's"
        ) from error
    read = read_karpathy if karpathy else read_coco
    source = read("karpathy" if karpathy else "coco", file.parent, file, None)
    if split == "train":  # whole, without the tenth that pipeline.train keeps for dev
        return [image for image in source.images if image.split in ("train", "all")]
    return source.select(split or source.reported())


def read_ids(file: Path) -> list[int]:
    """Image ids, one a line or a JSON list, each once."""
    text = read_text(file).strip()
    try:
        found = json.loads(text) if text.startswith("[") else [int(line) for line in text.split()]
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is neither one image id a line nor a JSON list of them: {error}"
        ) from error
    if not found:
        raise DataError(f"{file} holds no image id")
    return list(dict.fromkeys(check_id(image_id, f"{file}") for image_id in found))


def choose(images: Sequence[Image], ids: Iterable[int], where: Path, ids_file: Path) -> list[Image]:
    """The images with these ids, in the order of the ids; DataError for an id that is not among
    them.
    """
    known = {image.id: image for image in images}
    chosen = []
    for image_id in ids:
        if image_id not in known:
            raise DataError(
                f"image {image_id} of {ids_file} is not in {where} ({len(known):,} images)"
            )
        chosen.append(known[image_id])
    return chosen


def write_server(
    folder: Path, name: str, captions: Mapping[int, str], images: Sequence[Image]
) -> list[Path]:
    """Write what COCO's caption server takes, after holding it against its rules; the paths of what
    was written.

    images: all of val2014 or of test2014, known by their file names. Every one has one caption, and
    nothing else has. The results are captions_{val,test}2014_NAME_results.json; once both are in
    `folder`, they are zipped as well.
    """
    if not re.fullmatch(r"[A-Za-z0-9.-]+", name):
        raise DataError(
            f"--server {name!r}: a name of letters, digits, dots and hyphens; it becomes part "
            "of file names"
        )
    split = server_split(images)
    missing = [image.id for image in images if image.id not in captions]
    if missing:
        raise DataError(
            f"the server wants a caption for each image of {split}2014; {len(missing):,} lack "
            f"one, as {missing[0]}"
        )
    extra = captions.keys() - {image.id for image in images}
    if extra:
        raise DataError(
            f"the server takes only images of {split}2014; {len(extra):,} are not among them, "
            f"as {min(extra)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    both = [folder / f"captions_{each}2014_{name}_results.json" for each in SERVER_IMAGES]
    written = both[list(SERVER_IMAGES).index(split)]
    write_results(written, captions)
    if not all(file.exists() for file in both):
        return [written]
    archive = folder / f"{name}_results.zip"
    with atomic_write(archive) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as opened:
            for file in both:
                opened.write(file, file.name)
        if (size := temporary.stat().st_size) > SERVER_ZIP_BYTES:
            raise DataError(
                f"{archive} would have {size:,} bytes, the server takes {SERVER_ZIP_BYTES:,}"
            )
    return [written, archive]


def server_split(images: Sequence[Image]) -> str:
    """Which split the images are all of, val or test; DataError where they are neither."""
    names = [re.match(r"COCO_(val|test)2014_", image.name.rpartition("/")[2]) for image in images]
    found = {match[1] if match else "" for match in names}
    split = found.pop() if len(found) == 1 else ""
    if not split or len(images) != SERVER_IMAGES[split]:
        raise DataError(
            f"the server takes all {SERVER_IMAGES['val']:,} images of val2014 or all "
            f"{SERVER_IMAGES['test']:,} of test2014; "
            f"these are {len(images):,}, as {images[0].name}. For test2014: its "
            "image_info_test2014.json"
        )
    return split
