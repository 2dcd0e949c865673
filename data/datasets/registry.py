"""The datasets by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from data import DataError
from data.datasets import coco, folder, karpathy
from data.sources import Source

DATASETS = ("coco2014", "coco2017", "coco", "karpathy", "folder", "sample")
CAPTIONS_FROM = ("auto", "txt")  # of a folder: caption files by their names, or the .txt beside each photograph


def open_source(
    dataset: str,
    root: Path | None,
    annotations: Path | None = None,
    images: Path | None = None,
    captions_from: str = "auto",
) -> Source:
    """Open `dataset` (one of DATASETS) under `root`.

    annotations: the caption file, where it is not the one found under the root (coco needs it; for coco2014 and
        coco2017 the folder of the two).
    images: the folder of the photographs, where that is not the root.
    captions_from: one of CAPTIONS_FROM, for a folder; "txt" reads the .txt beside each photograph.
    Raises DataError for a missing place or a caption file that cannot be trusted. Photographs that a caption file
    names and the disk lacks are no error here: see `Source.missing`.
    """
    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"no dataset {dataset!r}; {hint}there are {', '.join(DATASETS)}")
    if captions_from != "auto" and dataset != "folder":
        raise DataError(f"--captions-from {captions_from} reads --dataset folder; {dataset} has its own caption file")
    if root is None and images is None:
        raise DataError(f"{dataset} needs a root: pass --root, the folder of the photographs and their captions")
    try:
        if dataset == "sample":
            from data.datasets.sample import ensure_sample

            ensure_sample(Path(root or images))
        for place, flag in ((root, "--root"), (images, "--images")):
            if place is not None and not Path(place).is_dir():
                raise DataError(f"{place} is not a folder; {flag} names the folder of {dataset}")
        if annotations is not None and not Path(annotations).exists():
            raise DataError(f"{annotations} does not exist; --annotations names the captions of {dataset}")
        readers = {"coco": coco.read, "karpathy": karpathy.read, "folder": folder.read, "sample": karpathy.read}
        read = readers.get(dataset, coco.read_official)
        places = [None if place is None else Path(place) for place in (root, annotations, images)]
        return read(dataset, *places, *([captions_from] if dataset == "folder" else []))
    except OSError as error:
        raise DataError(f"{dataset}: {error.filename or root or images}: {error.strerror or error}") from error
