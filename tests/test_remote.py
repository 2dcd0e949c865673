"""Remote roots and caches: memory:// in one process, a local HTTP server, and a local S3 server."""

from __future__ import annotations

import functools
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data import DataError, remote
from data.cache.outputs import open_output
from data.cache.reader import FeatureCache, shard_paths
from data.datasets.registry import open_source
from data.remote import Blob, FetchError, as_path, copy_folder, main
from data.sources import Listing
from pipeline import extract, train
from tests.s3_server import BUCKET, s3_server
from tests.test_commands import LOOK, refused, works
from tests.test_images import halves

fsspec = pytest.importorskip("fsspec", reason="the package fsspec is absent")
pytest.importorskip("upath", reason="the package universal_pathlib is absent")


@pytest.fixture
def memory() -> Iterator[object]:
    """An empty memory:// store."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """A folder of 25 photographs in two folders, one of them broken, with a COCO caption file."""
    root = tmp_path_factory.mktemp("coco")
    entries = []
    for n in range(25):
        name = f"{'ab'[n % 2]}/photo {n:02d}.png"
        (root / name).parent.mkdir(exist_ok=True)
        halves(40 + n, 30).save(root / name)
        entries.append({"id": n, "file_name": name})
    (root / "a" / "photo 04.png").write_text("broken")
    captions = [{"id": n, "image_id": n, "caption": f"photo {n}"} for n in range(25)]
    (root / "captions.json").write_text(json.dumps({"images": entries, "annotations": captions}))
    return root


def options(root: object, out: object, *more: object) -> list[object]:
    annotations = ["--annotations", f"{root}/captions.json"]
    return ["--dataset", "coco", "--root", root, *annotations, *LOOK, "--out", out, *more]


@pytest.fixture
def local(coco, tmp_path, small_shards) -> Path:
    """The local cache of the local photographs: what every remote cache must equal."""
    works(extract.main, *options(coco, tmp_path / "local"))
    return tmp_path / "local"


def upload(fs, folder: Path, target: str) -> None:
    fs.put(f"{folder}/", target, recursive=True)


def same_shards(local: Path, copy: Path) -> None:
    """Every shard has the same bytes, and the features of the cache are the same."""
    names = [path.name for path in shard_paths(local)]
    assert [path.name for path in shard_paths(copy)] == names and len(names) == 3
    for name in names:
        assert (local / name).read_bytes() == (copy / name).read_bytes(), name
    same_rows(local, copy)
    assert list(FeatureCache(copy).unreadable) == [4]


def same_rows(local: Path, copy: Path) -> None:
    one, two = FeatureCache(local), FeatureCache(copy)
    assert one.ids.tolist() == two.ids.tolist()
    assert list(one.unreadable) == list(two.unreadable)
    assert np.array_equal(one.rows(one.ids).features, two.rows(one.ids).features)


# ---------------------------------------------------------------------------------------- reading


def test_photographs_and_captions_are_read_from_a_remote_root(coco, local, memory, tmp_path):
    upload(memory, coco, "/coco/")
    works(extract.main, *options("memory://coco", tmp_path / "cache"))
    one, two = FeatureCache(local), FeatureCache(tmp_path / "cache")
    assert one.ids.tolist() == two.ids.tolist()
    assert np.array_equal(one.rows(one.ids).features, two.rows(one.ids).features)
    assert list(two.unreadable) == [4] and "not an image" in two.unreadable[4].reason


def test_every_reader_of_remote_files_reads_as_from_a_folder(coco, memory):
    upload(memory, coco, "/coco/")
    for dataset, files in (
        ("folder", {}),
        ("coco", {"annotations": "captions.json"}),
    ):
        sources = [
            open_source(dataset, root, *(f"{root}/{file}" for file in files.values()))
            for root in (str(coco), "memory://coco")
        ]
        one, two = ([(i.id, i.name, i.split, i.captions) for i in s.images] for s in sources)
        assert one == two and len(one) == 25 and sources[0].notes == sources[1].notes


def test_karpathy_and_the_official_layout_are_read_from_a_remote_root(memory, world, tmp_path):
    upload(memory, world / "sample", "/sample/")
    for dataset in ("karpathy", "folder"):
        local, there = (
            open_source(dataset, root) for root in (world / "sample", "memory://sample")
        )
        assert [i.name for i in local.images] == [i.name for i in there.images]
        assert local.missing == there.missing == () and local.digest == there.digest


def test_a_listing_is_one_request_per_folder(coco, memory, monkeypatch):
    upload(memory, coco, "/coco/")
    requests = []
    kind, listed = type(memory), type(memory).ls
    for method in ("info", "exists", "isfile", "isdir", "cat_file"):
        plain = getattr(kind, method)
        monkeypatch.setattr(
            kind,
            method,
            lambda *args, plain=plain, **kwargs: requests.append(args[1]) or plain(*args, **kwargs),
        )
    monkeypatch.setattr(
        kind, "ls", lambda *args, **kwargs: requests.append("ls") or listed(*args, **kwargs)
    )
    listing = Listing(as_path("memory://coco"))
    assert all(f"{'ab'[n % 2]}/photo {n:02d}.png" in listing for n in range(25))
    assert requests == ["ls", "ls"]


def test_a_web_server_is_a_root(coco, local, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=coco)
    handler.log_message = lambda *_: None
    pytest.importorskip("aiohttp", reason="the package aiohttp is absent")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        works(extract.main, *options(root, tmp_path / "cache"))
        message = refused(extract.main, *options(root, f"{root}/cache"))
        server.shutdown()
    assert "files cannot be written by HTTP" in message
    same = FeatureCache(tmp_path / "cache")
    ids = FeatureCache(local).ids
    assert np.array_equal(FeatureCache(local).rows(ids).features, same.rows(ids).features)


def test_a_store_that_does_not_answer_ends_the_run_and_no_photograph_is_called_unreadable(
    coco, memory, monkeypatch, tmp_path, small_shards
):
    upload(memory, coco, "/coco/")
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0, 0))
    works(extract.main, *options("memory://coco", tmp_path / "cache", "--limit", 10))
    plain, calls = type(memory).cat_file, []

    def fail(self, path, **kwargs):
        calls.append(path)
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(memory), "cat_file", fail)
    message = refused(extract.main, *options("memory://coco", tmp_path / "cache"))
    assert "could not be transferred in 3 attempts: no answer" in message
    assert len(shard_paths(tmp_path / "cache")) == 1
    monkeypatch.setattr(type(memory), "cat_file", plain)
    works(extract.main, *options("memory://coco", tmp_path / "cache"))
    assert list(FeatureCache(tmp_path / "cache").unreadable) == [4]


def test_a_request_that_fails_once_is_repeated_and_an_absent_file_is_not(monkeypatch, memory):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0, 0))
    memory.pipe("/x/a.png", b"content")
    plain, calls = type(memory).cat_file, []

    def once(self, path, **kwargs):
        calls.append(path)
        if len(calls) == 1:
            raise TimeoutError
        return plain(self, path, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", once)
    assert Blob("memory://x/a.png").read_bytes() == b"content" and len(calls) == 2
    with pytest.raises(FileNotFoundError):
        Blob("memory://x/b.png").read_bytes()
    assert len(calls) == 3
    assert Blob("memory://x/a.png", "m", 2, 3).read_bytes() == b"nte"
    with pytest.raises(FetchError, match="2 bytes were read, not 3"):
        Blob("memory://x/a.png", "m", 5, 3).read_bytes()


def test_paths_that_are_not_remote_files_are_plain_errors(coco, memory, tmp_path, monkeypatch):
    run = ["--dataset", "coco2017", "--root", coco]
    message = refused(train.main, *run, "--features", "s3://bucket/cache")
    assert "takes a local path" in message and "python -m data.remote s3://bucket/cache" in message
    message = refused(extract.main, *options("memory://nowhere", tmp_path / "c"))
    assert "memory://nowhere is not a folder" in message
    assert "unknown://x cannot be opened" in refused(extract.main, *options("unknown://x", "c"))
    message = refused(extract.main, "--dataset", "vqa", "--root", "memory://coco")
    assert "--dataset vqa reads local files only" in message
    for option in ("--repair", "--pack"):
        more = [option, tmp_path / "p.h5"] if option == "--pack" else [option]
        message = refused(extract.main, *options(coco, "memory://cache", *more))
        assert "copy it first: python -m data.remote memory://cache cache" in message
    monkeypatch.setitem(__import__("sys").modules, "upath", None)
    message = refused(extract.main, *options("memory://coco", tmp_path / "c"))
    assert "pip install -e '.[remote]'" in message


# ---------------------------------------------------------------------------------------- writing


def test_a_remote_cache_has_the_same_shards_as_a_local_one(coco, local, memory, tmp_path):
    told = works(extract.main, *options(coco, "memory://cache"))
    assert "1 photograph has no row" in told and "python -m data.remote memory://cache" in told
    copy_folder("memory://cache", tmp_path / "copy")
    same_shards(local, tmp_path / "copy")
    lists = [folder / "unreadable.jsonl" for folder in (local, tmp_path / "copy")]
    assert lists[0].read_text() == lists[1].read_text()
    assert (tmp_path / "copy" / "backbone.safetensors").exists()
    with pytest.raises(DataError, match="already exists"):
        copy_folder("memory://cache", tmp_path / "copy")


@pytest.mark.parametrize("content", [b"", b"{", b"[5]", b'{"identity": 1, "provenance": 2}'])
def test_a_damaged_file_of_a_remote_cache_is_one_error_with_its_name(
    coco, memory, small_shards, content
):
    works(extract.main, *options(coco, "memory://cache"))
    (plan,) = (name for name in memory.find("/cache") if "plan-" in name)
    (unreadable,) = (name for name in memory.find("/cache") if name.endswith("0.unreadable.jsonl"))
    more = options(coco, "memory://cache", "--retry-unreadable", "--limit", 5)
    for name in ("/cache/cache.json", plan, unreadable):
        if name == unreadable and not content:
            continue  # an empty list is valid
        whole = memory.cat_file(name)
        memory.pipe_file(name, content)
        told = refused(extract.main, *more)
        assert f"memory://cache/{name.removeprefix('/cache/')} is damaged" in told
        memory.pipe_file(name, whole)
    short = io.BytesIO()
    np.save(short, np.arange(3))
    memory.pipe_file(plan, short.getvalue())
    assert "3 image ids for 3 shards" in refused(extract.main, *more)


def test_a_copy_appears_whole_or_not_at_all(memory, tmp_path, monkeypatch, capsys):
    for name in ("shard-00000.h5", "shard-00001.h5"):
        memory.pipe_file(f"/cache/{name}", b"rows")
    get_file = type(memory).get_file

    def broken(self, path, target, **options):
        if path.endswith("1.h5"):
            raise ConnectionError("the network is down")
        return get_file(self, path, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", broken)
        assert main(["memory://cache", str(tmp_path / "copy")]) == 2
    assert not any(tmp_path.iterdir())
    assert "memory://cache cannot be reached: the network is down" in capsys.readouterr().err
    (tmp_path / ".copy.part").mkdir()  # of a copy that was killed
    (tmp_path / ".copy.part" / "shard-00007.h5").touch()
    assert main(["memory://cache", str(tmp_path / "copy")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    assert len(shard_paths(tmp_path / "copy")) == 2
    for arguments in (["memory://none", "x"], ["here", "x"], ["memory://cache"]):
        assert main(arguments) == 2 and "Traceback" not in capsys.readouterr().err


def test_a_remote_extraction_continues_and_opens_no_shard(coco, local, memory, tmp_path):
    works(extract.main, *options(coco, "memory://cache"))
    memory.rm_file("/cache/shard-00001.h5")
    kept = {name: memory.modified(name) for name in memory.find("/cache") if "shard" in name}
    memory.store["/cache/shard-00000.h5"].seek(0)
    told = works(extract.main, *options(coco, "memory://cache"))
    assert "15 done; 10 rows" in told
    assert all(memory.modified(name) == then for name, then in kept.items())
    copy_folder("memory://cache", tmp_path / "copy")
    same_shards(local, tmp_path / "copy")
    assert "already extracted" in works(extract.main, *options(coco, "memory://cache"))


def test_each_rank_of_a_remote_extraction_writes_its_own_shards(
    coco, local, memory, monkeypatch, tmp_path
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in ((1, ["1"]), (0, ["0", "1", "2"])):
        monkeypatch.setenv("RANK", str(rank))
        works(extract.main, *options(coco, "memory://cache"))
        shards = sorted(name for name in memory.find("/cache") if name.endswith(".h5"))
        assert shards == [f"/cache/shard-0000{number}.h5" for number in expected]
    copy_folder("memory://cache", tmp_path / "copy")
    same_shards(local, tmp_path / "copy")


def test_more_photographs_and_tried_again_ones_get_shards_after_the_others(
    coco, memory, tmp_path, small_shards
):
    works(extract.main, *options(coco, "memory://cache", "--limit", 15))
    works(extract.main, *options(coco, "memory://cache"))
    output = open_output(as_path("memory://cache"))
    names = sorted(name for name in output.sizes() if name.endswith(".h5"))
    assert names == [f"shard-0000{number}.h5" for number in (0, 1, 3, 4)]
    photo = coco / "a" / "photo 04.png"
    broken = photo.read_bytes()
    try:
        halves().save(photo)
        assert "already extracted" in works(extract.main, *options(coco, "memory://cache"))
        told = works(extract.main, *options(coco, "memory://cache", "--retry-unreadable"))
        assert "24 done; 1 rows" in told and "no row" not in told
    finally:
        photo.write_bytes(broken)
    copy_folder("memory://cache", tmp_path / "copy")
    cache = FeatureCache(tmp_path / "copy")
    assert sorted(cache.ids.tolist()) == list(range(25)) and not cache.unreadable


def test_another_identity_and_foreign_shards_in_a_remote_cache_are_refused(coco, memory):
    works(extract.main, *options(coco, "memory://cache"))
    message = refused(extract.main, *options(coco, "memory://cache", "--grid", 1))
    assert "was extracted with other options (grid" in message
    memory.pipe("/other/shard-00000.h5", b"")
    message = refused(extract.main, *options(coco, "memory://other"))
    assert "shard-00000.h5, which this program did not upload" in message


def test_two_different_extractions_into_one_remote_cache_are_one_plain_error(
    coco, memory, monkeypatch
):
    from data.cache.outputs import RemoteOutput

    plain = RemoteOutput.existing

    def between(self, images, unreadable=False):
        existing = plain(self, images, unreadable)
        memory.pipe("/cache/plan-00000-1-other.npy", b"")  # of a run that began at the same time
        return existing

    monkeypatch.setattr(RemoteOutput, "existing", between)
    message = refused(extract.main, *options(coco, "memory://cache"))
    assert "another extraction writes memory://cache at the same time" in message
    assert [name for name in memory.find("/cache") if "plan" in name] == [
        "/cache/plan-00000-1-other.npy"
    ]


BEGIN = """
import sys
from data.cache import writer
from data.cache.outputs import RemoteOutput
from pipeline import extract
writer.SHARD_IMAGES = 10
release = RemoteOutput.release
def announced(self, path):
    print("upload", path.name, flush=True)
    release(self, path)
    sys.stdin.readline()  # the test kills the process here
RemoteOutput.release = announced
extract.main.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_extraction_into_s3_continues_to_the_same_cache(
    coco, local, tmp_path, monkeypatch
):
    with s3_server(monkeypatch):
        out = f"s3://{BUCKET}/caches/one"
        process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, *map(str, options(coco, out))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "upload shard-00000.h5\n"
        output = open_output(as_path(out))
        until = time.monotonic() + 60
        while "shard-00000.h5" not in output.sizes() and time.monotonic() < until:
            time.sleep(0.1)
        process.kill()
        process.wait()
        assert [name for name in output.sizes() if name.endswith(".h5")] == ["shard-00000.h5"]
        assert "10 done; 15 rows" in works(extract.main, *options(coco, out))
        copy_folder(out, tmp_path / "copy")
    same_shards(local, tmp_path / "copy")


@pytest.mark.slow
def test_photographs_and_tars_are_read_from_s3(coco, local, tmp_path, monkeypatch):
    pytest.importorskip("webdataset", reason="the package webdataset is absent")
    with s3_server(monkeypatch):
        fs = fsspec.filesystem("s3")
        upload(fs, coco, f"{BUCKET}/coco/")
        works(extract.main, *options(f"s3://{BUCKET}/coco", tmp_path / "cache"))
        same_rows(local, tmp_path / "cache")
        for number in range(2):
            with tarfile.open(tmp_path / f"{number:03d}.tar", "w") as tar:
                tar.add(coco / "ab"[number], arcname=".")
            fs.put_file(str(tmp_path / f"{number:03d}.tar"), f"{BUCKET}/tars/{number:03d}.tar")
        roots = [f"s3://{BUCKET}/tars/{{000..001}}.tar", f"s3://{BUCKET}/tars", tmp_path]
        for number, root in enumerate(roots):
            more = ["--dataset", "webdataset", "--root", root, *LOOK]
            works(extract.main, *more, "--out", tmp_path / f"tars-{number}")
    for number in (0, 1):
        same_rows(tmp_path / "tars-2", tmp_path / f"tars-{number}")
    assert len(FeatureCache(tmp_path / "tars-2")) == 24


def test_a_store_without_whole_uploads_gets_a_temporary_name_first(coco, local, tmp_path):
    works(extract.main, *options(coco, f"file://{tmp_path}/there"))
    same_shards(local, tmp_path / "there")
    assert not [path for path in (tmp_path / "there").iterdir() if path.suffix == ".tmp"]
