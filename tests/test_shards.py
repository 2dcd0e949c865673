"""Caches that nothing can spoil: kills, full disks, flipped bytes, two writers; and how they are
checked, mended and packed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from data import DataError
from data.cache import claims as claiming
from data.cache import writer as shards
from data.cache.claims import Claims
from data.cache.reader import FeatureCache, Rows, packed_backbone, shard_paths
from data.cache.writer import plan_retry, plan_shards, stamp, verify_shard, write_shard
from pipeline.cli import UserError
from pipeline.extraction import maintenance as keeping
from pipeline.runtime import Machine
from tests.processes import begin, command

# fixtures
from tests.test_features import IDENTITY, some_images, write_plan

CPU = torch.device("cpu")

ROOT = Path(__file__).resolve().parents[1]


# -------------------------------------------------------------------------------------------- kills


def kill(photographs: Path, work: Path, *options: object) -> str:
    said = work / "said.txt"
    asked = [str(part) for part in (photographs, work, *options)]
    process = begin(command, "tests.kill_extraction", asked, said=said)
    process.join()
    assert process.exitcode == 0, said.read_text()
    return said.read_text()


def test_kills_at_random_moments_leave_whole_shards_and_the_same_cache(tmp_path, real):
    told = kill(
        real / "flickr8k" / "images", tmp_path, "--kills", 2, "--limit", 60, "--shard-images", 15
    )
    assert "killed 2 times" in told and "two runs at once into one folder: the same cache" in told


@pytest.mark.slow
def test_more_kills_leave_whole_shards_and_the_same_cache(tmp_path, real):
    assert "killed 5 times" in kill(
        real / "flickr8k" / "images", tmp_path, "--kills", 5, "--limit", 200, "--shard-images", 40
    )


KILLS = int(os.environ.get("ONCEOVER_KILLS", 12))


@pytest.mark.slow
def test_many_kills_leave_whole_shards_and_the_same_cache(tmp_path, real):
    """ONCEOVER_KILLS says how many; 50 take some minutes."""
    assert f"killed {KILLS} times" in kill(
        real / "flickr8k" / "images", tmp_path, "--kills", KILLS, "--limit", 30 * KILLS
    )


# ------------------------------------------------------------------------------------------- claims


@pytest.fixture
def shard(tmp_path, small_shards):
    return plan_shards(some_images(3), tmp_path)[0]


def claim_of(shard) -> Path:
    return shard.path.with_name(f".{shard.path.stem}.claim")


def test_one_of_two_processes_gets_a_shard_and_gives_it_back(shard):
    with Claims(shard.path.parent) as one, Claims(shard.path.parent) as two:
        assert one.take(shard) and not two.take(shard)
        one.release(shard.path)
        assert two.take(shard)
    assert not claim_of(shard).exists()


def test_a_finished_shard_is_taken_by_nobody(shard):
    shard.path.write_text("")
    with Claims(shard.path.parent) as claims:
        assert not claims.take(shard) and not claim_of(shard).exists()


def test_the_claim_of_a_dead_process_is_taken_over_and_its_scraps_removed(shard):
    run = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    )
    with Claims(shard.path.parent) as claims:
        record = {**claims.own_record, "pid": int(run.stdout)}
        for left in (
            record,
            {**claims.own_record, "start": "1"},
        ):  # dead; and its number given to another process since
            claim_of(shard).write_text(json.dumps(left))
            scrap = shard.path.with_name(f".{shard.path.name}.{run.stdout.strip()}.tmp")
            scrap.write_text("half")
            assert claims.take(shard) and not scrap.exists()
            claims.release(shard.path)
        claim_of(shard).write_text(json.dumps(claims.own_record))
        assert not claims.take(shard)  # alive


@pytest.mark.parametrize("content", [json.dumps({"host": "elsewhere", "pid": 1, "start": "1"}), ""])
def test_a_claim_from_elsewhere_is_taken_over_after_two_minutes_of_silence(shard, content):
    claim_of(shard).write_text(content)
    with Claims(shard.path.parent) as claims:
        assert not claims.take(shard)
        then = time.time() - 119
        os.utime(claim_of(shard), (then, then))
        assert not claims.take(shard)
        os.utime(claim_of(shard), (then - 3, then - 3))
        assert claims.take(shard)
    assert socket.gethostname() in claims.own_record["host"]
    assert not list(shard.path.parent.glob(".*"))


def test_a_claim_is_touched_while_it_is_held(shard, monkeypatch):
    monkeypatch.setattr(claiming, "TOUCH_SECONDS", 0.05)
    begun = shard.path.with_name("begun")
    with Claims(shard.path.parent) as claims:
        assert claims.take(shard)
        os.utime(claim_of(shard), (1, 1))
        begun.touch()
        until = time.monotonic() + 60
        while claim_of(shard).stat().st_mtime == 1 and time.monotonic() < until:
            time.sleep(0.02)
        assert claim_of(shard).stat().st_mtime >= begun.stat().st_mtime


def kill_in_claims(folder: Path, images: list, line: int) -> None:
    """Take and release a shard; killed at the given line of data/cache/claims.py, by order."""
    shard, passed = plan_shards(images, folder)[0], itertools.count()

    def trace(frame, *_):
        if frame.f_code.co_filename == claiming.__file__ and next(passed) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    claims = Claims(folder)
    sys.settrace(trace)
    claims.take(shard)
    claims.release(shard.path)


@pytest.mark.slow
def test_a_process_killed_at_any_line_of_a_claim_leaves_the_shard_to_the_next(tmp_path):
    images, killed = some_images(3), []
    for line in itertools.count():
        folder = tmp_path / str(line)
        folder.mkdir()
        process = begin(kill_in_claims, folder, images, line, said=tmp_path / "said.txt")
        process.join()
        killed.append(process.exitcode == -signal.SIGKILL)
        assert killed[-1] or process.exitcode == 0, (tmp_path / "said.txt").read_text()
        with Claims(folder) as claims:
            assert claims.take(plan_shards(images, folder)[0]), f"killed at event {line}"
        assert all(path.suffix == ".tmp" for path in folder.iterdir())  # swept later
        if not killed[-1]:
            break
    assert len(killed) > 30


# --------------------------------------------------------------------------------------- full disks


def whole_rows(shard) -> tuple:
    n = len(shard.images)
    features = np.ones((n, 4, 3), np.float16)
    return (
        [Rows(features, np.zeros((n, 4, 4), np.float32), np.full(n, 4))],
        np.ones((n, 2)),
        [],
        IDENTITY,
        {},
    )


def test_a_full_disk_is_a_plain_error_and_leaves_what_was_there(tmp_path, small_shards):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here (it takes root)")
    try:
        one, two = plan_shards(some_images(20), folder)
        write_shard(one, one.images, *whole_rows(one))
        before = one.path.read_bytes()
        (folder / "filler").write_bytes(b"x" * (260_000 - len(before)))
        large = np.ones((10, 4, 3000), np.float16)
        with pytest.raises(OSError) as error:
            write_shard(
                two,
                two.images,
                [whole_rows(two)[0][0]._replace(features=large)],
                *whole_rows(two)[1:],
            )
        assert error.value.errno == errno.ENOSPC and "shard-00001.h5" in error.value.filename
        assert (
            one.path.read_bytes() == before
            and not two.path.exists()
            and not list(folder.glob(".*tmp"))
        )
    finally:
        subprocess.run(["umount", folder], check=True)


# ------------------------------------------------------------------------------- checked and mended


def test_a_cache_as_written_has_nothing_wrong(cache):
    assert [verify_shard(path) for path in shard_paths(cache)] == [[]] * 4


def test_a_flipped_byte_of_a_row_is_named_by_shard_row_and_image(cache):
    path = cache / "shard-00001.h5"
    with h5py.File(path) as file:
        at = file["features"].id.get_offset() + 3 * 4 * 3 * 2 + 5
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    (problem,) = verify_shard(path)
    assert "shard-00001.h5: row 3, image 13 (photos/13.jpg), is not as it was written" in problem


@pytest.mark.parametrize(
    "name", ["boxes", "counts", "image_ids", "sizes", "names", "provenance", "unreadable"]
)
def test_a_change_in_any_table_or_attribute_is_found(cache, name):
    path = cache / "shard-00002.h5"
    with h5py.File(path, "r+") as file:
        if name in file.attrs:
            file.attrs[name] = file.attrs[name].replace("2", "3") if name == "provenance" else "[1]"
        else:
            file[name][1] = "photos/x.jpg" if name == "names" else file[name][1] + 1
    assert any("not as they were written" in line for line in verify_shard(path))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "older format", "foreign HDF5"])
def test_what_is_no_whole_shard_is_told_not_raised(cache, damage):
    path = cache / "shard-00001.h5"
    if damage == "foreign HDF5":
        path.unlink()
        with h5py.File(path, "w") as file:
            file.attrs["format"] = 1
    elif damage == "older format":
        with h5py.File(path, "r+") as file:
            file.attrs["format"] = 0
    else:
        path.write_bytes(
            {"truncated": path.read_bytes()[:-20], "empty": b"", "text": b"not HDF5"}[damage]
        )
    (problem, *_) = verify_shard(path)
    assert "shard-00001.h5" in problem


# --------------------------------------------------------------------------------- unreadable again


def test_only_unreadable_photographs_that_changed_are_tried_again(tmp_path, small_shards):
    photos = tmp_path / "photos"
    photos.mkdir()
    images = [
        image.__class__(image.id, image.name, photos / f"{image.id}.jpg", "train", ())
        for image in some_images(12)
    ]
    for image in images:
        image.path.write_text("broken")
    folder = tmp_path / "cache"
    folder.mkdir()
    for shard in plan_shards(images, folder):
        lost = [
            shards.Unreadable(i.id, i.name, "broken", *stamp(i.path))
            for i in shard.images
            if i.id in (3, 11)
        ]
        kept = [image for image in shard.images if image.id not in (3, 11)]
        rows = whole_rows(shards.Shard(shard.path, shard.plan, tuple(kept)))
        write_shard(shard, kept, *rows[:2], lost, IDENTITY, {})
    assert plan_retry(images, folder, every=False) == []
    assert [[i.id for i in shard.images] for shard in plan_retry(images, folder, every=True)] == [
        [3, 11]
    ]
    images[11].path.write_text("mended")
    (again,) = plan_retry(images, folder, every=False)
    assert [i.id for i in again.images] == [11] and again.path.name == "shard-00002.h5"
    write_shard(again, again.images, *whole_rows(again))
    assert list(FeatureCache(folder).unreadable) == [3] and 11 in FeatureCache(folder)
    assert plan_retry(images, folder, every=False) == []
    assert len(plan_shards(images, folder)) == 2  # the first plan stands


# ------------------------------------------------------------------------------------------- packed


def test_a_packed_file_reads_as_its_cache_and_in_plain_h5py(cache, tmp_path):
    (cache / "backbone.safetensors").write_bytes(b"weights")
    shards.pack(FeatureCache(cache), tmp_path / "out" / "packed.h5")
    packed = FeatureCache(tmp_path / "out" / "packed.h5")
    assert packed.ids.tolist() == list(range(35)) and packed.identity == IDENTITY
    for one, two in zip(packed.rows(range(35)), FeatureCache(cache).rows(range(35)), strict=True):
        assert np.array_equal(one, two)
    assert packed_backbone(tmp_path / "out" / "packed.h5") == b"weights"
    assert verify_shard(tmp_path / "out" / "packed.h5") == []
    with h5py.File(tmp_path / "out" / "packed.h5") as file:
        assert file["features"].chunks is None and file["names"].asstr()[34] == "photos/34.jpg"
    with pytest.raises(DataError, match="already exists"):
        shards.pack(FeatureCache(cache), tmp_path / "out" / "packed.h5")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["packed.h5"]


def test_features_h5_stands_for_the_cache_that_it_lies_in(cache):
    assert FeatureCache(cache / "features.h5").rows([3, 30]).features.shape == (2, 4, 3)


def test_an_image_in_two_shards_is_packed_once(tmp_path, small_shards):
    folder = tmp_path / "cache"
    write_plan(folder, some_images(10))
    shutil.copy(folder / "shard-00000.h5", folder / "shard-00001.h5")
    shards.pack(FeatureCache(folder), tmp_path / "packed.h5")
    assert FeatureCache(tmp_path / "packed.h5").ids.tolist() == list(range(10))


# ------------------------------------------------------------------------------------ several plans


def test_images_of_a_smaller_plan_whose_shard_is_gone_get_one_of_their_own(tmp_path, small_shards):
    folder, images = tmp_path / "cache", some_images(35)
    write_plan(folder, images[:15])
    write_plan(folder, images)
    assert sorted(FeatureCache(folder).ids.tolist()) == list(range(35))
    (folder / "shard-00000.h5").unlink()  # of the smaller plan, as --repair puts it aside
    write_plan(folder, images)
    assert sorted(FeatureCache(folder).ids.tolist()) == list(range(35))
    before = {path.name for path in shard_paths(folder)}
    write_plan(folder, images)
    assert {path.name for path in shard_paths(folder)} == before


def test_two_plans_that_begin_at_once_end_with_all_images(tmp_path, small_shards):
    """Both plan shard-00000 while the folder is empty; one is first with some, the other with the
    rest.
    """
    folder = tmp_path / "cache"
    folder.mkdir()
    plans = [plan_shards(some_images(25), folder), plan_shards(some_images(25, start=100), folder)]

    def write(shard) -> None:
        if not shard.path.exists():
            rows = (
                np.ones((len(shard.images), 4, 3))
                * np.array([i.id for i in shard.images])[:, None, None]
            )
            found = whole_rows(shard)[0][0]._replace(features=rows)
            write_shard(shard, shard.images, [found], *whole_rows(shard)[1:])

    for one, two in zip(*plans, strict=True):
        for shard in (one, two) if one.path.name != "shard-00001.h5" else (two, one):
            write(shard)
    for images in (some_images(25), some_images(25, start=100)):
        for _ in range(3):
            for shard in plan_shards(images, folder):
                write(shard)
    found = FeatureCache(folder)
    assert sorted(found.ids.tolist()) == [*range(25), *range(100, 125)]
    assert [
        int(row.flat[0]) for row in found.rows(found.ids.tolist()).features
    ] == found.ids.tolist()


def test_a_row_that_two_shards_have_stands_once_in_features_h5(tmp_path, small_shards):
    folder = tmp_path / "cache"
    write_plan(folder, some_images(20))
    shutil.copy(folder / "shard-00000.h5", folder / "shard-00002.h5")
    shards.write_index(folder)
    with h5py.File(folder / "features.h5") as file:
        assert sorted(file["image_ids"][:].tolist()) == list(range(20))
        assert [int(row.flat[0]) for row in file["features"][:]] == file["image_ids"][:].tolist()


def test_an_index_without_its_shards_is_refused_not_read_as_zeros(cache, tmp_path):
    shutil.copy(cache / "features.h5", tmp_path / "alone.h5")
    with pytest.raises(DataError, match="only points to shards"):
        FeatureCache(tmp_path / "alone.h5")
    assert "only points to shards" in verify_shard(tmp_path / "alone.h5")[0]


def test_what_killed_processes_left_beside_finished_work_is_swept(cache):
    (cache / ".shard-00001.claim").write_text("7")
    (cache / ".shard-00009.claim").write_text("7")
    (cache / ".old.tmp").write_text("")
    (cache / ".new.tmp").write_text("")
    os.utime(cache / ".old.tmp", (1, 1))
    claiming.sweep(cache)
    assert sorted(path.name for path in cache.glob(".*")) == [".new.tmp", ".shard-00009.claim"]


def test_a_packed_file_takes_no_name_of_a_shard_and_no_empty_cache(cache, tmp_path, small_shards):
    for name in ("shard-00099.h5", "features.h5"):
        with pytest.raises(DataError, match="another"):
            shards.pack(FeatureCache(cache), tmp_path / name)
    write_plan(tmp_path / "none", some_images(2), unreadable=(0, 1))
    with pytest.raises(DataError, match="no row to pack"):
        shards.pack(FeatureCache(tmp_path / "none"), tmp_path / "p.h5")


def test_a_claim_is_given_back_only_by_its_owner(shard):
    with Claims(shard.path.parent) as claims:
        assert claims.take(shard)
        claim_of(shard).write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "1"}))
        claims.release(shard.path)
        assert claim_of(shard).exists()


# ------------------------------------------------------------------------------------- file systems


def test_a_cache_is_written_and_read_without_locks(cache, small_shards):
    """A file system without locks answers each request for one with an error, as a taken lock
    does.
    """
    with contextlib.ExitStack() as stack:
        for path in shard_paths(cache):
            descriptor = os.open(path, os.O_RDWR)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert len(FeatureCache(cache)) == 35
        assert [verify_shard(path) for path in shard_paths(cache)] == [[]] * 4
        shards.write_index(cache)
        shards.pack(FeatureCache(cache), cache / "packed.h5")
        assert len(plan_shards(some_images(35), cache)) == 4


def unreadable_file(path: Path, how: str) -> None:
    """Put something in place of a file that the system does not let be read."""
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "an I/O error":
        path.symlink_to("/proc/self/mem")  # the kernel answers EIO where nothing is mapped
    else:
        path.symlink_to("loop.h5")
        path.with_name("loop.h5").symlink_to(path.name)


@pytest.mark.parametrize("how", ["a folder", "an I/O error", "a loop of links"])
def test_a_file_that_cannot_be_read_is_not_called_bad_and_nothing_is_put_aside(cache, how):
    path, other = cache / "shard-00001.h5", cache / "shard-00002.h5"
    unreadable_file(path, how)
    content = bytearray(other.read_bytes())
    content[-100] ^= 1
    other.write_bytes(content)
    with pytest.raises(OSError):
        verify_shard(path)
    before = sorted(file.name for file in cache.iterdir())
    for step in (
        keeping.verify_cache,
        lambda cache: keeping.repair_cache(cache, Machine(CPU, "fp32", 0, 1)),
    ):
        with pytest.raises(
            UserError,
            match=r"1 of 4 files could not be read.*shard-00001.h5: .*Nothing was changed",
        ):
            step(cache)
        assert sorted(file.name for file in cache.iterdir()) == before
    assert other.read_bytes() == content


@pytest.mark.parametrize("at", range(8))
def test_a_read_error_while_a_shard_is_checked_is_no_damage(cache, monkeypatch, at):
    """HDF5 sees broken content from some byte on; a plain read then tells that the file system does
    not answer.
    """
    path = cache / "shard-00001.h5"
    content = path.read_bytes()
    kept = len(content) * at // 8
    path.write_bytes(content[:kept] + bytes(len(content) - kept))
    assert verify_shard(path)  # bad, where all bytes can be read

    class Failing(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(shards, "open", lambda name, *_, **__: Failing(name), raising=False)
    with pytest.raises(
        UserError, match=r"1 of 4 files could not be read.*shard-00001.h5: .*Nothing was changed"
    ):
        keeping.verify_cache(cache)


def test_an_error_of_the_system_that_hdf5_reports_is_no_damage(cache, monkeypatch):
    def fail(*_):
        raise OSError(
            "Can't synchronously read data (file read failed: errno = 5, error message = "
            "'Input/output error')"
        )

    monkeypatch.setattr(shards, "_tables_crc32", fail)
    with pytest.raises(OSError, match=r"shard-00001\.h5") as found:
        verify_shard(cache / "shard-00001.h5")
    assert found.value.errno == errno.EIO


def test_a_shard_of_a_newer_version_is_not_put_aside(cache):
    with h5py.File(cache / "shard-00001.h5", "r+") as file:
        file.attrs["format"] = 2
    with pytest.raises(DataError, match="made by a newer version"):
        keeping.repair_cache(cache, Machine(CPU, "fp32", 0, 1))
    assert (cache / "shard-00001.h5").exists()


def test_a_second_repair_keeps_what_the_first_put_aside(cache):
    path = cache / "shard-00001.h5"
    for content in (b"first", b"second", b"third"):
        path.write_bytes(content)
        keeping.repair_cache(cache, Machine(CPU, "fp32", 0, 1))
    kept = sorted(file.name for file in cache.glob("*.bad*"))
    assert kept == [f"shard-00001.h5.{end}" for end in ("bad", "bad2", "bad3")]
    assert [(cache / name).read_bytes() for name in kept] == [b"first", b"second", b"third"]


@pytest.mark.parametrize("name", ["features", "boxes", "counts", "image_ids", "names"])
@pytest.mark.parametrize("damage", ["absent", "another shape", "a group"])
def test_a_shard_whose_tables_are_not_as_written_is_one_plain_error(cache, name, damage):
    path = cache / "shard-00001.h5"
    with h5py.File(path, "r+") as file:
        values = file[name][:]
        del file[name]
        if damage == "another shape":
            file[name] = np.zeros((len(values), 7), np.float32)
        elif damage == "a group":
            file.create_group(name)
    with pytest.raises(DataError, match=r"shard-00001.h5"):
        FeatureCache(cache)
    assert verify_shard(path)
