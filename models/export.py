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
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from models import ModelError
from models.backbones.interface import Backbone
from models.decoders.attention import KVCache, Layout, additive_mask
from models.decoders.interface import Decoder
from models.decoders.lstm import LstmCache, State
from models.regions import Regions

BOS = 1  # the token that begins a text


class Sizes(NamedTuple):
    """The sizes of an example: images, regions and texts."""

    B: int
    R: int
    N: int


# The examples of a graph differ in each of these sizes, and in no other.
EXAMPLES = Sizes(B=2, R=7, N=3), Sizes(B=4, R=9, N=5)


class Graph(NamedTuple):
    """A module to export.

    examples: the inputs by name, with the sizes of each of EXAMPLES. outputs: their names.
    """

    module: nn.Module
    examples: list[dict[str, Tensor]]
    outputs: list[str]

    def dynamic(self) -> list[dict[int, str]]:
        """For each input the dimensions that differ between the examples: {dimension: name}."""
        names = {(a, b): name for name, a, b in zip(Sizes._fields, *EXAMPLES, strict=True)}
        return [
            {axis: names[pair] for axis, pair in enumerate(zip(one.shape, two.shape, strict=True))
             if pair[0] != pair[1]}
            for one, two in zip(*(each.values() for each in self.examples), strict=True)
        ]  # fmt: skip


@torch.no_grad()
def make_graphs(decoder: Decoder, backbone: Backbone | None) -> dict[str, Graph]:
    """Make the graphs of a decoder, and of the backbone if there is one, by name."""
    decoder, graphs = decoder.float().eval(), {}
    if backbone is not None:
        photographs = [_photographs(backbone, sizes) for sizes in EXAMPLES]
        graphs["backbone"] = Graph(Photographs(backbone), photographs, [*Regions._fields])
    regions = [_regions(decoder.config.channels, sizes) for sizes in EXAMPLES]
    memories = [pytree.tree_flatten(decoder.encode(each)) for each in regions]
    names = [f"memory{number}" for number in range(len(memories[0][0]))]
    graphs["encoder"] = Graph(Encoder(decoder), [each._asdict() for each in regions], names)
    of_texts = [
        _of_texts(parts, sizes) for (parts, _), sizes in zip(memories, EXAMPLES, strict=True)
    ]
    memory = pytree.tree_unflatten(of_texts[0], memories[0][1])
    inputs = [
        {
            "tokens": _tokens(decoder.config.max_prompt, sizes.N),
            **dict(zip(names, parts, strict=True)),
        }
        for parts, sizes in zip(of_texts, EXAMPLES, strict=True)
    ]
    begin = Begin(decoder, memory)
    results = [begin(*each.values()) for each in inputs]
    cached = [f"cache{number}" for number in range(len(results[0]) - 1)]
    graphs["begin"] = Graph(begin, inputs, ["scores", *cached])
    if decoder.config.classes:
        return graphs
    examples = [
        {
            "tokens": scores.argmax(1, keepdim=True),
            "length": torch.tensor(decoder.config.max_prompt + 1),
            **dict(zip(cached, (part.clone() for part in cache), strict=True)),
            **dict(zip(names, parts, strict=True)),
        }
        for (scores, *cache), parts in zip(results, of_texts, strict=True)
    ]
    step = Step(decoder, memory, len(cached))
    graphs["step"] = Graph(step, examples, ["scores", *(f"next_{name}" for name in cached)])
    return graphs


def _photographs(backbone: Backbone, sizes: Sizes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sizes.B)
    shape = sizes.B, 3, *backbone.framing()["size"]
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return {"pixels": pixels, "frame": torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(sizes.B, 1)}


def _regions(channels: int, sizes: Sizes) -> Regions:
    """Random regions. Images have padding or no regions, so that no mask is left out."""
    generator = torch.Generator().manual_seed(sizes.B)
    return Regions(
        torch.rand(sizes.B, sizes.R, channels, generator=generator),
        torch.rand(sizes.B, sizes.R, 4, generator=generator).sort(dim=2).values,
        torch.tensor([sizes.R - 2, 0, sizes.R, 1][: sizes.B]),
    )


def _of_texts(memory: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    """The memory of images, with a row per text."""
    rows = torch.arange(sizes.N) % sizes.B
    # copies: an exported program must not depend on how the examples lie in memory
    return [part[rows].clone(memory_format=torch.contiguous_format) for part in memory]


def _tokens(max_prompt: int, texts: int) -> Tensor:
    """Prompts and <bos>: the first prompt is a full one, the others have one token."""
    tokens = torch.full((texts, max_prompt + 1), BOS)
    if max_prompt:
        tokens[:, :-1], tokens[1:, :-2] = 3, 0
    return tokens


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
