"""The captioner: a Transformer that encodes an image's regions once and decodes its K captions over them.

Pre-norm layers (Xiong et al. 2020) of Vaswani et al. 2017. B images, R regions, C channels, K captions an image,
T tokens, N rows, V words, D model width, H heads, d = D/H.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ModelError
from models.decoders.attention import CrossAttention, KVCache, Layout, Packed, SelfAttention, additive, move
from models.decoders.dropout import Dropout
from models.generation.beam_search import generate
from models.generation.options import Captions, Generation
from models.regions import Regions

MOST_LAYERS, MOST = 1000, 2**31 - 1  # far above any that trains; what index arithmetic bears
BOX_WAVES = 4  # frequencies pi/2 to 4 pi a coordinate: a grid of up to about 16 cells a side keeps its places apart


@dataclass(frozen=True)
class CaptionerConfig:
    """The sizes of a captioner; `words` V and `channels` C follow from the vocabulary and the cache."""

    words: int
    channels: int
    width: int = 512
    heads: int = 8
    encoder_layers: int = 3
    decoder_layers: int = 3
    feedforward: int = 2048
    dropout: float = 0.1
    max_length: int = 20

    def __post_init__(self) -> None:
        if self.encoder_layers < 0:
            raise ModelError(f"encoder_layers is {self.encoder_layers}, it must be at least 0")
        for name in ("words", "channels", "width", "heads", "decoder_layers", "feedforward", "max_length"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name, most in {name: MOST_LAYERS if name.endswith("layers") else MOST for name in vars(self)}.items():
            if getattr(self, name) > most:
                raise ModelError(f"{name} is {getattr(self, name)}, it must be at most {most}")
        if self.width % self.heads:
            raise ModelError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout is {self.dropout}, it must be in [0, 1)")


ExactScores = Callable[[slice, Tensor], Tensor]  # some rows, their words [n,M]: scores [n,M] float32


class Memory(NamedTuple):
    """An encoded batch of images: keys and values [B,H,R,d] for each decoder layer; mask [B,1,1,R] to add, or None."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None

    @property
    def images(self) -> int:
        return self.keys[0].shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.keys, *self.values) if self.mask is None else (*self.keys, *self.values, self.mask)

    def keep(self, images: Tensor, in_place: bool = False) -> Memory:
        """Only these images, `images` [b] int64; in_place: moved to the front of this memory, which is spent by it."""
        mask = None if self.mask is None else self.mask[images]
        regions = self.keys[0].shape[2]
        take = (lambda part: move(part, images, regions)) if in_place else (lambda part: part.index_select(0, images))
        return Memory(tuple(map(take, self.keys)), tuple(map(take, self.values)), mask)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module without dropout for a while, then as it was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


class FeedForward(nn.Sequential):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class EncoderLayer(nn.Module):
    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads)
        self.feedforward = FeedForward(config.width, config.feedforward)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x [B,R,D] to [B,R,D]."""
        x = x + self.dropout(self.attention(self.norms[0](x), layout))
        return x + self.dropout(self.feedforward(self.norms[1](x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads)
        self.cross = CrossAttention(config.width, config.heads)
        self.feedforward = FeedForward(config.width, config.feedforward)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, layout: Layout, memory: Memory, layer: int) -> Tensor:
        """Rows x [N,D] to [N,D]."""
        x = x + self.dropout(self.attention(self.norms[0](x), layout, layer))
        x = x + self.dropout(self.cross(self.norms[1](x), layout, memory.keys[layer], memory.values[layer], memory.mask))
        return x + self.dropout(self.feedforward(self.norms[2](x)))


def waves(places: Tensor) -> Tensor:
    """Coordinates [...,n] in -1..1 as sines and cosines of growing frequency (Tancik et al. 2020), [...,2*n*BOX_WAVES]."""
    angles = places[..., None] * (math.pi / 2 * 2.0 ** torch.arange(BOX_WAVES, device=places.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class Captioner(nn.Module):
    """Regions [B,R,C] and tokens [B,K,T] to logits [B,K,T,V]."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.region_norm = nn.LayerNorm(config.channels)
        self.region = nn.Linear(config.channels, width)
        self.box = nn.Linear(8 * BOX_WAVES, width)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.memory_norm = nn.LayerNorm(width)
        self.memory_box = nn.Linear(8 * BOX_WAVES, width)
        self.word = nn.Embedding(config.words, width)
        self.position = nn.Embedding(config.max_length + 1, width)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.output_bias = nn.Parameter(torch.zeros(config.words))
        for embedding in (self.word, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.memory_box.weight, std=(4 * BOX_WAVES) ** -0.5)  # as large as the normed content beside it
        for layers, sublayers in ((self.encoder, 2), (self.decoder, 3)):
            for name, weight in layers.named_parameters():  # what is added to the stream begins small (GPT-2's rule)
                if name.endswith(("attention.out.weight", "cross.out.weight", "feedforward.2.weight")):
                    weight.data.mul_((sublayers * len(layers)) ** -0.5)

    def encode(self, regions: Regions) -> Memory:
        """Encode each image once; regions past `counts` are never attended to."""
        features, boxes, counts = regions
        there = (torch.arange(features.shape[1], device=features.device) < counts[:, None])[:, None, None, :]
        everywhere = features.device.type == "cpu" and bool(there.all())  # no such look at a GPU: it waits
        layout = Layout(None if everywhere else additive(there))
        places = waves(boxes)
        x = self.dropout(self.region(self.region_norm(features.float())) + self.box(places))
        for layer in self.encoder:
            x = layer(x, layout)
        x = self.memory_norm(x) + self.memory_box(places)
        keys, values = zip(*(layer.cross.project(x) for layer in self.decoder), strict=True)
        return Memory(keys, values, layout.mask)

    def states(self, words: Tensor, positions: Tensor, layout: Packed | KVCache, memory: Memory) -> Tensor:
        """What the output layer reads after each of `words` [N], which stand at `positions` in their captions; [N,D]."""
        x = self.dropout(self.word(words) * self.config.width**0.5 + self.position(positions))
        for number, layer in enumerate(self.decoder):
            x = layer(x, layout, memory, number)
        return self.norm(x)

    def logits(self, states: Tensor) -> Tensor:
        """Scores of the words [...,V] by states [...,D]; the output layer shares the word embedding's matrix."""
        return F.linear(states, self.word.weight, self.output_bias)

    def decode(self, tokens: Tensor, memory: Memory, cache: KVCache | None = None) -> Tensor:
        """Score the next word after each of `tokens` [B,K,T]; returns logits [B,K,T,V].

        With a `cache`, `tokens` are only the new ones: in the first call any number, and K may be 1, a beginning that all
        captions share; one of each caption after it.
        """
        return self.logits(self.read(tokens, memory, cache))

    def next_words(self, tokens: Tensor, memory: Memory, cache: KVCache) -> tuple[Tensor, ExactScores | None]:
        """Scores [B*K,V] of the word after `tokens` [B,K,T], as `decode` with a cache; and where a product rounded them, what
        gives those of some words exactly (None: they are)."""
        states = self.read(tokens, memory, cache)[:, :, -1].flatten(0, 1)
        scores = self.logits(states)

        def exact(rows: slice, words: Tensor) -> Tensor:
            dots = (F.embedding(words, self.word.weight) * states[rows, None]).sum(2)
            return dots + F.embedding(words, self.output_bias[:, None])[:, :, 0]

        return scores, None if scores.dtype == states.dtype else exact

    def read(self, tokens: Tensor, memory: Memory, cache: KVCache | None = None) -> Tensor:
        """As `decode`, up to the output layer: states [B,K,T,D]."""
        if cache is None:
            text = Packed(tokens)
            found = self.states(text.words, text.positions, text, memory)
        else:
            cache.begin(*tokens.shape[1:])
            positions = torch.arange(cache.start, cache.length, device=tokens.device)
            found = self.states(tokens.flatten(), positions.expand(tokens.shape).flatten(), cache, memory)
        return found.view(*tokens.shape, -1)

    def forward(self, regions: Regions | Memory, text: Packed, sampled: float = 0.0) -> Tensor:
        """States [N,D] of whole captions: encode, then decode up to the output layer (training's entry). Rows past
        text.count are of no word.

        regions: as they are, or encoded.
        sampled: this share of the words is replaced by what the captioner itself guesses there from the words before
        (scheduled sampling for Transformers, Mihaylova and Martins 2019: two passes, the first without a gradient).
        """
        memory, words = regions if isinstance(regions, Memory) else self.encode(regions), text.words
        if sampled:
            with torch.no_grad():
                guessed = self.logits(self.states(words, text.positions, text, memory)).argmax(1).roll(1)
            drawn = torch.rand(words.shape, device=words.device) < sampled
            words = torch.where(drawn & (text.positions > 0), guessed, words)  # a caption's words stand one after another
        return self.states(words, text.positions, text, memory)

    def generate(
        self, regions: Regions, options: Generation | None = None, generator: torch.Generator | None = None, **names: Any
    ) -> Captions:
        """Captions of each image, as `options` say; `names` are fields of Generation, those of Hugging Face's `generate`."""
        with evaluating(self), torch.inference_mode():
            return generate(self, self.encode(regions), replace(options or Generation(), **names), generator)

    def start(self, memory: Memory, captions: int) -> KVCache:
        """An empty decoding cache for `captions` captions an image of `memory`."""
        return KVCache(self.config.decoder_layers, captions, self.config.max_length + 1, memory.keys[0])
