"""Decoding options shared by evaluate and caption, named as in Hugging Face's generate."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from models import MAX_CAPTIONS, ModelError
from pipeline.cli import Settings, UserError, flag_of, setting

# names of the options in models.generation.options.Generation, if they differ
NAMES = {
    "beam": "num_beams",
    "sample": "do_sample",
    "beam_groups": "num_beam_groups",
    "diversity": "diversity_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "bad_words": "bad_words_ids",
    "force_words": "force_words_ids",
    "nbest": "num_return_sequences",
}


@dataclass(frozen=True)
class DecodingOptions(Settings):
    """Options of beam search and sampling. None: the default of the run, or of `Generation`."""

    beam: int | None = setting(
        None, "beam size  [the run's]", at_most=MAX_CAPTIONS, group="decoding"
    )
    length_penalty: float | None = setting(
        None,
        "length penalty: a score is the log-probability divided by the length to this power  [the "
        "run's]",
        group="decoding",
    )
    sample: bool = setting(False, "sample captions instead of beam search", group="decoding")
    temperature: float | None = setting(
        None, "sampling temperature, with --sample  [1]", group="decoding"
    )
    top_k: int | None = setting(
        None, "with --sample, sample from the K most likely words  [all]", group="decoding"
    )
    top_p: float | None = setting(
        None,
        "with --sample, nucleus sampling: sample from the most likely words whose probabilities "
        "sum to this value  [1]",
        group="decoding",
    )
    beam_groups: int | None = setting(
        None, "number of groups of diverse beam search  [1]", group="decoding"
    )
    diversity: float | None = setting(
        None,
        "diversity penalty: subtracted from the log-probability of a word each time that an "
        "earlier group chose it  [0]",
        group="decoding",
    )
    no_repeat_ngram: int | None = setting(
        None, "forbid repeated n-grams of this length  [allowed]", group="decoding"
    )
    min_length: int | None = setting(
        None, "minimum number of words of a caption  [0]", group="decoding"
    )
    max_length: int | None = setting(
        None, "maximum number of words of a caption  [the run's]", group="decoding"
    )
    bad_words: tuple[str, ...] = setting(
        (), "forbidden word or phrase; may be repeated", group="decoding"
    )
    force_words: tuple[str, ...] = setting(
        (), "required word or phrase; may be repeated", group="decoding"
    )
    consensus: int | None = setting(
        None,
        "minimum Bayes risk decoding: number of samples per image. The caption is the beam with "
        "the highest mean CIDEr against the samples",
        at_least=1,
        at_most=MAX_CAPTIONS,
        group="decoding",
    )
    nbest: int | None = setting(
        None,
        "number of captions per image; the output also has their log-probabilities  [1]",
        at_most=MAX_CAPTIONS,
        group="decoding",
    )

    def given(self) -> dict[str, Any]:
        """Return the options that are not their default, by name."""
        values = {
            item.name: getattr(self, item.name)
            for item in fields(DecodingOptions)
            if item.name != "extensions"
        }
        return {
            name: value
            for name, value in values.items()
            if value is not None and value is not False and value != ()
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample and self.beam is not None:
            raise UserError("--sample cannot be used with --beam: it samples without beam search")
        if self.consensus and (self.sample or self.beam_groups or self.force_words):
            raise UserError(
                "--consensus cannot be used with --sample, --beam-groups or --force-words: it "
                "chooses one of the beams"
            )


@contextlib.contextmanager
def by_option() -> Iterator[None]:
    """Context manager: replaces argument names in a ModelError by option names, and raises it as
    UserError.
    """
    flags = {
        NAMES.get(item.name, item.name): flag_of(item.name) for item in fields(DecodingOptions)
    }
    try:
        yield
    except ModelError as error:
        text = re.sub(
            r"\w+_\w+|\btemperature\b", lambda match: flags.get(match[0], match[0]), str(error)
        )
        raise UserError(text) from error
