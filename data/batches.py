"""Training batches: images with K texts each, and their features from the cache."""

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
from data.segmentation import prompt_tokens, segmented
from data.sources import Image
from data.vocabulary import BOS, EOS, PAD, Vocabulary


@dataclass
class Batch:
    """A batch of B images with K texts each, padded to T tokens.

    features: [B,R,C] float16.
    boxes: [B,R,4] float32, as in `data.cache.reader`.
    counts: [B] int64, the number of regions of each image; [B,2] with two kinds of regions, as in
        models.regions.
    tokens: [B,K,T] int64. A text consists of its prompt, <bos>, its target and <eos> (no <eos> if
        the target was cut at the length limit), and is padded with <pad>. An image with fewer than
        K texts has texts of <pad> only. Only tokens after <bos> count in the loss.
    image_ids: the B ids; None for a text without an image.
    counted: False if this process has no image in this step. It then computes an image of another
        process, whose loss is not counted.
    """

    features: Tensor
    boxes: Tensor
    counts: Tensor
    tokens: Tensor
    image_ids: list[int | None]
    counted: bool = True
    labels: Tensor | None = None  # [texts,classes] float32, in the order of the texts
    exclusive: bool = False  # whether exactly one class of a text is true

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
        prompt_tokens = 0 if self.prompt_lengths is None else int(self.prompt_lengths.sum())
        return after_first - prompt_tokens

    @property
    def scored(self) -> int:
        """Number of items that the loss sums over: tokens, or texts if there are labels."""
        return self.words if self.labels is None else self.texts

    @property
    def texts(self) -> int:
        """Number of texts that count in the loss."""
        return int((self.tokens[:, :, 0] != PAD).sum()) if self.counted else 0

    def split(self, parts: int) -> list[Batch]:
        """Split the images into at most `parts` batches of about the same size."""
        size = -(-len(self.image_ids) // parts)
        chunks = zip(
            self.features.split(size),
            self.boxes.split(size),
            self.counts.split(size),
            self.tokens.split(size),
            iterate(self.image_ids, size),
            strict=True,
        )
        batches = [
            Batch(features, boxes, counts, tokens, list(ids), self.counted, None, self.exclusive)
            for features, boxes, counts, tokens, ids in chunks
        ]
        if self.labels is not None:
            texts = [int((batch.tokens[:, :, 0] != PAD).sum()) for batch in batches]
            for batch, labels in zip(batches, self.labels.split(texts), strict=True):
                batch.labels = labels
        return batches

    def to(self, device: torch.device) -> Batch:
        """Move the regions to a device. The tokens stay on the CPU, where they are packed."""
        features, boxes, counts = (
            part.to(device, non_blocking=True) for part in (self.features, self.boxes, self.counts)
        )
        return Batch(
            features, boxes, counts, self.tokens, self.image_ids, self.counted, self.labels,
            self.exclusive,
        )  # fmt: skip


class ImageTexts:
    """The images and texts of one split, with batches of features from a cache.

    examples: the examples whose image the cache holds.
    images: the images of `examples`, in order.
    left_out: how many images the cache lists as unreadable.
    image_ids: one id per image; None for an example without an image.
    tokens, prompts: by image and text, the words of the target and of the prompt.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        images: Mapping[int, Image],
        cache: FeatureCache | NoFeatures,
        split: str,
        segment: str = "words",
        holds_mirrored: Callable[[Sequence[str]], bool] = lambda words: True,
        labels: Callable[[Example], Sequence[tuple[int, float]]] | None = None,
        classes: int = 0,
        exclusive: bool = False,
    ) -> None:
        """Tokenize the examples and group them by image.

        images: all images of the source, by id.
        segment: one of `data.segmentation.SEGMENTS`.
        holds_mirrored: returns whether a text (a list of words) is also true of the mirrored image.
        labels: returns the classes of an example with their weights; a text is then a prompt
            without a target. None: the targets are texts.
        classes: the number of classes. exclusive: whether exactly one of them is true of a text.

        Raises DataError for an image without a row in the cache, and for an image whose targets
        contain no words.
        """
        self.cache, self.segment, self.holds_mirrored = cache, segment, holds_mirrored
        self.classes, self.exclusive = classes, exclusive
        self.labels: list[list[Sequence[tuple[int, float]]]] = []
        self.examples, self.images, self.left_out = with_rows(examples, images, cache, split)
        self.on_device: tuple[Tensor, dict[int, int]] | None = None
        groups: dict[object, list[Example]] = {}
        for index, example in enumerate(self.examples):
            key = (index,) if example.image_id is None else example.image_id
            groups.setdefault(key, []).append(example)
        self.image_ids = [group[0].image_id for group in groups.values()]
        self.tokens: list[list[list[str]]] = []
        self.prompts: list[list[list[str]]] = []
        for group in groups.values():
            if labels is not None:
                self.prompts.append([prompt_tokens(example.prompt, segment) for example in group])
                self.tokens.append([[] for _ in group])
                self.labels.append([labels(example) for example in group])
                continue
            texts = [
                (prompt_tokens(example.prompt, segment), words)
                for example in group
                for target in example.targets
                if (words := segmented(target, segment))
            ]
            without = next((example for example in group if not example.targets), None)
            if without or not texts:
                self._raise_no_words(without or group[0], images)
            self.prompts.append([prompt for prompt, _ in texts])
            self.tokens.append([words for _, words in texts])

    @staticmethod
    def _raise_no_words(example: Example, images: Mapping[int, Image]) -> None:
        name = (
            f"image {example.image_id} ({images[example.image_id].name})"
            if example.image_id is not None and example.image_id in images
            else str(example.id)
        )
        if example.id != example.image_id:
            name = f"example {example.id} about {name}"
        if not example.targets:
            raise DataError(f"{name} has no caption or other target")
        raise DataError(f"the captions of {name} contain no words: {example.targets[0]!r}")

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def texts(self) -> int:
        """Number of texts of all images."""
        return sum(map(len, self.tokens))

    def encode(
        self, vocabulary: Vocabulary, max_length: int, max_prompt: int = 0
    ) -> list[list[list[int]]]:
        """Return the token ids by image and text: the prompt, <bos>, the target, <eos>.

        A prompt of more than `max_prompt` tokens loses its first tokens. A target of more than
        `max_length` tokens loses its last tokens and its <eos>.
        """
        encoded = []
        for prompts, targets in zip(self.prompts, self.tokens, strict=True):
            texts = []
            for prompt, words in zip(prompts, targets, strict=True):
                prompt_ids = vocabulary.encode(prompt)
                target_ids = vocabulary.encode(words)
                eos = [EOS] if len(target_ids) <= max_length and not self.labels else []
                prompt_ids = last_tokens(prompt_ids, max_prompt)
                texts.append([*prompt_ids, BOS, *target_ids[:max_length], *eos])
            encoded.append(texts)
        return encoded

    def keep_on(self, device: torch.device, views: int = 0) -> None:
        """Copy the features of all images, and of their first `views` views, to a device."""
        ids = [image.id for image in self.images]
        features = torch.empty(
            (1 + views) * len(ids), *self.cache.shape, dtype=torch.float16, device=device
        )
        for view in range(1 + views):
            for start in range(0, len(ids), 1000):
                batch_ids, first = ids[start : start + 1000], view * len(ids) + start
                rows = self.cache.rows(batch_ids, views=[view] * len(batch_ids))
                features[first : first + len(batch_ids)] = torch.from_numpy(rows.features)
        self.on_device = features, {image_id: row for row, image_id in enumerate(ids)}

    def features(
        self, image_ids: Sequence[int | None], views: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [B,R,C] float16, boxes [B,R,4] float32 and counts [B] int64.

        views: the view of each image, as in `FeatureCache.rows`.

        The features are on the device of `keep_on`, else on the CPU. A text without an image (id
        None) has 0 regions.
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
            all_features, row_of = self.on_device
            rows = self.cache.rows(ids, tables_only=True, views=views)
            image_count = len(self.images)
            indices = [
                row_of[i] + view * image_count
                for i, view in zip(ids, views or [0] * len(ids), strict=True)
            ]
            features = all_features[torch.tensor(indices).to(all_features.device)]
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
        """Yield all images once in batches of `size` images.

        ids: the result of `encode`.
        generator: shuffles the images; None: in order.
        views: use the original or one of the cache's views of each image, with equal probability.
            A mirrored image has only the texts that are true of it. If no text is true of it, the
            original is used.
        whole: use the original if any text of the mirrored image would be omitted.
        skip: the number of first batches to skip.
        rank, world: yield only the images of process `rank` of `world` processes.
        """
        order = np.arange(len(self)) if generator is None else generator.permutation(len(self))
        view_of = np.zeros(len(self), int)  # 0: the original
        flip = 1 + self.cache.views.index("flip") if "flip" in self.cache.views else None
        if views:
            assert generator is not None  # views are only used in training
            view_of = generator.integers(1 + len(self.cache.views), size=len(self))
            required = [len(texts) if whole else 1 for texts in self.tokens]
            can_flip = [len(ks) >= n for ks, n in zip(self.mirrored, required, strict=True)]
            view_of = view_of * ((view_of != flip) | can_flip)
        view_list = view_of.tolist()
        for batch in list(iterate(order.tolist(), size))[skip:]:
            images = batch[rank::world]
            counted, images = bool(images), images or batch[:1]
            image_ids = [self.image_ids[i] for i in images]
            batch_views = [view_list[i] for i in images]
            texts = [
                [ids[i][k] for k in self.mirrored[i]] if view == flip else ids[i]
                for i, view in zip(images, batch_views, strict=True)
            ]
            regions = self.features(image_ids, batch_views if views else None)
            labels = self._label_rows(images, [view == flip for view in batch_views])
            yield Batch(*regions, pad(texts), image_ids, counted, labels, self.exclusive)

    def _label_rows(self, images: Sequence[int], is_mirrored: Sequence[bool]) -> Tensor | None:
        """The labels of the texts of a batch, [texts,classes] float32; None without classes."""
        if not self.labels:
            return None
        rows = [
            self.labels[i][k]
            for i, mirrored in zip(images, is_mirrored, strict=True)
            for k in (self.mirrored[i] if mirrored else range(len(self.labels[i])))
        ]
        labels = torch.zeros(len(rows), self.classes)
        for row, weighted in enumerate(rows):
            for number, weight in weighted:
                labels[row, number] = weight
        return labels

    @functools.cached_property
    def mirrored(self) -> list[list[int]]:
        """For each image, the indices of the texts that are true of the mirrored image."""
        return [
            [k for k, words in enumerate(texts) if self.holds_mirrored([*prompts[k], *words])]
            for prompts, texts in zip(self.prompts, self.tokens, strict=True)
        ]


def zeros_elsewhere(values: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Return [count,...] with the values [n,...] at the given n rows, and zeros in all others."""
    index = torch.tensor(rows, dtype=torch.int64, device=values.device)
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, index, values)


def last_tokens(ids: Sequence[int], most: int) -> list[int]:
    """Return the last `most` ids."""
    return [*ids[max(0, len(ids) - most) :]]


def pad(texts: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Pad ids by image and text with <pad> to tokens [B,K,T] int64."""
    most = max(len(group) for group in texts)
    longest = max(len(text) for group in texts for text in group)
    tokens = np.full((len(texts), most, longest), PAD, np.int64)
    for b, group in enumerate(texts):
        for k, text in enumerate(group):
            tokens[b, k, : len(text)] = text
    return torch.from_numpy(tokens)


def prefetch(batches: Iterator[Batch], ahead: int = 4) -> Iterator[Batch]:
    """Read batches in a background thread, at most `ahead` batches ahead.

    Errors of `batches` are raised in the caller.
    """
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
        except BaseException as error:  # raised again in the caller
            ready.put(error)

    threading.Thread(target=fill, daemon=True).start()
    try:
        while (batch := ready.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch
    finally:
        stop.set()
