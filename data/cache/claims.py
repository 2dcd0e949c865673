"""Claim files: they decide which process writes which shard of a cache.

A process claims a shard by creating a file (`.shard-00000.claim`: host, pid, start). Only one
process can create the file. The owner touches it every TOUCH_SECONDS seconds. Another process takes
over a claim if its process has ended (same host), or if the file was not touched for LEASE_SECONDS
seconds by the clock of the file system (other host). If two processes still write the same shard,
both write the same rows, and the last rename wins.
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
    """The shards that this process writes. A context manager; it releases all of them at exit."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.held: set[Path] = set()
        self.stop = threading.Event()
        self.own_record = {"host": _host(), "pid": os.getpid(), "start": _started(os.getpid())}

    def __enter__(self) -> Claims:
        threading.Thread(target=self._touch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for shard in list(self.held):
            self.release(shard)

    def take(self, shard: Shard) -> bool:
        """Claim a shard. Returns False if it exists or if another live process writes it."""
        path = _claim_path(shard.path)
        for _ in range(2):
            if shard.path.exists():
                return False
            try:
                self._create(path)
            except FileExistsError:
                if not self._abandoned(path):
                    return False
                self._remove_abandoned(path)
                continue
            self.held.add(shard.path)
            if shard.path.exists():  # another process finished it in the meantime
                self.release(shard.path)
                return False
            # A killed process may have left temporary files.
            for temporary in shard.path.parent.glob(f".{shard.path.name}.*.tmp"):
                temporary.unlink(missing_ok=True)
            return True
        return False

    def _create(self, path: Path) -> None:
        """Create a claim file with its content in one step. Raises FileExistsError if it exists.

        A process that is killed between creating a file and writing it would leave an empty claim,
        which says nothing of its owner: others would wait for LEASE_SECONDS. Where the file system
        has no hard links, the two steps are what can be had.
        """
        content, temporary = json.dumps(self.own_record), _temporary(path)
        try:
            temporary.write_text(content)
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:
                with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "w") as file:
                    file.write(content)
        finally:
            temporary.unlink(missing_ok=True)

    def release(self, shard: Path) -> None:
        """Release the claim of a shard."""
        self.held.discard(shard)
        # Another process may have taken over the claim, if this one did not touch it in time.
        if _owner(_claim_path(shard)) == self.own_record:
            _claim_path(shard).unlink(missing_ok=True)

    def _remove_abandoned(self, path: Path) -> None:
        """Remove an abandoned claim. If another process has just taken it over, restore it."""
        owner, aside = _owner(path), _temporary(path)
        try:
            path.rename(aside)
        except FileNotFoundError:  # another process removed it first
            return
        if _owner(aside) != owner:
            # OSError: the claim exists again, or the file system has no hard links.
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()

    def _abandoned(self, path: Path) -> bool:
        if not path.exists():
            return True
        owner = _owner(path)
        if owner.get("host") == self.own_record["host"]:
            return not _alive(owner["pid"], owner["start"])
        clock = _temporary(self.cache / ".clock")
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
    """The content of a claim file; empty if its process is still writing it or was killed."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.keys() >= {"host", "pid", "start"} else {}


def _claim_path(shard: Path) -> Path:
    return shard.with_name(f".{shard.stem}.claim")


def _temporary(path: Path) -> Path:
    """A new name beside `path`; `sweep` removes such a file if its process was killed."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def _host() -> str:
    """An identifier of this machine, its last boot and its process namespace (of a container)."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str:
    """The start time of a process; empty if the system does not report it.

    It distinguishes the process from a later one with the same pid.
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
    """Remove files of killed processes: claims of finished shards and old temporary files."""
    for claim in cache.glob(".shard-*.claim"):
        if (cache / f"{claim.stem.removeprefix('.')}.h5").exists():
            claim.unlink(missing_ok=True)
    for temporary in cache.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - temporary.stat().st_mtime > 10 * LEASE_SECONDS:
                temporary.unlink()
