"""Beam search as a CUDA graph: the host launches a whole search at once."""

from __future__ import annotations

import torch
from torch import Tensor

from models.decoders.interface import Decoder, Memory
from models.generation.beam_search import beam_search
from models.generation.options import Captions, Generation


class CapturedSearch:
    """Beam search for memories of one shape, captured as one CUDA graph.

    This is possible because the search loop has fixed shapes on a GPU.
    """

    @torch.inference_mode()
    def __init__(
        self, decoder: Decoder, memory: Memory, options: Generation, prompts: Tensor | None
    ) -> None:
        self.memory = memory.keep(torch.arange(memory.images, device=memory.device))
        self.prompts = None if prompts is None else prompts.to(memory.device).clone()
        warmup_stream = torch.cuda.Stream()
        warmup_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup_stream):  # libraries initialise in the first run
            beam_search(decoder, self.memory, options, self.prompts)
        torch.cuda.current_stream().wait_stream(warmup_stream)
        # Autocast must not reuse earlier casts, which are freed before the replay. It must not keep
        # casts of the capture either, which are valid only after a replay.
        torch.clear_autocast_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.captions = beam_search(decoder, self.memory, options, self.prompts)
        torch.clear_autocast_cache()

    @torch.inference_mode()
    def __call__(self, memory: Memory, prompts: Tensor | None) -> Captions:
        if self.prompts is not None:
            assert prompts is not None  # BeamSearch captures one graph per shape
            self.prompts.copy_(prompts)
        for static_input, new_input in zip(self.memory.tensors(), memory.tensors(), strict=True):
            static_input.copy_(new_input)
        self.graph.replay()
        return Captions(*(part.clone() for part in self.captions))


class BeamSearch:
    """`beam_search` with fixed decoder and options; it uses CUDA graphs on a GPU.

    A shape is captured when it occurs for the second time. Values of the decoder's weights may
    change between calls. Their storage, their dtype and the autocast mode must not change.
    """

    def __init__(self, decoder: Decoder, options: Generation) -> None:
        self.decoder, self.options = decoder, options
        self.captured: dict[tuple, CapturedSearch | None] = {}  # None: the shape occurred once

    def __call__(self, memory: Memory, prompts: Tensor | None = None) -> Captions:
        if memory.device.type != "cuda" or self.options.force_words_ids:
            return beam_search(self.decoder, memory, self.options, prompts)
        prompt_shape = None if prompts is None else prompts.shape
        shape = (*(part.shape for part in memory.tensors()), prompt_shape)
        if shape not in self.captured:
            self.captured[shape] = None
            return beam_search(self.decoder, memory, self.options, prompts)
        search = self.captured[shape]
        if search is None:
            search = CapturedSearch(self.decoder, memory, self.options, prompts)
            self.captured[shape] = search
        return search(memory, prompts)
