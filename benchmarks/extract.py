"""The extraction stage, compared with its upper bound and with a plain loop.

    python -m benchmarks.extract [--regions detector] [--json FILE]

The stage reads JPEGs from disk and writes complete, fsynced shards. Its upper bound ("ceiling") on
a CPU is 1 / (1/d + 1/f): d is the rate of decoding and resizing on all cores, f is the rate of the
backbone at its best batch size on all cores, each alone. On a GPU the upper bound is the minimum of
the rates of decoding, forward pass and writing, each alone. The plain loop uses Pillow, fp32,
contiguous memory, and one photograph at a time. For detectors see benchmarks/detector.py.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import h5py
import numpy as np
import torch
from PIL import Image as PillowImage

from benchmarks.detector import measure_detector
from benchmarks.measure import header, seconds_of
from benchmarks.photographs import make_photographs
from data import images as decoding
from data.cache.claims import Claims
from data.cache.writer import plan_shards
from data.sources import Image
from pipeline.extraction.backbone import extract_regions, framing_of, place_backbone
from pipeline.extraction.detector import DetectorOptions
from pipeline.extraction.grid import open_backbone
from pipeline.extraction.stream import (
    Recipe,
    Work,
    _read_in_processes,
    _read_in_threads,
    decoding_workers,
    extract_shards,
)
from pipeline.runtime import Machine, open_machine
from pipeline.terminal import progress


@click.command(context_settings={"show_default": True})
@click.option(
    "--real",
    type=click.Path(path_type=Path),
    envvar="ONCEOVER_REAL",
    default="../shared/real",
    help="folder of real photographs; drawn ones if it does not exist",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(tempfile.gettempdir()) / "onceover-benchmark",
    help="folder for photographs (kept) and caches (removed afterwards)",
)
@click.option(
    "--count", default=1000, help="photographs of 640x480, and the same number of 224x224"
)
@click.option(
    "--backbone",
    "names",
    multiple=True,
    default=("mobilenetv2_100", "resnet50"),
    help="may be repeated",
)
@click.option("--passes", default=1, help="times that the stage reads the photographs")
@click.option("--seconds", default=4.0, help="duration of a measurement of the forward pass")
@click.option("--large", default=64, help="photographs of 2560x1920; 0: none")
@click.option("--regions", type=click.Choice(["grid", "detector"]), default="grid")
@click.option("--detector", default="fasterrcnn_resnet50_fpn_v2", help="with --regions detector")
@click.option("--detector-size", default="800x1333", help="with --regions detector")
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option("--json", "out", type=click.Path(path_type=Path), help="also write the figures here")
def main(
    real: Path,
    work: Path,
    count: int,
    names: tuple[str, ...],
    passes: int,
    seconds: float,
    large: int,
    regions: str,
    detector: str,
    detector_size: str,
    device: str,
    out: Path | None,
) -> None:
    """Measure decoding, the forward pass and the whole stage."""
    machine = open_machine(device)
    photographs, description = make_photographs(work / f"coco-{count}", count, real)
    sets = {description: photographs}
    if small := sorted((real / "flickr8k" / "images").glob("*.jpg"))[:count]:
        sets[f"{len(small)} JPEGs of 224x224, as found"] = small
    report_header = header() | {"machine": str(machine), "torch": torch.__version__}
    click.echo(json.dumps(report_header))
    if regions == "detector":
        options = DetectorOptions(
            detector=detector, detector_weights="random", detector_size=detector_size
        )
        figures = [measure_detector(options, description, photographs, work, machine)]
    else:
        figures = [
            measure(name, kind, paths, work, machine, passes, seconds)
            for name in names
            for kind, paths in sets.items()
        ]
        if large:
            paths, description = make_photographs(work / f"large-{large}", large, real, 2560, 1920)
            figures += [reduced_scale(name, description, paths, real, machine) for name in names]
    if out:
        out.write_text(json.dumps({**report_header, "figures": figures}, indent=2) + "\n")


def measure(
    name: str,
    kind: str,
    paths: list[Path],
    work: Path,
    machine: Machine,
    passes: int = 1,
    forward_seconds: float = 4.0,
) -> dict:
    """Return the rates in photographs per second: of each part, of the stage, and of the bound.

    passes: times that decoding and the stage read the photographs.
    forward_seconds: duration of the measurement of the forward pass at each batch size.
    """
    backbone = place_backbone(open_backbone(name, "random", {}), machine)
    identity = backbone.identity()
    images = [
        Image(number, f"{number}-{path.name}", path, "all", ())
        for number, path in enumerate(paths * passes)
    ]
    recipe = Recipe(backbone, machine, identity, {}, 32, decoding_workers(None))
    gpu = machine.device.type == "cuda"
    figures: dict = {"backbone": name, "photographs": kind, "decode": rate(recipe, images)}
    forward_rates = {
        batch: forward_rate(recipe, batch, forward_seconds)
        for batch in ((32, 64, 128, 256) if gpu else (8, 16, 32, 64))
    }
    recipe.batch = figures["batch"] = max(forward_rates, key=forward_rates.get) if gpu else 32
    figures["forward"] = max(forward_rates.values())
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)

    def stage() -> None:
        with Claims(cache) as claims, progress(len(images), "images", name) as bar:
            extract_shards(plan_shards(images, cache), claims, recipe, bar)

    if gpu:
        torch.cuda.reset_peak_memory_stats()
    figures["stage"] = len(images) / seconds_of(stage)
    if gpu:
        figures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        figures["write"] = write_rate(recipe, cache)
        figures["ceiling"] = min(figures["decode"], figures["forward"], figures["write"])
    else:
        figures["ceiling"] = 1 / (1 / figures["decode"] + 1 / figures["forward"])
    figures["of the ceiling"] = figures["stage"] / figures["ceiling"]
    shutil.rmtree(cache)
    figures["plain loop"] = plain_rate(
        name, backbone.size, paths[: 60 if not gpu else 500], machine
    )
    figures["times the plain loop"] = figures["stage"] / figures["plain loop"]
    if machine.precision == "bf16":
        figures["cosine of bf16 and fp32 rows, least"] = cosine(recipe, paths[:64])
    for key, value in figures.items():
        click.echo(f"  {key:<38} {value:.4g}" if isinstance(value, float) else f"{key:<40} {value}")
    return figures


def reduced_scale(
    name: str, description: str, paths: list[Path], real: Path, machine: Machine
) -> dict:
    """Return how fast large JPEGs are decoded at a reduced scale, and how the features change."""
    weights = real / "weights" / "mobilenetv2_100_onnx7_features.pth"
    is_trained = name == "mobilenetv2_100" and weights.exists()
    backbone = place_backbone(
        open_backbone(name, str(weights) if is_trained else "random", {}), machine
    )
    recipe = Recipe(backbone, machine, backbone.identity(), {}, 32, decoding_workers(None))
    figures: dict = {
        "backbone": name,
        "photographs": description,
        "weights": "trained" if is_trained else "random",
    }
    rows, gap = [], decoding.GAP
    images = tuple(Image(number, path.name, path, "all", ()) for number, path in enumerate(paths))
    for label, minimum_ratio in (("decode, reduced scale", gap), ("decode, full scale", 10**6)):
        decoding.GAP = minimum_ratio
        figures[label] = rate(recipe, list(images))
        framing = framing_of(backbone)
        (_, batch), *_ = _read_in_threads(iter([Work(None, images, True)]), framing, recipe)
        rows.append(
            extract_regions(backbone, batch.pixels, Machine(machine.device, "fp32", 0, 1))
            .features.float()
            .flatten(1)
        )
    decoding.GAP = gap
    figures["cosine of rows, least"] = float(torch.nn.functional.cosine_similarity(*rows).min())
    figures["cosine of rows, mean"] = float(torch.nn.functional.cosine_similarity(*rows).mean())
    for key, value in figures.items():
        click.echo(f"  {key:<38} {value:.4g}" if isinstance(value, float) else f"{key:<40} {value}")
    return figures


def rate(recipe: Recipe, images: list[Image]) -> float:
    """Return the photographs decoded per second, as in the stage, with nothing else running.

    A first pass warms the page cache.
    """
    framing = framing_of(recipe.backbone)
    read = _read_in_processes if recipe.machine.device.type == "cuda" else _read_in_threads

    def work() -> Iterator[Work]:
        for at in range(0, len(images), recipe.batch):
            yield Work(None, tuple(images[at : at + recipe.batch]), False)

    rates = []
    for _ in range(2):
        start = time.perf_counter()
        count = sum(len(batch.pixels) for _, batch in read(work(), framing, recipe))
        rates.append(count / (time.perf_counter() - start))
    return rates[-1]


def forward_rate(recipe: Recipe, batch: int, seconds: float = 4.0) -> float:
    """Return the images per second of the backbone alone, measured for `seconds` seconds."""
    pixels = torch.randint(0, 256, (batch, *recipe.backbone.size, 3), dtype=torch.uint8).permute(
        0, 3, 1, 2
    )
    pixels = pixels.to(recipe.machine.device)
    wait = torch.cuda.synchronize if recipe.machine.device.type == "cuda" else lambda: None
    extract_regions(recipe.backbone, pixels, recipe.machine)
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        extract_regions(recipe.backbone, pixels, recipe.machine)
        wait()
        count += batch
    return count / (time.perf_counter() - start)


def write_rate(recipe: Recipe, cache: Path) -> float:
    """Return the rows per second when the first shard is written again, with fsync."""
    path = sorted(cache.glob("shard-*.h5"))[0]
    rows = path.read_bytes()
    with h5py.File(path) as file:
        count = len(file["image_ids"])
    start = time.perf_counter()
    for number in range(5):
        with open(cache / f"again-{number}", "wb") as file:
            file.write(rows)
            os.fsync(file.fileno())
    return 5 * count / (time.perf_counter() - start)


def plain_rate(name: str, size: tuple[int, int], paths: list[Path], machine: Machine) -> float:
    """Return the photographs per second of the plain loop."""
    import timm
    from torchvision import transforms

    network = timm.create_model(name, num_classes=0).eval().to(machine.device)
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    prepare = transforms.Compose([transforms.Resize(size), transforms.ToTensor(), normalise])
    rows = []
    start = time.perf_counter()
    with torch.no_grad():
        for path in paths:
            photo = prepare(PillowImage.open(path).convert("RGB"))[None].to(machine.device)
            rows.append(network.forward_features(photo)[0].cpu().numpy())
    return len(rows) / (time.perf_counter() - start)


def cosine(recipe: Recipe, paths: list[Path]) -> float:
    """Return the minimum cosine similarity of the flattened rows in bf16 and in fp32."""
    machine = recipe.machine
    images = tuple(Image(number, path.name, path, "all", ()) for number, path in enumerate(paths))
    framing = framing_of(recipe.backbone)
    (_, batch), *_ = _read_in_threads(iter([Work(None, images, True)]), framing, recipe)
    rows = [
        extract_regions(recipe.backbone, batch.pixels, Machine(machine.device, precision, 0, 1))
        .features.float()
        .flatten(1)
        for precision in ("bf16", "fp32")
    ]
    return float(torch.nn.functional.cosine_similarity(*rows).min())


if __name__ == "__main__":
    np.random.seed(0)
    main()
