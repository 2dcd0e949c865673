"""Remote files through fsspec (`s3://`, `gs://`, `http://`, ...), and parts of files.

A path whose text contains "://" is remote. `as_path` opens it as a `UPath` of the package
universal_pathlib, which has the methods of `pathlib.Path`. Both packages are the extra [remote] and
are imported only here and only for such a path. Options of a store, such as its endpoint, come from
fsspec's configuration: the environment variable FSSPEC_S3_ENDPOINT_URL, or ~/.config/fsspec/.

`python -m data.remote s3://bucket/folder FOLDER` copies a remote folder to this machine.

A listing of a folder is one request (of 1,000 names each), never one request per file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import shutil
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from data import DataError

INSTALL = "pip install -e '.[remote]'"
# seconds before each new attempt of a request that failed
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0)
Result = TypeVar("Result")


class FetchError(DataError):
    """A request failed several times. Nothing is known about the content of the file."""


def is_remote(path: object) -> bool:
    """Return whether a path or its text is remote."""
    return "://" in str(path)


def as_path(path: Path | str) -> Path:
    """Return a local path as a `Path`, and a remote path as a `UPath`.

    Raises DataError if the packages for this kind of path are not installed.
    """
    if not is_remote(path):
        return Path(path)
    if not isinstance(path, str):
        return path
    with _packages(path):
        from upath import UPath

        remote = UPath(path)
        remote.fs  # noqa: B018 - imports the package of the protocol
    return cast(Path, remote)


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a remote path, and the path in that file system."""
    with _packages(url):  # no UPath, because each photograph is opened here
        from fsspec.core import url_to_fs

        return url_to_fs(url)


@contextlib.contextmanager
def _packages(path: str) -> Iterator[None]:
    """Context manager: raise DataError if a package for a remote path is not installed."""
    try:
        import upath  # noqa: F401
    except ModuleNotFoundError as error:
        raise DataError(f"{path} is a remote path, which needs a package: {INSTALL}") from error
    try:
        yield
    except (ImportError, ValueError) as error:  # fsspec names the package, such as s3fs
        raise DataError(f"{path} cannot be opened: {error}") from error


@contextlib.contextmanager
def store_errors(place: object) -> Iterator[None]:
    """Context manager: convert the errors of a store's client to DataError with the path.

    The clients raise errors of their own types, for example for absent credentials. Errors of a
    local path are not changed.
    """
    if not is_remote(place):
        yield
        return
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{place} cannot be reached: {_reason(error)}; check the address, the credentials and "
            "the network"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def attempt(request: Callable[[], Result], place: object) -> Result:
    """Return the result of a request, which is repeated if it fails.

    Raises FileNotFoundError at once, and FetchError after the last attempt.
    """
    for seconds in (*RETRY_SECONDS, None):
        try:
            return request()
        except FileNotFoundError:
            raise
        except Exception as error:
            if seconds is None:
                raise FetchError(
                    f"{place} could not be transferred in {len(RETRY_SECONDS) + 1} attempts: "
                    f"{_reason(error)}; check the network and the credentials, and run the command "
                    "again to continue"
                ) from error
            time.sleep(seconds)
    raise AssertionError("not reached")


def folder_names(folder: Path) -> set[str]:
    """Return the names of the entries of a remote folder; empty if there is no such folder."""
    remote = cast(Any, folder)
    with store_errors(folder):
        try:
            paths = remote.fs.ls(remote.path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return set()
    own = remote.path.rstrip("/")
    names = {posixpath.basename(path.rstrip("/")) for path in paths if path.rstrip("/") != own}
    return {_unquoted(folder, name) for name in names}


def files_below(root: Path) -> list[str]:
    """Return the names of all files below a remote folder, relative to it."""
    remote = cast(Any, root)
    with store_errors(root):
        paths = remote.fs.find(remote.path)
    prefix = remote.path.rstrip("/") + "/"
    return [_unquoted(root, path.removeprefix(prefix)) for path in paths if path.startswith(prefix)]


def _unquoted(root: Path, name: str) -> str:
    """A file name of a listing. Pages of web servers have quoted names."""
    return urllib.parse.unquote(name) if str(root).startswith("http") else name


@dataclass(frozen=True, slots=True)
class Blob:
    """The bytes of a photograph that is not a local file of its own.

    place: a local path or a URL.
    member: the name of the file in the tar `place`; "": the whole of `place`.
    start, size: the range of the bytes of a member.
    """

    place: str
    member: str = ""
    start: int = 0
    size: int = 0

    def __str__(self) -> str:
        return f"{self.place}/{self.member}" if self.member else self.place

    def read_bytes(self) -> bytes:
        """Return the content.

        Raises FileNotFoundError, and FetchError if it cannot be read for another reason.
        """
        if self.member and not self.size:
            return b""
        if is_remote(self.place):
            fs, path = file_system(self.place)
            ends = (self.start, self.start + self.size) if self.member else (None, None)
            try:
                content = attempt(lambda: fs.cat_file(path, start=ends[0], end=ends[1]), self)
            except FileNotFoundError as error:  # fsspec gives no errno
                code = errno.ENOENT
                raise FileNotFoundError(code, os.strerror(code), str(self)) from error
        else:
            try:
                with open(self.place, "rb") as file:
                    file.seek(self.start)
                    content = file.read(self.size)
            except OSError as error:
                raise FetchError(f"{self.place}: {error.strerror or error}") from error
        if self.member and len(content) != self.size:
            raise FetchError(
                f"{self}: {len(content):,} bytes were read, not {self.size:,}; the tar changed, or "
                "the server does not serve parts of a file (HTTP range requests)"
            )
        return content

    def stamp(self) -> tuple[int, int]:
        """Return size and modification time (ns), to detect changes.

        (-1, -1) if the file does not exist; the time is 0 where only the size is known.
        """
        try:
            if not is_remote(self.place):
                return self.size, os.stat(self.place).st_mtime_ns
            if self.member:
                return self.size, 0
            fs, path = file_system(self.place)
            info = attempt(lambda: fs.info(path), self)
        except OSError:
            return -1, -1
        modified = next((info[key] for key in ("LastModified", "mtime") if key in info), 0)
        seconds = modified.timestamp() if hasattr(modified, "timestamp") else modified
        return info.get("size") or 0, int(float(seconds) * 1e9)


def photograph_path(base: Path, name: str) -> Path:
    """Return the path of a photograph: base / name, or a `Blob` under a remote folder.

    A UPath of each photograph would take 0.1 ms.
    """
    if not is_remote(base):
        return base / name
    if str(base).startswith("http"):
        name = urllib.parse.quote(name)
    # Image.path is declared as a Path, because most datasets have local files
    return cast(Path, Blob(f"{str(base).rstrip('/')}/{name}"))


def copy_folder(url: str, target: Path) -> None:
    """Copy a remote folder into the local folder `target`, which must not exist.

    `target` appears when it is complete: a part of a cache would look like a whole one.

    Raises DataError if it exists, if there is no file to copy, or if the copy fails.
    """
    if not is_remote(url):
        raise DataError(f"{url} is not a remote path, such as s3://bucket/folder")
    if target.exists():
        raise DataError(f"{target} already exists; pass a new folder")
    fs, path = file_system(url)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a copy that was killed
    try:
        with store_errors(url):
            fs.get(path.rstrip("/") + "/", f"{part}/", recursive=True)
        if not part.is_dir() or not any(part.iterdir()):
            raise DataError(f"{url} has no files; check the address")
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Run `python -m data.remote`, and return its exit code."""
    if len(arguments) != 2:
        print("usage: python -m data.remote s3://bucket/folder FOLDER", file=sys.stderr)
        return 2
    try:
        copy_folder(arguments[0], Path(arguments[1]))
    except (DataError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
