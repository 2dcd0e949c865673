"""What is asked of a captioner, and what it gives: how captions are found, and captions with their scores.

A caption scores sum(log p) / words**length_penalty, its <eos> counted as a word (0: the plain sum; 1: the mean). B images,
L words of a caption at most, N captions asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from models import ModelError
from models.rules import Barred

if TYPE_CHECKING:
    from models.captioner import Captioner


@dataclass(frozen=True)
class Generation:
    """How captions are found, by the names of Hugging Face's `generate`; lengths are in words, the <eos> not counted."""

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
        for name in ("num_beams", "num_beam_groups", "num_return_sequences", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("top_k", "diversity_penalty", "no_repeat_ngram_size", "min_length"):
            if getattr(self, name) < 0:
                raise ModelError(f"{name} is {getattr(self, name)}, it must be at least 0")
        if not self.temperature > 0:
            raise ModelError(f"temperature is {self.temperature}, it must be above 0")
        if not 0 < self.top_p <= 1:
            raise ModelError(f"top_p is {self.top_p}, it must be above 0 and at most 1")
        if self.early_stopping not in (False, True, "never"):
            raise ModelError(f"early_stopping is {self.early_stopping!r}, it must be False, True or 'never'")
        if self.max_length is not None and self.min_length > self.max_length:
            raise ModelError(f"min_length {self.min_length} is above max_length {self.max_length}")
        if self.num_beams % self.num_beam_groups:
            raise ModelError(f"num_beams {self.num_beams} is not a multiple of num_beam_groups {self.num_beam_groups}")
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise ModelError("diversity_penalty acts between groups: it needs num_beam_groups above 1")
        if self.num_beam_groups > 1 and self.force_words_ids:
            raise ModelError("num_beam_groups and force_words_ids do not go together")
        if self.do_sample and (self.num_beam_groups > 1 or self.force_words_ids):
            raise ModelError("do_sample draws each caption by itself: no num_beam_groups, no force_words_ids")
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ModelError("temperature, top_k and top_p shape what is drawn from: they need do_sample")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ModelError(f"num_return_sequences {self.num_return_sequences} is above num_beams {self.num_beams}")
        if not all(self.bad_words_ids) or not all(self.force_words_ids):
            raise ModelError("bad_words_ids and force_words_ids hold an empty phrase")

    def limit(self, captioner: Captioner) -> int:
        """The most words of a caption; ModelError where the captioner cannot write as many, or the rules need more."""
        most = captioner.config.max_length
        limit = self.max_length or most
        if limit > most:
            raise ModelError(f"max_length is {limit}; this captioner was made for captions of up to {most} words")
        if self.min_length > limit:
            raise ModelError(f"min_length is {self.min_length}, captions have at most {limit} words")
        if sum(map(len, self.force_words_ids)) > limit:
            raise ModelError(f"force_words_ids are more than the {limit} words of a caption")
        return limit

    @property
    def barred(self) -> Barred:
        return Barred(
            self.eos_token_id, self.suppress_tokens, self.min_length, self.no_repeat_ngram_size, self.bad_words_ids
        )


class Captions(NamedTuple):
    """N captions of each image, best first (samples: as drawn): tokens [B,N,L] int64, <eos> after their end; scores and
    log_p [B,N] float32, both -inf where fewer than N were found."""

    tokens: Tensor
    scores: Tensor
    log_p: Tensor
