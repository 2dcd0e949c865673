"""Photographs from disk to pixels: any file Pillow reads becomes upright RGB of the backbone's size.

Pillow decodes (JPEGs of more than twice the size that is needed at a reduced scale, as its thumbnails are), torch's uint8
kernel resizes: within one step of 255 of Pillow's own, five times as fast. Threads do both side by side: neither holds the
interpreter. The decode path recorded in a cache is `DECODE_PATH`: rows made by another differ in their last digits.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from data import DataError

DECODE_PATH = f"pillow {PIL.__version__.split('.')[0]}, torch resize"
RESIZES = ("stretch", "crop", "letterbox")
GAP = 2  # a JPEG is decoded at a reduced scale that is still so many times the size needed
FILTERS = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}  # lanczos is Pillow's

# Told as UnreadableImage instead; the filter is set here since one set around each photograph is not safe in threads.
warnings.filterwarnings("ignore", category=PillowImage.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken tags in files that are read all the same
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read


class UnreadableImage(DataError):
    """A photograph that cannot be decoded; the message is the reason, without the name."""


@dataclass(frozen=True)
class Framing:
    """How a photograph becomes a backbone's input.

    stretch: the whole photograph, its sides squeezed to `size` (H, W). crop: the largest part in the middle that has the
    shape of `size`. letterbox: the whole photograph in its own shape, the rest filled with `fill` (RGB).
    """

    size: tuple[int, int]
    interpolation: str = "bicubic"
    resize: str = "stretch"
    fill: tuple[int, int, int] = (0, 0, 0)


class Photo(NamedTuple):
    """pixels uint8 [3,H,W] RGB, channels last in memory; (height, width) of the upright original; and the part of it that
    the pixels show: x0 y0 x1 y1 in 0..1 of the original, beyond that where there is filling."""

    pixels: np.ndarray
    original: tuple[int, int]
    frame: tuple[float, float, float, float]


def read_image(path: Path, framing: Framing) -> Photo:
    """Decode, turn upright (EXIF) and frame one photograph. Raises UnreadableImage."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise UnreadableImage("not a regular file")
        for _ in range(3):
            with open(path, "rb") as file:
                before = os.fstat(file.fileno())
                photo, original = _decode(file, framing)
                after = os.stat(path)
            if (before.st_ino, before.st_size, before.st_mtime_ns) == (after.st_ino, after.st_size, after.st_mtime_ns):
                return _frame(photo, original, framing)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image that Pillow reads") from error
    except PillowImage.DecompressionBombError as error:
        raise UnreadableImage(f"more than {PillowImage.MAX_IMAGE_PIXELS:,} pixels") from error
    except Exception as error:  # what decoders raise on broken files is past listing: struct.error, MemoryError, ...
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(reason or type(error).__name__) from error
    raise UnreadableImage("it changed while it was read")


def _decode(file, framing: Framing) -> tuple[PillowImage.Image, tuple[int, int]]:
    """The upright photograph in RGB, perhaps at a reduced scale, and the (height, width) it has in full."""
    with PillowImage.open(file) as opened:
        width, height = opened.size
        if width * height > PillowImage.MAX_IMAGE_PIXELS:
            raise PillowImage.DecompressionBombError
        needed = GAP * max(framing.size)
        if min(width, height) >= 2 * needed:
            opened.draft(None, (needed, needed))  # of JPEGs alone
        photo = ImageOps.exif_transpose(opened)
        if photo.size != opened.size and photo.size == opened.size[::-1]:
            width, height = height, width
        return _eight_bits(photo).convert("RGB"), (height, width)


def _eight_bits(photo: PillowImage.Image) -> PillowImage.Image:
    """16-bit greyscale scaled to 8 bits (Pillow's own conversion clips it to white); anything else as it is."""
    if not photo.mode.startswith("I"):
        return photo
    return PillowImage.fromarray((np.asarray(photo).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))


def _frame(photo: PillowImage.Image, original: tuple[int, int], framing: Framing) -> Photo:
    (height, width), pixels = framing.size, np.asarray(photo)
    h, w = pixels.shape[:2]
    if framing.resize == "stretch":
        return Photo(_resize(pixels, framing.size, framing).transpose(2, 0, 1), original, (0.0, 0.0, 1.0, 1.0))
    if framing.resize == "crop":
        scale = max(height / h, width / w)
        part_h, part_w = min(h, max(1, round(height / scale))), min(w, max(1, round(width / scale)))
        y, x = (h - part_h) // 2, (w - part_w) // 2
        found = _resize(pixels[y : y + part_h, x : x + part_w], framing.size, framing)
        return Photo(found.transpose(2, 0, 1), original, (x / w, y / h, (x + part_w) / w, (y + part_h) / h))
    scale = min(height / h, width / w)
    inner_h, inner_w = max(1, min(height, round(h * scale))), max(1, min(width, round(w * scale)))
    y, x = (height - inner_h) // 2, (width - inner_w) // 2
    found = np.empty((height, width, 3), np.uint8)
    found[:] = framing.fill
    found[y : y + inner_h, x : x + inner_w] = _resize(pixels, (inner_h, inner_w), framing)
    frame = (-x / inner_w, -y / inner_h, (width - x) / inner_w, (height - y) / inner_h)
    return Photo(found.transpose(2, 0, 1), original, frame)


def _resize(pixels: np.ndarray, size: tuple[int, int], framing: Framing) -> np.ndarray:
    """Pixels uint8 [h,w,3] resized to `size`, with antialiasing; [H,W,3], contiguous."""
    if pixels.shape[:2] == size:
        return np.ascontiguousarray(pixels)
    if framing.interpolation == "lanczos":
        photo = PillowImage.fromarray(pixels).resize(size[::-1], PillowImage.Resampling.LANCZOS)
        return np.ascontiguousarray(np.asarray(photo))
    mode = FILTERS[framing.interpolation]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    smooth = {"antialias": True} if mode in ("bilinear", "bicubic") else {}
    found = torch.nn.functional.interpolate(image, size, mode=mode, **smooth)[0]
    return np.ascontiguousarray(found.permute(1, 2, 0).numpy())


def try_image(path: Path, framing: Framing) -> tuple[Photo | None, str]:
    """(photo, "") of a photograph, or (None, reason) for one that cannot be read."""
    try:
        return read_image(path, framing), ""
    except UnreadableImage as error:
        return None, str(error)


class Photographs(Dataset):
    """Decoded photographs: item i is (Photo, ""), or (None, reason) for one that cannot be read."""

    def __init__(self, paths: Sequence[Path], framing: Framing) -> None:
        self.paths, self.framing = list(paths), framing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Photo | None, str]:
        return try_image(self.paths[index], self.framing)


def stack(photos: Sequence[Photo]) -> tuple[torch.Tensor, torch.Tensor]:
    """Photographs as a batch: pixels uint8 [B,3,H,W], channels last, and frames [B,4] float32."""
    pixels = np.stack([photo.pixels.transpose(1, 2, 0) for photo in photos])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([photo.frame for photo in photos])
