"""Decoding options shared by evaluate and caption, named as in Hugging Face's generate."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from models import MAX_CAPTIONS, ModelError
from pipeline.cli import Settings, UserError, flag_of, setting

# names of options in models.generation.options.Generation, where they differ
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
    """Options of beam search and sampling. None: the run's own value, or the default of
    Generation.
    """

    beam: int | None = setting(None, "beams  [the run's]", at_most=MAX_CAPTIONS, group="decoding")
    length_penalty: float | None = setting(
        None,
        "length penalty: scores are divided by length to this power  [the run's]",
        group="decoding",
    )
    sample: bool = setting(False, "draw random captions instead of beam search", group="decoding")
    temperature: float | None = setting(
        None, "sampling temperature, with --sample  [1]", group="decoding"
    )
    top_k: int | None = setting(
        None, "with --sample, draw from the K most likely words  [all]", group="decoding"
    )
    top_p: float | None = setting(
        None,
        "with --sample, nucleus sampling: draw from the most likely words whose probabilities add "
        "up to this  [1]",
        group="decoding",
    )
    beam_groups: int | None = setting(None, "groups of diverse beam search  [1]", group="decoding")
    diversity: float | None = setting(
        None,
        "diversity penalty: log-probability that a word loses if an earlier group chose it  [0]",
        group="decoding",
    )
    no_repeat_ngram: int | None = setting(
        None, "forbid repeated N-grams  [not forbidden]", group="decoding"
    )
    min_length: int | None = setting(
        None, "smallest number of words of a caption  [0]", group="decoding"
    )
    max_length: int | None = setting(
        None, "largest number of words of a caption  [the run's]", group="decoding"
    )
    bad_words: tuple[str, ...] = setting(
        (), "forbidden word or phrase; may be repeated", group="decoding"
    )
    force_words: tuple[str, ...] = setting(
        (), "required word or phrase; may be repeated", group="decoding"
    )
    consensus: int | None = setting(
        None,
        "minimum Bayes risk decoding: choose the beam with the highest mean CIDEr against this "
        "many samples",
        at_least=1,
        at_most=MAX_CAPTIONS,
        group="decoding",
    )
    nbest: int | None = setting(
        None,
        "captions per image, with their log-probabilities  [1]",
        at_most=MAX_CAPTIONS,
        group="decoding",
    )

    def given(self) -> dict[str, Any]:
        """The options that were set, by name."""
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
            raise UserError("--sample draws each caption by itself; it takes no --beam")
        if self.consensus and (self.sample or self.beam_groups or self.force_words):
            raise UserError(
                "--consensus chooses among the beams: no --sample, --beam-groups or "
                "--force-words with it"
            )


@contextlib.contextmanager
def by_option() -> Iterator[None]:
    """Rewrite the argument names in a ModelError as option names."""
    flags = {
        NAMES.get(item.name, item.name): flag_of(item.name) for item in fields(DecodingOptions)
    }
    try:
        yield
    except ModelError as error:
        text = re.sub(
            r"\w+_\w+|\btemperature\b", lambda found: flags.get(found[0], found[0]), str(error)
        )
        raise UserError(text) from error
