"""Photographs for benchmarks: JPEGs of COCO's size (640x480, about 150 KB).

They are enlarged real photographs with added noise, or drawn images.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

BYTES_PER_PIXEL = 150_000 / (640 * 480)


def make_photographs(
    folder: Path, count: int, real: Path | None, width: int = 640, height: int = 480
) -> tuple[list[Path], str]:
    """Write `count` JPEGs 000000.jpg, 000001.jpg, ... to `folder`; existing files are kept.

    real: the folder of real photographs; None or without flickr8k: draw images.

    Returns the paths and a description of the photographs.
    """
    real_paths = (
        sorted((real / "flickr8k" / "images").glob("*.jpg"))[:count]
        if real and (real / "flickr8k").is_dir()
        else []
    )
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06d}.jpg" for number in range(count)]

    target_bytes = BYTES_PER_PIXEL * width * height

    def make(number: int) -> None:
        if paths[number].exists():
            return
        rng = np.random.default_rng(number)
        if real_paths:
            with Image.open(real_paths[number % len(real_paths)]) as photo:
                photo = photo.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        else:  # smooth patches of colour
            patches = rng.integers(0, 256, (12, 16, 3), np.uint8)
            photo = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(photo, np.float32)
        # noise replaces the detail that enlarging lost
        contrast = 4 + 0.1 * np.abs(pixels - pixels.mean((0, 1))).mean()
        grain = rng.normal(0, contrast, pixels.shape[:2])[..., None]
        photo = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
        quality = min(
            range(60, 97, 3),
            key=lambda quality: abs(_size(photo, quality, paths[number]) - target_bytes),
        )
        temporary = paths[number].with_suffix(".tmp")
        photo.save(temporary, "JPEG", quality=quality)
        temporary.replace(paths[number])

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(count)))
    size = sum(path.stat().st_size for path in paths) / count
    origin = "real ones enlarged, grain added" if real_paths else "drawn"
    return paths, f"{count} JPEGs of {width}x{height}, {size / 1e3:.0f} KB, {origin}"


def _size(photo: Image.Image, quality: int, path: Path) -> int:
    scratch = path.with_suffix(f".{quality}.tmp")
    photo.save(scratch, "JPEG", quality=quality)
    size = scratch.stat().st_size
    scratch.unlink()
    return size
