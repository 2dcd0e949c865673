"""Photographs of every kind become upright RGB, or are unreadable with a reason."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data.images import Photographs, UnreadableImage, read_image

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
    pixels, size = read_image(tmp_path / name, (32, 32), "bilinear")
    assert (pixels.shape, pixels.dtype, size) == ((3, 32, 32), np.uint8, (40, 60))
    assert is_left_red_right_blue(pixels)


def test_a_photograph_turned_by_exif_comes_upright(tmp_path):
    turned = halves().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera says: turn by 90 degrees clockwise to see it upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    pixels, size = read_image(tmp_path / "turned.jpg", (32, 32), "bilinear")
    assert size == (40, 60) and is_left_red_right_blue(pixels)


def test_greyscale_of_8_and_16_bits_keeps_its_brightness(tmp_path):
    Image.new("L", (9, 9), 100).save(tmp_path / "8.png")
    Image.fromarray(np.full((9, 9), 100 * 257, np.uint16)).save(tmp_path / "16.png")
    for name in ("8.png", "16.png"):
        assert read_image(tmp_path / name, (9, 9), "bicubic")[0].mean() == pytest.approx(100)


def test_one_pixel_is_a_photograph(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "1.png")
    assert read_image(tmp_path / "1.png", (5, 5), "bicubic")[0][:, 2, 2].tolist() == list(RED)


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
        read_image(path, (8, 8), "bilinear")
    assert str(error.value)
    pixels, size, reason = Photographs([path], (8, 8), "bilinear")[0]
    assert reason and size == (0, 0) and not pixels.any()
