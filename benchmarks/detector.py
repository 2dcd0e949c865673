"""The extraction of detector regions, compared with the forward pass of torchvision's detector.

    python -m benchmarks.extract --regions detector [--json FILE]

The stage decodes JPEGs from disk, detects, and writes complete shards. The forward pass alone has
the same photographs, decoded and in memory, torchvision's own score threshold of 0.05, and one call
of the network per photograph. On a CPU the figures are seconds of the processor, which other jobs
on the machine change little; on a GPU they are wall time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from data.cache.claims import Claims
from data.cache.writer import plan_shards
from data.images import read_image
from data.sources import Image
from models.backbones.detector import Detector
from pipeline.extraction.backbone import framing_of, place_backbone
from pipeline.extraction.detector import DetectorOptions, open_detector
from pipeline.extraction.stream import Recipe, decoding_workers, extract_shards
from pipeline.runtime import Machine
from pipeline.terminal import progress

THRESHOLD = 0.05  # torchvision's default


def measure_detector(
    options: DetectorOptions, kind: str, paths: list[Path], work: Path, machine: Machine
) -> dict:
    """Return the seconds per photograph of the stage and of the forward pass alone."""
    detector = open_detector(options, "folder", 0)
    place_backbone(detector, machine)
    is_gpu = machine.device.type == "cuda"
    clock = time.perf_counter if is_gpu else time.process_time
    forward = forward_seconds(detector, paths, machine, clock)
    images = [Image(number, path.name, path, "all", ()) for number, path in enumerate(paths)]
    recipe = Recipe(
        detector, machine, detector.identity(), {}, detector.batch, decoding_workers(None)
    )
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    start = clock()
    with Claims(cache) as claims, progress(len(images), "images", detector.name) as bar:
        extract_shards(plan_shards(images, cache), claims, recipe, bar)
    stage = (clock() - start) / len(images)
    shutil.rmtree(cache)
    figures = {
        "detector": detector.name,
        "size": list(detector.size),
        "photographs": kind,
        "forward, s": forward,
        "stage, s": stage,
        "share of the forward pass": forward / stage,
    }
    for key, value in figures.items():
        click.echo(f"  {key:<28} {value:.4g}" if isinstance(value, float) else f"{key:<30} {value}")
    return figures


def forward_seconds(
    detector: Detector, paths: list[Path], machine: Machine, clock: Callable[[], float]
) -> float:
    """Return the seconds per photograph of torchvision's forward pass, after one warm-up call."""
    network, framing = detector.rcnn, framing_of(detector)
    images = [
        torch.from_numpy(read_image(path, framing).pixels.copy()).to(machine.device) / 255
        for path in paths
    ]
    network.roi_heads.score_thresh = THRESHOLD
    with torch.inference_mode(), machine.autocast():
        network([images[0]])
        start = clock()
        for image in images:
            network([image])
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = clock() - start
    network.roi_heads.score_thresh = 0.0
    return seconds / len(images)
