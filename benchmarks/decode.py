"""Beam search against its plain twin, Hugging Face's `generate` and the limit of the machine's products.

    python -m benchmarks.decode [--checkpoint RUN --features CACHE] [--json FILE]

Beam 5, exactly 20 words, 10,000 words, random weights, from given encoder states; each at its best batch of 50, 100 or 200
images, at one thread and at as many as there are cores (ours then decodes a batch in each). All take turns in one process;
figures are medians, ratios medians of the rounds' ratios, of the thread setting that is the better one for ours. `of_limit` is
the share of the operations a second of the best bf16 product with the rows of one step. With --checkpoint also a trained
captioner over real photographs, where captions end by themselves, against the same with 20 words each.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch

from benchmarks.measure import header, in_turn, peak_above, ratio, report, seconds_of, waiter
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
from data.features import FeatureCache
from models.captioner import Captioner, Memory
from models.captured import BeamSearch
from models.generation import Generation
from models.grid import Regions
from pipeline.checkpoint import load_checkpoint
from pipeline.decoding import lighten, on_every_core
from pipeline.runtime import Machine, open_machine

BEAMS, LENGTH, IMAGES, BATCHES = 5, 20, 400, (50, 100, 200)
THEIRS, TWINS = 200, 50  # images of a round of Hugging Face, and of the twin
FORCED = Generation(num_beams=BEAMS, min_length=LENGTH, max_length=LENGTH)


@click.command(context_settings={"show_default": True})
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="a trained run, to decode by itself")
@click.option("--features", type=click.Path(exists=True, path_type=Path), help="the cache that it reads")
@click.option("--rounds", default=3)
@click.option("--device", default="auto")
@click.option("--json", "out", type=click.Path(path_type=Path), help="write the figures here too")
@click.option("--only-memory", is_flag=True, hidden=True)
def main(
    checkpoint: Path | None, features: Path | None, rounds: int, device: str, out: Path | None, only_memory: bool
) -> None:
    """Time beam search, and measure the memory that a batch of 64 takes."""
    machine = open_machine(device)
    if only_memory:
        click.echo(peak_memory(machine))
        return
    figures = header() | {"machine": str(machine), "torch": torch.__version__}
    cores = torch.get_num_threads()
    found = {}
    for threads in sorted({1, cores}) if machine.device.type == "cpu" else [cores]:
        torch.set_num_threads(threads)
        found[threads] = measure(machine, rounds)
        figures |= {f"{name} ({threads} threads)": value for name, value in found[threads].items()}
    for name in ("ratio_hf_fp32", "ratio_hf_bf16", "ratio_twin", "ratio_hf_fp32_with_encoder", "of_limit"):
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
    captioner, twin = our_captioner().to(device).eval(), our_captioner().to(device).eval()
    lighten(captioner, machine)
    peers = [hugging_face().to(device).eval() for _ in range(2)]
    regions = random_regions(IMAGES)
    encoded = torch.randn(IMAGES, 49, 512, device=device)
    bf16 = replace(machine, precision="bf16")

    def ours(batch: int, with_encoder: bool = False) -> Callable[[], object]:
        parts = [Regions(*(part.to(device) for part in group)) for group in
                 zip(*(part.split(batch) for part in regions), strict=True)]  # fmt: skip
        given = parts if with_encoder else [encode(captioner, part, bf16) for part in parts]
        search = searcher(captioner, bf16, FORCED)
        work = (lambda part: search(encode(captioner, part, bf16))) if with_encoder else search
        return lambda: list(on_every_core(work, given, machine))

    def theirs(which: int, batch: int) -> Callable[[], object]:
        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=which == 1):
                for part in encoded[:THEIRS].split(batch):
                    hugging_face_beam_search(peers[which], part, BEAMS, LENGTH)

        return run

    def plainly() -> None:
        with torch.inference_mode(), bf16.autocast():
            plain_beam_search(twin, few, BEAMS, LENGTH)

    few = encode(twin, Regions(*(part[:TWINS].to(device) for part in regions)), bf16)
    makers = {
        "ours": ours, "ours_with_encoder": lambda batch: ours(batch, True),
        "hf_fp32": lambda batch: theirs(0, batch), "hf_bf16": lambda batch: theirs(1, batch),
    }  # fmt: skip
    wait = waiter(device)
    best: dict[str, int] = {}
    for name, make in makers.items():
        tried = {batch: make(batch) for batch in BATCHES}
        tried[BATCHES[0]]()
        best[name] = min(BATCHES, key=lambda batch, tried=tried: seconds_of(tried[batch], wait))
    seconds = in_turn({name: makers[name](batch) for name, batch in best.items()} | {"twin": plainly}, rounds, wait)
    for name, count in (("hf_fp32", THEIRS), ("hf_bf16", THEIRS), ("twin", TWINS)):
        seconds[name] = [each * IMAGES / count for each in seconds[name]]
    found: dict[str, float] = {}
    for name, each in seconds.items():
        found[f"{name}, images/s at batch {best.get(name, 50)}"] = median_rate(IMAGES, each)
    found |= {f"ratio_{name}": ratio(seconds[name], seconds["ours"]) for name in ("hf_fp32", "hf_bf16", "twin")}
    found["ratio_hf_fp32_with_encoder"] = ratio(seconds["hf_fp32"], seconds["ours_with_encoder"])
    rows = best["ours"] * BEAMS
    top = limit([(rows, 512, 2048), (rows, 2048, 512), (rows, 512, 512), (rows, 512, WORDS)], device)
    operations = decoder_operations(captioner.config, (LENGTH - 1) / 2) * (1 + BEAMS * (LENGTH - 1))
    rate = median_rate(IMAGES, seconds["ours"]) * operations
    return found | {"operations a second, GFLOP/s": rate / 1e9, "limit, GFLOP/s": top / 1e9, "of_limit": rate / top}


def encode(captioner: Captioner, regions: Regions, machine: Machine) -> Memory:
    with torch.inference_mode(), machine.autocast():
        return captioner.encode(regions)


def searcher(captioner: Captioner, machine: Machine, options: Generation) -> Callable[[Memory], object]:
    """Memory to captions; on a GPU the whole search of a shape is one CUDA graph."""
    search = BeamSearch(captioner, options)

    def run(memory: Memory) -> object:
        with torch.inference_mode(), machine.autocast():
            return search(memory)

    return run


def peak_memory(machine: Machine) -> float:
    """GB of memory that beam search of 64 images takes at most, beyond what weights and a first small search took."""
    captioner = our_captioner().eval()
    lighten(captioner, machine)
    search = searcher(captioner, machine, FORCED)
    search(encode(captioner, random_regions(1), machine))
    return peak_above(lambda: search(encode(captioner, random_regions(64), machine)))


def trained(folder: Path, features: Path, machine: Machine, rounds: int, count: int = 3200, batch: int = 200) -> dict:
    """A trained captioner over the cache's first photographs: captions that end by themselves against 20 words each."""
    checkpoint, cache = load_checkpoint(folder), FeatureCache(features)
    captioner = checkpoint.captioner.to(machine.device)
    lighten(captioner, machine)
    ids = cache.ids[:count].tolist()
    memories = []
    for start in range(0, len(ids), batch):
        rows = cache.rows(ids[start : start + batch])
        memories.append(encode(captioner, Regions(*(torch.from_numpy(part).to(machine.device) for part in rows)), machine))
    by_itself, forced = (searcher(captioner, machine, options) for options in (Generation(num_beams=BEAMS), FORCED))
    seconds = in_turn({"by_itself": lambda: list(on_every_core(by_itself, memories, machine)),
                       "forced": lambda: list(on_every_core(forced, memories, machine))}, rounds,
                      waiter(machine.device))  # fmt: skip
    return {
        "trained, photographs": len(ids), "trained, images/s": median_rate(len(ids), seconds["by_itself"]),
        "trained, 20 words each, images/s": median_rate(len(ids), seconds["forced"]),
        "ratio_forced_length": ratio(seconds["forced"], seconds["by_itself"]),
    }  # fmt: skip


if __name__ == "__main__":
    main()
