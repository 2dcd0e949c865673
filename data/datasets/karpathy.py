"""Read Karpathy's split files of COCO, Flickr8k and Flickr30k, and other files of this format.

    {"images": [{"filename", "filepath"?, "imgid", "cocoid"?, "split",
                 "sentences": [{"raw", "tokens"}]}]}

The root contains one such `dataset*.json`. A photograph is in root/filepath, root/images or root.
Karpathy's file of COCO has names of 2014 (val2014/COCO_val2014_000000391895.jpg). These photographs
may also be in any folder of COCO 2014 or 2017, because many images of val2014 are in train2017.
"""

import re
from pathlib import Path

from data import DataError
from data.remote import photograph_path
from data.sources import (
    Image,
    Listing,
    Source,
    check_caption,
    check_id,
    check_name,
    check_split,
    on_disk,
    read_json,
)

COCO_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12}\.jpg)")
COCO_PATHS = (
    "train2014/COCO_train2014_{}", "val2014/COCO_val2014_{}", "train2017/{}", "val2017/{}",
)  # fmt: skip


def read(dataset: str, root: Path | None, annotations: Path | None, images: Path | None) -> Source:
    """Read one split file. The split `restval` becomes train.

    annotations: the split file; None: the only `dataset*.json` in the root.
    images: the folder of the photographs; None: root.

    Raises DataError if the file is missing or invalid.
    """
    base, parent = images or root, root or images
    assert base is not None and parent is not None  # checked by open_source
    file = annotations or _only_file(parent)
    if file.is_dir():
        raise DataError(f"{file} is a folder; pass the file of {dataset} to --annotations")
    entries = read_json(file)["images"]
    wheres, candidates = [], []
    for number, entry in enumerate(entries):
        if "filename" not in entry:
            raise DataError(
                f"{file}: image number {number} has no filename; for a COCO caption file use "
                "--dataset coco"
            )
        wheres.append(f"{entry['filename']} in {file}")
        candidates.append(_possible_names(entry, wheres[-1]))
    names_on_disk = on_disk(candidates, Listing(base))
    all_images, missing = [], []
    for entry, where, names, name_on_disk in zip(
        entries, wheres, candidates, names_on_disk, strict=True
    ):
        name = name_on_disk or names[0]
        id_ = check_id(entry.get("cocoid", entry.get("imgid")), where)
        split = check_split(entry.get("split"), where)
        path = photograph_path(base, name)
        image = Image(id_, name, path, split, tuple(_captions(entry, where)))
        all_images.append(image)
        if name_on_disk is None:
            missing.append(image)
    return Source(dataset, base, tuple(all_images), tuple(missing), file)


def _only_file(root: Path) -> Path:
    files = sorted(root.glob("dataset*.json"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "no dataset*.json"
        raise DataError(f"{root} has {names}; pass the caption file to --annotations")
    return files[0]


def _possible_names(entry: dict, where: str) -> list[str]:
    """Return the names that the photograph may have under the root, the most probable first."""
    name = check_name(entry["filename"], where)
    names = [f"images/{name}", name]
    if entry.get("filepath"):
        names.insert(0, f"{check_name(entry['filepath'], where)}/{name}")
    if coco := COCO_NAME.fullmatch(name.rpartition("/")[2]):
        names += [pattern.format(coco[1]) for pattern in COCO_PATHS]
    return names


def _captions(entry: dict, where: str) -> list[str]:
    """Return the raw text of each sentence, or its tokens joined by spaces if it has no text."""
    captions = []
    try:
        for sentence in entry.get("sentences", ()):
            text = sentence["raw"] if "raw" in sentence else " ".join(sentence["tokens"])
            captions.append(check_caption(text, where))
    except (KeyError, TypeError) as error:
        raise DataError(
            f'{where}: "sentences" is not a list of objects with "raw" text or "tokens"'
        ) from error
    return captions
