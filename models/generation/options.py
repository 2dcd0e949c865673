"""Options of text generation, and its result.

The score of a text is sum(log p) / length**length_penalty. The length counts words and <eos>. So a
penalty of 0 gives the sum of log p and a penalty of 1 gives the mean.

Letters in shapes: B images, L maximum words of a text, N texts per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models import ModelError
from models.generation.constraints import BannedWords

MINIMUM = {
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
    """Options of text generation, with the names of Hugging Face's `generate`.

    min_length and max_length count words without <eos>. max_length None: the decoder's maximum.
    top_k 0: all words. no_repeat_ngram_size 0: n-grams may repeat. suppress_tokens: ids that are
    never generated. early_stopping: see `beam_search`.

    Raises ModelError if a value is out of range or two options exclude each other.
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
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for name, minimum in MINIMUM.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < minimum):
                raise ModelError(
                    f"{name} is {value!r}, it must be a whole number and at least {minimum}"
                )
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ModelError(f"{name} is {getattr(self, name)}, it must be in {low} to {high}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ModelError(
                f"early_stopping is {self.early_stopping!r}, it must be False, True or 'never'"
            )
        if not all(self.bad_words_ids) or not all(self.force_words_ids):
            raise ModelError(
                "bad_words_ids or force_words_ids contains an empty phrase; remove that phrase"
            )

    def _check_combinations(self) -> None:
        if self.max_length is not None and self.min_length > self.max_length:
            raise ModelError(f"min_length {self.min_length} is above max_length {self.max_length}")
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise ModelError("diversity_penalty needs num_beam_groups above 1")
        if self.do_sample:
            if self.num_beam_groups > 1 or self.force_words_ids:
                raise ModelError(
                    "do_sample cannot be combined with num_beam_groups or force_words_ids"
                )
            return
        if (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ModelError("temperature, top_k and top_p need do_sample")
        if self.num_beam_groups > 1 and self.force_words_ids:
            raise ModelError("num_beam_groups and force_words_ids cannot be combined")
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

    def limit(self, decoder_max_length: int) -> int:
        """Return the maximum number of words of a text, for a decoder with this maximum.

        Raises ModelError if max_length is above the decoder's maximum, or if min_length or the
        forced words do not fit.
        """
        limit = self.max_length or decoder_max_length
        if limit > decoder_max_length:
            raise ModelError(
                f"max_length is {limit}; this captioner supports captions of up to "
                f"{decoder_max_length} words"
            )
        if self.min_length > limit:
            raise ModelError(
                f"min_length is {self.min_length}, captions have at most {limit} words"
            )
        if (forced_words := sum(map(len, self.forced))) > limit:
            raise ModelError(
                f"force_words_ids have {forced_words} words, captions have at most {limit} words"
            )
        return limit

    @property
    def banned_words(self) -> BannedWords:
        return BannedWords(
            self.eos_token_id, self.min_length, self.no_repeat_ngram_size, self.bad_words_ids
        )

    @property
    def forced(self) -> list[tuple[int, ...]]:
        """The phrases of force_words_ids, without phrases that another phrase contains."""
        phrases = list(dict.fromkeys(map(tuple, self.force_words_ids)))
        return [
            phrase
            for phrase in phrases
            if not any(phrase != other and contains(other, phrase) for other in phrases)
        ]


def contains(words: tuple[int, ...], phrase: tuple[int, ...]) -> bool:
    """Whether `phrase` is a contiguous part of `words`."""
    return any(words[i : i + len(phrase)] == phrase for i in range(len(words) - len(phrase) + 1))


def first_tokens(
    images: int, bos: int, device: torch.device, prompts: Tensor | None = None
) -> Tensor:
    """The first input of a decoder: the prompts [B,P] followed by <bos>, [B,P+1] int64."""
    begin = torch.full((images, 1), bos, dtype=torch.int64, device=device)
    return begin if prompts is None else torch.cat([prompts.to(device), begin], dim=1)


def lengths(tokens: Tensor, eos: int) -> Tensor:
    """Number of words of each text [...,L], with <eos> if it fits into L: [...] int64."""
    return ((tokens != eos).sum(-1) + 1).clamp(max=tokens.shape[-1])


class Captions(NamedTuple):
    """N texts of each image. Results of beam search are sorted, best first; samples are not.

    tokens: [B,N,L] int64, filled with <eos> after the end of a text.
    scores: [B,N] float32, log_p / length**length_penalty.
    log_p: [B,N] float32. Scores and log_p are -inf for texts that were not found.
    """

    tokens: Tensor
    scores: Tensor
    log_p: Tensor
