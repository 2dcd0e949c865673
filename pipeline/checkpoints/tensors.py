"""safetensors files, written completely or not at all and read strictly. Weights are stored in no
other format.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.files import atomic_write
from pipeline.cli import UserError


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> None:
    """Write tensors under a temporary name, fsync, rename. header: text by name, stored with
    them.
    """
    require_utf8(path)
    # clones, because tensors that share memory (a tied layer) are refused otherwise
    own = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    try:
        with atomic_write(path, sync=True) as temporary:
            save_file(own, temporary, metadata={"format": "pt", **(header or {})})
            temporary.chmod(0o666 & ~_umask())  # safetensors makes it readable by its owner alone
    except SafetensorError as error:  # of the system, by the package's name
        kept = f"; {path} is as it was before" if path.exists() else ""
        raise UserError(
            f"{path} could not be written: {error}{kept}; make room, or choose another --out"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes that a file's header declares (safetensors refuses one whose tensors are not the
    file's very bytes).
    """
    _require(path)
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is broken ({error}); copy it again, or make it again") from error


def require_utf8(path: Path) -> None:
    """Raise UserError for a path that safetensors cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path}: its name, or a folder's, is not UTF-8, which safetensors files need; "
            "rename it"
        ) from error


def _require(path: Path) -> None:
    require_utf8(path)
    if not path.is_file():
        raise UserError(
            f"{path} is missing; {path.parent} is not whole: make it again, or copy it whole"
        )


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file; UserError if it is missing or damaged."""
    _require(path)
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is broken ({error}); copy it again, or make it again") from error
