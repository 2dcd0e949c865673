"""WebDataset tars: keys, captions, ids and splits, damaged tars, and the same rows as a folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data import DataError
from data.cache.reader import FeatureCache
from data.datasets import webdataset as reader
from data.datasets.registry import open_source
from data.remote import FetchError
from data.sources import image_id
from pipeline import extract
from tests.test_commands import LOOK, refused, works
from tests.test_images import halves

wds = pytest.importorskip("webdataset", reason="the package webdataset is absent")


def jpeg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    halves(90 + shade, 60).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three tars of three photographs each, with captions in .txt and .json."""
    for tar in range(3):
        files: dict[str, bytes | str] = {}
        for n in range(3):
            key = f"{tar}{n}"
            files |= {f"{key}.jpg": jpeg(10 * tar + n), f"{key}.txt": f"caption {key}\n"}
            files[f"{key}.json"] = json.dumps({"caption": f"caption {key}", "text": ["more"]})
        write_tar(tmp_path / "shards" / f"{tar:03d}.tar", files)
    return tmp_path / "shards"


def test_a_pattern_a_folder_and_a_tar_give_photographs_with_captions(shards):
    by_pattern = open_source("webdataset", shards / "{000..002}.tar")
    by_folder = open_source("webdataset", shards)
    assert by_pattern.images == by_folder.images and len(by_folder.images) == 9
    first = by_folder.images[0]
    assert (first.name, first.captions) == ("000.tar/00.jpg", ("caption 00", "more"))
    assert first.id == image_id("000.tar/00.jpg") and first.split == "train"
    assert first.path.read_bytes() == jpeg(0)
    assert len(open_source("webdataset", shards / "001.tar").images) == 3


def test_the_samples_are_those_of_the_package_webdataset(shards):
    expected = [
        (sample["__key__"], sample["jpg"])
        for sample in wds.WebDataset([str(p) for p in sorted(shards.iterdir())], shardshuffle=False)
    ]
    images = open_source("webdataset", shards).images
    assert [(i.name[8:-4], i.path.read_bytes()) for i in images] == expected


def test_the_rows_equal_those_of_the_same_photographs_in_a_folder(shards, tmp_path):
    names = {}
    for image in open_source("webdataset", shards).images:
        file = tmp_path / "folder" / image.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image.path.read_bytes())
        names[image.id] = image.name
    options = [*LOOK, "--batch", 4]
    for dataset, root in (("webdataset", shards), ("folder", tmp_path / "folder")):
        out = tmp_path / dataset
        works(extract.main, "--dataset", dataset, "--root", root, *options, "--out", out)
    one, two = FeatureCache(tmp_path / "webdataset"), FeatureCache(tmp_path / "folder")
    assert one.ids.tolist() == two.ids.tolist() == list(names)
    assert np.array_equal(one.rows(one.ids).features, two.rows(one.ids).features)
    before = {path: path.stat().st_mtime_ns for path in one.paths}
    again = ["--dataset", "webdataset", "--root", shards / "{000..002}.tar", *options]
    told = works(extract.main, *again, "--out", tmp_path / "webdataset")
    assert "already extracted" in told
    assert f"--dataset webdataset --root '{shards}/{{000..002}}.tar'" in told.split("next: ")[1]
    assert before == {path: path.stat().st_mtime_ns for path in one.paths}


def test_ids_in_the_json_win_over_the_hash_of_the_name(tmp_path):
    files = {
        "a.jpg": jpeg(),
        "a.json": '{"image_id": 7, "id": 9}',
        "b.png": jpeg(),
        "b.json": '{"id": 8}',
        "c.JPG": jpeg(),
        "c.json": '{"id": "8", "key": "c"}',
    }
    images = open_source("webdataset", write_tar(tmp_path / "x.tar", files)).images
    assert [image.id for image in images] == [7, 8, image_id("x.tar/c.JPG")]


def test_keys_have_folders_and_end_at_the_first_dot(tmp_path):
    files = {
        "in/a.b/c.seg.png": jpeg(),
        "in/a.b/c.jpg": jpeg(),
        "in/a.b/c.txt": "one\n\ntwo",
        "in/c.txt": "of nothing",
        "nodot": "",
    }
    source = open_source("webdataset", write_tar(tmp_path / "x.tar", files))
    (image,) = source.images
    assert (image.name, image.captions) == ("x.tar/in/a.b/c.jpg", ("one", "two"))
    assert source.notes == (
        "1 files *.*.png of the tars are ignored: the key of a file ends at its first dot",
        "1 samples of the tars have no photograph and are ignored",
    )


def test_the_notes_do_not_repeat_the_names_of_files(tmp_path):
    files = {f"2024.05.{day:02d} beach.jpg": jpeg() for day in range(20)} | {"a.jpg": jpeg()}
    (note,) = open_source("webdataset", write_tar(tmp_path / "x.tar", files)).notes
    assert note.startswith("20 files *.*.jpg of the tars are ignored: the key")


def test_links_in_a_tar_are_counted(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg()})
    with tarfile.open(path, "a") as tar:
        for name, kind in (("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            tar.addfile(member)
        folder = tarfile.TarInfo("some.folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    source = open_source("webdataset", path)
    assert [image.name for image in source.images] == ["x.tar/a.jpg"]
    assert source.notes == ("2 entries of the tars are links or devices and are ignored",)


def test_splits_come_from_the_names_of_tars_and_folders(tmp_path):
    for name in ("train-0.tar", "val/0.tar", "flickr_test_0.tar"):
        write_tar(tmp_path / name, {"a.jpg": jpeg()})
    root = f"{tmp_path}/{{train-0,val/0,flickr_test_0}}.tar"
    assert [i.split for i in open_source("webdataset", root).images] == ["train", "val", "test"]
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg()})
    with pytest.raises(DataError, match=r"0.tar/a.jpg.*is in no split, others are in train"):
        open_source("webdataset", f"{tmp_path}/{{train-0,0}}.tar")


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.jpg": b"", "a.json": "{"}, r"x.tar/a.json is not JSON"),
        ({"a.jpg": b"", "a.json": "[1]"}, r"x.tar/a.json is not a JSON object"),
        ({"a.jpg": b"", "a.json": '{"caption": 3}'}, r"x.tar/a: the caption is 3, not a string"),
        ({"a.jpg": b"", "a.txt": b"\xff\xfe"}, r"x.tar/a.txt is not UTF-8 at byte 0"),
        ({"a.jpg": b"", "a.png": b""}, r"the key a has several photographs, a.jpg, a.png"),
        ({"../a.jpg": b""}, r"outside the root"),
        ({"a.txt": "alone"}, r"no images"),
    ],
)
def test_invalid_samples_are_one_plain_error(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        open_source("webdataset", write_tar(tmp_path / "x.tar", files))


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "gzip", "text", "absent"])
def test_a_damaged_tar_is_named(shards, damage):
    tar = shards / "001.tar"
    content = bytearray(tar.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 3]
    elif damage == "header":  # of the second file; tarfile alone takes it for the end
        size = 512 + -(-len(jpeg(10)) // 512) * 512
        content[size : size + 512] = b"\1" * 512
    elif damage == "gzip":
        import gzip

        content = bytearray(gzip.compress(bytes(content)))
    elif damage in ("text", "empty"):
        content = bytearray(b"not a tar" * 100 if damage == "text" else b"")
    tar.write_bytes(content)
    if damage == "absent":
        tar.unlink()
    message = refused(
        extract.main, "--dataset", "webdataset", "--root", shards / "{000..002}.tar", *LOOK
    )
    assert f"{tar}" in message and ("check --root" if damage == "absent" else "tar (") in message


def test_a_tar_is_read_once_until_it_changes(shards, monkeypatch):
    open_source("webdataset", shards)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "index_tar", lambda place: pytest.fail(f"{place} is read again"))
        assert len(open_source("webdataset", shards).images) == 9
    write_tar(shards / "001.tar", {"new.jpg": jpeg()})
    assert len(open_source("webdataset", shards).images) == 7


def test_a_tar_that_changes_while_it_is_extracted_ends_the_run(shards):
    images = open_source("webdataset", shards).images
    os.truncate(shards / "002.tar", images[-1].path.start + 10)
    with pytest.raises(FetchError, match=r"002.tar/22.jpg: 10 bytes were read"):
        images[-1].path.read_bytes()


def test_without_the_package_the_error_has_the_install_line(shards, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    message = refused(
        extract.main, "--dataset", "webdataset", "--root", shards / "{000..002}.tar", *LOOK
    )
    assert "pip install -e '.[webdataset]'" in message


def test_a_root_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match="gone: No such file or directory; check --root"):
        open_source("webdataset", tmp_path / "gone")
