"""The registry of datasets, and `open_source`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from data import DataError
from data.datasets import (
    coco,
    folder,
    karpathy,
    mvsa,
    scene_questions,
    visdial,
    vqa,
    webdataset,
)
from data.remote import as_path, is_remote, store_errors
from data.sources import Source, paused_collector


class Dataset(NamedTuple):
    """A reader of a dataset.

    read: read(dataset, root, annotations, images, **options) -> Source.
    Options: the dataclass of the dataset's own options; None if it has none.
    several: `annotations` and `images` are lists of paths; else each is one path or None.
    remote: the paths may be remote (`data.remote`).
    root_is_pattern: the root may also be a file or a pattern of files.
    """

    read: Callable[..., Source]
    Options: type | None = None
    several: bool = False
    remote: bool = False
    root_is_pattern: bool = False


DATASETS: dict[str, Dataset] = {
    "coco2014": Dataset(coco.read_official, remote=True),
    "coco2017": Dataset(coco.read_official, remote=True),
    "coco": Dataset(coco.read, remote=True),
    "karpathy": Dataset(karpathy.read, remote=True),
    "folder": Dataset(folder.read, folder.Options, remote=True),
    "webdataset": Dataset(webdataset.read, remote=True, root_is_pattern=True),
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
    root: the folder of the photographs and captions; may be remote for some datasets.
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
    root = None if root is None else as_path(root)
    _check_remote(dataset, [root, *files, *folders])
    try:
        folder_root = None if DATASETS[dataset].root_is_pattern else root
        for place, flag in ((folder_root, "--root"), *((each, "--images") for each in folders)):
            if place is not None and not _exists(place, "is_dir"):
                raise DataError(f"{place} is not a folder; {flag} must be a folder of {dataset}")
        for file in files:
            if not _exists(file, "exists"):
                raise DataError(
                    f"{file} does not exist; --annotations must be the annotations of {dataset}"
                )
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


def _check_remote(dataset: str, places: Sequence[Path | None]) -> None:
    """Raise DataError for a remote path that the reader of the dataset cannot read."""
    place = next((place for place in places if place is not None and is_remote(place)), None)
    if place is not None and not DATASETS[dataset].remote:
        readers = ", ".join(name for name, reader in DATASETS.items() if reader.remote)
        raise DataError(
            f"{place}: --dataset {dataset} reads local files only; copy it to this machine first "
            f"(datasets that read remote files: {readers})"
        )


def _exists(place: Path, method: str) -> bool:
    with store_errors(place):
        return getattr(place, method)()


def _option_names(dataset: str) -> set[str]:
    options = DATASETS[dataset].Options
    return {item.name for item in fields(options)} if options else set()


def as_list(paths: Path | Sequence[Path] | None) -> list[Path]:
    if paths is None:
        return []
    if isinstance(paths, Sequence) and not isinstance(paths, str):
        return [as_path(path) for path in paths]
    return [as_path(paths)]
