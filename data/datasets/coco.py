"""COCO caption files: {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id",
"caption"}]}.

The official layout, read as `coco2014` and `coco2017`, the year in every name; either split may be
absent:

    root/annotations/captions_train2017.json, captions_val2017.json
    root/train2017/000000000009.jpg, root/val2017/000000000139.jpg     (2014:
                                                                       train2014/COCO_train2014_000000000009.jpg)

`coco` is any other file of that form, with the folder its file names are relative to. An image may
carry a `split`. An annotation needs no `id` of its own.
"""

import contextlib
import io
from dataclasses import replace
from pathlib import Path

from pycocotools.coco import COCO

from data import DataError
from data.sources import (
    Image,
    Listing,
    Source,
    check_caption,
    check_entries,
    check_id,
    check_name,
    check_split,
    on_disk,
    read_json,
)


def read_official(
    dataset: str, root: Path | None, annotations: Path | None, images: Path | None
) -> Source:
    """Read COCO as it is downloaded; `dataset` ends in the year.

    `annotations` is the folder of the two files.
    """
    year, base, above = dataset[-4:], images or root, root or images
    assert base is not None and above is not None  # open_source refuses that
    folder = annotations or above / "annotations"
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; {dataset} reads two files in it (for one file: "
            "--dataset coco)"
        )
    files = {split: folder / f"captions_{split}{year}.json" for split in ("train", "val")}
    files = {split: file for split, file in files.items() if file.exists()}
    if not files:
        raise DataError(
            f"{folder} has neither captions_train{year}.json nor captions_val{year}.json; "
            f"unpack COCO's annotations_trainval{year}.zip into {folder.parent}"
        )
    found = [
        Image(id_, f"{split}{year}/{name}", base / f"{split}{year}" / name, split, captions)
        for split, file in files.items()
        for id_, name, _, captions in _entries(file)
    ]
    return _source(dataset, base, found, folder)


def read(dataset: str, root: Path | None, annotations: Path | None, images: Path | None) -> Source:
    """Read one COCO caption file over one folder of photographs."""
    if annotations is None or annotations.is_dir():
        raise DataError(
            f"{dataset} needs its caption file: pass --annotations FILE (and --images DIR)"
        )
    base = images or root
    assert base is not None  # open_source refuses a dataset without any folder
    found, unsplit = [], []
    for id_, name, split, captions in _entries(annotations):
        if split is None:
            unsplit.append(id_)
        else:
            split = check_split(split, f"image {id_} in {annotations}")
        found.append(Image(id_, name, base / name, split or "all", captions))
    if unsplit and len(unsplit) < len(found):
        raise DataError(
            f"image {unsplit[0]} in {annotations} has no split, others have; name one for each "
            "or none"
        )
    return _source(dataset, base, found, annotations)


def _source(dataset: str, base: Path, found: list[Image], annotations: Path) -> Source:
    names = on_disk([[image.name] for image in found], Listing(base))
    missing = tuple(image for image, name in zip(found, names, strict=True) if name is None)
    found = [
        image if name in (None, image.name) else replace(image, name=name, path=base / name)
        for image, name in zip(found, names, strict=True)
    ]
    return Source(dataset, base, tuple(found), missing, annotations)


def _entries(file: Path) -> list[tuple[int, str, object, tuple[str, ...]]]:
    """The (id, file name, split or None, captions) of each image of `file`, in its order."""
    content = read_json(file)
    content.setdefault("annotations", [])  # image_info_test2017.json has none
    check_entries(content, "annotations", file)
    images = []
    for entry in content["images"]:
        if "id" not in entry or "file_name" not in entry:
            raise DataError(f"{file}: an image has no id or no file_name: {str(entry)[:80]}; "
                            "a file by Karpathy is read with --dataset karpathy")  # fmt: skip
        id_ = check_id(entry["id"], f"{file}")
        images.append(
            (id_, check_name(entry["file_name"], f"image {id_} in {file}"), entry.get("split"))
        )
    known = {id_ for id_, _, _ in images}
    annotations = []
    for number, entry in enumerate(content["annotations"]):
        if not isinstance(entry.get("id"), int | str):  # captions need none, pycocotools wants one
            entry = {**entry, "id": f"number {number}"}
        annotations.append(entry)
        if "image_id" not in entry:
            raise DataError(
                f"{file}: annotation number {number} has no image_id: "
                f"{str(content['annotations'][number])[:80]}"
            )
        where = f"annotation {entry['id']!r} in {file}"
        if check_id(entry["image_id"], where) not in known:
            raise DataError(
                f"{where} is of image {entry['image_id']}, which is not among its "
                '"images"; '
                "take the annotation out or add the image"
            )
        check_caption(entry.get("caption"), where)
    # Not COCO(file), which reads in the locale's encoding; no categories, which converters add and
    # COCO trips over.
    coco = COCO()
    coco.dataset = {"images": content["images"], "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
    return [
        (id_, name, split, tuple(entry["caption"] for entry in coco.imgToAnns.get(id_, ())))
        for id_, name, split in images
    ]
