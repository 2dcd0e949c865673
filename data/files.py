"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path, sync: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` to write under; at the end it is renamed, so that nobody ever
    sees half of a file. sync: not before it is on the disk."""
    # a name has at most 255 bytes
    begin = path.name.encode(errors="ignore")[:100].decode(errors="ignore")
    temporary = path.with_name(f".{begin}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                _fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(descriptor: int) -> None:
    """Wait until a file is on disk, if the file system supports it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write a small text file completely or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
