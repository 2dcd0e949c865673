"""Decode photographs to upright RGB pixels of the backbone's input size.

Pillow decodes every format that it supports. It decodes JPEGs of more than twice the required size
at a reduced scale, as it does for thumbnails. torch's uint8 kernel resizes: its result is within
one step of 255 of Pillow's and it is five times as fast. Both release the interpreter lock, so that
threads run in parallel. Transparent parts become white. Greyscale of more than 8 bits is scaled to
8 bits. A cache records the decode path as `DECODE_PATH`: rows of another decode path differ in
their last digits.
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
from PIL import ExifTags, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL import Image as PillowImage
from torch.utils.data import Dataset

from data import DataError
from data.image_formats import HEIC_BRANDS, SUFFIXES
from data.remote import Blob, FetchError

DECODE_PATH = f"pillow {PIL.__version__.split('.')[0]}, torch resize"
RESIZES = ("stretch", "crop", "letterbox")
ORIGINAL = "original"  # no resize; the backbone resizes
GAP = 2  # a JPEG decoded at a reduced scale has at least this many times the required size
# torch's names of the interpolations; lanczos is done by Pillow
FILTERS = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}

# UnreadableImage reports such images instead. The filters are global because
# warnings.catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", category=PillowImage.DecompressionBombWarning)
# Pillow warns of invalid tags in files that it can decode
warnings.filterwarnings("ignore", module=r"PIL\.")
# torch warns about read-only arrays; the arrays are only read
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
# 64 MB, because image editors store histories of several MB as PNG text
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class UnreadableImage(DataError):
    """A photograph that cannot be decoded. The message is the reason, without the file name."""


class NotAPhotograph(DataError, TypeError):
    """A value whose type is not accepted as a photograph."""


@dataclass(frozen=True)
class Framing:
    """How a photograph is resized to a backbone's input.

    size: (H, W) of the input.
    interpolation: nearest, bilinear, bicubic or lanczos.
    resize: "stretch" resizes the whole photograph without keeping its aspect ratio; "crop" takes
        the largest central part with the aspect ratio of `size`; "letterbox" keeps the whole
        photograph and its aspect ratio, and fills the rest with `fill` (RGB); "original" changes
        nothing. Then `size` only limits the reduced scale at which a large JPEG is decoded.
    max_pixels: a photograph of more pixels is unreadable; None: Pillow's limit. Decoding takes up
        to 9 bytes per pixel.
    more: further inputs from the same photograph, for several kinds of regions side by side.
    """

    size: tuple[int, int]
    interpolation: str = "bicubic"
    resize: str = "stretch"
    fill: tuple[int, int, int] = (0, 0, 0)
    max_pixels: int | None = None
    more: tuple[Framing, ...] = ()


class Photo(NamedTuple):
    """A decoded photograph.

    pixels: uint8 [3,H,W] RGB, channels last in memory.
    original: (height, width) of the upright original.
    frame: the part of the original that the pixels show: x0 y0 x1 y1, relative to its width and
        height; outside 0..1 where the input is filled.
    """

    pixels: np.ndarray
    original: tuple[int, int]
    frame: tuple[float, float, float, float]

    @property
    def inputs(self) -> tuple[Photo, ...]:
        """All inputs from this photograph: the first one, then those of `Framing.more`."""
        return (self,)


class SeveralInputs(Photo):
    """A photograph with the inputs of several kinds of regions. The fields are the first input."""

    more: tuple[Photo, ...]

    @property
    def inputs(self) -> tuple[Photo, ...]:
        return (self, *self.more)


Photograph = os.PathLike | str | bytes | PillowImage.Image | np.ndarray | Blob
ACCEPTED = (
    "a path, a PIL image, the bytes of an image file, a uint8 array [H,W], [H,W,3] or "
    "[H,W,4], or a list of these"
)


def as_photographs(value: object) -> tuple[list[Photograph], bool]:
    """Return the photographs of a value as a list, and whether the value is a single photograph.

    Raises NotAPhotograph if the type is not accepted.
    """
    is_single = isinstance(value, Photograph | bytearray | memoryview)
    is_list = (
        not is_single
        and isinstance(value, Iterable)
        and not hasattr(value, "read")
        and not hasattr(value, "shape")
    )
    photographs: list[Any] = list(cast(Iterable[Any], value)) if is_list else [value]
    for index, item in enumerate(photographs):
        if isinstance(item, bytearray | memoryview):
            photographs[index] = bytes(item)
            continue
        kind = type(item).__name__
        if isinstance(item, np.ndarray):
            if item.dtype == np.uint8 and (
                item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (3, 4))
            ):
                continue
            kind = f"array of {item.dtype} {list(item.shape)}"
        elif isinstance(item, Photograph):
            continue
        subject = f"photograph number {index} is" if is_list else "the photograph is"
        raise NotAPhotograph(f"{subject} of type {kind}; accepted: {ACCEPTED}")
    return photographs, not is_list


def describe(photograph: Photograph, number: int) -> str:
    """Return the path of a photograph, or its position in the list and its type."""
    if isinstance(photograph, Blob):
        return str(photograph)
    if isinstance(photograph, os.PathLike | str):
        return os.fspath(photograph)
    kinds = {bytes: "bytes", np.ndarray: "array"}
    return f"photograph number {number} ({kinds.get(type(photograph), 'PIL image')})"


def read_image(photograph: Photograph, framing: Framing) -> Photo:
    """Decode a photograph, rotate it upright (EXIF) and resize it.

    photograph: a path, a `Blob`, the bytes of a file, a PIL image or a uint8 array: [H,W], [H,W,3]
        or [H,W,4].

    Raises UnreadableImage if it cannot be decoded, and FetchError if a remote file cannot be read.
    """
    try:
        if isinstance(photograph, Blob):
            photograph = photograph.read_bytes()
        if isinstance(photograph, np.ndarray):
            photograph = PillowImage.fromarray(photograph)
        if isinstance(photograph, PillowImage.Image):
            return _frame(*_upright(photograph, framing, keep=True), framing)
        if isinstance(photograph, bytes):
            return _frame(*_decode(io.BytesIO(photograph), framing), framing)
        return _read_file(photograph, framing)
    except (UnreadableImage, FetchError):
        raise
    except PillowImage.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        limit = framing.max_pixels or PillowImage.MAX_IMAGE_PIXELS
        raise UnreadableImage(
            f"more than {limit:,} pixels ({int(pixels[0]) if pixels else 0:,}); --max-pixels N "
            "raises the limit"
        ) from error
    # Decoders raise errors of many types on damaged files: struct.error, MemoryError, ...
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if "MAX_TEXT" in reason or "text chunks" in reason:
            reason = (
                "the text or colour profile in the PNG is larger than 64 MB; save the PNG "
                "without metadata"
            )
        raise UnreadableImage(reason or type(error).__name__) from error


def _read_file(path: os.PathLike | str, framing: Framing) -> Photo:
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe could block
        raise UnreadableImage("not a regular file")
    for _ in range(3):
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            photo, original = _decode(file, framing)
            after = os.stat(path)
        if _version(before) == _version(after):
            return _frame(photo, original, framing)
    raise UnreadableImage("it changed while it was read")


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _decode(file, framing: Framing) -> tuple[PillowImage.Image, tuple[int, int]]:
    """Return the upright photograph in RGB, and the (height, width) of the original.

    The photograph may be decoded at a reduced scale.
    """
    if framing.max_pixels and PillowImage.MAX_IMAGE_PIXELS:
        # Pillow has one limit per process, so it is only raised here. `_upright` checks the limit
        # of each photograph.
        PillowImage.MAX_IMAGE_PIXELS = max(PillowImage.MAX_IMAGE_PIXELS, framing.max_pixels)
    try:
        opened = PillowImage.open(file)
    except UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(12)
        heic = head[4:8] == b"ftyp" and head[8:] in HEIC_BRANDS and ".heic" not in SUFFIXES
        hint = (
            "it is HEIC; to read HEIC: pip install -e '.[heic]'"
            if heic
            else "not an image format that Pillow can read"
        )
        raise UnreadableImage(hint) from error
    with opened:
        return _upright(opened, framing)


def _upright(
    opened: PillowImage.Image, framing: Framing, keep: bool = False
) -> tuple[PillowImage.Image, tuple[int, int]]:
    """Return an opened photograph upright in RGB, and the (height, width) of the original.

    keep: do not change `opened`; costs a copy.
    """
    width, height = opened.size
    limit = framing.max_pixels or PillowImage.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise PillowImage.DecompressionBombError(f"{width * height} pixels")
    needed = GAP * max(side for each in (framing, *framing.more) for side in each.size)
    if not keep and min(width, height) >= 2 * needed:
        opened.draft(None, (needed, needed))  # has an effect on JPEGs only
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
    """Return the transparent value of an image, if it has one, on the scale of its pixels.

    For a PNG of 2, 4 or 16 bits, Pillow returns the value of the file although the pixels have
    8 bits.
    """
    value = opened.info.get("transparency")
    tiles = getattr(opened, "tile", ())  # empty after the image is loaded
    if opened.format != "PNG" or not tiles:
        return value
    raw_mode = tiles[0][3]
    if isinstance(value, tuple):
        return tuple(component >> 8 for component in value) if raw_mode == "RGB;16B" else value
    return value * {"L;2": 85, "L;4": 17}.get(raw_mode, 1) if isinstance(value, int) else value


def _to_rgb(photo: PillowImage.Image, kind: str | None) -> PillowImage.Image:
    """Convert any mode to RGB: transparent parts become white, and more than 8 bits are scaled."""
    if photo.mode.startswith("I") or photo.mode == "F":
        return _eight_bits(photo, kind).convert("RGB")
    if not photo.has_transparency_data:
        return photo if photo.mode == "RGB" else photo.convert("RGB")
    photo = (photo.convert("LA") if photo.mode == "La" else photo).convert("RGBA")
    white = PillowImage.new("RGB", photo.size, "white")
    white.paste(photo, mask=photo)
    return white


def _eight_bits(photo: PillowImage.Image, kind: str | None) -> PillowImage.Image:
    """Scale greyscale of more than 8 bits to 8 bits. Pillow's own conversion clips it to white.

    16 bits are divided by 257, or scaled from 8, 10 or 12 bits if all values are below 4096.
    Integers and floats of 32 bits are scaled from their minimum and maximum to 0..255. Two ranges
    are kept: 0..1 (floats) and 0..255, if the maximum is in the upper half of the range.
    """
    values = np.asarray(photo)
    scaled = values.astype(np.float64)
    low, high = float(scaled.min()), float(scaled.max())
    if kind == "PPM":  # Pillow scales it to 16 bits by the range in the file
        scaled = scaled / 257
    elif photo.mode.startswith("I;16") or kind == "PNG":  # 16 bits at most
        scaled = scaled * (255 / next((top for top in (255, 1023, 4095) if high <= top), 65535))
    elif not np.isfinite(scaled).all():
        raise UnreadableImage("it has values that are infinite or NaN")
    else:
        if photo.mode == "F" and low >= 0 and (0.5 <= high <= 1 or low == high <= 1):
            scaled = scaled * 255
        elif low < high and not (low >= 0 and 128 <= high <= 255):
            scaled = (scaled - low) * (255 / (high - low))
        scaled = np.rint(scaled)
    pixels = scaled.clip(0, 255).astype(np.uint8)
    if isinstance(transparent := photo.info.get("transparency"), int):
        pixels[values == transparent] = 255
    return PillowImage.fromarray(pixels)


def _frame(photo: PillowImage.Image, original: tuple[int, int], framing: Framing) -> Photo:
    first = _frame_one(photo, original, framing)
    if not framing.more:
        return first
    several = SeveralInputs(*first)
    several.more = tuple(_frame_one(photo, original, each) for each in framing.more)
    return several


def _frame_one(photo: PillowImage.Image, original: tuple[int, int], framing: Framing) -> Photo:
    (height, width), pixels = framing.size, np.asarray(photo)
    h, w = pixels.shape[:2]
    if framing.resize == ORIGINAL:
        return Photo(pixels.transpose(2, 0, 1), original, (0.0, 0.0, 1.0, 1.0))
    if framing.resize == "stretch":
        stretched = _resize(pixels, framing.size, framing)
        return Photo(stretched.transpose(2, 0, 1), original, (0.0, 0.0, 1.0, 1.0))
    if framing.resize == "crop":
        scale = max(height / h, width / w)
        part_h, part_w = min(h, max(1, round(height / scale))), min(w, max(1, round(width / scale)))
        y, x = (h - part_h) // 2, (w - part_w) // 2
        cropped = _resize(pixels[y : y + part_h, x : x + part_w], framing.size, framing)
        frame = (x / w, y / h, (x + part_w) / w, (y + part_h) / h)
        return Photo(cropped.transpose(2, 0, 1), original, frame)
    scale = min(height / h, width / w)
    inner_h, inner_w = max(1, min(height, round(h * scale))), max(1, min(width, round(w * scale)))
    y, x = (height - inner_h) // 2, (width - inner_w) // 2
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = framing.fill
    canvas[y : y + inner_h, x : x + inner_w] = _resize(pixels, (inner_h, inner_w), framing)
    frame = (-x / inner_w, -y / inner_h, (width - x) / inner_w, (height - y) / inner_h)
    return Photo(canvas.transpose(2, 0, 1), original, frame)


def _resize(pixels: np.ndarray, size: tuple[int, int], framing: Framing) -> np.ndarray:
    """Resize uint8 pixels [h,w,3] to contiguous [H,W,3] with antialiasing."""
    if pixels.shape[:2] == size:
        return np.ascontiguousarray(pixels)
    if framing.interpolation == "lanczos":
        photo = PillowImage.fromarray(pixels).resize(size[::-1], PillowImage.Resampling.LANCZOS)
        return np.ascontiguousarray(np.asarray(photo))
    mode = FILTERS[framing.interpolation]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    smooth = {"antialias": True} if mode in ("bilinear", "bicubic") else {}
    resized = torch.nn.functional.interpolate(image, size, mode=mode, **smooth)[0]
    return np.ascontiguousarray(resized.permute(1, 2, 0).numpy())


def read_size(path: os.PathLike | Blob) -> tuple[int, int]:
    """Return the (height, width) of an upright photograph without decoding it.

    Raises DataError if Pillow cannot read its header, and FetchError if a remote file or a tar
    cannot be read.
    """
    file = io.BytesIO(path.read_bytes()) if isinstance(path, Blob) else path
    try:
        with PillowImage.open(file) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (UnidentifiedImageError, PillowImage.DecompressionBombError, ValueError) as error:
        raise DataError(f"the size of {path} cannot be read: {error}") from error
    return (width, height) if turned else (height, width)


def try_image(photograph: Photograph, framing: Framing) -> tuple[Photo | None, str]:
    """Return (photo, ""), or (None, reason) if the photograph cannot be read."""
    try:
        return read_image(photograph, framing), ""
    except UnreadableImage as error:
        return None, str(error)


class Photographs(Dataset):
    """A Dataset of decoded photographs: each item is the result of `try_image`."""

    def __init__(self, photographs: Sequence[Photograph], framing: Framing) -> None:
        self.photographs, self.framing = list(photographs), framing

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> tuple[Photo | None, str]:
        return try_image(self.photographs[index], self.framing)


Pixels = torch.Tensor | list[torch.Tensor]


def stack(photos: Sequence[Photo]) -> tuple[Pixels, torch.Tensor]:
    """Stack photographs: pixels uint8 [B,3,H,W], channels last, and frames [B,4] float32.

    The pixels of photographs of different sizes are a list of B tensors [3,H,W].
    """
    frames = torch.tensor([photo.frame for photo in photos])
    if len({photo.pixels.shape for photo in photos}) > 1:
        return [torch.from_numpy(np.ascontiguousarray(photo.pixels)) for photo in photos], frames
    pixels = np.stack([photo.pixels.transpose(1, 2, 0) for photo in photos])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), frames


def stack_inputs(photos: Sequence[Photo]) -> list[tuple[Pixels, torch.Tensor]]:
    """Stack each of `Photo.inputs` of photographs, as `stack` does."""
    inputs = zip(*(photo.inputs for photo in photos), strict=True)
    return [stack(list(each)) for each in inputs]
