"""Beam search against its plain twin, Hugging Face's `generate` and the limit of the machine's
products.

    python -m benchmarks.decode [--checkpoint RUN --features CACHE] [--json FILE]

Beam 5, exactly 20 words, 10,000 words, random weights, from given encoder states; each at its best
batch of 50, 100 or 200 images, at one thread and at as many as there are cores (ours then decodes a
batch in each). All take turns in one process; figures are medians, ratios medians of the rounds'
ratios, of the thread setting that is the better one for ours. `of_limit` is the share of the
operations a second of the best product with the rows of one step. Ours and the twin run in bf16
where the machine computes in it; else all is in fp32, over fewer images, and the report says so.
With --checkpoint also a trained captioner over real photographs, where captions end by themselves,
against the same with 20 words each.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import torch

from benchmarks.measure import (
    header,
    in_turn,
    peak_above,
    precisions,
    ratio,
    report,
    seconds_of,
    waiter,
    why_fp32,
)
from benchmarks.peers import (
    WORDS,
    decoder_operations,
    hugging_face,
    hugging_face_beam_search,
    limit,
    median_rate,
    our_captioner,
    plain_beam_search,
    random_regions,
)
from data.cache.reader import FeatureCache
from models.decoders.interface import Memory
from models.decoders.transformer import Transformer
from models.generation.cuda_graph import BeamSearch
from models.generation.options import Generation
from models.regions import Regions
from pipeline.checkpoints.checkpoint import load_checkpoint
from pipeline.decoding.captioner import cast_linears_to_bf16, on_every_core
from pipeline.runtime import Machine, open_machine

BEAMS, LENGTH = 5, 20
FORCED = Generation(num_beams=BEAMS, min_length=LENGTH, max_length=LENGTH)


class Sizes(NamedTuple):
    """Images of a round of ours, of Hugging Face and of the twin, and the batches that are
    tried.
    """

    ours: int
    theirs: int
    twin: int
    batches: tuple[int, ...]


SIZES = {"bf16": Sizes(400, 200, 50, (50, 100, 200)), "fp32": Sizes(50, 25, 5, (25,))}


@click.command(context_settings={"show_default": True})
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, path_type=Path),
    help="a trained run, to decode by itself",
)
@click.option(
    "--features", type=click.Path(exists=True, path_type=Path), help="the cache that it reads"
)
@click.option("--rounds", default=3)
@click.option("--device", default="auto")
@click.option("--json", "out", type=click.Path(path_type=Path), help="write the figures here too")
@click.option("--only-memory", is_flag=True, hidden=True)
def main(
    checkpoint: Path | None,
    features: Path | None,
    rounds: int,
    device: str,
    out: Path | None,
    only_memory: bool,
) -> None:
    """Time beam search, and measure the memory that a batch of 64 takes."""
    machine = open_machine(device)
    if only_memory:
        click.echo(peak_memory(machine))
        return
    figures = header() | {"machine": str(machine), "torch": torch.__version__, **why_fp32(machine)}
    cores = torch.get_num_threads()
    found = {}
    for threads in sorted({1, cores}) if machine.device.type == "cpu" else [cores]:
        torch.set_num_threads(threads)
        found[threads] = measure(machine, rounds)
        figures |= {f"{name} ({threads} threads)": value for name, value in found[threads].items()}
    for name in found[cores]:
        if name.startswith(("ratio_", "of_limit")):
            figures[name] = max(of[name] for of in found.values())
    if sys.platform == "linux":
        command = [sys.executable, "-m", "benchmarks.decode", "--only-memory", "--device", "cpu"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures["memory beyond the weights, batch 64, GB"] = float(done.stdout.split()[-1])
    if checkpoint:
        figures |= trained(checkpoint, features, machine, rounds)
    report(figures, out)


def measure(machine: Machine, rounds: int) -> dict[str, float]:
    """Images a second of each at its best batch, and ratios."""
    device = machine.device
    sizes = SIZES[machine.precision]
    captioner, twin = our_captioner().to(device).eval(), our_captioner().to(device).eval()
    cast_linears_to_bf16(captioner, machine)
    peers = {precision: hugging_face().to(device).eval() for precision in precisions(machine)}
    regions = random_regions(sizes.ours)
    encoded = torch.randn(sizes.theirs, 49, 512, device=device)

    def ours(batch: int, with_encoder: bool = False) -> Callable[[], object]:
        parts = [Regions(*(part.to(device) for part in group)) for group in
                 zip(*(part.split(batch) for part in regions), strict=True)]  # fmt: skip
        given = parts if with_encoder else [encode(captioner, part, machine) for part in parts]
        search = searcher(captioner, machine, FORCED)
        work = (lambda part: search(encode(captioner, part, machine))) if with_encoder else search
        return lambda: list(on_every_core(work, given, machine))

    def theirs(precision: str, batch: int) -> Callable[[], object]:
        def run() -> None:
            with replace(machine, precision=precision).autocast():
                for part in encoded.split(batch):
                    hugging_face_beam_search(peers[precision], part, BEAMS, LENGTH)

        return run

    def plainly() -> None:
        with torch.inference_mode(), machine.autocast():
            plain_beam_search(twin, few, BEAMS, LENGTH)

    few = encode(twin, Regions(*(part[: sizes.twin].to(device) for part in regions)), machine)
    makers = {"ours": ours, "ours_with_encoder": lambda batch: ours(batch, True)}
    makers |= {f"hf_{precision}": functools.partial(theirs, precision) for precision in peers}
    wait = waiter(device)
    best = dict.fromkeys(makers, sizes.batches[0])
    for name, make in makers.items() if len(sizes.batches) > 1 else ():
        tried = {batch: make(batch) for batch in sizes.batches}
        tried[sizes.batches[0]]()
        best[name] = min(
            sizes.batches, key=lambda batch, tried=tried: seconds_of(tried[batch], wait)
        )
    seconds = in_turn(
        {name: makers[name](batch) for name, batch in best.items()} | {"twin": plainly},
        rounds,
        wait,
    )
    others = {**{f"hf_{precision}": sizes.theirs for precision in peers}, "twin": sizes.twin}
    for name, count in others.items():
        seconds[name] = [each * sizes.ours / count for each in seconds[name]]
    found: dict[str, float] = {}
    for name, each in seconds.items():
        found[f"{name}, images/s at batch {best.get(name, sizes.twin)}"] = median_rate(
            sizes.ours, each
        )
    found |= {f"ratio_{name}": ratio(seconds[name], seconds["ours"]) for name in others}
    found["ratio_hf_fp32_with_encoder"] = ratio(seconds["hf_fp32"], seconds["ours_with_encoder"])
    rows = best["ours"] * BEAMS
    top = limit(
        [(rows, 512, 2048), (rows, 2048, 512), (rows, 512, 512), (rows, 512, WORDS)], machine
    )
    operations = decoder_operations(captioner.config, (LENGTH - 1) / 2) * (1 + BEAMS * (LENGTH - 1))
    rate = median_rate(sizes.ours, seconds["ours"]) * operations
    return found | {
        "operations a second, GFLOP/s": rate / 1e9,
        "limit, GFLOP/s": top / 1e9,
        "of_limit": rate / top,
    }


def encode(captioner: Transformer, regions: Regions, machine: Machine) -> Memory:
    with torch.inference_mode(), machine.autocast():
        return captioner.encode(regions)


def searcher(
    captioner: Transformer, machine: Machine, options: Generation
) -> Callable[[Memory], object]:
    """Memory to captions; on a GPU the whole search of a shape is one CUDA graph."""
    search = BeamSearch(captioner, options)

    def run(memory: Memory) -> object:
        with torch.inference_mode(), machine.autocast():
            return search(memory)

    return run


def peak_memory(machine: Machine) -> float:
    """GB of memory that beam search of 64 images takes at most, beyond what weights and a first
    small search took.
    """
    captioner = our_captioner().eval()
    cast_linears_to_bf16(captioner, machine)
    search = searcher(captioner, machine, FORCED)
    search(encode(captioner, random_regions(1), machine))
    return peak_above(lambda: search(encode(captioner, random_regions(64), machine)))


def trained(
    folder: Path, features: Path, machine: Machine, rounds: int, count: int = 3200, batch: int = 200
) -> dict:
    """A trained captioner over the cache's first photographs: captions that end by themselves
    against 20 words each.
    """
    checkpoint, cache = load_checkpoint(folder), FeatureCache(features)
    captioner = checkpoint.captioner.to(machine.device)
    cast_linears_to_bf16(captioner, machine)
    ids = cache.ids[:count].tolist()
    memories = []
    for start in range(0, len(ids), batch):
        rows = cache.rows(ids[start : start + batch])
        memories.append(
            encode(
                captioner,
                Regions(*(torch.from_numpy(part).to(machine.device) for part in rows)),
                machine,
            )
        )
    by_itself, forced = (
        searcher(captioner, machine, options) for options in (Generation(num_beams=BEAMS), FORCED)
    )
    seconds = in_turn({"by_itself": lambda: list(on_every_core(by_itself, memories, machine)),
                       "forced": lambda: list(on_every_core(forced, memories, machine))}, rounds,
                      waiter(machine.device))  # fmt: skip
    return {
        "trained, photographs": len(ids),
        "trained, images/s": median_rate(len(ids), seconds["by_itself"]),
        "trained, 20 words each, images/s": median_rate(len(ids), seconds["forced"]),
        "ratio_forced_length": ratio(seconds["forced"], seconds["by_itself"]),
    }


if __name__ == "__main__":
    main()
