"""Stage one: run a CNN over every image once and cache region features in HDF5."""

from __future__ import annotations

import ast
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch.utils.data import DataLoader

from data.features import (
    Shard,
    Unreadable,
    cache_header,
    differences,
    plan_shards,
    write_index,
    write_shard,
)
from data.images import DECODE_PATH, Photographs
from data.sources import DATASETS, Image, Source, open_source
from models.backbones import Backbone
from pipeline.backbone import SCENES_BACKBONE, backbone_identity, keep_backbone, look, open_backbone, place_backbone
from pipeline.cli import DEVICES, PRECISIONS, UserError, command, setting
from pipeline.runtime import Machine, open_machine, refuse_what_cannot_fit
from pipeline.terminal import Progress, human_bytes, progress, say

SAMPLE_ROOT, SAMPLE_CACHE = Path("datasets/sample"), Path("cache/sample")


@dataclass(frozen=True)
class ExtractConfig:
    """What to look at, with what, and where to keep it."""

    dataset: str = setting("sample", "layout of the photographs", choices=DATASETS)
    root: Path | None = setting(None, "folder of the dataset  [sample: datasets/sample, drawn if absent]")
    annotations: Path | None = setting(None, "caption file, where the layout does not name it")
    images: Path | None = setting(None, "folder of the photographs, for --dataset coco")
    split: str = setting("all", "which part", choices=("train", "dev", "val", "test", "all"))
    backbone: str | None = setting(None, "a timm model, or torchvision/NAME  [resnet50; sample: test_resnet]")
    backbone_arg: tuple[str, ...] = setting((), "KEY=VALUE for timm's create_model, any number of times")
    weights: str | None = setting(None, "a file, pretrained (hub), random, or scenes  [pretrained; sample: scenes]")
    out: Path | None = setting(None, "the cache to make or go on with  [cache/DATASET]")
    allow_missing: bool = setting(False, "list photographs that the disk lacks as unreadable, and go on")
    batch: int = setting(32, "photographs a forward pass")
    workers: int = setting(1, "decoding processes; 0 decodes between forward passes")
    limit: int | None = setting(None, "take only the first N photographs")
    device: str = setting("auto", "where the backbone runs", choices=DEVICES)
    precision: str = setting("auto", "of the forward pass", choices=PRECISIONS)
    seed: int = setting(0, "for --weights random")

    def __post_init__(self) -> None:
        for name in ("batch", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least 1")

    @property
    def arguments(self) -> dict[str, Any]:
        """`--backbone-arg` by name, values read as Python literals where they are, else as text."""
        found = {}
        for text in self.backbone_arg:
            key, sign, value = text.partition("=")
            if not sign or not key.isidentifier():
                raise UserError(f"--backbone-arg {text!r} is not KEY=VALUE")
            try:
                found[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[key] = value
        return found


@command(ExtractConfig)
def main(config: ExtractConfig) -> None:
    """Run a CNN over every image once and cache its region features in HDF5.

    Without options: draws the embedded sample of simple scenes and extracts it with the package's own small backbone.
    """
    machine = open_machine(config.device, config.seed, config.precision)
    source = open_photographs(config)
    images = source.select(config.split)[: config.limit]
    missing = missing_photographs(source, images, config.allow_missing)
    backbone, weights = choose_backbone(config)
    identity = backbone_identity(backbone, config.arguments)
    provenance = describe_versions(machine)
    cache = config.out or Path("cache") / config.dataset
    refuse_other_identity(cache, identity, provenance)
    shards = plan_shards(images, cache)
    todo = [shard for shard in shards[machine.rank :: machine.world] if not shard.path.exists()]
    announce(cache, source, images, shards, todo, identity, machine)
    cache.mkdir(parents=True, exist_ok=True)
    if weights != "pretrained" and machine.rank == 0:
        keep_backbone(backbone, cache)
    with progress(sum(len(shard.images) for shard in todo), "images", "extract") as bar:
        for shard in todo:
            extract_shard(shard, missing, place_backbone(backbone, machine), machine, config, identity, provenance, bar)
    finish(cache, shards, bar)


def open_photographs(config: ExtractConfig) -> Source:
    """The source that the options name; bare options name the embedded sample, and it is said."""
    root = config.root
    if config.dataset == "sample" and root is None:
        root = SAMPLE_ROOT
        say(f"the embedded sample of drawn scenes, in {root}; your own: --dataset folder --root PHOTOGRAPHS")
    return open_source(config.dataset, root, config.annotations, config.images)


def missing_photographs(source: Source, images: Sequence[Image], allowed: bool) -> set[int]:
    """Ids of `images` that the disk lacks; UserError with the count and the first five, unless they are allowed."""
    absent = {image.id for image in source.missing}
    missing = [image for image in images if image.id in absent]
    if missing and not allowed:
        first = ", ".join(image.name for image in missing[:5])
        raise UserError(
            f"{len(missing):,} of {len(images):,} photographs are not under {source.root}: {first}"
            f"{', ...' if len(missing) > 5 else ''}; put them there, or pass --allow-missing to go on without them"
        )
    return {image.id for image in missing}


def choose_backbone(config: ExtractConfig) -> tuple[Backbone, str]:
    """The backbone and where its weights come from; the sample's defaults are the package's own."""
    sample = config.dataset == "sample" and config.backbone is None
    name = config.backbone or (SCENES_BACKBONE if sample else "resnet50")
    weights = config.weights or ("scenes" if sample else "pretrained")
    return open_backbone(name, weights, config.arguments, config.seed), weights


def describe_versions(machine: Machine) -> dict[str, Any]:
    """What is recorded beside the identity: a difference in it changes a row's last digits at most."""
    return {
        "precision": machine.precision,
        "decode": DECODE_PATH,
        "device": machine.device.type,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def refuse_other_identity(cache: Path, identity: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """An existing cache takes only rows of its own identity, precision and decode path."""
    if cache.exists() and not cache.is_dir():
        raise UserError(f"--out {cache} is a file; a cache is a folder")
    header = cache_header(cache)
    if header is None:
        return
    found = differences(identity, header[0]) + differences(provenance, header[1], ("precision", "decode"))
    if found:
        raise UserError(f"{cache} was made otherwise ({'; '.join(found)}); pass another --out, or the same options")
    if other := differences(provenance, header[1]):
        say(f"warning: {cache} was begun with {'; '.join(other)}")


def announce(
    cache: Path,
    source: Source,
    images: Sequence[Image],
    shards: Sequence[Shard],
    todo: Sequence[Shard],
    identity: Mapping[str, Any],
    machine: Machine,
) -> None:
    """Say what is about to be done, and refuse what cannot fit."""
    rows = sum(len(shard.images) for shard in todo)
    regions, channels = identity["grid"][0] * identity["grid"][1], identity["channels"]
    space = refuse_what_cannot_fit(cache, rows * (regions * (channels * 2 + 16) + 400))
    done = len(images) - sum(len(shard.images) for shard in shards if not shard.path.exists())
    say(f"{identity['backbone']} ({identity['weights']}), {regions} regions x {channels}, on {machine}")
    say(f"{source.dataset} {source.root}: {len(images):,} images, {done:,} done; {rows:,} rows to {cache}, {space}")


def extract_shard(
    shard: Shard,
    missing: set[int],
    backbone: Backbone,
    machine: Machine,
    config: ExtractConfig,
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
    bar: Progress,
) -> None:
    """Decode, look and write one shard; photographs that cannot be read are listed in it, never replaced."""
    unreadable = [Unreadable(image.id, image.name, "missing") for image in shard.images if image.id in missing]
    images = [image for image in shard.images if image.id not in missing]
    regions, channels = identity["grid"][0] * identity["grid"][1], identity["channels"]
    features = np.empty((len(images), regions, channels), np.float16)
    boxes = np.zeros((len(images), regions, 4), np.float32)
    kept: list[Image] = []
    sizes: list[tuple[int, int]] = []
    rest = iter(images)
    for pixels, originals, reasons in decoded_batches(images, backbone, config, machine):
        batch = list(islice(rest, len(reasons)))
        good = [i for i, reason in enumerate(reasons) if not reason]
        unreadable += [Unreadable(image.id, image.name, why) for image, why in zip(batch, reasons, strict=True) if why]
        if good:
            found = look(backbone, pixels[good], machine)
            rows = slice(len(kept), len(kept) + len(good))
            features[rows] = found.features.cpu().numpy()
            boxes[rows] = found.boxes.cpu().numpy()
        kept += [batch[i] for i in good]
        sizes += [originals[i] for i in good]
        bar.step(len(batch), f"{len(unreadable)} unreadable" if unreadable else "")
    counts = np.full(len(kept), regions)
    rows = features[: len(kept)], boxes[: len(kept)], counts, np.array(sizes)
    write_shard(shard, kept, *rows, unreadable, identity, provenance)


def decoded_batches(
    images: Sequence[Image], backbone: Backbone, config: ExtractConfig, machine: Machine
) -> Iterator[tuple[torch.Tensor, list[tuple[int, int]], list[str]]]:
    """Batches of pixels uint8 [B,3,H,W], (height, width) of the originals, and a reason where one cannot be read."""
    photographs = Photographs([image.path for image in images], backbone.size, backbone.interpolation)
    yield from DataLoader(
        photographs,
        batch_size=config.batch,
        num_workers=config.workers,
        collate_fn=_collate,
        pin_memory=machine.device.type == "cuda",
    )


def _collate(items: Sequence[tuple]) -> tuple[torch.Tensor, list[tuple[int, int]], list[str]]:
    pixels, originals, reasons = zip(*items, strict=True)
    return torch.from_numpy(np.stack(pixels)), list(originals), list(reasons)


def finish(cache: Path, shards: Sequence[Shard], bar: Progress) -> None:
    """Whoever finishes last joins the shards into features.h5; then say what there is and what comes next."""
    if not all(shard.path.exists() for shard in shards):
        say(f"this process's part of {cache} is done; the last process to finish joins the shards")
        return
    unreadable = write_index(cache)
    size = sum(path.stat().st_size for path in cache.glob("shard-*.h5"))
    say(f"{cache}: complete, {human_bytes(size)}; {bar.done:,} images in {bar.seconds:.0f} s, {bar.rate:.0f} images/s")
    if unreadable:
        say(f"{len(unreadable)} photographs have no row, listed with reasons in {cache / 'unreadable.jsonl'}:")
        for record in unreadable[:5]:
            say(f"  {record.file_name}: {record.reason}")
    say(f"next: python -m pipeline.train --features {cache} ...")


if __name__ == "__main__":
    main()
