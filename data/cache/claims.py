"""Claims: which process writes which shard of a cache, by files that only one process can create.

A shard is claimed by a file (`.shard-00000.claim`: host, pid, start), which its owner touches every
TOUCH_SECONDS seconds. A claim whose process is dead (on this host), or that nobody touched for
LEASE_SECONDS seconds by the file system's own clock (on another), is taken over. Should two
processes write one shard all the same, both write the same rows, and the last rename wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from data.cache.writer import Shard

TOUCH_SECONDS, LEASE_SECONDS = 10, 120  # seconds


class Claims:
    """The shards that this process is writing. A context manager: its end releases all of them."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.held: set[Path] = set()
        self.stop = threading.Event()
        self.me = {"host": _host(), "pid": os.getpid(), "start": _started(os.getpid())}

    def __enter__(self) -> Claims:
        threading.Thread(target=self._touch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for shard in list(self.held):
            self.release(shard)

    def take(self, shard: Shard) -> bool:
        """Claim `shard`: True if it does not exist and no other live process is writing it."""
        path = _claim_path(shard.path)
        for _ in range(2):
            if shard.path.exists():
                return False
            try:
                with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "w") as file:
                    json.dump(self.me, file)
            except FileExistsError:
                if not self._abandoned(path):
                    return False
                self._put_aside(path)
                continue
            self.held.add(shard.path)
            if shard.path.exists():  # finished and released in the meantime
                self.release(shard.path)
                return False
            # left by a killed process
            for left in shard.path.parent.glob(f".{shard.path.name}.*.tmp"):
                left.unlink(missing_ok=True)
            return True
        return False

    def release(self, shard: Path) -> None:
        self.held.discard(shard)
        # taken over by another process, because this one was silent for too long
        if _owner(_claim_path(shard)) == self.me:
            _claim_path(shard).unlink(missing_ok=True)

    def _put_aside(self, path: Path) -> None:
        """Remove an abandoned claim. A claim that another process has just taken over is put
        back.
        """
        owner, aside = _owner(path), path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            path.rename(aside)
        except FileNotFoundError:  # another was quicker
            return
        if _owner(aside) != owner:
            with contextlib.suppress(
                OSError
            ):  # it exists again, or the file system has no hard links
                os.link(aside, path)
        aside.unlink()

    def _abandoned(self, path: Path) -> bool:
        if not path.exists():
            return True
        owner = _owner(path)
        if owner.get("host") == self.me["host"]:
            return not _alive(owner["pid"], owner["start"])
        clock = self.cache / f".clock.{uuid.uuid4().hex}"
        try:
            clock.touch()
            return clock.stat().st_mtime - path.stat().st_mtime > LEASE_SECONDS
        except FileNotFoundError:
            return True
        finally:
            clock.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self.stop.wait(TOUCH_SECONDS):
            for shard in list(self.held):
                with contextlib.suppress(OSError):
                    os.utime(_claim_path(shard))


def _owner(path: Path) -> dict[str, Any]:
    """The content of a claim; empty if it was just created, or its process was killed while
    creating it.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.keys() >= {"host", "pid", "start"} else {}


def _claim_path(shard: Path) -> Path:
    return shard.with_name(f".{shard.stem}.claim")


def _host() -> str:
    """This machine since its last boot, and its process namespace (containers have their own)."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str:
    """The start time of a process, which distinguishes it from a later one with the same number;
    empty if the system does not report it.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _alive(pid: int, start: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(pid) == start


def sweep(cache: Path) -> None:
    """Remove what killed processes left: claims of finished shards and old temporary files."""
    for claim in cache.glob(".shard-*.claim"):
        if (cache / f"{claim.stem.removeprefix('.')}.h5").exists():
            claim.unlink(missing_ok=True)
    for left in cache.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 10 * LEASE_SECONDS:
                left.unlink()
