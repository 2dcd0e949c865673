"""Beam search as CUDA graphs: on a GPU the host starts a whole search and is not asked again until its end."""

from __future__ import annotations

import torch

from models.captioner import Captioner, Memory
from models.generation import Captions, Generation
from models.search import beam_search


class CapturedSearch:
    """Beam search over memories of one shape as one graph (the loop has fixed shapes where no CPU runs it)."""

    def __init__(self, captioner: Captioner, memory: Memory, options: Generation) -> None:
        self.memory = memory.keep(torch.arange(memory.images, device=memory.keys[0].device))
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # a first run outside: libraries set themselves up
            beam_search(captioner, self.memory, options)
        torch.cuda.current_stream().wait_stream(aside)
        torch.clear_autocast_cache()  # casts made before would be gone by then, and those made here hold only after a replay
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = beam_search(captioner, self.memory, options)
        torch.clear_autocast_cache()

    def __call__(self, memory: Memory) -> Captions:
        for kept, new in zip(self.memory.tensors(), memory.tensors(), strict=True):
            kept.copy_(new)
        self.graph.replay()
        return Captions(*(part.clone() for part in self.found))


class BeamSearch:
    """`beam_search` of one captioner by one set of options; on a GPU each shape is captured when it comes a second time."""

    def __init__(self) -> None:
        self.captured: dict[tuple, CapturedSearch | None] = {}

    def __call__(self, captioner: Captioner, memory: Memory, options: Generation) -> Captions:
        if memory.keys[0].device.type != "cuda" or options.force_words_ids:
            return beam_search(captioner, memory, options)
        shape = tuple(part.shape for part in memory.tensors())
        if shape not in self.captured:
            self.captured[shape] = None
            return beam_search(captioner, memory, options)
        self.captured[shape] = self.captured[shape] or CapturedSearch(captioner, memory, options)
        return self.captured[shape](memory)
