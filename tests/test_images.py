"""Photographs of every kind become upright RGB, or are unreadable with a reason."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from data import images
from data.images import DECODE_PATH, Framing, Photographs, UnreadableImage, read_image, stack

RED, BLUE = (220, 20, 20), (20, 20, 220)


def halves(width: int = 60, height: int = 40) -> Image.Image:
    """Red on the left, blue on the right."""
    photo = Image.new("RGB", (width, height), RED)
    photo.paste(BLUE, (width // 2, 0, width, height))
    return photo


def is_left_red_right_blue(pixels: np.ndarray) -> bool:
    left, right = pixels[:, :, :8].mean((1, 2)), pixels[:, :, -8:].mean((1, 2))
    return left[0] > 150 > 80 > left[2] and right[2] > 150 > 80 > right[0]


@pytest.mark.parametrize(
    ("name", "convert", "options"),
    [
        ("rgb.jpg", None, {}),
        ("progressive.jpg", None, {"progressive": True}),
        ("cmyk.jpg", "CMYK", {}),
        ("rgba.png", "RGBA", {}),
        ("palette.png", "P", {}),
        ("animated.gif", "P", {"save_all": True, "append_images": [Image.new("P", (60, 40))]}),
        ("photo.webp", None, {}),
        ("photo.bmp", None, {}),
        ("photo.tiff", None, {}),
        ("with space 'and' \"quotes\" é.jpg", None, {}),
    ],
)
def test_each_kind_of_file_gives_the_same_picture(tmp_path, name, convert, options):
    photo = halves()
    (photo.convert(convert) if convert else photo).save(tmp_path / name, **options)
    pixels, size, frame = read_image(tmp_path / name, Framing((32, 32), "bilinear"))
    assert frame == (0, 0, 1, 1)
    assert (pixels.shape, pixels.dtype, size) == ((3, 32, 32), np.uint8, (40, 60))
    assert is_left_red_right_blue(pixels)


def test_a_photograph_turned_by_exif_comes_upright(tmp_path):
    turned = halves().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera says: turn by 90 degrees clockwise to see it upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    pixels, size, _ = read_image(tmp_path / "turned.jpg", Framing((32, 32), "bilinear"))
    assert size == (40, 60) and is_left_red_right_blue(pixels)


def test_greyscale_of_8_and_16_bits_keeps_its_brightness(tmp_path):
    Image.new("L", (9, 9), 100).save(tmp_path / "8.png")
    Image.fromarray(np.full((9, 9), 100 * 257, np.uint16)).save(tmp_path / "16.png")
    for name in ("8.png", "16.png"):
        assert read_image(tmp_path / name, Framing((9, 9))).pixels.mean() == pytest.approx(100)


def test_one_pixel_is_a_photograph(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "1.png")
    assert read_image(tmp_path / "1.png", Framing((5, 5))).pixels[:, 2, 2].tolist() == list(RED)


@pytest.mark.parametrize("kind", ["zero bytes", "text", "truncated", "absent", "too large"])
def test_what_cannot_be_read_says_why(tmp_path, kind, monkeypatch):
    path = tmp_path / "photo.jpg"
    if kind == "zero bytes":
        path.touch()
    elif kind == "text":
        path.write_text("not a photograph")
    elif kind == "truncated":
        halves(300, 300).save(path)
        path.write_bytes(path.read_bytes()[:700])
    elif kind == "too large":
        halves(300, 300).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage) as error:
        read_image(path, Framing((8, 8)))
    assert str(error.value)
    photo, reason = Photographs([path], Framing((8, 8)))[0]
    assert reason == str(error.value) and photo is None


def test_the_resize_is_within_one_step_of_pillow_s_own(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (91, 70, 3), np.uint8)
    photo = Image.fromarray(noise).resize((320, 250), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "p.png")
    for interpolation, own in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        found = read_image(tmp_path / "p.png", Framing((224, 200), interpolation)).pixels.transpose(1, 2, 0)
        wanted = np.asarray(photo.resize((200, 224), own))
        assert np.abs(found.astype(int) - wanted).max() <= 1
    assert "torch resize" in DECODE_PATH


def test_a_much_larger_jpeg_is_decoded_at_a_reduced_scale_and_keeps_its_size(tmp_path):
    halves(1200, 800).save(tmp_path / "large.jpg", quality=95)
    pixels, size, _ = read_image(tmp_path / "large.jpg", Framing((32, 32)))
    assert size == (800, 1200) and is_left_red_right_blue(pixels)
    turned = halves(1200, 800).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    pixels, size, _ = read_image(tmp_path / "turned.jpg", Framing((32, 32)))
    assert size == (800, 1200) and is_left_red_right_blue(pixels)


@pytest.mark.parametrize(("width", "height"), [(120, 40), (40, 120), (33, 32), (32, 32), (1000, 1), (7, 5)])
@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox"])
def test_a_frame_says_which_part_of_the_photograph_the_pixels_show(tmp_path, width, height, resize):
    """The photograph's colours are its own coordinates, so each pixel says where it came from."""
    x = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    colours = np.stack([x, y, np.ones((height, width))], 2)
    Image.fromarray((colours * 250).round().astype(np.uint8)).save(tmp_path / "p.png")
    size = (32, 48)
    pixels, original, frame = read_image(tmp_path / "p.png", Framing(size, "bilinear", resize, (0, 0, 0)))
    assert original == (height, width)
    x0, y0, x1, y1 = frame
    inside = pixels[2] > 200
    for row, column in ((0, 0), (31, 47), (16, 24), (5, 40)):
        at_x, at_y = x0 + (column + 0.5) / 48 * (x1 - x0), y0 + (row + 0.5) / 32 * (y1 - y0)
        shown = 0 <= at_x <= 1 and 0 <= at_y <= 1
        assert shown == bool(inside[row, column]) or min(abs(at_x), abs(at_y), abs(at_x - 1), abs(at_y - 1)) < 0.05
        if inside[row, column]:
            near = 0.06 + 0.6 / min(width, 48)
            assert abs(pixels[0, row, column] / 250 - at_x) < near
            assert abs(pixels[1, row, column] / 250 - at_y) < 0.06 + 0.6 / min(height, 32)
    assert inside.all() or resize == "letterbox"
    if resize == "letterbox" and min(width, height) > 1:  # its own shape
        assert (x1 - x0) * width / ((y1 - y0) * height) == pytest.approx(48 / 32, rel=0.05 + 1 / min(width, height))


def test_photographs_are_stacked_channels_last_with_their_frames(tmp_path):
    halves().save(tmp_path / "a.png")
    photo = read_image(tmp_path / "a.png", Framing((8, 12)))
    pixels, frames = stack([photo, photo])
    assert pixels.shape == (2, 3, 8, 12) and pixels.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(pixels[1].numpy(), photo.pixels) and frames.tolist() == [[0, 0, 1, 1]] * 2


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    halves().save(path)
    decode, times = images._decode, []

    def slowly(file, framing):
        found = decode(file, framing)
        times.append(1)
        if len(times) <= changes:
            os.utime(path, ns=(len(times), len(times)))
        return found

    monkeypatch.setattr(images, "_decode", slowly)
    changes = 1
    assert read_image(path, Framing((8, 8))).original == (40, 60) and len(times) == 2
    changes = 9
    with pytest.raises(UnreadableImage, match="changed while it was read"):
        read_image(path, Framing((8, 8)))


def test_a_broken_tag_or_a_decoder_s_own_error_is_a_reason_and_never_ends_the_run(tmp_path, monkeypatch):
    halves().save(tmp_path / "a.jpg")
    for error in (struct.error("required argument is not an integer"), RuntimeError("decoder"), MemoryError()):
        def fails(photo, error=error):
            raise error

        monkeypatch.setattr(images.ImageOps, "exif_transpose", fails)
        with pytest.raises(UnreadableImage) as told:
            read_image(tmp_path / "a.jpg", Framing((8, 8)))
        assert str(told.value)
