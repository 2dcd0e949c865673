"""Read COCO caption files.

    {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}

`coco2014` and `coco2017` read the official layout. Either split may be missing:

    root/annotations/captions_train2017.json, captions_val2017.json
    root/train2017/000000000009.jpg, root/val2017/000000000139.jpg

The names of 2014 are like train2014/COCO_train2014_000000000009.jpg.

`coco` reads any other file of this format, and a folder of photographs. An image may have a
`split`. The `id` of an annotation is optional.
"""

import contextlib
import io
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pycocotools.coco import COCO

from data import DataError
from data.image_formats import SUFFIXES
from data.remote import photograph_path
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

# file names with the id of the image, of COCO 2014 and 2017 and of VisDial's val and test splits
ID_IN_NAME = re.compile(r"(?:(?:COCO|VisualDialog)_\w+_)?(\d{12})")


def photographs_by_id(folders: Iterable[Path]) -> dict[int, tuple[str, Path]]:
    """Return the name and the path of each photograph whose file name has a COCO id, by id.

    The photographs are in the folders or one folder down. The first one of an id is returned.
    """
    found: dict[int, tuple[str, Path]] = {}
    for folder in folders:
        for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
            for path in sorted(place.iterdir()):
                match = ID_IN_NAME.fullmatch(path.stem)
                if match and path.suffix.lower() in SUFFIXES:
                    found.setdefault(int(match[1]), (path.relative_to(folder).as_posix(), path))
    return found


def read_official(
    dataset: str, root: Path | None, annotations: Path | None, images: Path | None
) -> Source:
    """Read the official layout of COCO.

    dataset: a name that ends with the year.
    root: the folder of the layout.
    annotations: the folder of the caption files; None: root/annotations.
    images: the folder of train20xx/ and val20xx/; None: root.

    Raises DataError if the files are missing or invalid.
    """
    year, base, parent = dataset[-4:], images or root, root or images
    assert base is not None and parent is not None  # checked by open_source
    folder = annotations or parent / "annotations"
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; {dataset} reads the two caption files of this folder (to "
            "read one file: --dataset coco)"
        )
    files = {split: folder / f"captions_{split}{year}.json" for split in ("train", "val")}
    files = {split: file for split, file in files.items() if file.exists()}
    if not files:
        raise DataError(
            f"{folder} has neither captions_train{year}.json nor captions_val{year}.json; "
            f"unpack COCO's annotations_trainval{year}.zip into {folder.parent}"
        )
    all_images = [
        Image(id_, path, photograph_path(base, path), split, captions)
        for split, file in files.items()
        for id_, name, _, captions in _entries(file)
        for path in [f"{split}{year}/{name}"]
    ]
    return _source(dataset, base, all_images, folder)


def read(dataset: str, root: Path | None, annotations: Path | None, images: Path | None) -> Source:
    """Read one COCO caption file.

    annotations: the caption file.
    images, root: the folder that the file names are relative to; `images` has priority.

    Raises DataError if the file is missing or invalid.
    """
    if annotations is None or annotations.is_dir():
        raise DataError(
            f"{dataset} needs a caption file: pass --annotations FILE (and --images DIR)"
        )
    base = images or root
    assert base is not None  # checked by open_source
    all_images, unsplit = [], []
    for id_, name, split, captions in _entries(annotations):
        if split is None:
            unsplit.append(id_)
        else:
            split = check_split(split, f"image {id_} in {annotations}")
        path = photograph_path(base, name)
        all_images.append(Image(id_, name, path, split or "all", captions))
    if unsplit and len(unsplit) < len(all_images):
        raise DataError(
            f"image {unsplit[0]} in {annotations} has no split, but other images have one; set "
            "the split of all images or of none"
        )
    return _source(dataset, base, all_images, annotations)


def _source(dataset: str, base: Path, images: list[Image], annotations: Path) -> Source:
    """A source of the images, with their names on disk."""
    names = on_disk([[image.name] for image in images], Listing(base))
    missing = tuple(image for image, name in zip(images, names, strict=True) if name is None)
    on_disk_images = tuple(
        image
        if name is None or name == image.name
        else replace(image, name=name, path=photograph_path(base, name))
        for image, name in zip(images, names, strict=True)
    )
    return Source(dataset, base, on_disk_images, missing, annotations)


def _entries(file: Path) -> list[tuple[int, str, object, tuple[str, ...]]]:
    """Return (id, file name, split or None, captions) of each image, in the order of the file."""
    content = read_json(file)
    content.setdefault("annotations", [])  # image_info_test2017.json has no annotations
    check_entries(content, "annotations", file)
    images = []
    for entry in content["images"]:
        if "id" not in entry or "file_name" not in entry:
            raise DataError(
                f"{file}: an image has no id or no file_name: {str(entry)[:80]}; for a file by "
                "Karpathy use --dataset karpathy"
            )
        id_ = check_id(entry["id"], f"{file}")
        name = check_name(entry["file_name"], f"image {id_} in {file}")
        images.append((id_, name, entry.get("split")))
    known = {id_ for id_, _, _ in images}
    annotations = []
    for number, entry in enumerate(content["annotations"]):
        if not isinstance(entry.get("id"), int | str):  # pycocotools requires an id
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
                f'{where} is of image {entry["image_id"]}, which is not among its "images"; '
                "remove the annotation or add the image"
            )
        check_caption(entry.get("caption"), where)
    # COCO(file) is not used: it reads with the encoding of the locale. Categories are not passed,
    # because COCO fails on the categories that some converters write.
    coco = COCO()
    coco.dataset = {"images": content["images"], "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):  # createIndex prints its progress
        coco.createIndex()
    return [
        (id_, name, split, tuple(entry["caption"] for entry in coco.imgToAnns.get(id_, ())))
        for id_, name, split in images
    ]
