"""Caches for texts without images: an image without features has 0 regions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.cache.reader import FeatureCache, Rows
from data.sources import Image


class NoFeatures:
    """Replaces `FeatureCache` for decoders without images (`--features none`): R is 0."""

    path = Path("none")
    shape = (0, 1)
    kinds = (("none", 0, 1),)
    views: tuple[str, ...] = ()
    identity: dict[str, Any] = {"regions": "none"}  # noqa: RUF012
    provenance: dict[str, Any] = {}  # noqa: RUF012
    feature_bytes = 0

    def __len__(self) -> int:
        return 0

    def rows(self, image_ids: Sequence[int], **_: Any) -> Rows:
        """Return features [n,0,1] float16, boxes [n,0,4] float32 and counts [n] int16, all 0."""
        count = len(image_ids)
        return Rows(
            np.empty((count, 0, 1), np.float16),
            np.empty((count, 0, 4), np.float32),
            np.zeros(count, np.int16),
        )

    def select(self, images: Iterable[Image]) -> tuple[list[Image], int]:
        """Return all images, and 0 omitted images."""
        return list(images), 0

    def keep_in_memory(self, *_: Any) -> None:
        """Do nothing: there are no features."""


class PartialFeatures(FeatureCache):
    """A cache in which an image without a row has 0 regions (`--text-only`).

    Only an image that has features in another cache file name, or is unreadable, is treated as in
    `FeatureCache`.
    """

    def rows(
        self,
        image_ids: Sequence[int],
        out: Rows | None = None,
        tables_only: bool = False,
        views: Sequence[int] | None = None,
    ) -> Rows:
        """As `FeatureCache.rows`; an image without a row has count 0 and zeros."""
        present = [i for i, image_id in enumerate(image_ids) if image_id in self]
        own_views = None if views is None else [views[i] for i in present]
        own = super().rows([image_ids[i] for i in present], None, tables_only, own_views)
        rows = self.empty_rows(len(image_ids)) if out is None else out
        for target, values in zip(rows, own, strict=True):
            target[...] = 0
            target[present] = values
        return rows

    def select(self, images: Iterable[Image]) -> tuple[list[Image], int]:
        """Return all images but unreadable ones, and the number of these."""
        images = list(images)
        known = [image for image in images if image.id in self or image.id in self.unreadable]
        selected, left_out = super().select(known)
        kept = {image.id for image in selected} | ({i.id for i in images} - {i.id for i in known})
        return [image for image in images if image.id in kept], left_out
