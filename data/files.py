"""Writing of files: completely or not at all, and never over an input file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from data import DataError


@contextlib.contextmanager
def atomic_write(path: Path, sync: bool = False) -> Iterator[Path]:
    """Context manager: yields a temporary path in the same folder and renames it to `path` at exit.

    Readers never see an incomplete file. After an error, `path` is unchanged.

    sync: flush the file to disk before it is renamed.
    """
    # A file name has at most 255 bytes.
    prefix = path.name.encode(errors="ignore")[:100].decode(errors="ignore")
    temporary = path.with_name(f".{prefix}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                _fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_files(folder: Path, old: Collection[str], last: str) -> Iterator[Path]:
    """Context manager: yields a temporary folder, and moves its files to `folder` at exit.

    The files `old` of `folder` are removed first. `last` is removed before all others and moved
    after them, so that it exists only beside a complete set of files. After an error `folder` is
    unchanged; if it did not exist, it does not exist. Temporary folders of a killed process are
    removed. Raises DataError if no file can be written in `folder`.
    """
    for killed in folder.glob(".*.tmp"):
        shutil.rmtree(killed, ignore_errors=True)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise DataError(
                f"{folder} cannot be written ({error.strerror}); pass another folder"
            ) from error
        yield temporary
        for name in sorted(old, key=lambda name: name != last):
            (folder / name).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
        created.clear()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in created:
                path.rmdir()


def _fsync(descriptor: int) -> None:
    """Flush a file to disk, if the file system supports it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def check_outputs(outputs: Iterable[tuple[str, Path]], inputs: Iterable[Path]) -> None:
    """Raise DataError if an output file is an input file, or if two outputs are the same file.

    outputs: the path of each output file, with the option that named it.
    """
    outputs = [*outputs]
    # A dataset may have 100,000 photographs, and to follow their links takes long on a network. A
    # file that does not exist has no other name.
    exists = any(path.exists() for _, path in outputs)
    place = os.path.realpath if exists else os.path.abspath
    # photographs in a tar or in a remote store have no path on this machine
    places = {place(path) for path in inputs if isinstance(path, os.PathLike)}
    options: dict[Path, str] = {}
    for option, path in outputs:
        resolved = path.resolve()
        if place(path) in places:
            raise DataError(f"{option} {path} would overwrite an input file; pass another path")
        if resolved in options:
            raise DataError(
                f"{options[resolved]} and {option} write the same file, {path}; pass another path"
            )
        options[resolved] = option


def json_lines(records: Iterable[object]) -> str:
    """Return records as JSON, one per line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def user_cache() -> Path | None:
    """$XDG_CACHE_HOME/onceover, or ~/.cache/onceover; None for a user without a home folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # the XDG standard says that relative paths are ignored
        try:
            folder = Path.home() / ".cache"
        except RuntimeError:
            return None
    return folder / "onceover"
