"""The images of a cache as a torch Dataset, for a DataLoader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class CachedImages(torch.utils.data.Dataset):
    """A Dataset of the images of `captions`; see `FeatureCache.dataset`.

    Each DataLoader worker opens the cache again.
    """

    def __init__(self, cache: Any, captions: Mapping[int, Sequence[str]]) -> None:
        self.cache, self.captions, self.ids = cache, dict(captions), list(captions)
        for image_id in self.ids:
            cache.require(image_id)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, int, list[str]]:
        image_id = self.ids[index]
        features, boxes, count = self.cache[image_id]
        return (
            torch.from_numpy(features),
            torch.from_numpy(boxes),
            int(count),
            image_id,
            list(self.captions[image_id]),
        )
