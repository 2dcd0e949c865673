"""Where an extraction writes its shards: a local folder, or a folder in a remote store.

Both kinds have the same methods. An extraction plans shards (`data.cache.writer`) in the local
folder `folder`, takes a shard, writes it there, and releases it. In a local cache `folder` is the
cache itself. For a remote cache it is temporary: `release` uploads the whole shard.

A remote cache has these files beside the shards and backbone.safetensors:

    cache.json                          identity and provenance
    plan-FIRST-SHARDS-DIGEST.npy        the image ids of a plan [N] int64. FIRST and SHARDS are the
                                        numbers of its first shard and of its shards
    shard-00012.unreadable.jsonl        the photographs of this shard without a row, if any
    unreadable.jsonl                    those of all shards, when the extraction is complete

Therefore one listing tells which images are done, and no shard is opened. A store has no exclusive
creation of files that all stores support, so there are no claims: each process writes its own part
of the shards, and two different extractions must not write one cache at the same time.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data import DataError
from data.cache import writer
from data.cache.claims import Claims, sweep
from data.cache.reader import (
    Unreadable,
    cache_header,
    iterate,
    reading_shard,
    shard_paths,
    unreadable_in,
)
from data.cache.writer import (
    SHARD_NAME,
    Existing,
    Shard,
    plan_digest,
    read_existing,
    write_index,
)
from data.files import json_lines
from data.remote import attempt, is_remote, store_errors
from data.sources import Image

# stores in which an upload is visible only when it is complete
ATOMIC_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "memory"}
PLAN_NAME = re.compile(r"plan-(\d+)-(\d+)-([\w-]+)\.npy")
UNREADABLE_SUFFIX = ".unreadable.jsonl"


class Output(Protocol):
    """The destination of an extraction.

    cache: the path that the user passed. folder: where shards are written on this machine.
    takes_over: whether a process may extract the shards of other processes.
    """

    cache: Path
    folder: Path
    takes_over: bool

    def header(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return identity and provenance of the cache; None before its first shard."""

    def existing(self, images: Sequence[Image], unreadable: bool = False) -> list[Existing]:
        """Return the shards that exist. unreadable: also their unreadable photographs.

        images: the images of the plan that the caller will make.
        """

    def prepare(
        self,
        images: Sequence[Image],
        shards: Sequence[Shard],
        identity: Mapping[str, Any],
        provenance: Mapping[str, Any],
        keep_backbone: Callable[[Path], None] | None,
    ) -> None:
        """Create the cache.

        keep_backbone: writes backbone.safetensors into a local folder, if a cache needs it.
        """

    def claims(self) -> contextlib.AbstractContextManager:
        """Return a context with `take(shard)` and `release(path)`."""

    def finish(self) -> tuple[list[Unreadable], int]:
        """Write what a complete cache has. Returns the unreadable photographs, and its bytes."""


def open_output(cache: Path) -> Output:
    """Return the output for a local or a remote path."""
    return RemoteOutput(cache) if is_remote(cache) else LocalOutput(cache)


class LocalOutput:
    """A cache in a folder that all processes of the extraction share."""

    takes_over = True

    def __init__(self, cache: Path) -> None:
        self.cache = self.folder = cache

    def header(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        if self.cache.exists() and not self.cache.is_dir():
            raise DataError(
                f"--out {self.cache} is a file; pass the path of a folder for the cache"
            )
        return cache_header(self.cache)

    def existing(self, images: Sequence[Image], unreadable: bool = False) -> list[Existing]:
        return read_existing(self.cache)

    def prepare(
        self,
        images: Sequence[Image],
        shards: Sequence[Shard],
        identity: Mapping[str, Any],
        provenance: Mapping[str, Any],
        keep_backbone: Callable[[Path], None] | None,
    ) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        if keep_backbone:
            keep_backbone(self.cache)

    def claims(self) -> Claims:
        return Claims(self.cache)

    def finish(self) -> tuple[list[Unreadable], int]:
        unreadable = write_index(self.cache)
        sweep(self.cache)
        return unreadable, sum(path.stat().st_size for path in shard_paths(self.cache))


class _Plan(NamedTuple):
    name: str
    first: int
    shards: int
    digest: str


class RemoteOutput:
    """A cache in a remote store. See the docstring of the module for its files."""

    takes_over = False

    def __init__(self, cache: Path) -> None:
        remote: Any = cache
        self.cache, self.fs, self.path = cache, remote.fs, remote.path.rstrip("/")
        self.protocol = remote.protocol
        if self.protocol in ("http", "https"):
            raise DataError(f"--out {cache}: files cannot be written by HTTP; pass another --out")
        self._temporary = tempfile.TemporaryDirectory(prefix="onceover-")
        self.folder = Path(self._temporary.name)

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file of the cache, by one listing."""
        with store_errors(self.cache):
            self.fs.invalidate_cache()
            try:
                entries = self.fs.ls(self.path, detail=True)
            except FileNotFoundError:
                return {}
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries}

    def header(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        if "cache.json" not in self.sizes():
            return None
        with self._content_of("cache.json"):
            record = json.loads(self._read("cache.json"))
            identity, provenance = record["identity"], record["provenance"]
            if not isinstance(identity, dict) or not isinstance(provenance, dict):
                raise TypeError("identity and provenance are not objects")
            return identity, provenance

    @contextlib.contextmanager
    def _content_of(self, name: str) -> Iterator[None]:
        """Context manager: raise errors on damaged content of a file as DataError."""
        try:
            yield
        except DataError:
            raise
        except (ValueError, LookupError, TypeError, EOFError) as error:
            raise DataError(
                f"{self.cache}/{name} is damaged ({error}); upload it again from a copy of the "
                "cache, or pass another --out"
            ) from error

    def existing(self, images: Sequence[Image], unreadable: bool = False) -> list[Existing]:
        names = self.sizes()
        own_digest, existing = plan_digest(images), []
        for plan in _plans(names):
            if not any(name in names for name in _shard_names(plan)):
                existing.append(Existing("", plan.digest, plan.first, plan.shards, [], []))
                continue
            ids = [image.id for image in images] if plan.digest == own_digest else self._ids(plan)
            for name, rows in _members(plan, ids):
                if name in names:
                    existing.append(Existing(name, plan.digest, plan.first, plan.shards, rows, []))
        known = {shard.name for shard in existing}
        for name in names:
            if re.fullmatch(r"shard-\d+\.h5", name) and name not in known:
                raise DataError(
                    f"{self.cache} has {name}, which this program did not upload; pass an empty "
                    "folder of the store to --out"
                )
        return self._with_unreadable(existing, names) if unreadable else existing

    def _ids(self, plan: _Plan) -> list[int]:
        with self._content_of(plan.name):
            ids = np.load(io.BytesIO(self._read(plan.name)))
            if ids.dtype != np.int64 or ids.ndim != 1:
                raise TypeError(f"{ids.dtype} {ids.shape} in place of image ids")
            if len(_chunks(plan, ids.tolist())) != plan.shards:
                raise ValueError(f"{len(ids):,} image ids for {plan.shards} shards")
            return ids.tolist()

    def _with_unreadable(
        self, existing: Sequence[Existing], names: Mapping[str, int]
    ) -> list[Existing]:
        """Move the ids of unreadable photographs from `rows` to `unreadable`."""
        files = [name for name in names if name.endswith(UNREADABLE_SUFFIX)]
        paths = {f"{self.path}/{name}": name for name in files}
        contents = attempt(lambda: self.fs.cat(list(paths)), self.cache) if paths else {}
        if isinstance(contents, bytes):  # fsspec returns the content alone for one path
            contents = dict.fromkeys(paths, contents)
        records: dict[str, list[Unreadable]] = {}
        for path, content in contents.items():
            name = path.rpartition("/")[2]
            with self._content_of(name):
                records[f"{name.removesuffix(UNREADABLE_SUFFIX)}.h5"] = [
                    Unreadable(**json.loads(line)) for line in content.decode().splitlines()
                ]
        result = []
        for shard in existing:
            lost = records.get(shard.name, [])
            ids = {record.image_id for record in lost}
            rows = [id_ for id_ in shard.rows if id_ not in ids]
            result.append(shard._replace(rows=rows, unreadable=lost))
        return result

    def prepare(
        self,
        images: Sequence[Image],
        shards: Sequence[Shard],
        identity: Mapping[str, Any],
        provenance: Mapping[str, Any],
        keep_backbone: Callable[[Path], None] | None,
    ) -> None:
        """Upload the plans of the shards, before the first shard.

        Raises DataError if another extraction has planned the same names of shards.
        """
        names = self.sizes()
        if "cache.json" not in names:
            record = {"identity": identity, "provenance": provenance}
            self._write("cache.json", json.dumps(record).encode())
        if keep_backbone and "backbone.safetensors" not in names:
            keep_backbone(self.folder)
            file = self.folder / "backbone.safetensors"
            if file.exists():
                self._upload(file)
        own = plan_digest(images)
        added = []
        for shard in shards:
            first, count, digest = (shard.plan[key] for key in ("first", "shards", "digest"))
            name = f"plan-{first:05d}-{count}-{digest.replace(' ', '-')}.npy"
            if name not in names and name not in added:
                members = images if digest == own else shard.images
                content = io.BytesIO()
                np.save(content, np.array([image.id for image in members], np.int64))
                self._write(name, content.getvalue())
                added.append(name)
        plans = sorted(_plans(self.sizes()), key=lambda plan: plan.first)
        for before, after in itertools.pairwise(plans):
            if before.first + before.shards > after.first:
                for name in added:
                    self.fs.rm_file(f"{self.path}/{name}")
                raise DataError(
                    f"another extraction writes {self.cache} at the same time, with other "
                    "photographs. Wait until it ends, and run this command again"
                )

    def claims(self) -> RemoteOutput:
        return self

    def __enter__(self) -> RemoteOutput:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.folder.glob("*.h5"):
            file.unlink()

    def take(self, shard: Shard) -> bool:
        return not shard.written

    def release(self, path: Path) -> None:
        """Upload a finished shard, and remove it from this machine."""
        with reading_shard(path) as file:
            unreadable = unreadable_in(file)
        if unreadable:
            lines = json_lines(record._asdict() for record in unreadable)
            self._write(f"{path.stem}{UNREADABLE_SUFFIX}", lines.encode())
        self._upload(path)
        path.unlink()

    def finish(self) -> tuple[list[Unreadable], int]:
        names = self.sizes()
        # of images that several shards contain, the last shard counts
        last: dict[int, Unreadable | None] = {}
        for plan in sorted(_plans(names), key=lambda plan: plan.first):
            ids = self._ids(plan)
            shards = [
                Existing(name, "", 0, 0, rows, [])
                for name, rows in _members(plan, ids)
                if name in names
            ]
            for shard in self._with_unreadable(shards, names):
                last |= dict.fromkeys(shard.rows)
                last |= {record.image_id: record for record in shard.unreadable}
        unreadable = [record for record in last.values() if record is not None]
        lines = json_lines(record._asdict() for record in unreadable)
        self._write("unreadable.jsonl", lines.encode())
        shards_bytes = (size for name, size in names.items() if name.endswith(".h5"))
        return unreadable, sum(shards_bytes)

    def _read(self, name: str) -> bytes:
        return attempt(lambda: self.fs.cat_file(f"{self.path}/{name}"), f"{self.cache}/{name}")

    def _write(self, name: str, content: bytes) -> None:
        file = self.folder / name
        file.write_bytes(content)
        self._upload(file)
        file.unlink()

    def _upload(self, file: Path) -> None:
        """Upload a file whole: readers see the complete file or none."""
        target = f"{self.path}/{file.name}"

        def put() -> None:
            if self.protocol in ATOMIC_STORES:
                self.fs.put_file(str(file), target)
                return
            temporary = f"{self.path}/.{file.name}.tmp"
            self.fs.makedirs(self.path, exist_ok=True)
            self.fs.put_file(str(file), temporary)
            self.fs.mv(temporary, target)

        attempt(put, f"{self.cache}/{file.name}")


def _plans(names: Mapping[str, int]) -> list[_Plan]:
    matches = [match for name in names if (match := PLAN_NAME.fullmatch(name))]
    return [_Plan(match[0], int(match[1]), int(match[2]), match[3]) for match in matches]


def _shard_names(plan: _Plan) -> list[str]:
    return [SHARD_NAME.format(number) for number in range(plan.first, plan.first + plan.shards)]


def _members(plan: _Plan, ids: list[int]) -> Iterator[tuple[str, list[int]]]:
    """Yield the name of each shard of a plan and its image ids."""
    yield from zip(_shard_names(plan), _chunks(plan, ids), strict=True)


def _chunks(plan: _Plan, ids: list[int]) -> list[list[int]]:
    """The image ids of each shard of a plan."""
    # one shard of retries may be larger
    size = max(1, len(ids)) if plan.shards == 1 else writer.SHARD_IMAGES
    return list(iterate(ids, size))
