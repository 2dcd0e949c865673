"""The datasets by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from data import DataError
from data.datasets import coco, folder, karpathy
from data.sources import Source


class Dataset(NamedTuple):
    """How a dataset is read: read(dataset, root, annotations, images, **options) -> Source;
    Options: its own, or None.
    """

    read: Callable[..., Source]
    Options: type | None = None


DATASETS: dict[str, Dataset] = {
    "coco2014": Dataset(coco.read_official),
    "coco2017": Dataset(coco.read_official),
    "coco": Dataset(coco.read),
    "karpathy": Dataset(karpathy.read),
    "folder": Dataset(folder.read, folder.Options),
    "sample": Dataset(karpathy.read),
}


def open_source(
    dataset: str,
    root: Path | None,
    annotations: Path | None = None,
    images: Path | None = None,
    **options: Any,
) -> Source:
    """Open `dataset` (one of DATASETS) under `root`.

    annotations: the caption file, where it is not the one found under the root (coco needs it; for
        coco2014 and coco2017 the folder of the two).
    images: the folder of the photographs, where that is not the root.
    options: those of the dataset itself, as `captions_from` of a folder.
    Raises DataError for a missing place or a caption file that cannot be trusted. Photographs that
    a caption file names and the disk lacks are no error here: see `Source.missing`.
    """
    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"no dataset {dataset!r}; {hint}there are {', '.join(DATASETS)}")
    own = DATASETS[dataset].Options
    known = {item.name for item in fields(own)} if own else set()
    if foreign := [name for name in options if name not in known]:
        having = [
            name
            for name, each in DATASETS.items()
            if each.Options and foreign[0] in {f.name for f in fields(each.Options)}
        ]
        hint = f"; it is one of --dataset {', '.join(having)}" if having else ""
        raise DataError(f"dataset {dataset!r} has no option {foreign[0]!r}{hint}")
    if root is None and images is None:
        raise DataError(
            f"{dataset} needs a root: pass --root, the folder of the photographs and their captions"
        )
    try:
        for place, flag in ((root, "--root"), (images, "--images")):
            if place is not None and not Path(place).is_dir():
                raise DataError(f"{place} is not a folder; {flag} names the folder of {dataset}")
        if annotations is not None and not Path(annotations).exists():
            raise DataError(
                f"{annotations} does not exist; --annotations names the captions of {dataset}"
            )
        places = [None if place is None else Path(place) for place in (root, annotations, images)]
        return DATASETS[dataset].read(dataset, *places, **options)
    except OSError as error:
        raise DataError(
            f"{dataset}: {error.filename or root or images}: {error.strerror or error}"
        ) from error
