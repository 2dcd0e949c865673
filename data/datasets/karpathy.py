"""Karpathy's split files of COCO, Flickr8k and Flickr30k, and every other file in their form:

    {"images": [{"filename", "filepath"?, "imgid", "cocoid"?, "split", "sentences": [{"raw",
    "tokens"}]}]}

The root holds one such `dataset*.json`. A photograph is looked for in root/filepath, root/images
and root; a COCO one (the files name it as of 2014: val2014/COCO_val2014_000000391895.jpg) also in
COCO's folders of 2014 and 2017, where the other year may have put it on the other side: much of
2014's val is in train2017.
"""

import re
from pathlib import Path

from data import DataError
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
COCO_PLACES = (
    "train2014/COCO_train2014_{}", "val2014/COCO_val2014_{}", "train2017/{}", "val2017/{}",
)  # fmt: skip


def read(dataset: str, root: Path | None, annotations: Path | None, images: Path | None) -> Source:
    """Read the one `dataset*.json` of the root, or `annotations`. `restval` joins train."""
    base, above = images or root, root or images
    assert base is not None and above is not None  # open_source refuses that
    file = annotations or _only_file(above)
    if file.is_dir():
        raise DataError(f"{file} is a folder; --annotations names the file of {dataset}")
    entries = read_json(file)["images"]
    wheres, places = [], []
    for number, entry in enumerate(entries):
        if "filename" not in entry:
            raise DataError(f"{file}: image number {number} has no filename; "
                            "a COCO caption file is read with --dataset coco")  # fmt: skip
        wheres.append(f"{entry['filename']} in {file}")
        places.append(_places(entry, wheres[-1]))
    found, missing = [], []
    for entry, where, names, there in zip(
        entries, wheres, places, on_disk(places, Listing(base)), strict=True
    ):
        name = there or names[0]
        id_ = check_id(entry.get("cocoid", entry.get("imgid")), where)
        split = check_split(entry.get("split"), where)
        image = Image(id_, name, base / name, split, tuple(_captions(entry, where)))
        found.append(image)
        if there is None:
            missing.append(image)
    return Source(dataset, base, tuple(found), tuple(missing), file)


def _only_file(root: Path) -> Path:
    files = sorted(root.glob("dataset*.json"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "no dataset*.json"
        raise DataError(f"{root} has {names}; name the caption file with --annotations")
    return files[0]


def _places(entry: dict, where: str) -> list[str]:
    """Names that the photograph may have under the root, likeliest first; the first is its name
    where it is absent.
    """
    name = check_name(entry["filename"], where)
    places = [f"images/{name}", name]
    if entry.get("filepath"):
        places.insert(0, f"{check_name(entry['filepath'], where)}/{name}")
    if coco := COCO_NAME.fullmatch(name.rpartition("/")[2]):
        places += [place.format(coco[1]) for place in COCO_PLACES]
    return places


def _captions(entry: dict, where: str) -> list[str]:
    """Each sentence as written, or its tokens joined by spaces where the file carries only
    these.
    """
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
