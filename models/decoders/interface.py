"""What every decoder offers. Losses, generation, ensembles and checkpoints use nothing else.

A decoder is one file: a `DecoderConfig` with its sizes, a `Decoder` with five methods, and one line
in models/decoders/registry.py. B images, R regions, C channels, K texts an image, T tokens, N rows
(tokens without padding), V words, D width of the states.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ModelError
from models.decoders.attention import KVCache, Packed
from models.regions import Regions

MOST_LAYERS, MOST = 1000, 2**31 - 1  # far above any real size; still safe for index arithmetic

# some rows, their words [n,M]: scores [n,M] float32
ExactScores = Callable[[slice, Tensor], Tensor]


class Memory(Protocol):
    """An encoded batch of images."""

    @property
    def images(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, of fixed shapes for one batch size."""
        ...

    def keep(self, images: Tensor, in_place: bool = False) -> Memory:
        """These images, [b] int64 (an image may come several times); in_place: this memory is not
        used any more.
        """
        ...


OwnMemory = Any  # the Memory that the decoder's own `encode` returned


class DecodingCache(Protocol):
    """The state of growing texts, K per image."""

    def reorder(self, beam_idx: Tensor) -> None:
        """beam_idx [B,K] int64: which text of the same image each text continues."""

    def keep(self, images: Tensor) -> None:
        """Keep only these images, [b] int64, in this order."""

    def regroup(self, image: Tensor, text: Tensor) -> None:
        """Lay out other texts: text k of the new image b continues `text[b,k]` of `image[b,k]`,
        both [b,K] int64.
        """


def size(default: int, help: str, at_least: int = 1, at_most: int = MOST) -> Any:
    """A field of a decoder's config: a whole number within bounds, which is also a command-line
    option.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "at_least": at_least, "at_most": at_most}
    )


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder. `words` V and `channels` C follow from the vocabulary and the cache.

    max_length: largest number of words of a generated text. max_prompt: largest number of tokens of
    a prompt. Raises ModelError for a value outside its bounds.
    """

    words: int
    channels: int
    max_length: int = size(20, "largest number of words of a text")
    max_prompt: int = size(0, "largest number of tokens of a prompt", at_least=0)

    def __post_init__(self) -> None:
        bounds = {"words": (1, MOST), "channels": (1, MOST)}
        for item in dataclasses.fields(self):
            low, high = bounds.get(
                item.name, (item.metadata.get("at_least"), item.metadata.get("at_most"))
            )
            value = getattr(self, item.name)
            if low is not None and value < low:
                raise ModelError(f"{item.name} is {value}, it must be at least {low}")
            if high is not None and value > high:
                raise ModelError(f"{item.name} is {value}, it must be at most {high}")

    def __str__(self) -> str:
        """The sizes as training prints them."""
        own = [
            item.name
            for item in dataclasses.fields(self)
            if item.name not in {"words", "channels", "max_length", "max_prompt"}
        ]
        return (
            ", ".join(f"{name.replace('_', ' ')} {getattr(self, name)}" for name in own)
            or "no sizes of its own"
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> DecoderConfig:
        """The config recorded in a checkpoint's config.json; ModelError if it does not fit.

        Fields that were added later have their defaults.
        """
        known = {item.name: item for item in dataclasses.fields(cls)}
        required = {name for name, item in known.items() if item.default is dataclasses.MISSING}
        if wrong := sorted({*required} - {*record}) + sorted({*record} - {*known}):
            raise ModelError(f"its sizes are not those of {cls.__name__}: {', '.join(wrong)}")
        for name, value in record.items():
            number = (int, float) if isinstance(known[name].default, float) else (int,)
            if type(value) not in number or not math.isfinite(value):
                raise ModelError(f"{name} is {value!r}, not a number of its kind")
        return cls(**record)


class Decoder(nn.Module, ABC):
    """Regions [B,R,C] and tokens [B,K,T] to logits [B,K,T,V].

    A subclass has `config` and five methods: encode, states, output_layer, init_cache, and its
        __init__(config).
    """

    Config: type[DecoderConfig] = DecoderConfig
    Options: type | None = (
        None  # a frozen dataclass of the decoder's own options, whose fields Config has too
    )
    config: DecoderConfig

    @abstractmethod
    def encode(self, regions: Regions) -> Memory:
        """Encode each image once.

        Regions after `counts` are padding; R, or an image's count, may be 0.
        """

    @abstractmethod
    def states(
        self, words: Tensor, positions: Tensor, layout: Packed | KVCache, memory: OwnMemory
    ) -> Tensor:
        """The states [N,D] from which the output layer scores the word after each of `words` [N],
        at `positions` [N] of their texts.

        layout.image [N] is each row's image; attention uses the layout.
        """

    @abstractmethod
    def output_layer(self) -> tuple[Tensor, Tensor]:
        """Weight [V,D] and bias [V]: logits are states @ weight.T + bias."""

    @abstractmethod
    def init_cache(self, memory: OwnMemory, texts: int, prompts: Tensor | None = None) -> KVCache:
        """An empty cache for `texts` texts per image. prompts: [B,P] int64, padded on the left with
        0.
        """

    # ---- from these

    def logits(self, states: Tensor) -> Tensor:
        """Scores of the next word: states [...,D] to [...,V]."""
        return F.linear(states, *self.output_layer())

    def decode(self, tokens: Tensor, memory: Memory, cache: KVCache | None = None) -> Tensor:
        """Score the next word after each of `tokens` [B,K,T]; returns logits [B,K,T,V].

        With a `cache`, `tokens` are the new ones only: first [B,1,P+1], prompts and the token that
        begins the texts (K is 1: all texts of an image share it), then one of each text, [B,K,1].
        """
        return self.logits(self.read(tokens, memory, cache))

    def next_words(
        self, tokens: Tensor, memory: Memory, cache: KVCache
    ) -> tuple[Tensor, ExactScores | None]:
        """Scores [B*K,V] of the word after `tokens` [B,K,T], as `decode` with a cache.

        The second value is None if the scores are exact. If they were rounded by a bf16 product, it
        is a function that computes float32 scores of given words.
        """
        states = self.read(tokens, memory, cache)[:, :, -1].flatten(0, 1)
        scores = self.logits(states)

        def exact(rows: slice, words: Tensor) -> Tensor:
            weight, bias = self.output_layer()
            dots = (F.embedding(words, weight) * states[rows, None]).sum(2)
            return dots + F.embedding(words, bias[:, None])[:, :, 0]

        return scores, None if scores.dtype == states.dtype else exact

    def read(self, tokens: Tensor, memory: Memory, cache: KVCache | None = None) -> Tensor:
        """As `decode`, up to the output layer: states [B,K,T,D]."""
        if cache is None:
            text = Packed(tokens)
            states = self.states(text.words, text.positions, text, memory)[: text.count]
        else:
            cache.begin(*tokens.shape[1:])
            states = self.states(tokens.flatten(), cache.positions(tokens.shape[1]), cache, memory)
        return states.view(*tokens.shape, -1)

    def forward(self, regions: Regions | Memory, text: Packed, sampled: float = 0.0) -> Tensor:
        """States [N,D] of whole texts: encode, then decode up to the output layer. Training calls
        this.

        Rows after `text.count` are padding.
        regions: as they are, or encoded.
        sampled: the share of words that are replaced by the decoder's own guess from the words
            before (scheduled sampling in two passes, the first without a gradient: Mihaylova and
            Martins 2019).
        """
        memory = self.encode(regions) if isinstance(regions, Regions) else regions
        words = text.words
        if sampled:
            with torch.no_grad():
                guessed = (
                    self.logits(self.states(words, text.positions, text, memory)).argmax(1).roll(1)
                )
            replaced = text.replaceable & (torch.rand(words.shape, device=words.device) < sampled)
            # a text's rows follow one another, so roll(1) is the guess for each
            words = torch.where(replaced, guessed, words)
        return self.states(words, text.positions, text, memory)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode (no dropout) inside the block."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
