"""Hypothesis draws that spoil what a user hands over: bytes, JSON, texts of lines, HDF5,
safetensors, photographs.

Every function takes hypothesis' `draw` first and returns the value, or changes the file, with one
or a few faults in it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import hypothesis.strategies as st
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

Draw = Callable[[st.SearchStrategy], Any]

TEXTS = (
    "",
    " ",
    ".",
    "..",
    "../escaped.jpg",
    "a/../../escaped.jpg",
    "/no/such/escaped.jpg",
    "\\\\host\\escaped.jpg",
    "C:\\escaped.jpg",
    "a\0b",
    "\ud800",
    "\x1b[31m",
    "\r\n",
    "\t",
    "\u2028",
    "e\u0301",
    "İ",
    "ﬃ",
    "<eos>",
    "<unk>",
    "%s{}",
    "nan",
    "-1",
    "x" * 5000,
    "a " * 3000,
    "/".join("a" * 300),
    "dog\xa0runs",
    "狗在跑",
    "🐕" * 50,
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    -0.5,
    1.0,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    float("-inf"),
    -0.0,
)
DEEP: Any = []
for _ in range(60):
    DEEP = [DEEP]
OTHERS = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [1, "a"],
    {"a": 1},
    {"": {"": []}},
    DEEP,
    [float("nan")],
)
VALUES = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from(NUMBERS),
    st.sampled_from(OTHERS),
    st.integers(),
    st.text(max_size=20),
)


def one_of(draw: Draw, options: Sequence[Any]) -> Any:
    return draw(st.sampled_from(options))


def place_in(draw: Draw, size: int) -> int:
    """A place below `size`, as often near the start, where headers are, as anywhere."""
    return draw(st.integers(0, max(0, min(size, one_of(draw, (16, 128, size))) - 1)))


def spoil_bytes(draw: Draw, content: bytes) -> bytes:
    """Random bytes in place of all, or up to four edits: bits, bytes, the end, slices put in,
    doubled, cut out.
    """
    if draw(st.integers(0, 15)) == 0:
        return draw(st.binary(max_size=200))
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at, size = place_in(draw, len(found)), draw(st.integers(1, 40))
        edit = one_of(draw, ("flip", "set", "cut", "insert", "double", "delete", "zero"))
        if edit == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif edit == "set":
            found[at : at + 4] = one_of(
                draw, (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x01")
            )
        elif edit == "cut":
            del found[at:]
        elif edit == "insert":
            found[at:at] = draw(st.binary(min_size=1, max_size=40))
        elif edit == "double":
            found[at:at] = found[at : at + size * 10]
        elif edit == "delete":
            del found[at : at + size]
        elif edit == "zero":
            found[at : at + size] = bytes(size)
    return bytes(found)


def places_of(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """All (container, key) of a JSON value."""
    for key in (
        list(value)
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else ()
    ):
        found.append((value, key))
        places_of(value[key], found)
    return found


def spoil_json(draw: Draw, value: Any) -> Any:
    """A copy of a JSON value with one to three faults anywhere in it."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = places_of(value, [])
        if not places or draw(st.integers(0, 30)) == 0:
            return copy.deepcopy(draw(VALUES))
        holder, key = one_of(draw, places)
        edit = one_of(
            draw, ("replace", "replace", "delete", "rename", "double", "text", "list", "swap")
        )
        if edit == "delete":
            del holder[key]
        elif edit == "double":
            if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            else:
                holder[f"{key} "] = copy.deepcopy(holder[key])
        elif edit == "rename" and isinstance(holder, dict):
            holder[one_of(draw, (str(key).upper(), f" {key}", *TEXTS[:4]))] = holder.pop(key)
        elif edit == "text":
            holder[key] = str(holder[key])[:200]
        elif edit == "list":
            holder[key] = [holder[key]]
        elif edit == "swap":  # another value of the same file, as an id that comes twice
            other, theirs = one_of(draw, places)
            holder[key] = (
                copy.deepcopy(other[theirs]) if theirs in other or isinstance(other, list) else None
            )
        else:
            holder[key] = copy.deepcopy(draw(VALUES))  # the next fault may change it in place
    return value


def json_bytes(draw: Draw, value: Any) -> bytes:
    """A spoilt JSON file: faults in what it says, in its bytes, or in both."""
    how = draw(st.integers(0, 4))
    text = json.dumps(
        spoil_json(draw, value) if how < 4 else value, ensure_ascii=draw(st.integers(0, 3)) > 0
    )
    content = text.encode("utf-8", "surrogatepass")
    return spoil_bytes(draw, content) if how > 2 else content


def spoil_lines(draw: Draw, text: str, separators: str) -> bytes:
    """A text of lines and cells with a few faults in lines or cells, and perhaps in its bytes."""
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(lines) - 1)))
        edit = one_of(
            draw, ("cell", "cell", "delete", "double", "insert", "quote", "separator", "end")
        )
        line = lines[at] if lines else ""
        if edit == "cell":
            cells = line.split(separators[0])
            value = draw(VALUES)
            cells[draw(st.integers(0, len(cells) - 1))] = (
                value if isinstance(value, str) else json.dumps(value)
            )
            line = separators[0].join(cells)
        elif edit == "insert":
            line = f"{line}\n{draw(st.text(max_size=30))}"
        elif edit == "quote":
            line = line[: len(line) // 2] + '"' + line[len(line) // 2 :]
        elif edit == "separator":
            line = line.replace(separators[0], one_of(draw, (";", "\t", "", separators)))
        elif edit == "end":
            line += one_of(draw, ("\r", "\r\n", "\0", separators[0], "\\"))
        elif edit == "double":
            line = f"{line}\n{line}"
        lines[at : at + 1] = [] if edit == "delete" else [line]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return spoil_bytes(draw, content) if draw(st.integers(0, 3)) == 0 else content


# -------------------------------------------------------------------------------- HDF5, safetensors


def spoil_hdf5(draw: Draw, path: Path) -> None:
    """Faults in a shard: its bytes, or its datasets (absent, of other types, shapes, layouts,
    values) and attributes.
    """
    if draw(st.integers(0, 3)) == 0:
        path.write_bytes(spoil_bytes(draw, path.read_bytes()))
        return
    # What h5py itself refuses to write stays as it is.
    with (
        contextlib.suppress(OSError, RuntimeError, ValueError, TypeError),
        h5py.File(path, "r+") as file,
    ):
        for _ in range(draw(st.integers(1, 2))):
            if draw(st.booleans()):
                _spoil_attribute(draw, file, one_of(draw, sorted(file.attrs) or ["format"]))
            else:
                _spoil_dataset(draw, file, one_of(draw, sorted(file)))


def _spoil_attribute(draw: Draw, file: h5py.File, name: str) -> None:
    old = file.attrs.get(name)
    if isinstance(old, str) and draw(st.integers(0, 3)):
        file.attrs[name] = json_bytes(draw, json.loads(old)) if draw(st.booleans()) else json.dumps(
            spoil_json(draw, json.loads(old)))  # fmt: skip
        return
    if name in file.attrs:
        del file.attrs[name]
    value = one_of(
        draw,
        (
            None,
            2,
            "text",
            b"\xff\xfe",
            np.zeros((2, 3)),
            np.float64("nan"),
            h5py.Empty("f"),
            -1,
            "{}",
            "[]",
        ),
    )
    if value is not None:
        file.attrs[name] = value


def _spoil_dataset(draw: Draw, file: h5py.File, name: str) -> None:
    old = file[name]
    # an earlier fault made it large
    if not isinstance(old, h5py.Dataset) or (old.size or 0) > 10**7:
        return
    values = old[:] if old.shape else old[()]
    edit = one_of(
        draw,
        (
            "delete",
            "type",
            "shape",
            "chunks",
            "virtual",
            "group",
            "value",
            "value",
            "value",
            "rows",
            "scalar",
        ),
    )
    if edit == "value" and old.is_virtual:  # HDF5 itself crashes
        return
    if edit == "value" and old.shape and old.size:
        at = tuple(draw(st.integers(0, side - 1)) for side in old.shape)
        number = values.dtype.kind != "O"
        fitting = (
            [each for each in NUMBERS if values.dtype.kind == "f" or _fits(each, values.dtype)]
            if number
            else TEXTS[:-1]
        )
        value = one_of(draw, [*fitting, *([values.flat[0]] if number else [])])
        if not number:
            value = value.encode("utf-8", "surrogatepass").replace(b"\0", b"")
        old[at] = (
            np.float64(min(value, 1e308)).astype(values.dtype)
            if values.dtype.kind == "f"
            else value
        )
        return
    del file[name]
    if edit == "type":
        kind = one_of(
            draw,
            (
                "f8",
                "i8",
                "u1",
                "S3",
                "c8",
                h5py.string_dtype(),
                [("a", "f4"), ("b", "i4")],
                ">f2",
                "?",
            ),
        )
        file.create_dataset(name, values.shape, kind)
    elif edit == "shape":
        shape = one_of(
            draw,
            (
                (0,),
                (1,),
                (0, 0, 0),
                (*values.shape, 1),
                values.shape[1:],
                (3, 5, 7),
                (2**40,),
                (2**33, 2**30),
            ),
        )
        file.create_dataset(name, shape, values.dtype)
    elif edit == "rows":
        file[name] = (
            values[: len(values) // 2] if draw(st.booleans()) else np.concatenate([values, values])
        )
    elif edit == "chunks":
        file.create_dataset(
            name, data=values, chunks=True, compression="gzip", dtype=old.dtype if old else None
        )
    elif edit == "virtual":
        layout = h5py.VirtualLayout(
            values.shape, "f2" if values.dtype.kind == "O" else values.dtype
        )
        file.create_virtual_dataset(name, layout)
    elif edit == "group":
        file.create_group(name)
    elif edit == "scalar":
        file[name] = 3


def _fits(number: float, kind: np.dtype) -> bool:
    return isinstance(number, int) and np.iinfo(kind).min <= number <= np.iinfo(kind).max


def spoil_safetensors(draw: Draw, path: Path) -> None:
    """Faults in a safetensors file: its bytes, its header's text, its length field, or its
    tensors.
    """
    content, how = path.read_bytes(), draw(st.integers(0, 3))
    if how == 0:
        path.write_bytes(spoil_bytes(draw, content))
    elif how == 1:
        size = int.from_bytes(content[:8], "little")
        header = json_bytes(draw, json.loads(content[8 : 8 + size]))
        length = one_of(draw, (len(header),) * 6 + (0, 1, 2**31, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length) + header + content[8 + size :])
    else:
        tensors = load_file(path)
        for _ in range(draw(st.integers(1, 2))):
            spoil_tensor(draw, tensors, one_of(draw, sorted(tensors)))
            if not tensors:
                break
        header = one_of(draw, (None, {"record": "{}"}, {"record": "[]"}, {"record": "\x00"}))
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, header)


def spoil_tensor(draw: Draw, tensors: dict[str, torch.Tensor], name: str) -> None:
    value = tensors.pop(name)
    edit = one_of(draw, ("delete", "rename", "type", "shape", "value", "value", "empty", "extra"))
    if edit == "rename":
        tensors[one_of(draw, (f"module.{name}", name.upper(), "a" * 300, "", "é.weight"))] = value
    elif edit == "type":
        kind = one_of(
            draw,
            (
                torch.int8,
                torch.bool,
                torch.float64,
                torch.bfloat16,
                torch.int64,
                torch.float8_e4m3fn,
            ),
        )
        tensors[name] = value.float().to(kind)
    elif edit == "shape":
        tensors[name] = one_of(
            draw, (value[None], value.flatten(), value.flatten()[:1], torch.zeros(()))
        )
    elif edit == "empty":
        tensors[name] = torch.zeros(0, *value.shape[1:])
    elif edit == "value":
        value = value.clone()
        number = one_of(
            draw,
            (float("nan"), float("inf"), -1.0, 0.0, 1e30)
            if value.is_floating_point()
            else (-1, 0, 2**30),
        )
        value.view(-1)[: draw(st.integers(1, 3))] = number
        tensors[name] = value
    elif edit == "extra":
        tensors |= {name: value, f"{name}.extra": torch.zeros(2)}


# -------------------------------------------------------------------------------------- photographs

FORMATS = (
    "PNG",
    "JPEG",
    "GIF",
    "WEBP",
    "TIFF",
    "BMP",
    "PPM",
    "ICO",
    "TGA",
    "PCX",
    "JPEG2000",
    "SGI",
    "DDS",
    "MPO",
    "DIB",
)
MODES = ("RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I", "I;16", "F", "YCbCr", "LAB", "PA")


def draw_photograph(draw: Draw) -> tuple[str, bytes]:
    """A small photograph of any format, mode, size and EXIF record as a file, spoilt in most cases,
    and its suffix.
    """
    size, mode = (one_of(draw, (1, 2, 31, 64)), one_of(draw, (1, 3, 40))), one_of(draw, MODES)
    kind, exif = one_of(draw, FORMATS), Image.Exif()
    exif[0x0112] = one_of(draw, (1, 3, 6, 8, 0, 9, "text", 70000))
    photo = Image.linear_gradient("L").resize(size)
    options = (
        {"exif": exif} if draw(st.booleans()) and kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    )
    if draw(st.booleans()) and kind in ("PNG", "GIF"):
        options["transparency"] = one_of(draw, (0, 3, 300))
    if draw(st.booleans()) and kind in ("GIF", "TIFF", "WEBP"):
        options |= {"save_all": True, "append_images": [photo.rotate(90)]}
    buffer = io.BytesIO()
    for wanted in (mode, "RGB"):  # not each format takes each mode
        try:
            buffer = io.BytesIO()
            photo.convert(wanted).save(buffer, kind, **options)
            break
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            SystemError,
            struct.error,
            AttributeError,
            OverflowError,
        ):
            options = {}
    suffix = one_of(draw, (f".{kind.lower()}",) * 4 + (".jpg", ".png", ".webp"))
    content = buffer.getvalue() or b"no image"
    return suffix, spoil_bytes(draw, content) if draw(st.integers(0, 4)) else content
