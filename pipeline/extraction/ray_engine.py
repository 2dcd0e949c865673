"""`--engine ray`: shards are tasks of the actors of a Ray cluster.

An actor opens the backbone once, and extracts whole shards as a single process does. Ray restarts
an actor whose process or machine ends, and repeats its task. The command that plans the shards
needs no GPU. It passes the photographs of a shard as paths or remote addresses, so every machine of
the cluster must be able to read them, and --out must be remote or a folder that all machines share.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import DataError
from data.cache.claims import LEASE_SECONDS
from data.cache.outputs import Output, open_output
from data.cache.reader import differences
from data.cache.writer import Shard
from data.remote import is_remote
from data.sources import Image
from models import ModelError
from pipeline.cli import UserError
from pipeline.extraction.stream import Recipe, extract_shards
from pipeline.runtime import Machine, open_machine
from pipeline.terminal import Progress, progress, say

INSTALL = "pip install -e '.[ray]'"
SAME_PROVENANCE = ("precision", "decode", "views", "device")  # of all actors
WAIT_SECONDS = 5  # between two attempts to take a shard that a killed actor has claimed
OpenRecipe = Callable[[Machine, int], Recipe]


class ShardActor:
    """A process of the cluster with a backbone. Ray makes it an actor.

    folder: the working folder of the command.
    """

    def __init__(
        self, open_recipe: OpenRecipe, device: str, seed: int, precision: str, workers: int,
        folder: Path,
    ) -> None:  # fmt: skip
        # relative paths are those of the command; a machine without the folder needs none
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self.recipe = open_recipe(open_machine(device, seed, precision), workers)

    def describe(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return identity and provenance."""
        return self.recipe.identity, self.recipe.provenance

    def extract(self, shard: Shard, cache: Path) -> tuple[Shard, bool]:
        """Extract a shard. Returns it, and whether this actor wrote it.

        Raises UserError if this machine does not have a photograph, which the command has found.
        """
        absent = [
            image
            for image in shard.images
            if isinstance(image.path, Path)
            and image.id not in self.recipe.missing
            and not image.path.exists()
        ]
        if absent:
            raise UserError(
                f"{absent[0].path} is not on the machine {platform.node()} of the Ray cluster "
                f"({len(absent):,} of {len(shard.images):,} photographs of a shard); every machine "
                "must have the photographs under the same path, or pass a remote --root"
            )
        output = open_output(cache)
        bar = Progress(len(shard.images), "images", "extract", enabled=False)
        local = replace(shard, path=output.folder / shard.path.name)
        with output.claims() as claims:
            return shard, bool(extract_shards([local], claims, self.recipe, bar))


class RayEngine:
    """The actors of an extraction: one per GPU of the cluster, else `workers` on CPUs.

    workers: decoding processes per GPU, or the number of actors on CPUs; None: as many as the
        cluster has CPUs.

    Raises UserError if Ray is not installed, or if the cluster has no free CPU.
    """

    def __init__(
        self,
        open_recipe: OpenRecipe,
        device: str,
        seed: int,
        precision: str,
        workers: int | None,
    ) -> None:
        self.ray = import_ray()
        if not self.ray.is_initialized():
            # joins the cluster of RAY_ADDRESS or of `ray start`, else starts one on this machine
            self.ray.init(log_to_driver=False, include_dashboard=False, logging_level="error")
        resources = self.ray.cluster_resources()
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if gpus and device in ("auto", "cuda"):
            count, decoders = gpus, workers if workers is not None else max(1, cpus // gpus - 1)
            needs = {"num_gpus": 1, "num_cpus": max(1, min(decoders, cpus // gpus))}
        else:
            count, decoders = workers or cpus, 1
            needs = {"num_cpus": 1}
        if not 0 < count * needs["num_cpus"] <= cpus:
            raise UserError(
                f"--engine ray needs {count * needs['num_cpus'] or 1} CPUs, and the cluster has "
                f"{cpus}; pass a smaller --workers, or add machines with `ray start`"
            )
        actor = self.ray.remote(max_restarts=-1, max_task_retries=-1, **needs)(ShardActor)
        arguments = open_recipe, device, seed, precision, decoders, Path.cwd()
        self.actors = [actor.remote(*arguments) for _ in range(count)]
        kind = "GPU" if "num_gpus" in needs else "CPU"
        say(f"Ray: {count} actors with one {kind} each, {cpus} CPUs and {gpus} GPUs in the cluster")

    def check_identity(self, identity: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the provenance of the actors.

        Raises UserError if an actor computes other features than `identity`, or than the others.
        """
        described = self._get([actor.describe.remote() for actor in self.actors])
        _, first = described[0]
        for other_identity, provenance in described:
            changes = differences(identity, other_identity)
            changes += differences(first, provenance, SAME_PROVENANCE)
            if changes:
                raise UserError(
                    f"the machines of the Ray cluster differ ({'; '.join(changes)}); pass "
                    "--precision, --device and the same --weights file on all of them"
                )
        return first

    def extract(
        self,
        images: Sequence[Image],
        output: Output,
        shards: Sequence[Shard],
        retry_shards: Sequence[Shard],
        recipe: Recipe,
    ) -> Progress:
        """Extract all shards that are not written. Returns the progress bar."""
        cache = output.cache if is_remote(output.cache) else output.cache.resolve()
        pending = [shard for shard in [*shards, *retry_shards] if not shard.written]
        total, end = sum(len(shard.images) for shard in pending), time.monotonic() + LEASE_SECONDS
        with progress(total, "images", "extract") as bar:
            while pending:
                skipped = self._extract(pending, cache, bar)
                if len(skipped) < len(pending):
                    end = time.monotonic() + 2 * LEASE_SECONDS
                # An actor that ended has claimed a shard of a shared folder for some time.
                pending = [shard for shard in skipped if not shard.path.exists()]
                if pending and time.monotonic() > end:
                    break  # another extraction writes these shards
                time.sleep(WAIT_SECONDS if pending else 0)
        return bar

    def _extract(self, shards: Sequence[Shard], cache: Path, bar: Progress) -> list[Shard]:
        """Give each free actor a shard until all are done. Returns the shards it did not write."""
        waiting, skipped = list(reversed(shards)), []
        free = list(self.actors)
        running: dict[Any, Any] = {}  # the actor of each task
        while waiting or running:
            while waiting and free:
                actor = free.pop()
                running[actor.extract.remote(waiting.pop(), cache)] = actor
            (done,), _ = self.ray.wait(list(running), num_returns=1)
            free.append(running.pop(done))
            shard, written = self._get(done)
            bar.step(len(shard.images) if written else 0)
            if not written:
                skipped.append(shard)
        return skipped

    def _get(self, references: Any) -> Any:
        """Return the results of tasks. A user's mistake in a task is raised as in one process.

        Raises UserError if an actor cannot start.
        """
        try:
            return self.ray.get(references)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError | DataError | ModelError | OSError):
                raise error.cause from error
            raise
        except self.ray.exceptions.RayActorError as error:
            lines = str(error).strip().splitlines()
            raise UserError(
                f"an actor of the Ray cluster could not start: {lines[-1].strip()[:300]}; the logs "
                "of Ray on that machine have the details"
            ) from error


def import_ray() -> Any:
    """Return the package ray. Raises UserError with the install line if it is absent."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError(f"--engine ray needs a package: {INSTALL}") from error
    return ray
