"""Options of generation and its results.

A text scores sum(log p) / words**length_penalty, where <eos> counts as a word (0: the plain sum; 1:
the mean). B images, L words of a text at most, N texts per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models import ModelError
from models.generation.constraints import BannedWords

LEAST = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "max_length": 1,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
RANGES = {
    "length_penalty": (-10, 10),
    "temperature": (0.01, 100),
    "top_p": (1e-6, 1),
    "diversity_penalty": (0, 1000),
}


@dataclass(frozen=True)
class Generation:
    """Options of generation, named as in Hugging Face's `generate`. Lengths are in words without
    <eos>.
    """

    num_beams: int = 5
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    max_length: int | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    force_words_ids: tuple[tuple[int, ...], ...] = ()
    num_return_sequences: int = 1
    bos_token_id: int = 1
    eos_token_id: int = 2
    suppress_tokens: tuple[int, ...] = (0, 1, 3)

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ModelError(
                    f"{name} is {value!r}, it must be a whole number and at least {least}"
                )
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ModelError(f"{name} is {getattr(self, name)}, it must be in {low} to {high}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ModelError(
                f"early_stopping is {self.early_stopping!r}, it must be False, True or 'never'"
            )
        if not all(self.bad_words_ids) or not all(self.force_words_ids):
            raise ModelError("bad_words_ids and force_words_ids hold an empty phrase")
        if self.max_length is not None and self.min_length > self.max_length:
            raise ModelError(f"min_length {self.min_length} is above max_length {self.max_length}")
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise ModelError(
                "diversity_penalty acts between groups: it needs num_beam_groups above 1"
            )
        if self.do_sample:
            if self.num_beam_groups > 1 or self.force_words_ids:
                raise ModelError(
                    "do_sample draws each caption by itself: no num_beam_groups, no force_words_ids"
                )
            return
        if (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ModelError(
                "temperature, top_k and top_p shape what is drawn from: they need do_sample"
            )
        if self.num_beam_groups > 1 and self.force_words_ids:
            raise ModelError("num_beam_groups and force_words_ids do not go together")
        if self.num_beams % self.num_beam_groups:
            raise ModelError(
                f"num_beams {self.num_beams} is not a multiple of num_beam_groups "
                f"{self.num_beam_groups}"
            )
        if self.num_return_sequences > self.num_beams:
            raise ModelError(
                f"num_return_sequences {self.num_return_sequences} is above num_beams "
                f"{self.num_beams}"
            )

    def limit(self, most: int) -> int:
        """Largest number of words of a text, for a decoder that writes up to `most`; ModelError if
        the options need more.
        """
        limit = self.max_length or most
        if limit > most:
            raise ModelError(
                f"max_length is {limit}; this captioner was made for captions of up to {most} words"
            )
        if self.min_length > limit:
            raise ModelError(
                f"min_length is {self.min_length}, captions have at most {limit} words"
            )
        if sum(map(len, self.forced)) > limit:
            raise ModelError(f"force_words_ids are more than the {limit} words of a caption")
        return limit

    @property
    def barred(self) -> BannedWords:
        return BannedWords(
            self.eos_token_id, self.min_length, self.no_repeat_ngram_size, self.bad_words_ids
        )

    @property
    def forced(self) -> list[tuple[int, ...]]:
        """The phrases of force_words_ids that are not part of another one."""
        phrases = list(dict.fromkeys(map(tuple, self.force_words_ids)))
        return [
            one
            for one in phrases
            if not any(one != other and stands_in(one, other) for other in phrases)
        ]


def stands_in(phrase: tuple[int, ...], words: tuple[int, ...]) -> bool:
    return any(words[i : i + len(phrase)] == phrase for i in range(len(words) - len(phrase) + 1))


def first_tokens(
    images: int, bos: int, device: torch.device, prompts: Tensor | None = None
) -> Tensor:
    """The first tokens that a decoder reads: the prompts [B,P] and then <bos>, [B,P+1] int64."""
    begin = torch.full((images, 1), bos, dtype=torch.int64, device=device)
    return begin if prompts is None else torch.cat([prompts.to(device), begin], dim=1)


def lengths(tokens: Tensor, eos: int) -> Tensor:
    """Number of words of texts [...,L], <eos> included: [...]."""
    return ((tokens != eos).sum(-1) + 1).clamp(max=tokens.shape[-1])


class Captions(NamedTuple):
    """N texts of each image, best first (samples: in the order of drawing).

    tokens [B,N,L] int64, <eos> after their end; scores and log_p [B,N] float32, both -inf if fewer
    than N were found.
    """

    tokens: Tensor
    scores: Tensor
    log_p: Tensor
