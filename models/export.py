"""Decoders and backbones as graphs without Python: modules whose inputs and outputs are tensors.

A decoder becomes three graphs:

    encoder   features [B,R,C], boxes [B,R,4], counts [B] -> the memory of the images
    begin     tokens [N,P+1], memory                      -> scores, cache
    step      tokens [N,1], length, cache, memory         -> scores, cache

Row n is a text with its own copies of the memory and of the cache. P is always the decoder's
max_prompt: shorter prompts are padded on the left, and <bos> follows. Scores are [N,V], the logits
of the next word, or [N,classes] if the decoder has classes; then `begin` is the last graph. The
cache has room for the longest text, and `length` (int64, no dimension) is the number of tokens that
it holds, with those of padding.

Letters in shapes: B images, R regions, C channels, N texts, P prompt tokens, T new tokens, S slots
of the cache, V words, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from models import ModelError
from models.backbones.interface import Backbone
from models.decoders.attention import KVCache, Layout, additive_mask
from models.decoders.interface import Decoder
from models.decoders.lstm import LstmCache, State
from models.regions import Regions


class Encoder(nn.Module):
    """Maps features, boxes and counts to the tensors of the memory."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: Tensor, boxes: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        leaves, _ = pytree.tree_flatten(self.decoder.encode(Regions(features, boxes, counts)))
        return tuple(leaves)


class TextGraph(nn.Module):
    """The common parts of `Begin` and `Step`. memory: an example of the decoder's memory."""

    def __init__(self, decoder: Decoder, memory: Any) -> None:
        super().__init__()
        self.decoder = decoder
        self.spec = pytree.tree_structure(memory)
        kind = decoder.init_cache(memory, 1)
        if not isinstance(kind, KVCache | LstmCache):
            raise ModelError(
                f"{type(decoder).__name__} cannot be exported: its cache is a {type(kind).__name__}"
            )
        self.is_recurrent = isinstance(kind, LstmCache)
        if isinstance(kind, KVCache):
            _, heads, _, width = kind.keys[0].shape
            capacity = decoder.config.max_prompt + decoder.config.max_length + 1
            self.layers, self.slot_shape = len(kind.keys), (heads, capacity, width)

    def scores(self, words: Tensor, positions: Tensor, cache: Any, memory: Any) -> Tensor:
        """The scores after the last token of each text."""
        states = self.decoder.states(words.flatten(), positions, cache, memory)
        last = states.view(*words.shape, -1)[:, -1]
        return self.decoder.head(last) if self.decoder.config.classes else self.decoder.logits(last)


class Begin(TextGraph):
    """Reads the prompts and <bos>. Returns scores, and the tensors of the cache."""

    def forward(self, tokens: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
        encoded = pytree.tree_unflatten(list(memory), self.spec)
        prompts = tokens[:, :-1]
        padding = (prompts == 0).sum(1)
        if self.is_recurrent:
            cache = LstmCache(encoded, 1, prompts if prompts.shape[1] else None)
            cache.begin(1, tokens.shape[1])
            scores = self.scores(tokens, cache.positions(1), cache, encoded)
            question = [] if cache.question is None else [cache.question]
            return scores, *cache.state, *question
        shape = tokens.shape[0], *self.slot_shape
        slots = [memory[0].new_zeros(shape) for _ in range(2 * self.layers)]
        static = StaticCache(slots, torch.zeros((), dtype=torch.int64), tokens.shape[1], padding,
                             prompts.shape[1])  # fmt: skip
        scores = self.scores(tokens, static.positions(), static, encoded)
        return scores, *static.slots, padding


class Step(TextGraph):
    """Reads one word of each text. Returns scores, and the tensors of the cache.

    The cache has `cache_parts` tensors; the memory follows.
    """

    def __init__(self, decoder: Decoder, memory: Any, cache_parts: int) -> None:
        super().__init__(decoder, memory)
        self.cache_parts = cache_parts

    def forward(self, tokens: Tensor, length: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        cache, memory = tensors[: self.cache_parts], tensors[self.cache_parts :]
        encoded = pytree.tree_unflatten(list(memory), self.spec)
        if self.is_recurrent:
            state = LstmCache(encoded, 1, None)
            state.state = State(*cache[:4])
            state.question = cache[4] if len(cache) > 4 else None
            state.begin(1, 1)
            scores = self.scores(tokens, tokens, state, encoded)
            return scores, *state.state, *cache[4:]
        prompt = self.decoder.config.max_prompt
        static = StaticCache(list(cache[:-1]), length, 1, cache[-1], prompt)
        scores = self.scores(tokens, static.positions(), static, encoded)
        return scores, *static.slots, cache[-1]


class StaticCache(Layout):
    """Keys and values [N,H,S,d] of one text per image, in tensors whose shapes never change."""

    def __init__(
        self, slots: Sequence[Tensor], start: Tensor, tokens: int, padding: Tensor, prompt: int
    ) -> None:
        """
        slots: the keys and values of the first layer, of the second, and so on.
        start: number of tokens so far. tokens: number of new tokens. padding [N]: tokens on the
            left that are padding. prompt: number of prompt tokens, with the padding.
        """
        self.slots, self.padding, self.texts = [*slots], padding, padding.shape[0]
        self.index = start + torch.arange(tokens)
        key, query = torch.arange(slots[0].shape[2]), self.index[:, None]
        # as KVCache: all tokens attend to the prompt, and padding attends to itself
        visible = ((key <= query) | (key < prompt))[None] & (key >= padding[:, None, None])
        super().__init__(additive_mask(visible | (key == query))[:, None])

    @property
    def image(self) -> Tensor:
        return torch.arange(self.texts).repeat_interleave(len(self.index))

    def positions(self) -> Tensor:
        return (self.index - self.padding[:, None]).clamp(min=0).flatten()

    def pad(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, len(self.index)))

    def unpad(self, sequences: Tensor) -> Tensor:
        return sequences.flatten(0, 1)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for number, new in ((2 * layer, keys), (2 * layer + 1, values)):
            self.slots[number] = self.slots[number].index_copy(2, self.index, new)
        return self.slots[2 * layer], self.slots[2 * layer + 1]


class Photographs(nn.Module):
    """Maps photographs to features, boxes and counts, the inputs of `Encoder`.

    pixels: [B,3,H,W] uint8. frame: [B,4], the part of each photograph that they show, x0 y0 x1 y1
        relative to its size. The features are float32, rounded to float16 as in a cache.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, boxes, counts = self.backbone(pixels, frame)
        return features.half().float(), boxes, counts
