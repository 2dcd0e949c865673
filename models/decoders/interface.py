"""The interface of decoders, used by losses, generation, ensembles and checkpoints.

A decoder is one file. It defines a `DecoderConfig` with the sizes and a `Decoder` with five
methods. One line in models/decoders/registry.py registers it.

Letters in shapes: B images, R regions per image, C channels, K texts per image, T tokens, N rows
(tokens without padding), V words in the vocabulary, D width of the hidden states.
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
from models.decoders.attention import Packed
from models.regions import Regions

MAX_LAYERS = 1000  # far above the depth of any decoder that trains
MAX_SIZE = 2**31 - 1  # largest size that 32-bit index arithmetic supports

# (rows: a slice of n rows, words [n,M] int64) -> float32 logits [n,M] of these words
ExactLogits = Callable[[slice, Tensor], Tensor]


class Memory(Protocol):
    """An encoded batch of images."""

    @property
    def images(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the memory. Their shapes depend only on the batch."""
        ...

    def keep(self, images: Tensor, in_place: bool = False) -> Memory:
        """Select `images` [b] int64; an index may occur several times.

        in_place: the result may reuse the storage of this memory. The caller must not use this
            memory afterwards.
        """
        ...


OwnMemory = Any  # the Memory type that the same decoder's `encode` returns


class DecodingCache(Protocol):
    """The state of incremental decoding, for K growing texts per image. `KVCache` is one."""

    def begin(self, texts: int, tokens: int) -> None:
        """Prepare for `tokens` new tokens in each of `texts` texts.

        The first call may have texts = 1, for a beginning that all K texts share, and tokens > 1:
        the prompt and the first token after it. In all later calls texts is K and tokens is 1.
        """

    def positions(self, texts: int) -> Tensor:
        """The position of each new token in its text: [B*K*T] int64."""
        ...

    def reorder(self, beam_idx: Tensor) -> None:
        """Reorder the texts of each image: text k continues the history of text beam_idx[b,k].

        beam_idx: [B,K] int64, indices of texts of the same image.
        """

    def keep(self, images: Tensor) -> None:
        """Keep only `images` [b] int64, in this order."""

    def regroup(self, image: Tensor, text: Tensor) -> None:
        """Replace all texts: the new text (b, k) continues the old text (image[b,k], text[b,k]).

        image, text: [b,K] int64. All entries of one row of `image` are equal.
        """

    def continuation(self, tokens: Tensor, is_token: Tensor) -> Packed:
        """The layout of texts that continue the prompts: tokens [B,K,T] int64.

        This cache has one text per image, whose prompt and first token it has read. With G groups
        of K texts per image, B is G times the number of images.
        is_token: [B,K,T] bool, False for padding.
        """
        ...


OwnCache = Any  # the DecodingCache type that the same decoder's `init_cache` returns


def size(default: int, help: str, at_least: int = 1, at_most: int = MAX_SIZE) -> Any:
    """Declare an integer field of a config, with bounds. It becomes a command-line option."""
    return dataclasses.field(
        default=default, metadata={"help": help, "at_least": at_least, "at_most": at_most}
    )


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder.

    words: V, the size of the vocabulary.
    channels: C, the number of feature channels in the cache.
    max_length: maximum number of words in a generated text.
    max_prompt: maximum number of tokens in a prompt.

    Raises ModelError if a value is out of bounds.
    """

    words: int
    channels: int
    max_length: int = size(20, "maximum number of words in a text")
    max_prompt: int = size(0, "maximum number of tokens in a prompt", at_least=0)
    # the number of answers of the classifier; keyword-only, so that positional sizes stay valid
    classes: int = dataclasses.field(
        default=0, kw_only=True, metadata={"at_least": 0, "at_most": MAX_SIZE}
    )
    # the number of channels of the second kind of regions; 0: there is one kind
    more_channels: int = dataclasses.field(
        default=0, kw_only=True, metadata={"at_least": 0, "at_most": MAX_SIZE}
    )

    def __post_init__(self) -> None:
        bounds = {"words": (1, MAX_SIZE), "channels": (1, MAX_SIZE)}
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
        """The sizes that this decoder adds, for the log of a training run."""
        common_names = {item.name for item in dataclasses.fields(DecoderConfig)}
        names = [item.name for item in dataclasses.fields(self) if item.name not in common_names]
        sizes = ", ".join(f"{name.replace('_', ' ')} {getattr(self, name)}" for name in names)
        return sizes or "no sizes of its own"

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> DecoderConfig:
        """Read the config from the `model` record of a checkpoint's config.json.

        A field that is missing in an older record gets its default.
        Raises ModelError if the names or the types of the record do not fit.
        """
        known = {item.name: item for item in dataclasses.fields(cls)}
        required = {name for name, item in known.items() if item.default is dataclasses.MISSING}
        missing, unknown = sorted({*required} - {*record}), sorted({*record} - {*known})
        if missing or unknown:
            problems = ", ".join(missing + unknown)
            raise ModelError(f"the sizes of {cls.__name__} differ; missing or unknown: {problems}")
        for name, value in record.items():
            types, kind = _types_of(known[name].default)
            if type(value) not in types or not math.isfinite(value):
                raise ModelError(f"{name} is {value!r}, it must be {kind}")
        return cls(**record)


def _types_of(default: Any) -> tuple[tuple[type, ...], str]:
    """The types of a field with this default, and their name in messages."""
    if isinstance(default, bool):
        return (bool,), "true or false"
    return ((int, float), "a number") if isinstance(default, float) else ((int,), "an integer")


class Decoder(nn.Module, ABC):
    """Maps regions [B,R,C] and tokens [B,K,T] to logits [B,K,T,V].

    A subclass sets `config` and implements five methods: __init__(config), encode, states,
    output_layer and init_cache.
    """

    Config: type[DecoderConfig] = DecoderConfig
    # A frozen dataclass of the options that this decoder adds. Config has the same fields.
    Options: type | None = None
    config: DecoderConfig
    # scores of the classes, from the state after a prompt; only if the config has classes
    head: nn.Linear

    @abstractmethod
    def encode(self, regions: Regions) -> Memory:
        """Encode each image once.

        Regions after `regions.counts` are padding. R and the count of an image may be 0.
        """

    @abstractmethod
    def states(
        self, words: Tensor, positions: Tensor, layout: Packed | OwnCache, memory: OwnMemory
    ) -> Tensor:
        """Compute the final hidden states [N,D], the input of the output layer.

        words: [N] int64, one token per row.
        positions: [N] int64, the position of each token in its text.
        layout: whole texts, or the cache of this decoder, after its `begin`. It arranges the rows
            for attention; layout.image [N] is the image of each row.
        """

    @abstractmethod
    def output_layer(self) -> tuple[Tensor, Tensor]:
        """Return weight [V,D] and bias [V]: logits = states @ weight.T + bias."""

    @abstractmethod
    def init_cache(self, memory: OwnMemory, texts: int, prompts: Tensor | None = None) -> OwnCache:
        """Create an empty cache for `texts` texts per image.

        prompts: [B,P] int64, padded on the left with 0; None: no prompts.
        """

    # ---- methods that use the five above

    def logits(self, states: Tensor) -> Tensor:
        """Apply the output layer: states [...,D] to logits [...,V] of the next word."""
        return F.linear(states, *self.output_layer())

    def decode(self, tokens: Tensor, memory: Memory, cache: DecodingCache | None = None) -> Tensor:
        """Compute logits [B,K,T,V] of the word after each of `tokens` [B,K,T] int64.

        With a `cache`, pass only the new tokens. The first call reads [B,1,P+1]: the prompts and
        the token that begins the texts, which all K texts of an image share. Each later call reads
        one new token per text, [B,K,1].
        """
        return self.logits(self.decode_states(tokens, memory, cache))

    def next_words(
        self, tokens: Tensor, memory: Memory, cache: DecodingCache
    ) -> tuple[Tensor, ExactLogits | None]:
        """Compute logits [B*K,V] of the word after `tokens` [B,K,T]; arguments as in `decode`.

        The second result is None if the logits have full precision. If a bf16 product rounded them,
        it is a function that computes the float32 logits of selected words.
        """
        states = self.decode_states(tokens, memory, cache)[:, :, -1].flatten(0, 1)
        logits = self.logits(states)

        def exact_logits(rows: slice, words: Tensor) -> Tensor:
            weight, bias = self.output_layer()
            dots = (F.embedding(words, weight) * states[rows, None]).sum(2)
            return dots + F.embedding(words, bias[:, None])[:, :, 0]

        return logits, None if logits.dtype == states.dtype else exact_logits

    def class_logits(self, tokens: Tensor, memory: Memory, cache: DecodingCache) -> Tensor:
        """Scores [B,classes] of the answers to prompts.

        tokens: [B,1,P+1], prompts padded on the left and then <bos>; cache: of the same prompts.
        """
        return self.head(self.decode_states(tokens, memory, cache)[:, 0, -1])

    def decode_states(
        self, tokens: Tensor, memory: Memory, cache: DecodingCache | None = None
    ) -> Tensor:
        """Compute the hidden states [B,K,T,D] of `decode`, without the output layer."""
        if cache is None:
            text = Packed(tokens)
            states = self.states(text.words, text.positions, text, memory)[: text.count]
        else:
            cache.begin(*tokens.shape[1:])
            states = self.states(tokens.flatten(), cache.positions(tokens.shape[1]), cache, memory)
        return states.view(*tokens.shape, -1)

    def selected_states(self, words: Tensor, text: Packed, memory: OwnMemory) -> Tensor:
        """Compute the final hidden states [B,Q,D] of the tokens `text.selected`.

        A decoder may override this method to omit computations that only the final states of the
        other tokens need.
        """
        assert text.selected is not None
        return self.states(words, text.positions, text, memory)[text.selected.rows]

    def forward(self, regions: Regions | Memory, text: Packed, sampled: float = 0.0) -> Tensor:
        """Compute the hidden states [N,D] of whole texts. Training uses this method.

        Rows after `text.count` are padding. If `text` has selected tokens, the result has only
        their states [B,Q,D].

        regions: regions, or images that are already encoded.
        sampled: probability that an input word is replaced by the decoder's own prediction from
            the preceding words. This is scheduled sampling in two passes (Mihaylova and Martins
            2019); the first pass has no gradient.
        """
        memory = self.encode(regions) if isinstance(regions, Regions) else regions
        words = text.words
        if sampled:
            with torch.no_grad():
                logits = self.logits(self.states(words, text.positions, text, memory))
            # The rows of a text are contiguous, so row n-1 predicts the word of row n.
            predictions = logits.argmax(1).roll(1)
            replaced = text.replaceable & (torch.rand(words.shape, device=words.device) < sampled)
            words = torch.where(replaced, predictions, words)
        if text.selected is not None:
            return self.selected_states(words, text, memory)
        return self.states(words, text.positions, text, memory)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set a module to eval mode (no dropout) inside the context, then restore its mode."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
