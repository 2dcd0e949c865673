"""Text generation with a decoder: beam search or sampling, according to `Generation` options."""

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
    """Generate texts for each image of `memory`, best first.

    generator: random generator for samples; None: torch's default generator.
    search: replaces `beam_search`, with the same options (see models.generation.cuda_graph).
    prompts: [B,P] int64, padded on the left; None: no prompts.

    Raises ModelError if an image has no text that satisfies the constraints.
    """
    if options.do_sample:
        captions = sample(decoder, memory, options, generator, prompts=prompts)
    elif search:
        captions = search(memory, prompts)
    else:
        captions = beam_search(decoder, memory, options, prompts)
    if (captions.scores == NEG_INF).all(1).any():
        raise ModelError(
            "no caption satisfies all constraints (bad_words_ids, force_words_ids, "
            "no_repeat_ngram_size, min_length, max_length); relax one of them, or increase "
            "num_beams"
        )
    return captions


def generate_from_regions(
    decoder: Decoder,
    regions: Regions,
    options: Generation | None = None,
    generator: torch.Generator | None = None,
    prompts: Tensor | None = None,
    **changes: Any,
) -> Captions:
    """Encode regions and generate texts, in eval mode. Arguments as in `generate`.

    changes: fields of `Generation`, which replace those of `options`. The names are those of
        Hugging Face's `generate`.
    """
    with evaluating(decoder), torch.inference_mode():
        options = replace(options or Generation(), **changes)
        return generate(decoder, decoder.encode(regions), options, generator, prompts=prompts)
