"""Photographs from disk to pixels: any file Pillow reads becomes upright RGB of the backbone's
size.

Pillow decodes (JPEGs of more than twice the size that is needed at a reduced scale, as its
thumbnails are), torch's uint8 kernel resizes: within one step of 255 of Pillow's own, five times as
fast. Threads do both side by side: neither holds the interpreter. What is transparent shows white;
greyscale of more than 8 bits is scaled to 8. The decode path recorded in a cache is `DECODE_PATH`:
rows made by another differ in their last digits.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import PIL
import torch
from PIL import Image as PillowImage
from PIL import ImageOps, PngImagePlugin, UnidentifiedImageError
from torch.utils.data import Dataset

from data import DataError
from data.image_formats import HEIC_BRANDS, SUFFIXES

DECODE_PATH = f"pillow {PIL.__version__.split('.')[0]}, torch resize"
RESIZES = ("stretch", "crop", "letterbox")
GAP = 2  # a JPEG is decoded at a reduced scale that is still so many times the size needed
FILTERS = {
    "nearest": "nearest-exact",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
}  # lanczos is Pillow's

# Told as UnreadableImage instead; the filter is set here since one set around each photograph is
# not safe in threads.
warnings.filterwarnings("ignore", category=PillowImage.DecompressionBombWarning)
# of broken tags in files that are read all the same
warnings.filterwarnings("ignore", module=r"PIL\.")
# it is only read
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
# 64 MB: editors keep histories of megabytes as PNG text
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class UnreadableImage(DataError):
    """A photograph that cannot be decoded. The message is the reason, without the file name."""


class NotAPhotograph(DataError, TypeError):
    """A value of a type that is not a photograph."""


@dataclass(frozen=True)
class Framing:
    """How a photograph becomes a backbone's input.

    stretch: the whole photograph, its sides squeezed to `size` (H, W). crop: the largest part in
    the middle that has the shape of `size`. letterbox: the whole photograph in its own shape, the
    rest filled with `fill`
        (RGB).
    max_pixels: photographs of more are unreadable; None: Pillow's limit. One takes up to 9 bytes a
        pixel while it is decoded.
    """

    size: tuple[int, int]
    interpolation: str = "bicubic"
    resize: str = "stretch"
    fill: tuple[int, int, int] = (0, 0, 0)
    max_pixels: int | None = None


class Photo(NamedTuple):
    """pixels uint8 [3,H,W] RGB, channels last in memory; (height, width) of the upright original;
    and the part of it that the pixels show: x0 y0 x1 y1 in 0..1 of the original, beyond that where
    there is filling."""

    pixels: np.ndarray
    original: tuple[int, int]
    frame: tuple[float, float, float, float]


Photograph = os.PathLike | str | bytes | PillowImage.Image | np.ndarray
TAKEN = (
    "a path, a PIL image, the bytes of an image file, a uint8 array [H,W], [H,W,3] or "
    "[H,W,4], or a list of these"
)


def as_photographs(given: object) -> tuple[list[Photograph], bool]:
    """One photograph or several as a list, and whether it was one. Raises NotAPhotograph."""
    one = isinstance(given, Photograph | bytearray | memoryview)
    several = (
        not one
        and isinstance(given, Iterable)
        and not hasattr(given, "read")
        and not hasattr(given, "shape")
    )
    photographs: list[Any] = list(cast(Iterable[Any], given)) if several else [given]
    for number, each in enumerate(photographs):
        if isinstance(each, bytearray | memoryview):
            photographs[number] = bytes(each)
            continue
        what = type(each).__name__
        if isinstance(each, np.ndarray):
            if each.dtype == np.uint8 and (
                each.ndim == 2 or (each.ndim == 3 and each.shape[2] in (3, 4))
            ):
                continue
            what = f"array of {each.dtype} {list(each.shape)}"
        elif isinstance(each, Photograph):
            continue
        at = f"photograph number {number} is" if several else "the photograph is"
        raise NotAPhotograph(f"{at} of type {what}; taken are {TAKEN}")
    return photographs, not several


def describe(photograph: Photograph, number: int) -> str:
    """A photograph by its path, or by what it is and its place in a list."""
    if isinstance(photograph, os.PathLike | str):
        return os.fspath(photograph)
    kinds = {bytes: "bytes", np.ndarray: "array"}
    return f"photograph number {number} ({kinds.get(type(photograph), 'PIL image')})"


def read_image(photograph: Photograph, framing: Framing) -> Photo:
    """Decode, turn upright (EXIF) and frame one photograph: a path, the bytes of a file, a PIL
    image or a uint8 array [H,W], [H,W,3] or [H,W,4]. Raises UnreadableImage."""
    try:
        if isinstance(photograph, np.ndarray):
            photograph = PillowImage.fromarray(photograph)
        if isinstance(photograph, PillowImage.Image):
            return _frame(*_upright(photograph, framing, keep=True), framing)
        if isinstance(photograph, bytes):
            return _frame(*_decode(io.BytesIO(photograph), framing), framing)
        return _read_file(photograph, framing)
    except UnreadableImage:
        raise
    except PillowImage.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        limit = framing.max_pixels or PillowImage.MAX_IMAGE_PIXELS
        raise UnreadableImage(
            f"more than {limit:,} pixels ({int(pixels[0]) if pixels else 0:,}); --max-pixels N "
            "raises the limit"
        ) from error
    # what decoders raise on broken files is past listing: struct.error, MemoryError, ...
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if "MAX_TEXT" in reason or "text chunks" in reason:
            reason = (
                "the text or colour profile in the PNG is of more than 64 MB; save it "
                "without metadata"
            )
        raise UnreadableImage(reason or type(error).__name__) from error


def _read_file(path: os.PathLike | str, framing: Framing) -> Photo:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise UnreadableImage("not a regular file")
    for _ in range(3):
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            photo, original = _decode(file, framing)
            after = os.stat(path)
        if (before.st_ino, before.st_size, before.st_mtime_ns) == (
            after.st_ino,
            after.st_size,
            after.st_mtime_ns,
        ):
            return _frame(photo, original, framing)
    raise UnreadableImage("it changed while it was read")


def _decode(file, framing: Framing) -> tuple[PillowImage.Image, tuple[int, int]]:
    """The upright photograph in RGB, perhaps at a reduced scale, and the (height, width) it has in
    full.
    """
    if framing.max_pixels and PillowImage.MAX_IMAGE_PIXELS:
        # Pillow's limit is one for the process, so it is only raised; `_upright` holds each
        # photograph to its own.
        PillowImage.MAX_IMAGE_PIXELS = max(PillowImage.MAX_IMAGE_PIXELS, framing.max_pixels)
    try:
        opened = PillowImage.open(file)
    except UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(12)
        heic = head[4:8] == b"ftyp" and head[8:] in HEIC_BRANDS and ".heic" not in SUFFIXES
        hint = (
            "it is HEIC, which pip install -e '.[heic]' reads"
            if heic
            else "not an image that Pillow reads"
        )
        raise UnreadableImage(hint) from error
    with opened:
        return _upright(opened, framing)


def _upright(
    opened: PillowImage.Image, framing: Framing, keep: bool = False
) -> tuple[PillowImage.Image, tuple[int, int]]:
    """An opened photograph upright in RGB, and the (height, width) that it has in full.

    keep: `opened` stays as it is, which takes a copy of it.
    """
    width, height = opened.size
    limit = framing.max_pixels or PillowImage.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise PillowImage.DecompressionBombError(f"{width * height} pixels")
    needed = GAP * max(framing.size)
    if not keep and min(width, height) >= 2 * needed:
        opened.draft(None, (needed, needed))  # of JPEGs alone
    transparent, decoded = _transparent(opened), opened.size
    photo = opened
    if keep:
        photo = ImageOps.exif_transpose(opened)
    else:
        ImageOps.exif_transpose(opened, in_place=True)
    if photo.size != decoded and photo.size == decoded[::-1]:
        width, height = height, width
    if transparent is not None:
        photo.info["transparency"] = transparent
    return _to_rgb(photo, opened.format), (height, width)


def _transparent(opened: PillowImage.Image) -> object:
    """The value that is transparent, if an image has one, on the scale of its pixels: Pillow gives
    a PNG's as the file has it, in 2, 4 or 16 bits, beside pixels of 8."""
    value = opened.info.get("transparency")
    tiles = getattr(opened, "tile", ())  # none once it is loaded
    if opened.format != "PNG" or not tiles:
        return value
    depth = tiles[0][3]
    if isinstance(value, tuple):
        return tuple(each >> 8 for each in value) if depth == "RGB;16B" else value
    return value * {"L;2": 85, "L;4": 17}.get(depth, 1) if isinstance(value, int) else value


def _to_rgb(photo: PillowImage.Image, kind: str | None) -> PillowImage.Image:
    """A photograph of any mode as RGB: on white where it is transparent, scaled where it has more
    than 8 bits.
    """
    if photo.mode.startswith("I") or photo.mode == "F":
        return _eight_bits(photo, kind).convert("RGB")
    if not photo.has_transparency_data:
        return photo if photo.mode == "RGB" else photo.convert("RGB")
    photo = (photo.convert("LA") if photo.mode == "La" else photo).convert("RGBA")
    white = PillowImage.new("RGB", photo.size, "white")
    white.paste(photo, mask=photo)
    return white


def _eight_bits(photo: PillowImage.Image, kind: str | None) -> PillowImage.Image:
    """Greyscale of more than 8 bits (which Pillow's own conversion clips to white) as 8 bits.

    16 bits are divided by 257, or where all values are below 4096 scaled from 8, 10 or 12 bits. 32
    bits, whole or real, are scaled from their least to their greatest value. Those that fill a
    usual range stay in it: 0..1 (real) or 0..255, where the greatest value is in the upper half.
    """
    values = np.asarray(photo)
    found = values.astype(np.float64)
    least, greatest = float(found.min()), float(found.max())
    if kind == "PPM":  # Pillow scales it to 16 bits by the range that the file names
        found = found / 257
    elif photo.mode.startswith("I;16") or kind == "PNG":  # 16 bits at most
        found = found * (255 / next((top for top in (255, 1023, 4095) if greatest <= top), 65535))
    elif not np.isfinite(found).all():
        raise UnreadableImage("it has values that are infinite or no numbers (NaN)")
    else:
        if photo.mode == "F" and least >= 0 and (0.5 <= greatest <= 1 or least == greatest <= 1):
            found = found * 255
        elif least < greatest and not (least >= 0 and 128 <= greatest <= 255):
            found = (found - least) * (255 / (greatest - least))
        found = np.rint(found)
    pixels = found.clip(0, 255).astype(np.uint8)
    if isinstance(transparent := photo.info.get("transparency"), int):
        pixels[values == transparent] = 255
    return PillowImage.fromarray(pixels)


def _frame(photo: PillowImage.Image, original: tuple[int, int], framing: Framing) -> Photo:
    (height, width), pixels = framing.size, np.asarray(photo)
    h, w = pixels.shape[:2]
    if framing.resize == "stretch":
        return Photo(
            _resize(pixels, framing.size, framing).transpose(2, 0, 1),
            original,
            (0.0, 0.0, 1.0, 1.0),
        )
    if framing.resize == "crop":
        scale = max(height / h, width / w)
        part_h, part_w = min(h, max(1, round(height / scale))), min(w, max(1, round(width / scale)))
        y, x = (h - part_h) // 2, (w - part_w) // 2
        found = _resize(pixels[y : y + part_h, x : x + part_w], framing.size, framing)
        return Photo(
            found.transpose(2, 0, 1), original, (x / w, y / h, (x + part_w) / w, (y + part_h) / h)
        )
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


def try_image(photograph: Photograph, framing: Framing) -> tuple[Photo | None, str]:
    """(photo, "") of a photograph, or (None, reason) for one that cannot be read."""
    try:
        return read_image(photograph, framing), ""
    except UnreadableImage as error:
        return None, str(error)


class Photographs(Dataset):
    """Decoded photographs: item i is (Photo, ""), or (None, reason) for one that cannot be read."""

    def __init__(self, photographs: Sequence[Photograph], framing: Framing) -> None:
        self.photographs, self.framing = list(photographs), framing

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> tuple[Photo | None, str]:
        return try_image(self.photographs[index], self.framing)


def stack(photos: Sequence[Photo]) -> tuple[torch.Tensor, torch.Tensor]:
    """Photographs as a batch: pixels uint8 [B,3,H,W], channels last, and frames [B,4] float32."""
    pixels = np.stack([photo.pixels.transpose(1, 2, 0) for photo in photos])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(
        [photo.frame for photo in photos]
    )
