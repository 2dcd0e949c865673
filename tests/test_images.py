"""Photographs of every kind become upright RGB, or are unreadable with a reason."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, PngImagePlugin

from data import images
from data.image_formats import HEIC, SUFFIXES
from data.images import (
    DECODE_PATH,
    Framing,
    NotAPhotograph,
    Photographs,
    UnreadableImage,
    as_photographs,
    read_image,
    stack,
)

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
    for interpolation, own in (
        ("bicubic", Image.Resampling.BICUBIC),
        ("bilinear", Image.Resampling.BILINEAR),
    ):
        found = read_image(tmp_path / "p.png", Framing((224, 200), interpolation)).pixels.transpose(
            1, 2, 0
        )
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


@pytest.mark.parametrize(
    ("width", "height"), [(120, 40), (40, 120), (33, 32), (32, 32), (1000, 1), (7, 5)]
)
@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox"])
def test_a_frame_says_which_part_of_the_photograph_the_pixels_show(tmp_path, width, height, resize):
    """The photograph's colours are its own coordinates, so each pixel says where it came from."""
    x = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    colours = np.stack([x, y, np.ones((height, width))], 2)
    Image.fromarray((colours * 250).round().astype(np.uint8)).save(tmp_path / "p.png")
    size = (32, 48)
    pixels, original, frame = read_image(
        tmp_path / "p.png", Framing(size, "bilinear", resize, (0, 0, 0))
    )
    assert original == (height, width)
    x0, y0, x1, y1 = frame
    inside = pixels[2] > 200
    for row, column in ((0, 0), (31, 47), (16, 24), (5, 40)):
        at_x, at_y = x0 + (column + 0.5) / 48 * (x1 - x0), y0 + (row + 0.5) / 32 * (y1 - y0)
        shown = 0 <= at_x <= 1 and 0 <= at_y <= 1
        assert (
            shown == bool(inside[row, column])
            or min(abs(at_x), abs(at_y), abs(at_x - 1), abs(at_y - 1)) < 0.05
        )
        if inside[row, column]:
            near = 0.06 + 0.6 / min(width, 48)
            assert abs(pixels[0, row, column] / 250 - at_x) < near
            assert abs(pixels[1, row, column] / 250 - at_y) < 0.06 + 0.6 / min(height, 32)
    assert inside.all() or resize == "letterbox"
    if resize == "letterbox" and min(width, height) > 1:  # its own shape
        assert (x1 - x0) * width / ((y1 - y0) * height) == pytest.approx(
            48 / 32, rel=0.05 + 1 / min(width, height)
        )


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


def test_a_broken_tag_or_a_decoder_s_own_error_is_a_reason_and_never_ends_the_run(
    tmp_path, monkeypatch
):
    halves().save(tmp_path / "a.jpg")
    for error in (
        struct.error("required argument is not an integer"),
        RuntimeError("decoder"),
        MemoryError(),
    ):

        def fails(photo, error=error):
            raise error

        monkeypatch.setattr(images.ImageOps, "exif_transpose", fails)
        with pytest.raises(UnreadableImage) as told:
            read_image(tmp_path / "a.jpg", Framing((8, 8)))
        assert str(told.value)


# What is transparent, and modes of more than 8 bits

PLAIN = Framing((8, 8), "nearest")


def corners(path: Path) -> tuple[list[int], list[int]]:
    pixels = read_image(path, PLAIN).pixels
    return pixels[:, 0, 0].tolist(), pixels[:, 7, 7].tolist()


def quarter(mode: str, rest: object, corner: object) -> Image.Image:
    """8x8 of `rest`, but for `corner` at the lower right."""
    photo = Image.new(mode, (8, 8), rest)
    photo.paste(corner, (4, 4, 8, 8))
    return photo


def palette() -> Image.Image:
    photo = quarter("P", 0, 1)
    photo.putpalette([0, 0, 0, *RED])
    return photo


CLEAR = [
    ("rgba.png", quarter("RGBA", (0, 0, 0, 0), (*RED, 255)), {}, RED),
    ("rgba.webp", quarter("RGBA", (0, 0, 0, 0), (*RED, 255)), {"lossless": True}, RED),
    ("rgba.tif", quarter("RGBA", (0, 0, 0, 0), (*RED, 255)), {}, RED),
    ("rgba.tga", quarter("RGBA", (0, 0, 0, 0), (*RED, 255)), {}, RED),
    ("rgba.jp2", quarter("RGBA", (0, 0, 0, 0), (*RED, 255)), {}, RED),
    (
        "animated.png",
        quarter("RGBA", (0, 0, 0, 0), (*RED, 255)),
        {"save_all": True, "append_images": [Image.new("RGBA", (8, 8), "blue")]},
        RED,
    ),
    ("la.png", quarter("LA", (0, 0), (90, 255)), {}, (90, 90, 90)),
    ("l.png", quarter("L", 0, 90), {"transparency": 0}, (90, 90, 90)),
    ("rgb.png", quarter("RGB", (0, 0, 0), RED), {"transparency": (0, 0, 0)}, RED),
    ("1.png", quarter("1", 0, 1), {"transparency": 0}, (255, 255, 255)),
    (
        "16.png",
        Image.fromarray(np.kron([[0, 0], [0, 90 * 257]], np.ones((4, 4))).astype(np.uint16)),
        {"transparency": 0},
        (90, 90, 90),
    ),
    ("p.png", palette(), {"transparency": 0}, RED),
    ("p_table.png", palette(), {"transparency": bytes([0, 255])}, RED),
    ("p.gif", palette(), {"transparency": 0}, RED),
    ("grey.gif", quarter("L", 0, 90), {"transparency": 0}, (90, 90, 90)),
]


@pytest.mark.parametrize(
    ("name", "photo", "options", "shown"), CLEAR, ids=[each[0] for each in CLEAR]
)
def test_what_is_transparent_shows_white(tmp_path, name, photo, options, shown):
    photo.save(tmp_path / name, **options)
    assert corners(tmp_path / name) == ([255, 255, 255], list(shown))
    # the same road for an opened image, which stays as it is
    with Image.open(tmp_path / name) as opened:
        pixels = read_image(opened, PLAIN).pixels
        assert pixels[:, 0, 0].tolist() == [255, 255, 255] and pixels[:, 7, 7].tolist() == list(
            shown
        )
        assert opened.mode in ("1", "I;16") or opened.has_transparency_data


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_every_mode_with_transparency_shows_white(mode):
    if mode in ("LA", "La"):
        photo, shown = quarter("LA", (0, 0), (90, 255)).convert(mode), [90] * 3
    elif mode == "PA":
        photo, shown = palette().convert("PA"), list(RED)
        photo.putalpha(quarter("L", 0, 255))
    else:
        photo, shown = quarter("RGBA", (0, 0, 0, 0), (*RED, 255)).convert(mode), list(RED)
    assert photo.mode == mode
    pixels = read_image(photo, PLAIN).pixels
    assert pixels[:, 0, 0].tolist() == [255] * 3 and pixels[:, 7, 7].tolist() == shown


def test_half_transparent_is_half_white_and_opaque_stays_as_it_is(tmp_path):
    quarter("RGBA", (0, 0, 0, 128), (*RED, 255)).save(tmp_path / "half.png")
    assert corners(tmp_path / "half.png") == ([127] * 3, list(RED))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    assert np.array_equal(
        read_image(noise.convert("RGBA"), PLAIN).pixels, read_image(noise, PLAIN).pixels
    )


@pytest.mark.parametrize(
    ("depth", "kind", "clear", "other", "shown"),
    [
        (2, 0, (2,), (1,), 85),
        (4, 0, (3,), (7,), 119),
        (16, 2, (0x1234, 0x5678, 0x9ABC), (0x7000, 0x7000, 0x7000), 0x70),
    ],
)
def test_a_png_s_transparent_value_is_known_at_every_depth(
    tmp_path, depth, kind, clear, other, shown
):
    """Pillow scales the pixels of such files to 8 bits, and not the value."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    def row(value: tuple) -> bytes:
        bits = "".join(format(each, f"0{depth}b") for _ in range(8) for each in value)
        return b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, kind, 0, 0, 0))
    data = header + chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    data += chunk(b"IDAT", zlib.compress(row(clear) * 4 + row(other) * 4)) + chunk(b"IEND", b"")
    (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert corners(tmp_path / "p.png") == ([255] * 3, [shown] * 3)


@pytest.mark.parametrize(
    ("kind", "values", "shown"),
    [
        (np.float32, (0, 0.5, 1), (0, 127, 255)),
        (np.float32, (0.25, 0.5, 0.75), (63, 127, 191)),
        (np.float32, (0, 100, 255), (0, 100, 255)),
        (np.float32, (0, 100 * 257, 65535), (0, 100, 255)),
        (np.float32, (-1, 0, 1), (0, 127, 255)),
        (np.float32, (0, 5e5, 1e6), (0, 127, 255)),
        (np.float32, (-3e38, 0, 3e38), (0, 127, 255)),
        (np.float32, (-5, -5, -5), (0, 0, 0)),
        (np.int32, (0, 100, 255), (0, 100, 255)),
        (np.int32, (0, 100 * 257, 65535), (0, 100, 255)),
        (np.int32, (-100, 0, 100), (0, 127, 255)),
        (np.int32, (0, 2**30, 2**31 - 2), (0, 127, 255)),
        *(
            (np.float32, (0, top / 2, top), (0, 127, 255))
            for top in (0.001, 0.4, 1.2, 5, 300, 4095)
        ),
        *((np.int32, (0, top // 2, top), (0, 127, 255)) for top in (100, 1000, 4094, 40000)),
        (np.int32, (0, 0, 1), (0, 0, 255)),
        (np.int32, (7, 7, 7), (7, 7, 7)),
        (np.float32, (0.2, 0.2, 0.2), (51, 51, 51)),
        (np.uint16, (0, 128, 255), (0, 128, 255)),
        (np.uint16, (0, 512, 1023), (0, 127, 255)),
        (np.uint16, (0, 2048, 4095), (0, 127, 255)),
        (np.uint16, (0, 2570, 5140), (0, 10, 20)),
    ],
)
def test_greyscale_of_more_than_8_bits_is_scaled_by_its_range(tmp_path, kind, values, shown):
    photo = Image.fromarray(np.array([values] * 3, kind))
    names = ("p.tif", "p.png") if kind is np.uint16 else ("p.tif",)
    for name in names:
        photo.save(tmp_path / name)
    for given in (photo, *(tmp_path / name for name in names)):
        pixels = read_image(given, Framing((3, 3))).pixels[:, 1].astype(int)
        assert np.abs(pixels - shown).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_a_reason(tmp_path, value):
    Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "p.tif")
    with pytest.raises(UnreadableImage, match="infinite or NaN"):
        read_image(tmp_path / "p.tif", PLAIN)


def test_16_bits_of_either_byte_order_keep_their_brightness(tmp_path):
    values = np.full((8, 8), 100 * 257, np.uint16)
    Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    Image.fromarray(values).save(tmp_path / "little.tif")
    Image.fromarray(values // 200).save(tmp_path / "dark.pgm")  # its range is known: 16 bits
    assert (
        corners(tmp_path / "big.tif") == corners(tmp_path / "little.tif") == ([100] * 3, [100] * 3)
    )
    assert corners(tmp_path / "dark.pgm") == ([0] * 3, [0] * 3)


NO_YCBCR = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13,
    reason="Pillow before 13 cannot read the YCbCr TIFF that it writes",
)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("p.jpg", "CMYK"),
        ("p.tif", "CMYK"),
        pytest.param("p.tif", "YCbCr", marks=NO_YCBCR),
        ("p.tif", "LAB"),
        ("p.psd", "HSV"),
        ("p.pcx", "P"),
    ],
)
def test_other_colour_spaces_give_the_same_picture(tmp_path, name, mode):
    photo = halves()
    if mode == "LAB":
        from PIL import ImageCms

        photo = ImageCms.profileToProfile(
            photo, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        photo = photo.convert(mode)
    found = [read_image(photo, Framing((32, 32)))]
    if mode != "HSV":
        photo.save(tmp_path / name)
        found.append(read_image(tmp_path / name, Framing((32, 32))))
    assert all(is_left_red_right_blue(each.pixels) for each in found)


def test_the_first_page_of_several_is_the_photograph(tmp_path):
    blue = Image.new("RGB", (60, 40), BLUE)
    for name in ("p.tif", "p.webp", "p.gif", "p.png"):
        halves().save(tmp_path / name, save_all=True, append_images=[blue, blue])
        assert is_left_red_right_blue(read_image(tmp_path / name, Framing((32, 32))).pixels)


# Suffixes and limits


def test_suffixes_are_those_of_formats_that_pillow_decodes_by_itself():
    assert {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".gif",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".mpo",
        ".jp2",
        ".tga",
        ".ppm",
        ".pgm",
        ".ico",
        ".psd",
        ".dds",
    } <= SUFFIXES
    assert (
        not {
            ".pdf",
            ".eps",
            ".ps",
            ".wmf",
            ".emf",
            ".h5",
            ".hdf",
            ".grib",
            ".bufr",
            ".mpg",
            ".mp4",
            ".txt",
        }
        & SUFFIXES
    )
    assert (".avif" in SUFFIXES) == ("AVIF" in Image.OPEN)


def test_heic_is_read_through_the_extra_or_names_it(tmp_path):
    (tmp_path / "p.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(UnreadableImage) as told:
        read_image(tmp_path / "p.jpg", PLAIN)
    assert ("pip install -e '.[heic]'" in str(told.value)) == (".heic" not in SUFFIXES)
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(halves()).save(tmp_path / "p.heic")
    assert {*HEIC} <= SUFFIXES and is_left_red_right_blue(
        read_image(tmp_path / "p.heic", Framing((32, 32))).pixels
    )


def test_max_pixels_raises_and_lowers_pillows_limit_and_the_reason_names_it(tmp_path, monkeypatch):
    halves(100, 30).save(tmp_path / "p.png")
    # Pillow itself refuses from twice as many on
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        UnreadableImage,
        match=r"^more than 1,000 pixels \(3,000\); --max-pixels N raises the limit$",
    ):
        read_image(tmp_path / "p.png", PLAIN)
    assert read_image(tmp_path / "p.png", Framing((8, 8), max_pixels=3000)).original == (30, 100)
    with pytest.raises(UnreadableImage, match="more than 2,999 pixels"):
        read_image(tmp_path / "p.png", Framing((8, 8), max_pixels=2999))


def test_max_pixels_reaches_worker_processes(tmp_path, monkeypatch):
    halves(100, 30).save(tmp_path / "p.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    read = Photographs([tmp_path / "p.png"], Framing((8, 8), max_pixels=3000))
    loader = torch.utils.data.DataLoader(read, None, num_workers=1, multiprocessing_context="fork")
    assert [reason for _, reason in loader] == [""]


def test_a_png_with_megabytes_of_text_is_read_up_to_a_bound(tmp_path):
    for megabytes, fits in ((3, True), (70, False)):
        info = PngImagePlugin.PngInfo()
        info.add_text("history", "x" * (megabytes << 20), zip=True)
        info.add_itxt("more", "y", zip=True)
        halves().save(tmp_path / "p.png", pnginfo=info)
        reason = Photographs([tmp_path / "p.png"], PLAIN)[0][1]
        assert (reason == "") is fits and (
            fits or "larger than 64 MB; save the PNG without metadata" in reason
        )


# Photographs that are no files


def test_a_photograph_may_be_a_path_bytes_an_image_or_an_array(tmp_path):
    photo = halves(8, 8)
    photo.save(tmp_path / "p.png")
    wanted, array = read_image(tmp_path / "p.png", PLAIN).pixels, np.asarray(photo)
    four = np.dstack([array, np.full((8, 8), 255, np.uint8)])
    for given in (
        str(tmp_path / "p.png"),
        (tmp_path / "p.png").read_bytes(),
        photo,
        array,
        array[::-1][::-1],
        four,
    ):
        assert as_photographs(given)[1] and np.array_equal(read_image(given, PLAIN).pixels, wanted)
    assert np.array_equal(read_image(array[:, :, 0], PLAIN).pixels[1], array[:, :, 0])
    given, one = as_photographs(
        [tmp_path / "p.png", photo, array, bytearray(b"x"), memoryview(b"y")]
    )
    assert (
        not one
        and given[3:] == [b"x", b"y"]
        and as_photographs(each for each in "ab") == (["a", "b"], False)
    )
    assert as_photographs([]) == ([], False)


def test_an_opened_image_is_turned_by_its_exif_and_stays_as_it_is(tmp_path):
    for name in ("p.jpg", "p.tif", "p.png"):
        exif = Image.Exif()
        exif[0x0112] = 6
        halves(1200, 800).transpose(Image.Transpose.ROTATE_90).save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as opened:
            pixels, size, _ = read_image(opened, Framing((32, 32)))
            assert size == (800, 1200) and is_left_red_right_blue(pixels)
            if name != "p.tif":  # which Pillow itself turns where it loads it
                assert opened.size == (800, 1200) and opened.getexif()[0x0112] == 6
        pixels, size, _ = read_image(tmp_path / name, Framing((32, 32)))
        assert size == (800, 1200) and is_left_red_right_blue(pixels)


@pytest.mark.parametrize(
    "given",
    [
        None,
        7,
        1.5,
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8), bool),
        io.BytesIO(b"x"),
        [["a.jpg"]],
        ["a.jpg", None],
        [b"x", 3],
    ],
)
def test_what_is_no_photograph_is_one_error_that_says_what_is_taken(given):
    with pytest.raises(NotAPhotograph) as told:
        as_photographs(given)
    assert isinstance(told.value, TypeError) and "accepted: a path, a PIL image, the bytes" in str(
        told.value
    )
    assert ("number" in str(told.value)) is isinstance(given, list)


@pytest.mark.parametrize(
    "given", [b"", b"nothing", np.zeros((0, 5, 3), np.uint8), Image.new("RGB", (0, 4))]
)
def test_what_holds_no_picture_is_unreadable(given):
    with pytest.raises(UnreadableImage):
        read_image(given, PLAIN)
