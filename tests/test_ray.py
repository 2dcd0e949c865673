"""`--engine ray`: a local cluster of two CPU workers, of which one is killed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import DataError
from data.cache.reader import shard_paths
from data.cache.writer import Shard
from data.datasets.registry import open_source
from data.remote import copy_folder
from models import ModelError
from pipeline import extract
from pipeline.cli import UserError
from pipeline.extraction import ray_engine
from pipeline.extraction.ray_engine import RayEngine, ShardActor
from tests.s3_server import BUCKET, s3_server
from tests.test_commands import LOOK, refused, works
from tests.test_images import halves
from tests.test_remote import same_rows  # skips this file where fsspec is absent

ray = pytest.importorskip("ray", reason="the package ray is absent")
PHOTOGRAPHS = 60  # in six shards


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for n in range(PHOTOGRAPHS):
        halves(40 + n % 50, 30 + n // 50).save(folder / f"{n:04d}.png")
    return folder


@pytest.fixture
def whole(photographs, tmp_path, small_shards) -> Path:
    """The cache of a run in one process, in shards of ten."""
    works(extract.main, *options(photographs, tmp_path / "whole"))
    assert len(shard_paths(tmp_path / "whole")) == 6
    return tmp_path / "whole"


def options(root: Path, out: object, *more: object) -> list[object]:
    return [
        "--dataset",
        "folder",
        "--root",
        root,
        *LOOK,
        "--precision",
        "fp32",
        "--out",
        out,
        *more,
    ]


def start_cluster() -> None:
    """Start a cluster of two CPUs. On a busy machine, a start may take longer than Ray waits."""
    for attempt in range(4):
        try:
            ray.init(
                num_cpus=2,
                num_gpus=0,
                object_store_memory=80 << 20,
                include_dashboard=False,
                logging_level="error",
                log_to_driver=False,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
            )
            return
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == 3:
                raise


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    start_cluster()
    try:
        yield
    finally:
        ray.shutdown()


def kill_one_actor(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kill the process of an actor after the first of six shards; returns the list of its pid."""
    killed: list[int] = []
    plain_check, plain_get = ray_engine.RayEngine.check_identity, ray_engine.RayEngine._get
    pids: list[int] = []

    def check_identity(self, identity):
        provenance = plain_check(self, identity)
        pids.append(ray.get(self.actors[0].__ray_call__.remote(lambda _: os.getpid())))
        return provenance

    def get(self, references):
        result = plain_get(self, references)
        if pids and not killed:
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])
        return result

    monkeypatch.setattr(ray_engine.RayEngine, "check_identity", check_identity)
    monkeypatch.setattr(ray_engine.RayEngine, "_get", get)
    return killed


@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_the_shards_equal_those_of_one_process(
    photographs, whole, tmp_path, monkeypatch
):
    killed = kill_one_actor(monkeypatch)
    with cluster():
        told = works(
            extract.main, *options(photographs, tmp_path / "c", "--engine", "ray", "--workers", 2)
        )
    assert killed and "2 actors with one CPU each" in told and "complete" in told
    for path in shard_paths(whole):
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()
    assert (tmp_path / "c" / "features.h5").exists()


@pytest.mark.slow
def test_ray_writes_a_cache_in_s3_without_a_shared_folder(
    photographs, whole, tmp_path, monkeypatch
):
    killed = kill_one_actor(monkeypatch)
    with s3_server(monkeypatch), cluster():
        out = f"s3://{BUCKET}/cache"
        more = ["--engine", "ray", "--workers", 2]
        works(extract.main, *options(photographs, out, *more))
        copy_folder(out, tmp_path / "copy")
    assert killed
    for path in shard_paths(whole):
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()
    same_rows(whole, tmp_path / "copy")


def test_ray_without_its_package_or_with_torchrun_is_a_plain_error(tmp_path, monkeypatch):
    halves().save(tmp_path / "a.png")
    more = options(tmp_path, tmp_path / "cache", "--engine", "ray")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "without torchrun" in refused(extract.main, *more)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert "pip install -e '.[ray]'" in refused(extract.main, *more)


def test_a_photograph_that_an_actors_machine_lacks_ends_the_run(photographs, tmp_path, monkeypatch):
    """It is not listed as unreadable, because the command has found it."""
    monkeypatch.chdir(tmp_path)
    images = tuple(open_source("folder", photographs).images[:3])
    shard = Shard(tmp_path / "cache" / "shard-00000.h5", {}, images)
    recipe = SimpleNamespace(missing=frozenset({images[1].id}))
    actor = ShardActor(lambda machine, workers: recipe, "cpu", 0, "fp32", 1, photographs)
    assert Path.cwd() == photographs  # relative paths are those of the command
    ShardActor(lambda machine, workers: recipe, "cpu", 0, "fp32", 1, tmp_path / "none")
    elsewhere = [replace(image, path=tmp_path / image.name) for image in images]
    absent = replace(shard, images=(images[0], *elsewhere[1:]))
    with pytest.raises(UserError, match=r"0002.png is not on the machine .* \(1 of 3"):
        actor.extract(absent, tmp_path / "cache")
    monkeypatch.setattr(ray_engine, "extract_shards", lambda shards, *_: shards)
    (tmp_path / "cache").mkdir()
    assert actor.extract(replace(absent, images=images), tmp_path / "cache")[1]


@pytest.mark.parametrize("mistake", [UserError, DataError, ModelError, FileNotFoundError])
def test_a_mistake_in_an_actor_is_raised_as_in_one_process(mistake):
    class RayTaskError(Exception):
        cause = mistake("what and where")

    def get(_: object) -> None:
        raise RayTaskError

    engine = object.__new__(RayEngine)
    names = SimpleNamespace(RayTaskError=RayTaskError, RayActorError=KeyError)
    engine.ray = SimpleNamespace(get=get, exceptions=names)
    with pytest.raises(mistake, match="what and where"):
        engine._get([])
