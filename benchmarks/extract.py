"""The extraction stage against its own ceiling and against the loop people write.

    python -m benchmarks.extract [--json FILE]

The ceiling of a CPU is 1 / (1/d + 1/f): d photographs decoded and resized a second on all cores, f
seen a second by the backbone at its best batch on all cores, each alone. Of a GPU it is the least
of decoding, looking and writing, each alone. The stage is all of it: JPEG on disk to complete,
fsynced shards on disk. The plain loop is Pillow, fp32, contiguous, one photograph at a time.
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

from benchmarks.measure import header
from benchmarks.photographs import make_photographs
from data import images as decoding
from data.cache.claims import Claims
from data.cache.writer import plan_shards
from data.sources import Image
from pipeline.extraction.backbone import extract_regions, framing_of, place_backbone
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
    "--real", type=click.Path(path_type=Path), envvar="ONCEOVER_REAL", default="../shared/real"
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(tempfile.gettempdir()) / "onceover-benchmark",
    help="folder for photographs (kept) and caches (removed)",
)
@click.option("--count", default=1000, help="photographs of 640x480; as many of 224x224")
@click.option("--backbone", "names", multiple=True, default=("mobilenetv2_100", "resnet50"))
@click.option("--device", default="auto")
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(
    real: Path, work: Path, count: int, names: tuple[str, ...], device: str, out: Path | None
) -> None:
    """Measure decoding, looking and the whole stage in one run."""
    machine = open_machine(device)
    made, what = make_photographs(work / f"coco-{count}", count, real)
    sets = {what: made}
    if small := sorted((real / "flickr8k" / "images").glob("*.jpg"))[:count]:
        sets[f"{len(small)} JPEGs of 224x224, as found"] = small
    first = header() | {"machine": str(machine), "torch": torch.__version__}
    click.echo(json.dumps(first))
    figures = [
        measure(name, kind, paths, work, machine) for name in names for kind, paths in sets.items()
    ]
    large, what = make_photographs(work / "large-64", 64, real, 2560, 1920)
    figures += [reduced_scale(name, what, large, real, machine) for name in names]
    if out:
        out.write_text(json.dumps({**first, "figures": figures}, indent=2) + "\n")


def measure(name: str, kind: str, paths: list[Path], work: Path, machine: Machine) -> dict:
    backbone = place_backbone(open_backbone(name, "random", {}), machine)
    identity = backbone.identity()
    images = [Image(number, path.name, path, "all", ()) for number, path in enumerate(paths)]
    recipe = Recipe(backbone, machine, "stretch", identity, {}, 32, decoding_workers(None))
    gpu = machine.device.type == "cuda"
    found: dict = {"backbone": name, "photographs": kind, "decode": rate(recipe, images)}
    forward = {
        batch: forward_rate(recipe, batch)
        for batch in ((32, 64, 128, 256) if gpu else (8, 16, 32, 64))
    }
    recipe.batch = found["batch"] = max(forward, key=forward.get) if gpu else 32
    found["forward"] = max(forward.values())
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    start = time.perf_counter()
    with Claims(cache) as claims, progress(len(images), "images", name) as bar:
        extract_shards(plan_shards(images, cache), claims, recipe, bar)
    seconds = time.perf_counter() - start
    found["stage"] = len(images) / seconds
    if gpu:
        found["write"] = write_rate(recipe, cache)
        found["ceiling"] = min(found["decode"], found["forward"], found["write"])
    else:
        found["ceiling"] = 1 / (1 / found["decode"] + 1 / found["forward"])
    found["of the ceiling"] = found["stage"] / found["ceiling"]
    shutil.rmtree(cache)
    found["plain loop"] = plain_rate(name, backbone.size, paths[: 60 if not gpu else 500], machine)
    found["times the plain loop"] = found["stage"] / found["plain loop"]
    if machine.precision == "bf16":
        found["cosine of bf16 and fp32 rows, least"] = cosine(recipe, paths[:64])
    for key, value in found.items():
        click.echo(f"  {key:<38} {value:.4g}" if isinstance(value, float) else f"{key:<40} {value}")
    return found


def reduced_scale(name: str, what: str, paths: list[Path], real: Path, machine: Machine) -> dict:
    """What decoding large JPEGs at a reduced scale gains, and what it costs in the features."""
    weights = real / "weights" / "mobilenetv2_100_onnx7_features.pth"
    known = name == "mobilenetv2_100" and weights.exists()
    backbone = place_backbone(open_backbone(name, str(weights) if known else "random", {}), machine)
    recipe = Recipe(backbone, machine, backbone.identity(), {}, 32, decoding_workers(None))
    found: dict = {
        "backbone": name,
        "photographs": what,
        "weights": "trained" if known else "random",
    }
    rows, gap = [], decoding.GAP
    images_of = tuple(
        Image(number, path.name, path, "all", ()) for number, path in enumerate(paths)
    )
    for label, decoding.GAP in (("decode, reduced scale", gap), ("decode, full scale", 10**6)):
        found[label] = rate(recipe, list(images_of))
        framing = framing_of(backbone)
        (_, batch), *_ = _read_in_threads(iter([Work(None, images_of, True)]), framing, recipe)
        rows.append(
            extract_regions(backbone, batch.pixels, Machine(machine.device, "fp32", 0, 1))
            .features.float()
            .flatten(1)
        )
    decoding.GAP = gap
    found["cosine of rows, least"] = float(torch.nn.functional.cosine_similarity(*rows).min())
    found["cosine of rows, mean"] = float(torch.nn.functional.cosine_similarity(*rows).mean())
    for key, value in found.items():
        click.echo(f"  {key:<38} {value:.4g}" if isinstance(value, float) else f"{key:<40} {value}")
    return found


def rate(recipe: Recipe, images: list[Image]) -> float:
    """Photographs decoded a second, as the stage decodes, with nothing else running; a first pass
    warms the disk's cache.
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
    """Rows a second of one shard written again, fsynced."""
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
    """The least cosine of a photograph's row, flattened, in bf16 and in fp32."""
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
