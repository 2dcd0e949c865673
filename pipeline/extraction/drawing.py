"""Draw the regions of a cache on the photographs, for --inspect CACHE --show DIR."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data.cache.reader import FeatureCache
from data.files import atomic_write
from data.images import ORIGINAL, Framing, try_image
from data.sources import Source
from pipeline.cli import UserError
from pipeline.terminal import say

SHOWN = 20  # photographs, without --limit
MAX_NAME = 200  # bytes of a file name, without the image id and the suffix
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")


def show_regions(
    path: Path, source: Source, folder: Path, limit: int | None, max_pixels: int | None = None
) -> None:
    """Write photographs with the boxes of their regions, class names and scores to `folder`.

    limit: number of photographs, evenly spaced in the cache; None: 20. max_pixels: as in Framing.
    Raises UserError if the folder is not empty, or if `source` has no photograph of the cache, and
    DataError if it has another photograph under an id of the cache.
    """
    cache = FeatureCache(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--show {folder} is not empty; pass a new folder")
    ids = [image_id for image_id in cache.ids.tolist() if image_id in source.by_id]
    if not ids:
        raise UserError(
            f"no photograph of {path} is in {source.dataset} {source.root}; pass the --dataset and "
            "--root of its extraction"
        )
    cache.select(source.by_id[image_id] for image_id in ids)  # raises DataError for other names
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(limit or SHOWN, len(ids))).astype(int))
    files: set[str] = set()
    for image_id in [ids[index] for index in chosen]:
        framing = Framing((4096, 4096), resize=ORIGINAL, max_pixels=max_pixels)
        photo, reason = try_image(source.by_id[image_id].path, framing)
        if photo is None:
            say(f"{cache.name_of(image_id)} is not drawn: {reason}")
            continue
        picture = Image.fromarray(np.ascontiguousarray(photo.pixels.transpose(1, 2, 0)))
        draw_boxes(picture, cache, image_id)
        files.add(file := file_of(cache.name_of(image_id), image_id, files))
        with atomic_write(folder / file) as temporary:
            picture.save(temporary, "JPEG", quality=90)
    say(f"{len(files)} photographs with their regions: {folder}")


def file_of(name: str, image_id: int, others: set[str]) -> str:
    """Return the file name for the drawing of a photograph, in which slashes are underscores.

    It ends in the image id if the name alone is too long, or is one of `others`.
    """
    stem = name.replace("/", "_")
    start = stem.encode()[:MAX_NAME].decode(errors="ignore")
    is_unique = start == stem and f"{stem}.jpg" not in others
    return f"{stem}.jpg" if is_unique else f"{start}-{image_id}.jpg"


def draw_boxes(picture: Image.Image, cache: FeatureCache, image_id: int) -> None:
    """Draw the boxes of an image's regions, in place; the best detection is drawn last."""
    pen = ImageDraw.Draw(picture)
    _, boxes, counts = cache[image_id]
    *_, count = np.atleast_1d(counts).tolist()  # of two kinds, the second one is drawn
    start = int(np.sum(counts)) - count
    pixels = boxes[start : start + count] * (picture.size * 2)
    texts = region_texts(cache, image_id, count)
    for number in reversed(range(count)):
        x0, y0, x1, y1 = pixels[number].tolist()
        colour = COLOURS[number % len(COLOURS)]
        line = max(1, round(min(picture.size) / 200))
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=line)
        if texts[number]:
            place = pen.textbbox((x0 + 1, y0 + 1), texts[number])
            pen.rectangle(place, fill=colour)
            pen.text((x0 + 1, y0 + 1), texts[number], fill="white")


def region_texts(cache: FeatureCache, image_id: int, count: int) -> list[str]:
    """Class name and score of each region; "" in a cache without classes."""
    classes = cache.classes
    if classes is None:
        return [""] * count
    scores, labels = (part[0, :count].tolist() for part in cache.detections([image_id]))
    return [f"{classes[label]} {score:.2f}" for score, label in zip(scores, labels, strict=True)]
