"""Batches for training: images with their captions grouped, K captions to an image, features read from the cache."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.cache.reader import FeatureCache, iterate
from data.segmentation import segmented_all
from data.sources import Image, check_captioned
from data.vocabulary import BOS, EOS, PAD, Vocabulary


@dataclass
class Batch:
    """features [B,R,C] float16, boxes [B,R,4] float32, counts [B] int64, tokens [B,K,T] int64, image_ids (B of them).

    `tokens` begin with <bos> and end with <eos> (but for captions cut at the length limit); <pad> fills T, and whole
    captions where an image has fewer than K. `counted` is False where a process has no image of a step and takes another's,
    whose loss is not to count.
    """

    features: Tensor
    boxes: Tensor
    counts: Tensor
    tokens: Tensor
    image_ids: list[int]
    counted: bool = True

    @property
    def words(self) -> int:
        """How many words are to be predicted."""
        return int((self.tokens[:, :, 1:] != PAD).sum()) if self.counted else 0

    @property
    def captions(self) -> int:
        return int((self.tokens[:, :, 0] != PAD).sum()) if self.counted else 0

    def split(self, parts: int) -> list[Batch]:
        """The same images in at most `parts` batches of about one size."""
        size = -(-len(self.image_ids) // parts)
        cut = [part.split(size) for part in (self.features, self.boxes, self.counts, self.tokens)]
        return [Batch(*four, ids, self.counted) for *four, ids in zip(*cut, iterate(self.image_ids, size), strict=True)]

    def to(self, device: torch.device) -> Batch:
        """The regions on a device; tokens stay, since where words stand is found out without keeping a device waiting."""
        moved = [part.to(device, non_blocking=True) for part in (self.features, self.boxes, self.counts)]
        return Batch(*moved, self.tokens, self.image_ids, self.counted)


class CaptionedImages:
    """Images of one split with tokenised captions, ready to be drawn in batches from a cache."""

    def __init__(
        self, images: Sequence[Image], cache: FeatureCache, split: str, segment: str = "words"
    ) -> None:
        check_captioned(images, split)
        self.images, self.left_out = cache.select(images)
        if not self.images:
            raise DataError(f"split {split!r} has no image with features in {cache.path}: all are unreadable")
        self.cache = cache
        self.on_device: tuple[Tensor, dict[int, int]] | None = None
        captions = [caption for image in self.images for caption in image.captions]
        words = iter(segmented_all(captions, segment))
        self.tokens = [[tokens for _ in image.captions if (tokens := next(words))] for image in self.images]
        for image, tokens in zip(self.images, self.tokens, strict=True):
            if not tokens:
                raise DataError(f"the captions of image {image.id} ({image.name}) hold no word: {image.captions[0]!r}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def captions(self) -> int:
        return sum(len(tokens) for tokens in self.tokens)

    def encode(self, vocabulary: Vocabulary, max_length: int) -> list[list[list[int]]]:
        """Ids by image and caption, with <bos> and <eos>; more than `max_length` tokens are cut and lose their <eos>."""
        found = [[vocabulary.encode(words) for words in captions] for captions in self.tokens]
        return [
            [[BOS, *tokens[:max_length], *([EOS] if len(tokens) <= max_length else [])] for tokens in captions]
            for captions in found
        ]

    def keep_on(self, device: torch.device, views: int = 0) -> None:
        """Keep the features of all images, as they are and in the first `views` views, on a device."""
        ids = [image.id for image in self.images]
        kept = torch.empty((1 + views) * len(ids), *self.cache.shape, dtype=torch.float16, device=device)
        for view in range(1 + views):
            for start in range(0, len(ids), 1000):
                some, at = ids[start : start + 1000], view * len(ids) + start
                kept[at : at + len(some)] = torch.from_numpy(self.cache.rows(some, views=[view] * len(some)).features)
        self.on_device = kept, {image_id: row for row, image_id in enumerate(ids)}

    def features(self, image_ids: Sequence[int], views: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """features [B,R,C] float16 where they are kept, boxes [B,R,4], counts [B] int64; `views` as in `FeatureCache.rows`."""
        if self.on_device is None:
            rows = self.cache.rows(image_ids, views=views)
            features = torch.from_numpy(rows.features)
        else:
            kept, row_of = self.on_device
            rows = self.cache.rows(image_ids, tables_only=True, views=views)
            at = [row_of[i] + view * len(self) for i, view in zip(image_ids, views or [0] * len(image_ids), strict=True)]
            features = kept[torch.tensor(at).to(kept.device)]
        return features, torch.from_numpy(rows.boxes), torch.from_numpy(rows.counts.astype(np.int64))

    def batches(
        self,
        ids: list[list[list[int]]],
        size: int,
        generator: np.random.Generator | None = None,
        views: bool = False,
        skip: int = 0,
        rank: int = 0,
        world: int = 1,
        whole: bool = False,
    ) -> Iterator[Batch]:
        """All images once in batches of `size` images, shuffled by `generator` (None: in order).

        views: each image as it is or in one of the cache's views, as likely one as the other; a mirrored photograph goes
            without the captions that name left or right, and is not drawn where those are all.
        whole: an image some of whose captions would be left out is drawn as it is.
        skip: leave out the first batches. rank, world: of each batch give only the part of one process of several.
        """
        order = np.arange(len(self)) if generator is None else generator.permutation(len(self))
        drawn = generator.integers(1 + len(self.cache.views), size=len(self)) if views else np.zeros(len(self), int)
        if views:
            least = [len(captions) if whole else 1 for captions in self.tokens]
            drawn = drawn * [len(kept) >= few for kept, few in zip(self.mirrored, least, strict=True)]
        drawn = drawn.tolist()
        for chosen in list(iterate(order.tolist(), size))[skip:]:
            mine = chosen[rank::world]
            counted, mine = bool(mine), mine or chosen[:1]
            image_ids, seen = [self.images[i].id for i in mine], [drawn[i] for i in mine]
            captions = [[ids[i][k] for k in self.mirrored[i]] if view else ids[i] for i, view in zip(mine, seen, strict=True)]
            yield Batch(*self.features(image_ids, seen if views else None), pad(captions), image_ids, counted)

    @functools.cached_property
    def mirrored(self) -> list[list[int]]:
        """By image the captions that hold of it mirrored: those that name neither left nor right."""
        return [
            [k for k, words in enumerate(captions) if not any(word.startswith(("left", "right")) for word in words)]
            for captions in self.tokens
        ]


def pad(captions: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Nested ids by image and caption as tokens [B,K,T] int64, padded with <pad>."""
    most = max(len(group) for group in captions)
    longest = max(len(caption) for group in captions for caption in group)
    tokens = np.full((len(captions), most, longest), PAD, np.int64)
    for b, group in enumerate(captions):
        for k, caption in enumerate(group):
            tokens[b, k, : len(caption)] = caption
    return torch.from_numpy(tokens)


def prefetch(batches: Iterator[Batch], ahead: int = 4) -> Iterator[Batch]:
    """The same batches, read by a thread while the model works on the one before."""
    ready: queue.Queue = queue.Queue(ahead)
    stop = threading.Event()

    def fill() -> None:
        try:
            for batch in batches:
                while not stop.is_set():
                    try:
                        ready.put(batch, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # handed to the reader, who raises it
            ready.put(error)

    threading.Thread(target=fill, daemon=True).start()
    try:
        while (batch := ready.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch
    finally:
        stop.set()
