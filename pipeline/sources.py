"""The dataset options of several commands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache
from data.datasets.registry import DATASETS, as_list, open_source
from data.datasets.sample import ensure_sample
from data.sources import Source
from pipeline.cli import Settings, setting
from pipeline.terminal import say

SAMPLE_ROOT = Path("datasets/sample")


@dataclass(frozen=True)
class SourceOptions(Settings):
    """The options that choose a dataset and its feature cache."""

    dataset: str = setting("sample", "dataset format", registry=DATASETS, group="data")
    root: Path | None = setting(
        None,
        "root folder of the dataset  [sample: datasets/sample, drawn if absent]",
        group="data",
        may_change_on_resume=True,
    )
    annotations: tuple[Path, ...] = setting(
        (),
        "caption file, if the dataset format has no fixed name for it",
        group="data",
        may_change_on_resume=True,
    )
    images: tuple[Path, ...] = setting(
        (),
        "folder of the photographs, with --dataset coco and vqa",
        group="data",
        may_change_on_resume=True,
    )

    def open_cache(self, features: Path | None) -> FeatureCache | NoFeatures:
        """Open the feature cache at `features`, by default cache/DATASET.

        With the path `none`, no image features are used.
        """
        if features == NoFeatures.path:
            return NoFeatures()
        return FeatureCache(features or Path("cache") / self.dataset)

    def open_source(self) -> Source:
        """Open the dataset and print the notes of its reader.

        The embedded sample is drawn if it does not exist.
        """
        root = self.root
        if self.dataset == "sample":
            root = root or (None if self.images else SAMPLE_ROOT)
            ensure_sample(root or as_list(self.images)[0])
        options = self.options("dataset")
        source = open_source(
            self.dataset,
            root,
            self.annotations,
            self.images,
            **(asdict(options) if options else {}),
        )
        for note in source.notes:
            say(note)
        return source
