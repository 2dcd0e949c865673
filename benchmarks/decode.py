"""Beam search, compared with a plain twin, Hugging Face's `generate` and the hardware's limit.

    python -m benchmarks.decode [--checkpoint RUN --features CACHE] [--json FILE]

All use beam 5, captions of exactly 20 words, a vocabulary of 10,000 words, random weights and
precomputed encoder states. Each uses its best batch size of 50, 100 and 200 images. On a CPU all
run with one thread and with all cores; with all cores, ours decodes one batch per core. All take
turns in one process. Rates are medians; ratios are medians of the ratios of the rounds, for the
number of threads that is better for ours. `of_limit` is the achieved share of the operations per
second of the fastest matrix product with the rows of one step. Ours and the twin run in bf16 if the
hardware supports it. Otherwise all run in fp32 over fewer images, and the report says so.

With --checkpoint, a trained captioner also decodes real photographs: captions that end by
themselves, compared with captions of exactly 20 words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import torch

from benchmarks.measure import (
    header,
    in_turn,
    memory_alone,
    peak_of,
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
    """Images per round of ours, of Hugging Face and of the twin, and the batch sizes to try."""

    ours: int
    theirs: int
    twin: int
    batches: tuple[int, ...]


SIZES = {"bf16": Sizes(400, 200, 50, (50, 100, 200)), "fp32": Sizes(50, 25, 5, (25,))}


@click.command(context_settings={"show_default": True})
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, path_type=Path),
    help="a trained run to decode in addition",
)
@click.option(
    "--features", type=click.Path(exists=True, path_type=Path), help="the cache of --checkpoint"
)
@click.option("--rounds", default=3, help="timed rounds")
@click.option("--ours-alone", is_flag=True, help="without the twin and Hugging Face's model")
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option("--json", "out", type=click.Path(path_type=Path), help="also write the figures here")
@click.option("--only-memory", is_flag=True, hidden=True)
def main(
    checkpoint: Path | None,
    features: Path | None,
    rounds: int,
    ours_alone: bool,
    device: str,
    out: Path | None,
    only_memory: bool,
) -> None:
    """Time beam search, and measure the peak memory of a batch of 64."""
    machine = open_machine(device)
    if only_memory:
        click.echo(peak_memory(machine))
        return
    figures = header() | {"machine": str(machine), "torch": torch.__version__, **why_fp32(machine)}
    cores = torch.get_num_threads()
    figures_of: dict[int, dict[str, float]] = {}  # by number of threads
    for threads in sorted({1, cores}) if machine.device.type == "cpu" else [cores]:
        torch.set_num_threads(threads)
        measured = figures_of[threads] = measure(machine, rounds, ours_alone)
        where = f" ({threads} threads)" if machine.device.type == "cpu" else ""
        figures |= {f"{name}{where}": value for name, value in measured.items()}
    for name in figures_of[cores]:
        if name.startswith(("ratio_", "of_limit")):
            figures[name] = max(measured[name] for measured in figures_of.values())
    figures["memory beyond the weights, batch 64, GB"] = memory_alone(
        lambda: peak_memory(machine), machine, "benchmarks.decode", "--only-memory"
    )
    if checkpoint:
        figures |= trained(checkpoint, features, machine, rounds)
    report(figures, out)


def measure(machine: Machine, rounds: int, ours_alone: bool = False) -> dict[str, float]:
    """Return the images per second of each at its best batch size, and the ratios."""
    device = machine.device
    sizes = SIZES[machine.precision]
    captioner, twin = our_captioner().to(device).eval(), our_captioner().to(device).eval()
    cast_linears_to_bf16(captioner, machine)
    peers = {}
    if not ours_alone:
        peers = {precision: hugging_face().to(device).eval() for precision in precisions(machine)}
    regions = random_regions(sizes.ours)
    encoded = torch.randn(sizes.theirs, 49, 512, device=device)

    def ours(batch: int, with_encoder: bool = False) -> Callable[[], object]:
        chunks = zip(*(part.split(batch) for part in regions), strict=True)
        batches = [Regions(*(part.to(device) for part in chunk)) for chunk in chunks]
        search = searcher(captioner, machine, FORCED)
        if with_encoder:
            return lambda: list(
                on_every_core(
                    lambda part: search(encode(captioner, part, machine)), batches, machine
                )
            )
        memories = [encode(captioner, part, machine) for part in batches]
        return lambda: list(on_every_core(search, memories, machine))

    def theirs(precision: str, batch: int) -> Callable[[], object]:
        def run() -> None:
            with replace(machine, precision=precision).autocast():
                for part in encoded.split(batch):
                    hugging_face_beam_search(peers[precision], part, BEAMS, LENGTH)

        return run

    def plain_twin() -> None:
        with torch.inference_mode(), machine.autocast():
            plain_beam_search(twin, twin_memory, BEAMS, LENGTH)

    twin_memory = encode(
        twin, Regions(*(part[: sizes.twin].to(device) for part in regions)), machine
    )
    makers = {"ours": ours, "ours_with_encoder": lambda batch: ours(batch, True)}
    makers |= {f"hf_{precision}": functools.partial(theirs, precision) for precision in peers}
    wait = waiter(device)
    best = dict.fromkeys(makers, sizes.batches[0])
    for name, make in makers.items() if len(sizes.batches) > 1 else ():
        candidates = {batch: make(batch) for batch in sizes.batches}
        for (
            work
        ) in candidates.values():  # warm-up; on a GPU it captures the graph of each batch size
            work()
        trial_seconds = {batch: seconds_of(work, wait) for batch, work in candidates.items()}
        best[name] = min(trial_seconds, key=trial_seconds.__getitem__)
    works = {name: makers[name](batch) for name, batch in best.items()}
    others = {f"hf_{precision}": sizes.theirs for precision in peers}
    if not ours_alone:
        works["twin"], others["twin"] = plain_twin, sizes.twin
    seconds = in_turn(works, rounds, wait)
    for name, count in others.items():
        seconds[name] = [duration * sizes.ours / count for duration in seconds[name]]
    figures = {
        f"{name}, images/s at batch {best.get(name, sizes.twin)}": median_rate(
            sizes.ours, durations
        )
        for name, durations in seconds.items()
    }
    figures |= {f"ratio_{name}": ratio(seconds[name], seconds["ours"]) for name in others}
    if peers:
        figures["ratio_hf_fp32_with_encoder"] = ratio(
            seconds["hf_fp32"], seconds["ours_with_encoder"]
        )
    rows = best["ours"] * BEAMS
    max_rate = limit(
        [(rows, 512, 2048), (rows, 2048, 512), (rows, 512, 512), (rows, 512, WORDS)], machine
    )
    operations = decoder_operations(captioner.config, (LENGTH - 1) / 2) * (1 + BEAMS * (LENGTH - 1))
    rate = median_rate(sizes.ours, seconds["ours"]) * operations
    return figures | {
        "operations a second, GFLOP/s": rate / 1e9,
        "limit, GFLOP/s": max_rate / 1e9,
        "of_limit": rate / max_rate,
    }


def encode(captioner: Transformer, regions: Regions, machine: Machine) -> Memory:
    """Encode regions without gradients, in the machine's precision."""
    with torch.inference_mode(), machine.autocast():
        return captioner.encode(regions)


def searcher(
    captioner: Transformer, machine: Machine, options: Generation
) -> Callable[[Memory], object]:
    """Return a function from memory to captions. On a GPU a search is one CUDA graph per shape."""
    search = BeamSearch(captioner, options)

    def run(memory: Memory) -> object:
        with torch.inference_mode(), machine.autocast():
            return search(memory)

    return run


def peak_memory(machine: Machine) -> float:
    """Return the peak memory in GB of beam search over 64 images.

    The memory of the weights and of a first search over one image is not included.
    """
    captioner = our_captioner().to(machine.device).eval()
    cast_linears_to_bf16(captioner, machine)
    search = searcher(captioner, machine, FORCED)

    def run(images: int) -> object:
        regions = Regions(*(part.to(machine.device) for part in random_regions(images)))
        return search(encode(captioner, regions, machine))

    run(1)
    return peak_of(lambda: run(64), machine)


def trained(
    folder: Path, features: Path, machine: Machine, rounds: int, count: int = 3200, batch: int = 200
) -> dict:
    """Time a trained captioner on the first `count` photographs of a cache.

    Captions that end by themselves are compared with captions of exactly 20 words.
    """
    checkpoint, cache = load_checkpoint(folder), FeatureCache(features)
    captioner = checkpoint.captioner.to(machine.device)
    cast_linears_to_bf16(captioner, machine)
    ids = cache.ids[:count].tolist()
    memories = []
    for start in range(0, len(ids), batch):
        rows = cache.rows(ids[start : start + batch])
        regions = Regions(*(torch.from_numpy(part).to(machine.device) for part in rows))
        memories.append(encode(captioner, regions, machine))
    free = searcher(captioner, machine, Generation(num_beams=BEAMS))
    forced = searcher(captioner, machine, FORCED)
    works = {
        "free": lambda: list(on_every_core(free, memories, machine)),
        "forced": lambda: list(on_every_core(forced, memories, machine)),
    }
    seconds = in_turn(works, rounds, waiter(machine.device))
    return {
        "trained, photographs": len(ids),
        "trained, images/s": median_rate(len(ids), seconds["free"]),
        "trained, 20 words each, images/s": median_rate(len(ids), seconds["forced"]),
        "ratio_forced_length": ratio(seconds["forced"], seconds["free"]),
    }


if __name__ == "__main__":
    main()
