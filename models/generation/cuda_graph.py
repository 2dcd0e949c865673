"""Beam search as CUDA graphs: the host launches a whole search at once."""

from __future__ import annotations

import torch
from torch import Tensor

from models.decoders.interface import Decoder, Memory
from models.generation.beam_search import beam_search
from models.generation.options import Captions, Generation


class CapturedSearch:
    """Beam search over memories of one shape, captured as one graph (the loop has fixed shapes on a
    GPU).
    """

    @torch.inference_mode()
    def __init__(
        self, decoder: Decoder, memory: Memory, options: Generation, prompts: Tensor | None
    ) -> None:
        self.memory = memory.keep(torch.arange(memory.images, device=memory.device))
        self.prompts = None if prompts is None else prompts.to(memory.device).clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            aside
        ):  # a first run outside of the graph, in which libraries initialise
            beam_search(decoder, self.memory, options, self.prompts)
        torch.cuda.current_stream().wait_stream(aside)
        # casts made before would be gone by then, and those made here hold only after a replay
        torch.clear_autocast_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.found = beam_search(decoder, self.memory, options, self.prompts)
        torch.clear_autocast_cache()

    @torch.inference_mode()
    def __call__(self, memory: Memory, prompts: Tensor | None) -> Captions:
        if self.prompts is not None:
            assert prompts is not None  # BeamSearch has a graph of its own for each shape
            self.prompts.copy_(prompts)
        for kept, new in zip(self.memory.tensors(), memory.tensors(), strict=True):
            kept.copy_(new)
        self.graph.replay()
        return Captions(*(part.clone() for part in self.found))


class BeamSearch:
    """`beam_search` of a decoder with fixed options. On a GPU each shape is captured when it occurs
    for the second time.

    The decoder's weights may change in place, but must keep their address and dtype; autocast must
    not change.
    """

    def __init__(self, decoder: Decoder, options: Generation) -> None:
        self.decoder, self.options = decoder, options
        self.captured: dict[tuple, CapturedSearch | None] = {}

    def __call__(self, memory: Memory, prompts: Tensor | None = None) -> Captions:
        if memory.device.type != "cuda" or self.options.force_words_ids:
            return beam_search(self.decoder, memory, self.options, prompts)
        shape = (
            *(part.shape for part in memory.tensors()),
            None if prompts is None else prompts.shape,
        )
        if shape not in self.captured:
            self.captured[shape] = None
            return beam_search(self.decoder, memory, self.options, prompts)
        captured = self.captured[shape] or CapturedSearch(
            self.decoder, memory, self.options, prompts
        )
        self.captured[shape] = captured
        return captured(memory, prompts)
