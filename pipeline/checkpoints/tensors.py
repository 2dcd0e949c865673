"""Atomic writing and strict reading of safetensors files, the only format of weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.files import atomic_write
from pipeline.cli import UserError


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically: to a temporary file, then fsync, then rename.

    header: additional text entries of the file's metadata.
    Raises UserError if the file cannot be written.
    """
    require_utf8(path)
    # safetensors refuses tensors that share memory, such as tied layers, so this makes clones.
    clones = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    try:
        with atomic_write(path, sync=True) as temporary:
            save_file(clones, temporary, metadata={"format": "pt", **(header or {})})
            # safetensors creates files that only their owner can read.
            temporary.chmod(0o666 & ~_umask())
    except SafetensorError as error:  # the package reports errors of the system in this way
        unchanged = f"; the existing {path} is unchanged" if path.exists() else ""
        raise UserError(
            f"{path} could not be written: {error}{unchanged}; free disk space, or choose another "
            "--out"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes in the header of a file, without its tensors.

    safetensors checks that the sizes in the header match the size of the file.
    Raises UserError if the file is missing or damaged.
    """
    _require(path)
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again, or make it again") from error


Value = TypeVar("Value")


def with_prefix(values: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """Return the values whose keys begin with `prefix`, without the prefix."""
    return {
        key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)
    }


def require_utf8(path: Path) -> None:
    """Raise UserError if a path is not UTF-8, because safetensors cannot open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path}: the name of the file or of a folder is not UTF-8, which safetensors needs; "
            "rename it"
        ) from error


def _require(path: Path) -> None:
    require_utf8(path)
    if not path.is_file():
        raise UserError(
            f"{path} is missing, so {path.parent} is incomplete; copy the whole folder again, or "
            "make it again"
        )


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a file.

    Raises UserError if the file is missing or damaged.
    """
    _require(path)
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again, or make it again") from error
