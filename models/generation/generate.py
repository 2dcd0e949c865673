"""Generate texts by beam search or sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models import ModelError
from models.decoders.interface import Decoder, Memory, evaluating
from models.generation.beam_search import beam_search
from models.generation.constraints import NEG_INF
from models.generation.options import Captions, Generation
from models.generation.sampling import sample
from models.regions import Regions


def generate(
    decoder: Decoder,
    memory: Memory,
    options: Generation,
    generator: torch.Generator | None = None,
    search: Callable[[Memory, Tensor | None], Captions] | None = None,
    prompts: Tensor | None = None,
) -> Captions:
    """Texts for each image of `memory`, best first.

    prompts: [B,P] int64, padded on the left; None: no prompts. search: replaces beam_search
    (models.generation.cuda_graph). Raises ModelError if no text satisfies the constraints.
    """
    if options.do_sample:
        found = sample(decoder, memory, options, generator, prompts=prompts)
    else:
        found = (
            search(memory, prompts) if search else beam_search(decoder, memory, options, prompts)
        )
    if (found.scores == NEG_INF).all(1).any():
        raise ModelError(
            "no caption was found that keeps all rules (bad_words_ids, force_words_ids, "
            "no_repeat_ngram_size, min_length, "
            "max_length); they leave none, or only with more num_beams"
        )
    return found


def generate_from_regions(
    decoder: Decoder,
    regions: Regions,
    options: Generation | None = None,
    generator: torch.Generator | None = None,
    prompts: Tensor | None = None,
    **names: Any,
) -> Captions:
    """`generate` from regions, in eval mode. names: fields of Generation, named as in Hugging
    Face's `generate`.
    """
    with evaluating(decoder), torch.inference_mode():
        options = replace(options or Generation(), **names)
        return generate(decoder, decoder.encode(regions), options, generator, prompts=prompts)
