"""A cache for texts without images: every image has 0 regions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.cache.reader import Rows
from data.sources import Image


class NoFeatures:
    """Replaces `FeatureCache` for decoders without images (`--features none`): R is 0."""

    path = Path("none")
    shape = (0, 1)
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
