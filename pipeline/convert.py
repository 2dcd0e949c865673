"""Convert features that other programs extracted to a feature cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.cache.claims import Claims
from data.cache.outputs import LocalOutput
from data.cache.reader import FeatureCache, Rows, differences
from data.cache.writer import Shard, plan_shards, write_shard
from data.datasets.registry import DATASETS
from data.images import read_size
from data.imports.listing import Imported, list_images, read_sizes
from data.imports.registry import FORMATS, detect, open_reader
from data.imports.rows import BOX_UNITS, row_of
from data.sources import Image, Source
from pipeline.cli import UserError, command, flag_of, setting
from pipeline.runtime import check_free_space
from pipeline.sources import SourceOptions
from pipeline.terminal import Progress, human_bytes, progress, say


@dataclass(frozen=True)
class ConvertConfig(SourceOptions):
    """The options of pipeline.convert."""

    sources: tuple[Path, ...] = setting(
        (),
        "file or folder of features; several ones of one format become one cache",
        name="SOURCE...",
    )
    out: Path | None = setting(
        None, "cache folder to create or to continue  [cache/NAME]", group="output"
    )
    name: str | None = setting(
        None,
        "what the features are, such as bottom-up-36; part of the identity of the cache, so that "
        "caches with one name can be used together  [the name of SOURCE]",
        group="output",
    )
    format: str | None = setting(
        None, "format of SOURCE  [detected]", choices=(*FORMATS,), group="source"
    )
    boxes: Path | None = setting(
        None,
        "second folder with the boxes, ID.npy, such as cocobu_box; with the formats npz and npy",
        group="source",
    )
    box_unit: str = setting(
        "pixel",
        "unit of the boxes; fraction: of the width and height; none: leave the boxes out",
        choices=BOX_UNITS,
        group="source",
    )
    sizes: tuple[Path, ...] = setting(
        (),
        "JSON file with the sizes of the images, for boxes in pixels without sizes, such as "
        "captions_train2014.json; may be repeated",
        group="source",
    )
    dataset: str | None = setting(  # type: ignore[assignment]
        None,
        "format of the dataset that the features belong to  [none: the ids follow from SOURCE]",
        registry=DATASETS,
        group="data",
    )
    split: str = setting(
        "all",
        "split of the dataset to convert",
        choices=("train", "dev", "val", "test", "all"),
        group="data",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UserError("no SOURCE; pass a file or folder of features")
        if self.dataset is None:
            unused = ("root", "annotations", "images", "ids", "exclude_ids")
            passed = [name for name in unused if getattr(self, name)]
            if passed or self.split != "all":
                raise UserError(f"{flag_of((passed or ['split'])[0])} needs --dataset")

    @property
    def feature_name(self) -> str:
        """What the features are: --name, else the name of the first SOURCE without suffix."""
        return self.name or self.sources[0].resolve().name.partition(".")[0] or "features"


@dataclass(frozen=True)
class Conversion:
    """Everything that determines the rows of the cache.

    regions: number of regions of a row, including padding.
    unit: one of BOX_UNITS.
    """

    imported: Imported
    regions: int
    unit: str
    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def row_bytes(self) -> int:
        """Size of a row on the disk: features, boxes and about 400 bytes of tables."""
        return self.regions * (self.imported.channels * 2 + 16) + 400


@command(ConvertConfig)
def main(config: ConvertConfig) -> None:
    """Convert region features of other programs to a feature cache.

    SOURCE is a .tsv file with base64 columns (bottom-up attention, LXMERT), a folder with one .npz
    or .npy file per image, an LMDB of such files, or an HDF5 file with datasets or a group per
    image (M2 Transformer, hloc). The same command continues a conversion that was stopped.
    """
    cache = config.out or Path("cache") / config.feature_name
    output = LocalOutput(cache)
    output.header()  # raises DataError if the cache would be a file
    if cache.resolve() in [path.resolve() for path in config.sources]:
        raise UserError(f"--out {cache} is the source; pass another folder")
    source = config.open_source() if config.dataset else None
    conversion = prepare(config, source, output)
    images = conversion.imported.images
    shards = unwritten(images, cache)
    print_plan(cache, conversion, pending(shards))
    cache.mkdir(parents=True, exist_ok=True)
    with output.claims() as claims, progress(pending(shards), "images", "convert") as bar:
        while shards and convert_shards(shards, claims, conversion, bar):
            shards = unwritten(images, cache)
    finish(output, pending(shards), bar, config)


def prepare(config: ConvertConfig, source: Source | None, output: LocalOutput) -> Conversion:
    """List the images of the source, and check everything that can be checked without features."""
    readers = [open_reader(path, config.format, config.boxes) for path in config.sources]
    wanted = source.select(config.split) if source else []
    sizes = read_sizes(config.sizes)
    imported = list_images(readers, config.box_unit, sizes, source, wanted)
    if imported.boxes == "given" and config.box_unit == "pixel":
        check_sizes(imported, source)
    identity = {
        "regions": "imported",
        "imported": config.feature_name,
        "boxes": imported.boxes,
        "channels": imported.channels,
    }
    formats = {config.format or detect(path) for path in config.sources}
    provenance = {
        "format": ", ".join(sorted(formats)),
        "sources": [path.name for path in config.sources],
    }
    regions = regions_of_rows(output, imported, identity, provenance)
    return Conversion(imported, regions, config.box_unit, identity, provenance)


def check_sizes(imported: Imported, source: Source | None) -> None:
    """Raise UserError if boxes are in pixels and the size of an image is unknown."""
    missing = {image.id for image in source.missing} if source else set()
    unknown = [
        image
        for image in imported.images
        if imported.items[image.id].size is None and (source is None or image.id in missing)
    ]
    if unknown:
        raise UserError(
            f"{imported.where(unknown[0])}: the size of the image is unknown, which boxes in "
            f"pixels need ({len(unknown):,} images). Pass --sizes with a JSON file of sizes, such "
            "as captions_train2014.json, or --dataset with the folder of the photographs, or "
            "--box-unit none to leave the boxes out"
        )


def regions_of_rows(
    output: LocalOutput,
    imported: Imported,
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> int:
    """Return the number of regions of a row: that of an existing cache, else the largest needed.

    Raises UserError if an existing cache has another identity, or too few regions.
    """
    header, cache = output.header(), output.cache
    if header is None:
        return imported.regions
    if changes := differences(identity, header[0]):
        raise UserError(
            f"{cache} has other features ({'; '.join(changes)}); pass another --out, or the same "
            "options and --name"
        )
    regions = FeatureCache(cache).shape[0]
    if imported.regions > regions:
        raise UserError(
            f"{cache} has rows of {regions} regions, and SOURCE has up to {imported.regions}; "
            "convert all sources in one command, with another --out"
        )
    if changes := differences(provenance, header[1]):
        say(f"warning: the first rows of {cache} were converted with {'; '.join(changes)}")
    return regions


def unwritten(images: tuple[Image, ...], cache: Path) -> list[Shard]:
    """Return the planned shards that do not exist yet."""
    return [shard for shard in plan_shards(images, cache) if not shard.written]


def pending(shards: list[Shard]) -> int:
    """Return the number of images in shards."""
    return sum(len(shard.images) for shard in shards)


def print_plan(cache: Path, conversion: Conversion, rows: int) -> None:
    """Print what is converted, and the disk space. Raises UserError if the space is too small.

    rows: number of images in shards that do not exist yet.
    """
    imported, images = conversion.imported, conversion.imported.images
    space = check_free_space(cache, rows * conversion.row_bytes)
    counts = f"up to {imported.regions} regions x {imported.channels}"
    boxes = {
        "given": "with boxes",
        "cells": "of a grid; the boxes are its cells",
        "none": "without boxes; each region has the whole image as its box",
    }
    say(
        f"{', '.join(conversion.provenance['sources'])} ({conversion.provenance['format']}): "
        f"{counts}, {boxes[imported.boxes]}"
    )
    if imported.left_out:
        say(f"{imported.left_out:,} images are left out: the dataset or its split has none of them")
    say(f"{len(images):,} images, {len(images) - rows:,} done; {rows:,} rows to {cache}, {space}")


def convert_shards(
    shards: list[Shard], claims: Claims, conversion: Conversion, bar: Progress
) -> int:
    """Write each shard that no other process has claimed. Returns the number of new shards."""
    written = 0
    for shard in shards:
        if claims.take(shard):
            write_rows(shard, conversion, bar)
            claims.release(shard.path)
            written += 1
    return written


def write_rows(shard: Shard, conversion: Conversion, bar: Progress) -> None:
    """Read the images of one shard and write it."""
    imported, count = conversion.imported, len(shard.images)
    rows = Rows(
        np.zeros((count, conversion.regions, imported.channels), np.float16),
        np.zeros((count, conversion.regions, 4), np.float32),
        np.empty(count, np.int16),
    )
    sizes = np.zeros((count, 2), np.int32)
    for number, (image, arrays) in enumerate(imported.read(shard.images)):
        _, entry, size = imported.items[image.id]
        if size is None and imported.boxes == "given" and conversion.unit == "pixel":
            size = read_size(image.path)
        where = imported.where(image)
        features, boxes = row_of(entry, arrays, conversion.unit, size, where)
        regions = len(features)
        rows.features[number, :regions], rows.boxes[number, :regions] = features, boxes
        rows.counts[number] = regions
        sizes[number] = size or (0, 0)
        bar.step(1)
    write_shard(shard, shard.images, [rows], sizes, [], conversion.identity, conversion.provenance)


def finish(output: LocalOutput, remaining: int, bar: Progress, config: ConvertConfig) -> None:
    """Write the index features.h5 if all images are done. Print a summary and the next command.

    remaining: number of images that other processes still convert.
    """
    cache = output.cache
    if remaining:
        say(
            f"other processes still convert {remaining:,} images to {cache}. If a process was "
            "killed, run the command again"
        )
        return
    _, size = output.finish()
    speed = "all images were already converted"
    if bar.done:
        speed = f"{bar.done:,} images in {bar.seconds:.0f} s, {bar.rate:.0f} images/s"
    say(f"{cache}: complete, {human_bytes(size)}; {speed}")
    say(f"next: {config.train_command(cache)}")


if __name__ == "__main__":
    main()
