"""Photographs from disk to pixels: any file Pillow reads becomes upright RGB, uint8 [3,H,W], the whole picture.

The decode path recorded in a cache is `DECODE_PATH`: rows made by another path differ in their last digits.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from data import DataError

DECODE_PATH = f"pillow {PIL.__version__.split('.')[0]}"
FILTERS = {"bilinear": PillowImage.Resampling.BILINEAR, "bicubic": PillowImage.Resampling.BICUBIC,
           "nearest": PillowImage.Resampling.NEAREST, "lanczos": PillowImage.Resampling.LANCZOS}  # fmt: skip


class UnreadableImage(DataError):
    """A photograph that cannot be decoded; the message is the reason, without the name."""


def read_image(path: Path, size: tuple[int, int], interpolation: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode, turn upright (EXIF) and stretch one photograph to `size` (H, W).

    Returns RGB uint8 [3,H,W] and the original's (height, width) after turning. Raises UnreadableImage.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PillowImage.DecompressionBombWarning)
            with PillowImage.open(path) as file:
                photo = ImageOps.exif_transpose(file)
                photo = _eight_bits(photo).convert("RGB")
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image that Pillow reads") from error
    except (PillowImage.DecompressionBombWarning, PillowImage.DecompressionBombError) as error:
        raise UnreadableImage(f"more than {PillowImage.MAX_IMAGE_PIXELS:,} pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(reason or type(error).__name__) from error
    original = (photo.height, photo.width)
    if original != size:
        photo = photo.resize((size[1], size[0]), FILTERS[interpolation])
    return np.ascontiguousarray(np.asarray(photo).transpose(2, 0, 1)), original


def _eight_bits(photo: PillowImage.Image) -> PillowImage.Image:
    """16-bit greyscale scaled to 8 bits (Pillow's own conversion clips it to white); anything else as it is."""
    if not photo.mode.startswith("I"):
        return photo
    return PillowImage.fromarray((np.asarray(photo).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))


class Photographs(Dataset):
    """Decoded photographs for a DataLoader: item i is (pixels uint8 [3,H,W], (height, width), reason).

    An unreadable photograph gives zero pixels and its reason; every other reason is the empty string.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], interpolation: str) -> None:
        self.paths, self.size, self.interpolation = list(paths), size, interpolation

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[int, int], str]:
        try:
            return *read_image(self.paths[index], self.size, self.interpolation), ""
        except UnreadableImage as error:
            return np.zeros((3, *self.size), np.uint8), (0, 0), str(error)
