"""Stage one: run a CNN over every image once and cache region features in HDF5."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from data.cache.claims import Claims, sweep
from data.cache.reader import FeatureCache, cache_header, differences, shard_paths
from data.cache.writer import Shard, plan_retry, plan_shards, write_index
from data.image_formats import HEIC, SUFFIXES
from data.images import DECODE_PATH
from data.sources import Image, Listing, Source
from models.backbones.grid import BF16
from pipeline.cli import DEVICES, PRECISIONS, UserError, command, setting
from pipeline.extraction.backbone import (
    MAX_PIXELS_HELP,
    keep_backbone,
    place_backbone,
)
from pipeline.extraction.maintenance import inspect_cache, pack_cache, repair_cache, verify_cache
from pipeline.extraction.registry import REGIONS
from pipeline.extraction.stream import Recipe, decoding_workers, extract_shards
from pipeline.extraction.views import parse_views
from pipeline.runtime import Machine, open_machine, refuse_what_cannot_fit
from pipeline.sources import SAMPLE_ROOT, SourceOptions
from pipeline.terminal import Progress, human_bytes, progress, say


@dataclass(frozen=True)
class ExtractConfig(SourceOptions):
    """The options of pipeline.extract."""

    split: str = setting(
        "all", "which split", choices=("train", "dev", "val", "test", "all"), group="data"
    )
    regions: str = setting("grid", "kind of regions", registry=REGIONS, group="model")
    out: Path | None = setting(
        None, "cache folder to create or to continue  [cache/DATASET]", group="output"
    )
    views: str = setting(
        "none",
        "augmented views to keep too, for train to draw from: flip, crop:N, color:N, separated by "
        "commas",
        group="model",
    )
    allow_missing: bool = setting(
        False, "list missing photographs as unreadable instead of stopping"
    )
    strict: bool = setting(False, "stop at the first photograph that cannot be read")
    retry_unreadable: bool = setting(
        False, "try all unreadable photographs again, also unchanged ones"
    )
    repair: bool = setting(False, "check every row first and extract damaged shards again")
    verify: Path | None = setting(
        None,
        "only check every row of this cache; exits with 1 and names the damaged rows if there are "
        "any",
    )
    inspect: Path | None = setting(None, "only show the contents of this cache")
    pack: Path | None = setting(None, "only pack the cache --out into one HDF5 file of this name")
    batch: int = setting(32, "images per forward pass", at_least=1, group="machine")
    workers: int | None = setting(
        None,
        "decoding threads (with a GPU: processes)  [one per core]",
        at_least=0,
        group="machine",
    )
    limit: int | None = setting(None, "take only the first N photographs", at_least=1, group="data")
    max_pixels: int | None = setting(None, MAX_PIXELS_HELP, at_least=1, group="data")
    device: str = setting("auto", "device of the backbone", choices=DEVICES, group="machine")
    precision: str = setting(
        "auto", "precision of matrix products", choices=PRECISIONS, group="machine"
    )
    seed: int = setting(0, "random seed for --weights random", group="machine")

    @property
    def retry_all(self) -> bool:
        """Whether unchanged unreadable photographs are tried again too: another pixel limit may
        make them readable.
        """
        return self.retry_unreadable or self.max_pixels is not None


@command(ExtractConfig)
def main(config: ExtractConfig) -> None:
    """Run a CNN over every image once and cache its region features in HDF5.

    Without options: draws the embedded sample of simple scenes and extracts it with the package's
    own small backbone.
    """
    cache = config.out or Path("cache") / config.dataset
    if config.verify or config.inspect or config.pack:
        return look_after(config, cache)
    machine = open_machine(config.device, config.seed, config.precision)
    source = open_photographs(config)
    images = source.select(config.split)[: config.limit]
    missing = missing_photographs(source, images, config.allow_missing)
    recipe = choose_recipe(config, machine, missing)
    if config.repair:
        repair_cache(cache, machine)
    refuse_other_identity(cache, recipe)
    shards = plan_shards(images, cache)
    again = plan_retry(images, cache, config.retry_all, shards) if machine.rank == 0 else []
    announce(cache, source, images, shards, again, recipe)
    prepare_folder(cache, recipe)
    bar = extract_all(images, cache, shards, again, recipe)
    finish(cache, images, bar)


def extract_all(
    images: Sequence[Image],
    cache: Path,
    shards: Sequence[Shard],
    again: Sequence[Shard],
    recipe: Recipe,
) -> Progress:
    """Extract this process's shards, then those that no other process has claimed."""
    machine = recipe.machine
    mine = shards[machine.rank :: machine.world]
    ordered = [*mine, *(shard for shard in shards if shard not in mine), *again]
    count = to_do([*shards, *again], machine)
    with Claims(cache) as claims, progress(count, "images", "extract") as bar:
        made = extract_shards(ordered, claims, recipe, bar)
        make_the_rest(made, images, cache, claims, recipe, bar)
    return bar


def make_the_rest(
    made: list[Path],
    images: Sequence[Image],
    cache: Path,
    claims: Claims,
    recipe: Recipe,
    bar: Progress,
) -> None:
    """Plan and extract again as long as images are left: another plan may have taken a file name of
    this one at the same time.
    """
    while made and absent(images, cache):
        made = extract_shards(plan_shards(images, cache), claims, recipe, bar)


def absent(images: Sequence[Image], cache: Path) -> list[Image]:
    """Images that have neither a row nor an entry in unreadable.jsonl."""
    if not shard_paths(cache):
        return list(images)
    found = FeatureCache(cache)
    return [image for image in images if image.id not in found and image.id not in found.unreadable]


def look_after(config: ExtractConfig, cache: Path) -> None:
    """Run --verify, --inspect or --pack on an existing cache. No photographs are read."""
    if config.verify:
        verify_cache(config.verify)
    if config.inspect:
        inspect_cache(config.inspect)
    if config.pack:
        pack_cache(cache, config.pack)


def open_photographs(config: ExtractConfig) -> Source:
    """Open the dataset. Without options it is the embedded sample, which is printed."""
    if config.dataset == "sample" and config.root is None:
        say(
            f"the embedded sample of drawn scenes, in {SAMPLE_ROOT}; your own: --dataset "
            "folder --root PHOTOGRAPHS"
        )
    return config.open_source()


def missing_photographs(source: Source, images: Sequence[Image], allowed: bool) -> set[int]:
    """Ids of `images` without a file. Unless --allow-missing, UserError with the count and the
    first five.
    """
    absent = {image.id for image in source.missing}
    missing = [image for image in images if image.id in absent]
    if missing and not allowed:
        disk = Listing(source.root)
        first = ", ".join(image.name + there_is(disk.similar(image.name)) for image in missing[:5])
        raise UserError(
            f"{len(missing):,} of {len(images):,} photographs are not under {source.root}: {first}"
            f"{', ...' if len(missing) > 5 else ''}; put them there, or pass --allow-missing "
            "to go on without them"
        )
    return {image.id for image in missing}


def there_is(similar: Sequence[str]) -> str:
    """A hint for a missing photograph: the photographs with similar names, in parentheses."""
    photographs = [name for name in similar if Path(name).suffix.lower() in {*SUFFIXES, *HEIC}]
    return f" (there is {', '.join(photographs[:3])})" if photographs else ""


def choose_recipe(config: ExtractConfig, machine: Machine, missing: set[int]) -> Recipe:
    """Make the recipe of the rows from the options."""
    views = parse_views(config.views)
    backbone = REGIONS[config.regions].open(config.options("regions"), config.dataset, config.seed)
    provenance = describe_versions(machine) | ({"views": list(views)} if views else {})
    return Recipe(
        place_backbone(backbone, machine),
        machine,
        backbone.identity(),
        provenance,
        config.batch,
        decoding_workers(config.workers),
        config.strict,
        frozenset(missing),
        config.max_pixels,
    )


def prepare_folder(cache: Path, recipe: Recipe) -> None:
    """Create the cache folder, with the backbone's weights unless the hub has them."""
    cache.mkdir(parents=True, exist_ok=True)
    if not recipe.backbone.from_hub and recipe.machine.rank == 0:
        keep_backbone(recipe.backbone, cache)


def describe_versions(machine: Machine) -> dict[str, Any]:
    """The record beside the identity. A difference in it changes at most the last digits of a
    row.
    """
    return {
        "precision": BF16 if machine.precision == "bf16" else machine.precision,
        "decode": DECODE_PATH,
        "device": machine.device.type,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def refuse_other_identity(cache: Path, recipe: Recipe) -> None:
    """Raise UserError if an existing cache has another identity, precision or decode path."""
    if cache.exists() and not cache.is_dir():
        raise UserError(f"--out {cache} is a file; a cache is a folder")
    header = cache_header(cache)
    if header is None:
        return
    identity, provenance = recipe.identity, recipe.provenance
    found = differences(identity, header[0]) + differences(
        provenance, header[1], ("precision", "decode", "views")
    )
    if found:
        raise UserError(
            f"{cache} was made with other options ({'; '.join(found)}); pass another --out, or the "
            "same options"
        )
    if other := differences(provenance, header[1]):
        say(f"warning: {cache} was begun with {'; '.join(other)}")


def to_do(shards: Sequence[Shard], machine: Machine) -> int:
    """Approximate number of images that this process extracts."""
    return -(
        -sum(len(shard.images) for shard in shards if not shard.path.exists()) // machine.world
    )


def announce(
    cache: Path,
    source: Source,
    images: Sequence[Image],
    shards: Sequence[Shard],
    again: Sequence[Shard],
    recipe: Recipe,
) -> None:
    """Print what will be done; UserError if the disk is too small."""
    rows = sum(len(shard.images) for shard in [*shards, *again] if not shard.path.exists())
    regions, channels = recipe.shape
    views = 1 + len(recipe.views)
    space = refuse_what_cannot_fit(cache, rows * (views * regions * (channels * 2 + 16) + 400))
    done = len(images) - sum(len(shard.images) for shard in shards if not shard.path.exists())
    name, weights = recipe.backbone.name, recipe.identity.get("weights", recipe.identity["regions"])
    also = f" and as much of each view ({', '.join(recipe.views)})" if recipe.views else ""
    say(
        f"{name} ({weights}), {regions} regions x {channels}{also}, on {recipe.machine}, "
        f"{recipe.workers} decoding"
    )
    say(
        f"{source.dataset} {source.root}: {len(images):,} images, {done:,} done; {rows:,} rows "
        f"to {cache}, {space}"
    )
    if again:
        say(
            f"{sum(len(shard.images) for shard in again):,} photographs that could not be read "
            "are tried again"
        )


def finish(cache: Path, images: Sequence[Image], bar: Progress) -> None:
    """The process that finishes last joins the shards into features.h5. Prints a summary and the
    next command.
    """
    if left := absent(images, cache):
        say(
            f"this process's part of {cache} is done; {len(left):,} images are still being "
            f"extracted by other processes; the last one to finish joins the shards (the shard of "
            f"a killed process is left to the next run)"
        )
        return
    unreadable = write_index(cache)
    sweep(cache)
    size = sum(path.stat().st_size for path in cache.glob("shard-*.h5"))
    speed = (
        f"{bar.done:,} images in {bar.seconds:.0f} s, {bar.rate:.0f} images/s"
        if bar.done
        else "nothing was left to do"
    )
    say(f"{cache}: complete, {human_bytes(size)}; {speed}")
    if unreadable:
        have = "photograph has" if len(unreadable) == 1 else "photographs have"
        say(
            f"{len(unreadable)} {have} no row, listed with reasons in {cache / 'unreadable.jsonl'}:"
        )
        for record in unreadable[:5]:
            say(f"  {record.file_name}: {record.reason}")
    say(f"next: python -m pipeline.train --features {cache} ...")


if __name__ == "__main__":
    main()
