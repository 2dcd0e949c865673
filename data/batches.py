"""Batches for training: images with their texts, K texts an image, features read from the cache."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache, iterate
from data.examples import Example, with_rows
from data.segmentation import segmented
from data.sources import Image
from data.vocabulary import BOS, EOS, PAD, Vocabulary


@dataclass
class Batch:
    """A batch of B images with K texts each, padded to T tokens.

    features [B,R,C] float16, boxes [B,R,4] float32, counts [B] int64, tokens [B,K,T] int64,
    image_ids (B of them). A text consists of its prompt, <bos>, its target and <eos> (no <eos> if
    the target was cut at the length limit); <pad> fills the rest, and whole texts of images with
    fewer than K. Only tokens after <bos> count in the loss.

    counted: False if this process has no image of the step; it then runs another process's image,
    whose loss is not counted.
    """

    features: Tensor
    boxes: Tensor
    counts: Tensor
    tokens: Tensor
    image_ids: list[int | None]
    counted: bool = True

    @functools.cached_property
    def prompt_lengths(self) -> Tensor | None:
        """Number of tokens before each text's <bos>, [B,K] int64; None if no text has a prompt."""
        if bool((self.tokens[:, :, 0] <= BOS).all()):
            return None
        return (self.tokens == BOS).int().argmax(2)

    @property
    def words(self) -> int:
        """Number of tokens that count in the loss."""
        if not self.counted:
            return 0
        after_first = int((self.tokens[:, :, 1:] != PAD).sum())
        return (
            after_first
            if self.prompt_lengths is None
            else after_first - int(self.prompt_lengths.sum())
        )

    @property
    def texts(self) -> int:
        return int((self.tokens[:, :, 0] != PAD).sum()) if self.counted else 0

    def split(self, parts: int) -> list[Batch]:
        """Split into at most `parts` batches of about the same size."""
        size = -(-len(self.image_ids) // parts)
        cut = zip(
            self.features.split(size),
            self.boxes.split(size),
            self.counts.split(size),
            self.tokens.split(size),
            iterate(self.image_ids, size),
            strict=True,
        )
        return [
            Batch(features, boxes, counts, tokens, list(ids), self.counted)
            for features, boxes, counts, tokens, ids in cut
        ]

    def to(self, device: torch.device) -> Batch:
        """Move the regions to a device. Tokens stay on the CPU, where their positions are looked
        up.
        """
        features, boxes, counts = (
            part.to(device, non_blocking=True) for part in (self.features, self.boxes, self.counts)
        )
        return Batch(features, boxes, counts, self.tokens, self.image_ids, self.counted)


class ImageTexts:
    """The images and texts of one split, drawn in batches from a cache.

    images: those of the examples, in their order, without the `left_out` ones that the cache lists
    as unreadable. image_ids: their ids; None for an example without an image. tokens, prompts: by
    image and text, the words of the target and of the prompt.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        images: Mapping[int, Image],
        cache: FeatureCache | NoFeatures,
        split: str,
        segment: str = "words",
        holds_mirrored: Callable[[Sequence[str]], bool] = lambda words: True,
    ) -> None:
        """images: by id, of the whole source. holds_mirrored: whether a text holds of the mirrored
        image too.

        Raises DataError for an image without a row, and for targets without a word.
        """
        self.cache, self.segment, self.holds_mirrored = cache, segment, holds_mirrored
        self.examples, self.images, self.left_out = with_rows(examples, images, cache, split)
        self.on_device: tuple[Tensor, dict[int, int]] | None = None
        groups: dict[object, list[Example]] = {}
        for number, example in enumerate(self.examples):
            groups.setdefault(
                (number,) if example.image_id is None else example.image_id, []
            ).append(example)
        self.image_ids = [group[0].image_id for group in groups.values()]
        self.tokens: list[list[list[str]]] = []
        self.prompts: list[list[list[str]]] = []
        for group in groups.values():
            texts = [
                (segmented(example.prompt, segment), words)
                for example in group
                for target in example.targets
                if (words := segmented(target, segment))
            ]
            if not texts:
                self._refuse_empty(group[0], images)
            self.prompts.append([prompt for prompt, _ in texts])
            self.tokens.append([words for _, words in texts])

    @staticmethod
    def _refuse_empty(example: Example, images: Mapping[int, Image]) -> None:
        name = (
            f"image {example.image_id} ({images[example.image_id].name})"
            if example.image_id is not None and example.image_id in images
            else str(example.id)
        )
        if not example.targets:
            raise DataError(f"{name} has no caption or other target")
        raise DataError(f"the captions of {name} hold no word: {example.targets[0]!r}")

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def texts(self) -> int:
        return sum(map(len, self.tokens))

    def encode(
        self, vocabulary: Vocabulary, max_length: int, max_prompt: int = 0
    ) -> list[list[list[int]]]:
        """Token ids by image and text: the prompt, <bos>, the target, <eos>.

        A longer prompt loses its first tokens; a longer target loses its last tokens and its <eos>.
        """
        found = []
        for prompts, targets in zip(self.prompts, self.tokens, strict=True):
            texts = []
            for prompt, words in zip(prompts, targets, strict=True):
                read = vocabulary.encode(prompt)
                target = vocabulary.encode(words)
                end = [EOS] if len(target) <= max_length else []
                texts.append(
                    [*read[max(0, len(read) - max_prompt) :], BOS, *target[:max_length], *end]
                )
            found.append(texts)
        return found

    def keep_on(self, device: torch.device, views: int = 0) -> None:
        """Keep the features of all images and of their first `views` views on a device."""
        ids = [image.id for image in self.images]
        kept = torch.empty(
            (1 + views) * len(ids), *self.cache.shape, dtype=torch.float16, device=device
        )
        for view in range(1 + views):
            for start in range(0, len(ids), 1000):
                some, at = ids[start : start + 1000], view * len(ids) + start
                kept[at : at + len(some)] = torch.from_numpy(
                    self.cache.rows(some, views=[view] * len(some)).features
                )
        self.on_device = kept, {image_id: row for row, image_id in enumerate(ids)}

    def features(
        self, image_ids: Sequence[int | None], views: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """features [B,R,C] float16 where they are kept, boxes [B,R,4], counts [B] int64; `views` as
        in `FeatureCache.rows`.

        A text without an image (None) has 0 regions.
        """
        ids = [image_id for image_id in image_ids if image_id is not None]
        if len(ids) < len(image_ids):
            present = [row for row, image_id in enumerate(image_ids) if image_id is not None]
            views = None if views is None else [views[row] for row in present]
            features, boxes, counts = (
                zeros_elsewhere(part, present, len(image_ids)) for part in self.features(ids, views)
            )
            return features, boxes, counts
        if self.on_device is None:
            rows = self.cache.rows(ids, views=views)
            features = torch.from_numpy(rows.features)
        else:
            kept, row_of = self.on_device
            rows = self.cache.rows(ids, tables_only=True, views=views)
            images = len(self.images)
            at = [
                row_of[i] + view * images
                for i, view in zip(ids, views or [0] * len(ids), strict=True)
            ]
            features = kept[torch.tensor(at).to(kept.device)]
        return (
            features,
            torch.from_numpy(rows.boxes),
            torch.from_numpy(rows.counts.astype(np.int64)),
        )

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

        ids: what `encode` gives.
        views: each image as it is or in one of the cache's views, all equally likely; a mirrored
            photograph goes without the texts that do not hold of it, and is not drawn where those
            are all.
        whole: an image some of whose texts would be left out is drawn as it is.
        skip: leave out the first batches. rank, world: of each batch give only the part of one
            process of several.
        """
        order = np.arange(len(self)) if generator is None else generator.permutation(len(self))
        drawn = np.zeros(len(self), int)
        flip = 1 + self.cache.views.index("flip") if "flip" in self.cache.views else None
        if views:
            assert generator is not None  # views are only drawn in training
            drawn = generator.integers(1 + len(self.cache.views), size=len(self))
            least = [len(texts) if whole else 1 for texts in self.tokens]
            holds = [len(kept) >= few for kept, few in zip(self.mirrored, least, strict=True)]
            drawn = drawn * ((drawn != flip) | holds)
        drawn = drawn.tolist()
        for chosen in list(iterate(order.tolist(), size))[skip:]:
            mine = chosen[rank::world]
            counted, mine = bool(mine), mine or chosen[:1]
            image_ids, seen = [self.image_ids[i] for i in mine], [drawn[i] for i in mine]
            texts = [
                [ids[i][k] for k in self.mirrored[i]] if view == flip else ids[i]
                for i, view in zip(mine, seen, strict=True)
            ]
            yield Batch(
                *self.features(image_ids, seen if views else None), pad(texts), image_ids, counted
            )

    @functools.cached_property
    def mirrored(self) -> list[list[int]]:
        """For each image, the indices of the texts that hold for the mirrored image."""
        return [
            [k for k, words in enumerate(texts) if self.holds_mirrored([*prompts[k], *words])]
            for prompts, texts in zip(self.prompts, self.tokens, strict=True)
        ]


def zeros_elsewhere(values: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """[count,...] with the n values [n,...] at the given rows and zeros in all others."""
    at = torch.tensor(rows, dtype=torch.int64, device=values.device)
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, at, values)


def last_tokens(ids: Sequence[int], most: int) -> list[int]:
    """The last `most` ids. A longer prompt loses its first tokens."""
    return [*ids[max(0, len(ids) - most) :]]


def pad(texts: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Nested ids by image and text as tokens [B,K,T] int64, padded with <pad>."""
    most = max(len(group) for group in texts)
    longest = max(len(text) for group in texts for text in group)
    tokens = np.full((len(texts), most, longest), PAD, np.int64)
    for b, group in enumerate(texts):
        for k, text in enumerate(group):
            tokens[b, k, : len(text)] = text
    return torch.from_numpy(tokens)


def prefetch(batches: Iterator[Batch], ahead: int = 4) -> Iterator[Batch]:
    """Yield the same batches, read by a thread while the model works on the previous one."""
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
        except BaseException as error:  # raised again by the consumer
            ready.put(error)

    threading.Thread(target=fill, daemon=True).start()
    try:
        while (batch := ready.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch
    finally:
        stop.set()
