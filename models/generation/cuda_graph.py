"""Beam search as CUDA graphs: on a GPU the host starts a whole search and is not asked again until its end."""

from __future__ import annotations

import torch

from models.decoders.transformer import Captioner, Memory
from models.generation.beam_search import beam_search
from models.generation.options import Captions, Generation


class CapturedSearch:
    """Beam search over memories of one shape as one graph (the loop has fixed shapes where no CPU runs it)."""

    @torch.inference_mode()
    def __init__(self, captioner: Captioner, memory: Memory, options: Generation) -> None:
        self.memory = memory.keep(torch.arange(memory.images, device=memory.keys[0].device))
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # a first run outside: libraries set themselves up
            beam_search(captioner, self.memory, options)
        torch.cuda.current_stream().wait_stream(aside)
        torch.clear_autocast_cache()  # casts made before would be gone by then, and those made here hold only after a replay
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.found = beam_search(captioner, self.memory, options)
        torch.clear_autocast_cache()

    @torch.inference_mode()
    def __call__(self, memory: Memory) -> Captions:
        for kept, new in zip(self.memory.tensors(), memory.tensors(), strict=True):
            kept.copy_(new)
        self.graph.replay()
        return Captions(*(part.clone() for part in self.found))


class BeamSearch:
    """`beam_search` of a captioner by options; on a GPU each shape is captured when it comes a second time.

    The captioner's weights may change, but neither move nor change their type; autocast stays as it was.
    """

    def __init__(self, captioner: Captioner, options: Generation) -> None:
        self.captioner, self.options = captioner, options
        self.captured: dict[tuple, CapturedSearch | None] = {}

    def __call__(self, memory: Memory) -> Captions:
        if memory.keys[0].device.type != "cuda" or self.options.force_words_ids:
            return beam_search(self.captioner, memory, self.options)
        shape = tuple(part.shape for part in memory.tensors())
        if shape not in self.captured:
            self.captured[shape] = None
            return beam_search(self.captioner, memory, self.options)
        self.captured[shape] = self.captured[shape] or CapturedSearch(self.captioner, memory, self.options)
        return self.captured[shape](memory)
