"""The dataset options of several commands."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.cache.no_features import NoFeatures, PartialFeatures
from data.cache.reader import FeatureCache
from data.datasets.registry import DATASETS, as_list, open_source
from data.datasets.sample import ensure_sample
from data.results import choose, read_ids
from data.sources import Source
from pipeline.cli import Settings, flag_of, setting
from pipeline.terminal import say

SAMPLE_ROOT = Path("datasets/sample")


# tasks of the datasets that have no captions
TASK_OF = {"mvsa": "sentiment", "visdial": "dialog", "vqa": "vqa"}


@dataclass(frozen=True)
class SourceOptions(Settings):
    """The options that choose a dataset and its feature cache."""

    dataset: str = setting("sample", "dataset format", registry=DATASETS, group="data")
    root: Path | None = setting(
        None,
        "root folder of the dataset; with --dataset webdataset also a tar or a pattern of tars; "
        "may be remote, such as s3://bucket/coco  [sample: datasets/sample, drawn if absent]",
        group="data",
        may_change_on_resume=True,
        remote=True,
    )
    annotations: tuple[Path, ...] = setting(
        (),
        "file of captions, answers or labels, if the dataset format has no fixed name for it; may "
        "be repeated with --dataset vqa",
        group="data",
        may_change_on_resume=True,
        remote=True,
    )
    images: tuple[Path, ...] = setting(
        (),
        "folder of the photographs, with --dataset coco and vqa",
        group="data",
        may_change_on_resume=True,
        remote=True,
    )

    ids: Path | None = setting(
        None,
        "file with the ids of the images to use, one per line or a JSON list",
        group="data",
    )
    exclude_ids: Path | None = setting(
        None, "file with the ids of images to leave out", group="data"
    )

    def dataset_options(self) -> str:
        """Return the options that choose the dataset, as on the command line."""
        options: dict[str, Any] = {"dataset": self.dataset, "root": self.root}
        options |= {"annotations": self.annotations, "images": self.images}
        options |= self.extensions.get("dataset", {})
        words = []
        for name, value in options.items():
            for each in value if isinstance(value, tuple) else (value,):
                if each is True:
                    words.append(flag_of(name))
                elif each not in (None, False):
                    words += [flag_of(name), str(each)]
        return shlex.join(words)

    def train_command(self, features: Path) -> str:
        """Return the command that trains over a cache of this dataset."""
        options = self.dataset_options() if self.dataset else "--dataset ... --root ..."
        if self.dataset in TASK_OF:
            options = f"--task {TASK_OF[self.dataset]} {options}"
        return f"python -m pipeline.train --features {shlex.quote(str(features))} {options}"

    def open_cache(self, features: Path | None) -> FeatureCache | NoFeatures:
        """Open the feature cache at `features`, by default cache/DATASET.

        With the path `none`, no image features are used. With --text-only, images without features
        have no regions, and all of them without --features.
        """
        text_only = getattr(self.options("dataset"), "text_only", None)
        if features == NoFeatures.path or (text_only and features is None):
            return NoFeatures()
        cache_class = PartialFeatures if text_only else FeatureCache
        cache = cache_class(features or Path("cache") / self.dataset)
        if text_only is False:
            cache.alternative = "; or pass --text-only to use them without regions"
        return cache

    def open_source(self) -> Source:
        """Open the dataset, print the notes of its reader, and choose the images of --ids.

        The embedded sample is drawn if it does not exist.
        """
        source = self.open_whole_source()
        for note in source.notes:
            say(note)
        return self.choose_images(source)

    def open_whole_source(self) -> Source:
        """Open the dataset with all images."""
        root = self.root
        if self.dataset == "sample":
            root = root or (None if self.images else SAMPLE_ROOT)
            ensure_sample(root or as_list(self.images)[0])
        options = self.options("dataset")
        return open_source(
            self.dataset,
            root,
            self.annotations,
            self.images,
            **(asdict(options) if options else {}),
        )

    def choose_images(self, source: Source) -> Source:
        """Keep the images of --ids, and leave out those of --exclude-ids.

        Raises DataError if an id of --ids is not in the dataset, or no image remains.
        """
        if not (self.ids or self.exclude_ids):
            return source
        images = source.images
        if self.ids:
            place = source.annotations or source.root
            images = tuple(choose(images, read_ids(self.ids), place, self.ids))
        if self.exclude_ids:
            excluded = {*read_ids(self.exclude_ids)}
            images = tuple(image for image in images if image.id not in excluded)
        kept = {image.id for image in images}
        missing = tuple(image for image in source.missing if image.id in kept)
        say(f"{len(images):,} of {len(source.images):,} images are used")
        return replace(source, images=images, missing=missing)
