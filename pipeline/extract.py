"""Stage one: run a CNN over every image once and cache region features in HDF5."""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from data.boxes import read_boxes
from data.cache.outputs import Output, open_output
from data.cache.reader import differences, kinds_of
from data.cache.writer import Shard, plan_retry, plan_shards, processed_ids
from data.image_formats import HEIC, SUFFIXES
from data.images import DECODE_PATH
from data.remote import is_remote
from data.sources import Image, Listing, Source
from models.backbones.network import BF16
from pipeline.cli import DEVICES, PRECISIONS, UserError, command, setting
from pipeline.extraction.backbone import (
    MAX_PIXELS_HELP,
    keep_backbone,
    place_backbone,
)
from pipeline.extraction.drawing import show_regions
from pipeline.extraction.maintenance import inspect_cache, pack_cache, repair_cache, verify_cache
from pipeline.extraction.ray_engine import RayEngine
from pipeline.extraction.registry import REGIONS, with_given_boxes
from pipeline.extraction.stream import (
    PENDING_WRITES,
    Recipe,
    decoding_workers,
    extract_shards,
)
from pipeline.extraction.views import parse_views
from pipeline.runtime import Machine, check_free_space, open_machine
from pipeline.sources import SAMPLE_ROOT, SourceOptions
from pipeline.terminal import Progress, human_bytes, progress, say


@dataclass(frozen=True)
class ExtractConfig(SourceOptions):
    """The options of pipeline.extract."""

    split: str = setting(
        "all", "split to extract", choices=("train", "dev", "val", "test", "all"), group="data"
    )
    regions: str = setting("grid", "kind of regions", registry=REGIONS, group="model")
    out: Path | None = setting(
        None,
        "cache folder to create or to continue; may be remote, such as gs://bucket/cache  "
        "[cache/DATASET]",
        group="output",
        remote=True,
    )
    views: str = setting(
        "none",
        "augmented views to extract too; pipeline.train draws from them. A comma-separated list of "
        "flip, crop:N and color:N",
        group="model",
    )
    allow_missing: bool = setting(
        False, "list missing photographs as unreadable, instead of an error"
    )
    strict: bool = setting(False, "stop at the first photograph that cannot be read")
    retry_unreadable: bool = setting(
        False, "try all unreadable photographs again, including unchanged files"
    )
    repair: bool = setting(False, "check every row first, then extract the damaged shards again")
    verify: Path | None = setting(
        None,
        "only check every row of this cache, and list damaged rows; the exit code is then 1",
    )
    inspect: Path | None = setting(None, "only show the contents of this cache")
    show: Path | None = setting(
        None,
        "with --inspect: draw the regions on photographs of --dataset and --root, into this new "
        "folder; 20 photographs, or --limit",
    )
    pack: Path | None = setting(
        None, "only pack the cache in --out into one HDF5 file with this name"
    )
    batch: int | None = setting(
        None, "images per forward pass  [grid: 32, detector: 8]", at_least=1, group="machine"
    )
    workers: int | None = setting(
        None,
        "decoding threads (with a GPU: processes)  [one per core]",
        at_least=0,
        group="machine",
    )
    limit: int | None = setting(
        None, "extract only the first N photographs", at_least=1, group="data"
    )
    max_pixels: int | None = setting(None, MAX_PIXELS_HELP, at_least=1, group="data")
    engine: str = setting(
        "processes",
        "what runs the extraction. processes: this process, and those of torchrun; ray: one actor "
        "per GPU of a Ray cluster, or --workers actors on CPUs",
        choices=("processes", "ray"),
        group="machine",
    )
    device: str = setting("auto", "device of the backbone", choices=DEVICES, group="machine")
    precision: str = setting(
        "auto", "precision of matrix products", choices=PRECISIONS, group="machine"
    )
    seed: int = setting(0, "random seed for --weights random", group="machine")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.show and not self.inspect:
            raise UserError("--show draws the regions of a cache; pass --inspect CACHE too")

    @property
    def retry_all(self) -> bool:
        """Whether to try all unreadable photographs again, including unchanged files.

        True with --max-pixels, because another pixel limit may make a photograph readable.
        """
        return self.retry_unreadable or self.max_pixels is not None


@command(ExtractConfig)
def main(config: ExtractConfig) -> None:
    """Run a CNN over every image once and cache its region features in HDF5.

    Without options, the command draws the embedded sample of simple scenes and extracts its
    features with a small backbone that is part of the package.
    """
    cache = config.out or Path("cache") / config.dataset
    if config.verify or config.inspect or config.pack or (config.repair and is_remote(cache)):
        return maintain(config, cache)
    machine = open_machine(config.device, config.seed, config.precision)
    source = open_photographs(config)
    images = source.select(config.split)[: config.limit]
    missing_ids = missing_photographs(source, images, config.allow_missing)
    recipe = choose_recipe(config, machine, images, missing_ids)
    if config.repair:
        repair_cache(cache, machine)
    output = open_output(cache)
    ray_engine = start_ray(config, recipe, images, missing_ids)
    refuse_other_identity(output, recipe)
    shards, retry_shards = plan_all(images, output, config.retry_all, machine)
    print_plan(output, source, images, shards, retry_shards, recipe)
    create_folder(output, images, [*shards, *retry_shards], recipe)
    run = ray_engine.extract if ray_engine else extract_all
    bar = run(images, output, shards, retry_shards, recipe)
    finish(output, images, bar, config)


def start_ray(
    config: ExtractConfig, recipe: Recipe, images: Sequence[Image], missing_ids: set[int]
) -> RayEngine | None:
    """Start the actors of --engine ray; None for another engine.

    The recipe gets the provenance of the machines of the actors.

    Raises UserError for torchrun, because Ray starts the processes itself.
    """
    if config.engine != "ray":
        return None
    if recipe.machine.world > 1:
        raise UserError("--engine ray starts its own processes; run the command without torchrun")

    if not getattr(config.options("regions"), "boxes", None):
        images = ()  # only given boxes need them, and the actors get a copy

    def open_recipe(machine: Machine, workers: int) -> Recipe:
        return choose_recipe(replace(config, workers=workers), machine, images, missing_ids)

    engine = RayEngine(open_recipe, config.device, config.seed, config.precision, config.workers)
    recipe.provenance = engine.check_identity(recipe.identity)
    return engine


def plan_all(
    images: Sequence[Image], output: Output, retry_all: bool, machine: Machine
) -> tuple[list[Shard], list[Shard]]:
    """Plan the shards of the images, and on rank 0 those of photographs that are tried again.

    The unreadable photographs of a remote cache are read and tried again only with `retry_all`.
    """
    existing = output.existing(images, unreadable=retry_all)
    shards = plan_shards(images, output.folder, existing)
    if machine.rank:
        return shards, []
    return shards, plan_retry(images, output.folder, retry_all, shards, existing)


def extract_all(
    images: Sequence[Image],
    output: Output,
    shards: Sequence[Shard],
    retry_shards: Sequence[Shard],
    recipe: Recipe,
) -> Progress:
    """Extract the shards of this process, then the shards that no other process has claimed.

    In a remote cache there are no claims, so this process extracts only its own shards.

    Returns the progress bar, which has the number of extracted images and the time.
    """
    machine = recipe.machine
    own_shards = shards[machine.rank :: machine.world]
    own_paths = {shard.path for shard in own_shards}
    other_shards = [shard for shard in shards if shard.path not in own_paths]
    if not output.takes_over:
        other_shards = []
    # only an estimate, because the processes share the shards by claims
    total = math.ceil(pending_images([*shards, *retry_shards]) / machine.world)
    with output.claims() as claims, progress(total, "images", "extract") as bar:
        written = extract_shards([*own_shards, *other_shards, *retry_shards], claims, recipe, bar)
        # A process with another plan may have written a shard under a file name of this plan.
        # Plan the remaining images again until none are left.
        while output.takes_over and written and remaining_images(images, output):
            again = plan_shards(images, output.folder, output.existing(images))
            written = extract_shards(again, claims, recipe, bar)
    return bar


def pending_images(shards: Sequence[Shard]) -> int:
    """Return the number of images in shards that are not written yet."""
    return sum(len(shard.images) for shard in shards if not shard.written)


def remaining_images(images: Sequence[Image], output: Output) -> list[Image]:
    """Return the images that have no row and are not listed as unreadable."""
    processed = processed_ids(output.existing(images))
    return [image for image in images if image.id not in processed]


def maintain(config: ExtractConfig, cache: Path) -> None:
    """Run --verify, --inspect or --pack on an existing cache. No photographs are read.

    Raises UserError for a remote cache.
    """
    if is_remote(cache) and (config.pack or config.repair):
        raise UserError(
            f"--pack and --repair need a local cache; copy it first: python -m data.remote {cache} "
            f"{cache.name or 'cache'}"
        )
    if config.verify:
        verify_cache(config.verify)
    if config.inspect:
        inspect_cache(config.inspect)
    if config.show:
        assert config.inspect is not None  # checked by the configuration
        source = config.open_source()
        show_regions(config.inspect, source, config.show, config.limit, config.max_pixels)
    if config.pack:
        pack_cache(cache, config.pack)


def open_photographs(config: ExtractConfig) -> Source:
    """Open the dataset. Without options this is the embedded sample, and a message says so."""
    if config.dataset == "sample" and config.root is None:
        say(
            f"dataset: the embedded sample of drawn scenes, in {SAMPLE_ROOT}; for your own data "
            "pass --dataset folder --root PHOTOGRAPHS"
        )
    return config.open_source()


def missing_photographs(source: Source, images: Sequence[Image], allowed: bool) -> set[int]:
    """Return the ids of the images whose file does not exist.

    Raises:
        UserError: files are missing and `allowed` is false. The message has their number and the
            first five names.
    """
    source_missing_ids = {image.id for image in source.missing}
    missing = [image for image in images if image.id in source_missing_ids]
    if missing and not allowed:
        listing = Listing(source.root)
        names = [image.name + similar_hint(listing.similar(image.name)) for image in missing[:5]]
        raise UserError(
            f"{len(missing):,} of {len(images):,} photographs are not under {source.root}: "
            f"{', '.join(names)}{', ...' if len(missing) > 5 else ''}; add the files, pass their "
            "folder as --images or --root, or pass --allow-missing to continue without them"
        )
    return {image.id for image in missing}


def similar_hint(similar: Sequence[str]) -> str:
    """Return a hint that names up to three photographs among the similar file names, or ""."""
    photographs = [name for name in similar if Path(name).suffix.lower() in {*SUFFIXES, *HEIC}]
    return f" (there is {', '.join(photographs[:3])})" if photographs else ""


def choose_recipe(
    config: ExtractConfig, machine: Machine, images: Sequence[Image], missing_ids: set[int]
) -> Recipe:
    """Open the backbone and collect everything that determines the rows of the cache."""
    views = parse_views(config.views)
    options = config.options("regions")
    backbone = REGIONS[config.regions].open(options, config.dataset, config.seed)
    if file := getattr(options, "boxes", None):
        if views:
            raise UserError("--boxes are boxes of whole photographs; leave out --views")
        backbone = with_given_boxes(backbone, read_boxes(file, images))
    provenance = describe_versions(machine) | ({"views": list(views)} if views else {})
    return Recipe(
        place_backbone(backbone, machine),
        machine,
        backbone.identity(),
        provenance,
        config.batch or backbone.batch,
        decoding_workers(config.workers),
        config.strict,
        frozenset(missing_ids),
        config.max_pixels,
    )


def create_folder(
    output: Output, images: Sequence[Image], shards: Sequence[Shard], recipe: Recipe
) -> None:
    """Create the cache folder. Save the backbone's weights there, unless they are from a hub."""
    keep = None
    if recipe.machine.rank == 0:
        keep = functools.partial(keep_backbone, recipe.backbone)
    output.prepare(images, shards, recipe.identity, recipe.provenance, keep)


def describe_versions(machine: Machine) -> dict[str, Any]:
    """Return the precision, decoder, device and versions as a record for the shards.

    A difference in this record changes at most the last digits of the features.
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


def refuse_other_identity(output: Output, recipe: Recipe) -> None:
    """Raise UserError if an existing cache has another identity, precision or decode path."""
    header, cache = output.header(), output.cache
    if header is None:
        return
    cache_identity, cache_provenance = header
    changes = differences(recipe.identity, cache_identity) + differences(
        recipe.provenance, cache_provenance, ("precision", "decode", "views")
    )
    if changes:
        raise UserError(
            f"{cache} was extracted with other options ({'; '.join(changes)}); pass another --out, "
            "or the same options"
        )
    if changes := differences(recipe.provenance, cache_provenance):
        say(f"warning: the first rows of {cache} were extracted with {'; '.join(changes)}")


def print_plan(
    output: Output,
    source: Source,
    images: Sequence[Image],
    shards: Sequence[Shard],
    retry_shards: Sequence[Shard],
    recipe: Recipe,
) -> None:
    """Print the model, the number of images and the disk space.

    Raises:
        UserError: the free disk space is too small for the new rows.
    """
    rows = pending_images([*shards, *retry_shards])
    shapes = [part.shape for part in recipe.backbone.parts]
    # float16 features, four float32 box coordinates, and about 400 bytes of tables for each image
    bytes_per_view = sum(regions * (channels * 2 + 16) for regions, channels in shapes)
    bytes_per_image = (1 + len(recipe.views)) * bytes_per_view + 400
    sizes = " + ".join(f"{regions} regions x {channels}" for regions, channels in shapes)
    needed = rows * bytes_per_image
    space = human_bytes(needed)
    if output.folder == output.cache:
        space = check_free_space(output.cache, needed)
    elif rows:  # a remote cache: a few shards at a time are on this disk
        waiting = (PENDING_WRITES + 2) * max(
            len(shard.images) for shard in [*shards, *retry_shards]
        )
        check_free_space(output.folder, min(needed, waiting * bytes_per_image))
    done = len(images) - pending_images(shards)
    name = recipe.backbone.name
    weights = ", ".join(kind.get("weights", kind["regions"]) for kind in kinds_of(recipe.identity))
    view_names = ""
    if recipe.views:
        view_names = f" and the same size again for each view ({', '.join(recipe.views)})"
    say(
        f"{name} ({weights}), {sizes}{view_names}, on {recipe.machine}, "
        f"{recipe.workers} decoding workers"
    )
    say(
        f"{source.dataset} {source.root}: {len(images):,} images, {done:,} done; {rows:,} rows "
        f"to {output.cache}, {space}"
    )
    if retry_shards:
        retries = sum(len(shard.images) for shard in retry_shards)
        say(f"{retries:,} photographs that could not be read are tried again")


def finish(output: Output, images: Sequence[Image], bar: Progress, config: ExtractConfig) -> None:
    """Write the index features.h5 if all images are done. Print a summary and the next command.

    If other processes still extract images, the last of them writes the index. A remote cache has
    no features.h5.
    """
    cache = output.cache
    if remaining := remaining_images(images, output):
        say(
            f"this process has finished its part of {cache}. Other processes still extract "
            f"{len(remaining):,} images; the last process to finish writes the index. If a process "
            "was killed, run the command again to extract its shard"
        )
        return
    unreadable, size = output.finish()
    speed = "all images were already extracted"
    if bar.done:
        speed = f"{bar.done:,} images in {bar.seconds:.0f} s, {bar.rate:.0f} images/s"
    say(f"{cache}: complete, {human_bytes(size)}; {speed}")
    if unreadable:
        have = "photograph has" if len(unreadable) == 1 else "photographs have"
        say(f"{len(unreadable)} {have} no row; {cache / 'unreadable.jsonl'} has the reasons:")
        for record in unreadable[:5]:
            say(f"  {record.file_name}: {record.reason}")
    if is_remote(cache):
        name = cache.name or "cache"
        say(f"next: python -m data.remote {cache} {name}  (copies the cache to this machine)")
        cache = Path(name)
    say(f"next: {config.train_command(cache)}")


if __name__ == "__main__":
    main()
