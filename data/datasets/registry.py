"""The registry of datasets, and `open_source`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from data import DataError
from data.datasets import coco, folder, karpathy, mvsa, scene_questions, visdial, vqa
from data.sources import Source, paused_collector


class Dataset(NamedTuple):
    """A reader of a dataset.

    read: read(dataset, root, annotations, images, **options) -> Source.
    Options: the dataclass of the dataset's own options; None if it has none.
    several: `annotations` and `images` are lists of paths; else each is one path or None.
    """

    read: Callable[..., Source]
    Options: type | None = None
    several: bool = False


DATASETS: dict[str, Dataset] = {
    "coco2014": Dataset(coco.read_official),
    "coco2017": Dataset(coco.read_official),
    "coco": Dataset(coco.read),
    "karpathy": Dataset(karpathy.read),
    "folder": Dataset(folder.read, folder.Options),
    "sample": Dataset(scene_questions.read),
    "vqa": Dataset(vqa.read, vqa.Options, several=True),
    "mvsa": Dataset(mvsa.read, mvsa.Options),
    "visdial": Dataset(visdial.read, visdial.Options, several=True),
}


def open_source(
    dataset: str,
    root: Path | None,
    annotations: Path | Sequence[Path] | None = None,
    images: Path | Sequence[Path] | None = None,
    **options: Any,
) -> Source:
    """Open a dataset.

    dataset: a key of DATASETS.
    root: the folder of the photographs and captions.
    annotations: the caption file (for coco2014 and coco2017: the folder of the two caption files);
        None: find it under the root. `coco` requires it.
    images: the folder of the photographs; None: the root.
    options: the dataset's own options, for example `captions_from` of `folder`.

    Raises DataError if a path does not exist or a caption file is invalid. Photographs that are not
    on disk are no error: see `Source.missing`.
    """
    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"unknown dataset {dataset!r}; {hint}known datasets: {', '.join(DATASETS)}")
    for name in options:
        if name not in _option_names(dataset):
            others = [other for other in DATASETS if name in _option_names(other)]
            hint = f"; it is an option of --dataset {', '.join(others)}" if others else ""
            raise DataError(f"dataset {dataset!r} has no option {name!r}{hint}")
    files, folders = as_list(annotations), as_list(images)
    if root is None and not folders and not DATASETS[dataset].several:
        raise DataError(
            f"{dataset} needs a root: pass the folder of the photographs and captions to --root"
        )
    try:
        for place, flag in ((root, "--root"), *((folder, "--images") for folder in folders)):
            if place is not None and not Path(place).is_dir():
                raise DataError(f"{place} is not a folder; {flag} must be a folder of {dataset}")
        for file in files:
            if not file.exists():
                raise DataError(
                    f"{file} does not exist; --annotations must be the annotations of {dataset}"
                )
        root = None if root is None else Path(root)
        places: list[Any] = [files, folders]
        if not DATASETS[dataset].several:
            for paths, flag in ((files, "--annotations"), (folders, "--images")):
                if len(paths) > 1:
                    raise DataError(f"{dataset} takes one {flag}; {len(paths)} are given")
            places = [paths[0] if paths else None for paths in places]
        with paused_collector():
            return DATASETS[dataset].read(dataset, root, *places, **options)
    except OSError as error:
        raise DataError(
            f"{dataset}: {error.filename or root or images}: {error.strerror or error}"
        ) from error


def _option_names(dataset: str) -> set[str]:
    options = DATASETS[dataset].Options
    return {item.name for item in fields(options)} if options else set()


def as_list(paths: Path | Sequence[Path] | None) -> list[Path]:
    if paths is None:
        return []
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
