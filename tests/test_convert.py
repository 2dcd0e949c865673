"""Features of other programs become an ordinary cache: each format, each fault, kills, memory.

The files are written here as their publishers describe them: bottom-up-attention
(tools/read_tsv.py), LXMERT, self-critical.pytorch (dataloader.py, scripts/make_bu_data.py),
bottom-up-attention.pytorch and openvqa (.npz), M2 Transformer (data/field.py) and hloc
(extract_features.py).
"""

from __future__ import annotations

import base64
import json
import os
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image as PillowImage

from data.cache import writer as shards
from data.cache.reader import FeatureCache, shard_paths
from data.cache.writer import verify_shard
from data.datasets.sample import draw_sample
from data.imports.listing import id_of_key
from data.sources import image_id
from pipeline import caption, convert, evaluate, export, extract, train
from pipeline.checkpoints.checkpoint import load_checkpoint
from tests.processes import begin
from tests.test_commands import QUICK, refused, run, works

C = 8
HEIGHT, WIDTH = 40, 50
IDS = (391895, 522418, 42)


class Photo:
    """Random regions of one image: features [R,C] float32, and boxes [R,4] in pixels."""

    def __init__(self, id_: int, regions: int = 3, channels: int = C) -> None:
        rng = np.random.default_rng(id_)
        self.id = id_
        self.features = rng.standard_normal((regions, channels)).astype(np.float32)
        x, y = rng.uniform(0, WIDTH, (regions, 2)), rng.uniform(0, HEIGHT, (regions, 2))
        x.sort(axis=1)
        y.sort(axis=1)
        self.boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1).astype(np.float32)

    @property
    def fractions(self) -> np.ndarray:
        return self.boxes / np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)


PHOTOS = [Photo(id_, regions) for id_, regions in zip(IDS, (3, 5, 1), strict=True)]


def encoded(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def tsv_line(photo: Photo, **changed: object) -> str:
    values = {
        "image_id": photo.id,
        "image_w": WIDTH,
        "image_h": HEIGHT,
        "num_boxes": len(photo.features),
        "boxes": encoded(photo.boxes),
        "features": encoded(photo.features),
    }
    return "\t".join(str(value) for value in (values | changed).values()) + "\n"


def write_tsv(folder: Path, photos: list[Photo] = PHOTOS) -> list:
    (folder / "bottom-up.tsv").write_text("".join(map(tsv_line, photos)))
    return [folder / "bottom-up.tsv"]


def write_lxmert(folder: Path) -> list:
    lines = []
    for photo in PHOTOS:
        name = f"COCO_val2014_{photo.id:012}"
        objects = encoded(np.zeros(len(photo.features), np.int64))
        values = (name, HEIGHT, WIDTH, *[objects] * 4, len(photo.features))
        values += encoded(photo.boxes), encoded(photo.features)
        lines.append("\t".join(map(str, values)) + "\n")
    (folder / "val2014_obj36.tsv").write_text("".join(lines))
    return [folder / "val2014_obj36.tsv"]


def write_sizes(folder: Path) -> Path:
    entries = [{"id": photo.id, "height": HEIGHT, "width": WIDTH} for photo in PHOTOS]
    (folder / "captions.json").write_text(json.dumps({"images": entries, "annotations": []}))
    return folder / "captions.json"


def write_cocobu(folder: Path) -> list:
    """The folders of self-critical.pytorch."""
    for part in ("att", "box"):
        (folder / f"cocobu_{part}").mkdir()
    for photo in PHOTOS:
        np.savez_compressed(folder / "cocobu_att" / str(photo.id), feat=photo.features)
        np.save(folder / "cocobu_box" / str(photo.id), photo.boxes)
    boxes = ["--boxes", folder / "cocobu_box", "--sizes", write_sizes(folder)]
    return [folder / "cocobu_att", *boxes]


def write_npy_pairs(folder: Path) -> list:
    arguments = write_cocobu(folder)
    (folder / "att").mkdir()
    for photo in PHOTOS:
        np.save(folder / "att" / f"{photo.id}.npy", photo.features)
    return [folder / "att", *arguments[1:]]


def write_bua(folder: Path) -> list:
    """One .npz per image, as bottom-up-attention.pytorch writes it."""
    (folder / "bua").mkdir()
    for photo in PHOTOS:
        np.savez_compressed(
            folder / "bua" / f"{photo.id}.npz",
            x=photo.features,
            bbox=photo.boxes,
            num_bbox=len(photo.boxes),
            image_h=HEIGHT,
            image_w=WIDTH,
            info=np.array({"image_id": photo.id}, object),  # a pickle, which is never read
        )
    return [folder / "bua"]


def write_openvqa(folder: Path) -> list:
    """openvqa's .npz: x is [C,R], and the names are those of the photographs."""
    (folder / "train2014").mkdir()
    for photo in PHOTOS:
        np.savez(
            folder / "train2014" / f"COCO_train2014_{photo.id:012}.jpg.npz",
            x=photo.features.T,
            bbox=photo.boxes,
            image_h=HEIGHT,
            image_w=WIDTH,
        )
    return [folder / "train2014"]


def write_lmdb(folder: Path) -> list:
    lmdb = pytest.importorskip("lmdb")
    (source,) = write_bua(folder)
    with (
        lmdb.open(str(folder / "bua.lmdb"), map_size=1 << 20) as database,
        database.begin(write=True) as transaction,
    ):
        for photo in PHOTOS:
            file = source / f"{photo.id}.npz"
            transaction.put(str(photo.id).encode(), file.read_bytes())
        transaction.put(b"__len__", b"3")
    return [folder / "bua.lmdb"]


def write_m2(folder: Path) -> list:
    with h5py.File(folder / "coco_detections.hdf5", "w") as file:
        for photo in PHOTOS:
            file[f"{photo.id}_features"] = photo.features
            file[f"{photo.id}_boxes"] = photo.boxes
            file[f"{photo.id}_cls_prob"] = np.zeros((len(photo.features), 4), np.float32)
    return [folder / "coco_detections.hdf5", "--sizes", write_sizes(folder)]


def write_groups(folder: Path) -> list:
    with h5py.File(folder / "groups.h5", "w") as file:
        for photo in PHOTOS:
            group = file.create_group(str(photo.id))
            group["features"], group["boxes"] = photo.features, photo.boxes
            group["image_size"] = np.array([WIDTH, HEIGHT])
    return [folder / "groups.h5"]


WRITERS = {
    name: function
    for name, function in (
        ("tsv", write_tsv),
        ("LXMERT's tsv", write_lxmert),
        ("cocobu", write_cocobu),
        ("npy pairs", write_npy_pairs),
        ("npz", write_bua),
        ("openvqa's npz", write_openvqa),
        ("lmdb", write_lmdb),
        ("M2's hdf5", write_m2),
        ("hdf5 groups", write_groups),
    )
}


# ------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_each_format_gives_the_same_rows(write: Callable[[Path], list], tmp_path):
    told = works(convert.main, *write(tmp_path), "--out", tmp_path / "cache")
    assert "3 images" in told and "up to 5 regions x 8, with boxes" in told
    cache = FeatureCache(tmp_path / "cache")
    assert cache.shape == (5, C) and sorted(cache.ids.tolist()) == sorted(IDS)
    for photo in PHOTOS:
        features, boxes, count = cache[photo.id]
        assert count == len(photo.features)
        assert np.array_equal(features[:count], photo.features.astype(np.float16))
        np.testing.assert_allclose(boxes[:count], photo.fractions, atol=1e-6)
        assert not features[count:].any() and not boxes[count:].any()
    assert cache.identity["regions"] == "imported" and cache.identity["channels"] == C
    works(extract.main, "--verify", tmp_path / "cache")
    assert "imported" in works(extract.main, "--inspect", tmp_path / "cache")
    works(extract.main, "--out", tmp_path / "cache", "--pack", tmp_path / "packed.h5")
    packed = FeatureCache(tmp_path / "packed.h5")
    for part, other in zip(cache.rows(IDS), packed.rows(IDS), strict=True):
        assert np.array_equal(part, other)
    with h5py.File(tmp_path / "cache" / "features.h5") as index:
        assert index["sizes"][:].tolist() == [[HEIGHT, WIDTH]] * 3


def test_hloc_files_have_points_as_boxes_or_one_region(tmp_path):
    """Local features are [C,R] with names that contain slashes; global ones are one vector."""
    keypoints = np.array([[10.0, 20.0], [30, 8], [-0.5, 39.5]], np.float32)
    descriptors = np.random.default_rng(0).standard_normal((C, 3)).astype(np.float16)
    with h5py.File(tmp_path / "feats.h5", "w", libver="latest") as file:
        for name in ("db/1.jpg", "query/night/1.jpg"):
            group = file.create_group(name)
            group["keypoints"], group["descriptors"] = keypoints, descriptors
            group["scores"] = np.ones(3)
            group["image_size"] = np.array([WIDTH, HEIGHT])
    works(convert.main, tmp_path / "feats.h5", "--out", tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    features, boxes, count = cache[image_id("query/night/1.jpg")]
    assert count == 3 and np.array_equal(features, descriptors.T)
    np.testing.assert_allclose(boxes[:2], [[0.2, 0.5, 0.2, 0.5], [0.6, 0.2, 0.6, 0.2]], atol=1e-6)
    assert boxes[2].tolist() == [0, np.float32(39.5 / 40), 0, np.float32(39.5 / 40)]

    with h5py.File(tmp_path / "global.h5", "w") as file:
        file.create_group("db/1.jpg")["global_descriptor"] = descriptors[:, 0]
    told = works(convert.main, tmp_path / "global.h5", "--out", tmp_path / "global")
    assert "up to 1 regions x 8, without boxes" in told
    features, boxes, count = FeatureCache(tmp_path / "global")[image_id("db/1.jpg")]
    assert count == 1 and features.tolist() == [descriptors[:, 0].tolist()]
    assert boxes.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("side", [7, 14])
def test_a_grid_is_flattened_row_by_row_and_has_its_cells_as_boxes(side, tmp_path):
    grid = np.random.default_rng(0).standard_normal((side, side, 20)).astype(np.float32)
    (tmp_path / "cocotalk_att").mkdir()
    np.savez_compressed(tmp_path / "cocotalk_att" / "42", feat=grid)
    np.savez_compressed(tmp_path / "cocotalk_att" / "43", feat=grid[None])
    works(convert.main, tmp_path / "cocotalk_att", "--out", tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    for id_ in (42, 43):
        features, boxes, count = cache[id_]
        assert count == side * side
        for row, column in ((0, 0), (2, 5), (side - 1, side - 1)):
            cell = row * side + column
            assert np.array_equal(features[cell], grid[row, column].astype(np.float16))
            edges = np.array([column, row, column + 1, row + 1]) / side
            np.testing.assert_allclose(boxes[cell], edges, atol=1e-6)
    assert cache.identity["boxes"] == "cells"


def test_fc_vectors_are_one_region(tmp_path):
    (tmp_path / "cocobu_fc").mkdir()
    for photo in PHOTOS:
        np.save(tmp_path / "cocobu_fc" / str(photo.id), photo.features[0])
    works(convert.main, tmp_path / "cocobu_fc", "--out", tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    assert cache.shape == (1, C)
    assert np.array_equal(cache[42].features[0], PHOTOS[2].features[0].astype(np.float16))


def test_several_sources_become_one_cache_as_the_published_tsv_files(tmp_path):
    files = [tmp_path / "karpathy_train.tsv.0", tmp_path / "karpathy_train.tsv.1"]
    for number, file in enumerate(files):
        file.write_text("".join(map(tsv_line, PHOTOS[number::2])))
    works(convert.main, *files, "--out", tmp_path / "cache")
    assert len(FeatureCache(tmp_path / "cache")) == 3
    header = FeatureCache(tmp_path / "cache").identity
    assert header["imported"] == "karpathy_train"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("391895", 391895),
        ("000000391895", 391895),
        ("val2014/COCO_val2014_000000391895", 391895),
        ("COCO_train2014_000000391895.jpg", 391895),
        ("VisualDialog_val2018_000000254080", 254080),
        ("1000268201_693b08cb0e", image_id("1000268201_693b08cb0e")),
        ("db/1.jpg", image_id("db/1.jpg")),
    ],
)
def test_an_id_is_the_number_of_the_name_or_a_hash(key, expected):
    assert id_of_key(key) == expected


def test_boxes_in_fractions_are_kept_and_boxes_can_be_left_out(tmp_path):
    (tmp_path / "bua").mkdir()
    for photo in PHOTOS:
        np.savez(tmp_path / "bua" / str(photo.id), features=photo.features, boxes=photo.fractions)
    source = tmp_path / "bua"
    told = refused(convert.main, source, "--out", tmp_path / "cache")
    assert "size of the image is unknown" in told and "--sizes" in told
    works(convert.main, source, "--box-unit", "fraction", "--out", tmp_path / "cache")
    boxes = FeatureCache(tmp_path / "cache")[IDS[0]].boxes
    np.testing.assert_allclose(boxes[:3], PHOTOS[0].fractions, atol=1e-6)
    told = works(convert.main, source, "--box-unit", "none", "--out", tmp_path / "none")
    assert "each region has the whole image as its box" in told
    assert FeatureCache(tmp_path / "none")[IDS[0]].boxes[:3].tolist() == [[0, 0, 1, 1]] * 3


# ----------------------------------------------------------------------------------------- datasets


def photograph_folder(folder: Path, names: list[str]) -> list:
    """A dataset of photographs of HEIGHT x WIDTH, one stored on its side with EXIF orientation."""
    folder.mkdir()
    for number, name in enumerate(names):
        exif = PillowImage.Exif()
        size = (WIDTH, HEIGHT)
        if number == 0:
            exif[0x0112], size = 6, (HEIGHT, WIDTH)
        PillowImage.new("RGB", size).save(folder / name, exif=exif)
    rows = [{"file_name": name, "text": "a photograph of something"} for name in names]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset", "folder", "--root", folder]


def test_a_dataset_gives_ids_by_file_name_and_sizes_from_the_photographs(tmp_path):
    at = photograph_folder(tmp_path / "photos", ["red.jpg", "Green.JPG", "blue.jpg"])
    (tmp_path / "feats").mkdir()
    for photo, name in zip(PHOTOS, ("red", "green", "blue"), strict=True):
        np.savez(tmp_path / "feats" / name, features=photo.features, boxes=photo.boxes)
    works(convert.main, tmp_path / "feats", *at, "--out", tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    for photo, name in zip(PHOTOS, ("red.jpg", "Green.JPG", "blue.jpg"), strict=True):
        assert cache.name_of(image_id(name)) == name
        count = len(photo.features)
        boxes = cache[image_id(name)].boxes[:count]
        np.testing.assert_allclose(boxes, photo.fractions, atol=1e-6)


def test_sizes_come_from_the_photographs_in_tars(tmp_path):
    pytest.importorskip("webdataset", reason="the package webdataset is absent")
    photograph_folder(tmp_path / "photos", ["red.jpg", "green.jpg", "blue.jpg"])
    (tmp_path / "photos" / "metadata.jsonl").unlink()
    (tmp_path / "feats").mkdir()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for photo, name in zip(PHOTOS, ("red", "green", "blue"), strict=True):
            np.savez(tmp_path / "feats" / name, features=photo.features, boxes=photo.boxes)
            tar.add(tmp_path / "photos" / f"{name}.jpg", f"{name}.jpg")
    at = ["--dataset", "webdataset", "--root", tmp_path / "0.tar"]
    works(convert.main, tmp_path / "feats", *at, "--out", tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    for photo, name in zip(PHOTOS, ("red", "green", "blue"), strict=True):
        boxes = cache[image_id(f"0.tar/{name}.jpg")].boxes[: len(photo.features)]
        np.testing.assert_allclose(boxes, photo.fractions, atol=1e-6)


def test_images_outside_the_dataset_are_counted_and_missing_ones_are_an_error(tmp_path):
    (source,) = write_tsv(tmp_path)
    entries = [
        {"filename": f"COCO_val2014_{id_:012}.jpg", "cocoid": id_, "split": split, "sentences": []}
        for id_, split in ((391895, "train"), (42, "train"), (7, "val"), (8, "test"))
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    at = ["--dataset", "karpathy", "--root", tmp_path, "--out", tmp_path / "cache"]
    told = refused(convert.main, source, *at)
    assert str(source) in told and "image 7 (" in told and "2 of 4 images" in told
    assert not (tmp_path / "cache").exists()
    told = works(convert.main, source, *at, "--split", "train")
    assert "1 images are left out" in told
    assert sorted(FeatureCache(tmp_path / "cache").ids.tolist()) == [42, 391895]
    assert "--root needs --dataset" in refused(convert.main, source, "--root", tmp_path)
    (tmp_path / "other.tsv").write_text(tsv_line(Photo(99)))
    assert "none of its 1 images" in refused(convert.main, tmp_path / "other.tsv", *at)


# ------------------------------------------------------------------------------------------- faults


def faulty_tsv(folder: Path, **changed: object) -> list:
    lines = [tsv_line(PHOTOS[0]), tsv_line(PHOTOS[1], **changed)]
    (folder / "faulty.tsv").write_text("".join(lines))
    return [folder / "faulty.tsv"]


def changed_features(value: float) -> str:
    features = PHOTOS[1].features.copy()
    features[4, 2] = value
    return encoded(features)


def changed_boxes(*box: float) -> str:
    boxes = PHOTOS[1].boxes.copy()
    boxes[1] = box
    return encoded(boxes)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"features": changed_features(np.nan)}, "region 4 has the value nan"),
        ({"features": changed_features(np.inf)}, "region 4 has the value inf"),
        ({"features": changed_features(70000)}, "70000, too large for float16 (at most 65504)"),
        ({"features": encoded(PHOTOS[1].features)[:-8]}, "which is no array of 5 rows"),
        ({"features": encoded(PHOTOS[1].features[:, :4])}, "4 channels; "),
        ({"features": "?" + encoded(PHOTOS[1].features)[1:]}, "not float32 in base64"),
        ({"boxes": encoded(PHOTOS[1].boxes[1:])}, "64 bytes, not 80 for 5 boxes"),
        ({"boxes": changed_boxes(10, 10, 70, 30)}, "box 1 is 10 10 70 30, not x0 y0 x1 y1 inside"),
        ({"boxes": changed_boxes(30, 10, 20, 30)}, "box 1 is 30 10 20 30"),
        ({"boxes": changed_boxes(np.nan, 10, 20, 30)}, "box 1 is nan 10 20 30"),
        ({"boxes": encoded(PHOTOS[1].fractions)}, "they seem to be fractions"),
        ({"num_boxes": "many"}, "num_boxes is 'many', not a number"),
        ({"num_boxes": 0}, "boxes has 80 bytes, not 0"),
        ({"image_w": 0}, "the size of the image is 0 x 40 pixels"),
    ],
)  # fmt: skip
def test_a_fault_in_a_tsv_file_is_one_error_with_its_line_and_id(changed, expected, tmp_path):
    told = refused(convert.main, *faulty_tsv(tmp_path, **changed), "--out", tmp_path / "cache")
    assert expected in told
    assert f"{tmp_path / 'faulty.tsv'}, line 2, image {IDS[1]}" in told
    assert not shard_paths(tmp_path / "cache")


def test_a_duplicate_missing_or_cut_id_is_one_error(tmp_path):
    told = refused(convert.main, *faulty_tsv(tmp_path, image_id=IDS[0]))
    assert "line 2, image 391895: the id is there twice, also in" in told and "line 1" in told
    told = refused(convert.main, *faulty_tsv(tmp_path, image_id=f"COCO_val2014_{IDS[0]:012}"))
    assert "the id is there twice" in told
    assert "line 2 has no image id" in refused(convert.main, *faulty_tsv(tmp_path, image_id=""))
    whole = (tmp_path / "faulty.tsv").read_bytes()
    (tmp_path / "cut.tsv").write_bytes(whole[:-9])
    assert "line 2, image" in refused(convert.main, tmp_path / "cut.tsv")
    (tmp_path / "cut.tsv").write_bytes(whole[: whole.rindex(b"\t")])
    assert "line 2 has 5 columns" in refused(convert.main, tmp_path / "cut.tsv")
    (tmp_path / "empty.tsv").touch()
    assert "no image found" in refused(convert.main, tmp_path / "empty.tsv")


FAULTY_ARRAYS = [
    (np.zeros((2, 3, 4, 5)), "shape (2, 3, 4, 5), not [channels]"),
    (np.zeros((20, 7, 7)), "channels first"),
    (np.zeros((3, 0)), "shape (3, 0)"),
    (np.zeros((3, C + 1)), f"{C + 1} channels; "),
    (np.zeros((40000, C), np.float16), "40,000 regions; a cache has at most 32,767"),
    (np.full((3, C), np.nan), "region 0 has the value nan"),
    (np.full((3, C), -1e6), "-1e+06, too large for float16"),
    (np.full((3, C), "a"), "type <U1, not real numbers"),
    (np.full((3, C), None), "cannot be read"),
]


@pytest.mark.parametrize(
    ("array", "expected"), FAULTY_ARRAYS, ids=[text for _, text in FAULTY_ARRAYS]
)
def test_a_faulty_array_is_one_error_with_its_file_and_id(array, expected, tmp_path):
    (tmp_path / "feats").mkdir()
    np.savez(tmp_path / "feats" / "1", feat=PHOTOS[0].features)
    np.savez(tmp_path / "feats" / "2", feat=array)
    with h5py.File(tmp_path / "feats.h5", "w") as file:
        file["1_features"] = PHOTOS[0].features
        if array.dtype.kind == "f":
            file["2_features"] = array
    told = refused(convert.main, tmp_path / "feats", "--out", tmp_path / "cache")
    assert expected in told and f"{tmp_path / 'feats' / '2.npz'}, image 2" in told
    if array.dtype.kind == "f":
        told = refused(convert.main, tmp_path / "feats.h5", "--out", tmp_path / "cache")
        assert expected in told and f"{tmp_path / 'feats.h5'}, 2_features, image 2" in told


@pytest.mark.parametrize("name", ["npz", "npy pairs", "M2's hdf5", "hdf5 groups"])
def test_a_file_cut_or_spoilt_anywhere_is_one_error_or_converted(name, tmp_path):
    source = WRITERS[name](tmp_path)[0]
    options = ["--box-unit", "none", "--out"]
    file = min(source.iterdir()) if source.is_dir() else source
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 6):
        file.write_bytes(whole[:place])
        assert str(file) in refused(convert.main, source, *options, tmp_path / "cache")
        spoilt = bytearray(whole)
        spoilt[place : place + 8] = rng.bytes(len(spoilt[place : place + 8]))
        file.write_bytes(spoilt)
        result = run(convert.main, source, *options, tmp_path / f"cache{place}")
        assert result.exit_code in (0, 2), result.output


def test_faulty_values_and_cut_files_of_lmdb_are_one_error(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    (source,) = write_lmdb(tmp_path)
    whole = (source / "data.mdb").read_bytes()
    (source / "data.mdb").write_bytes(whole[: len(whole) // 2])
    assert "data.mdb is cut" in refused(convert.main, source, "--out", tmp_path / "cache")
    (source / "data.mdb").write_bytes(whole)
    with lmdb.open(str(source), map_size=1 << 20) as database, database.begin(write=True) as all_:
        value = all_.get(b"42")
        all_.put(b"42", value[: len(value) // 2])
    told = refused(convert.main, source, "--out", tmp_path / "cache")
    assert f"{source}, image 42, cannot be read" in told
    (source / "data.mdb").write_bytes(bytes(len(whole)))
    assert "cannot be read as LMDB" in refused(convert.main, source, "--out", tmp_path / "cache")


def test_pairs_of_folders_name_the_missing_file_and_id(tmp_path):
    arguments = write_cocobu(tmp_path)
    (tmp_path / "cocobu_box" / "42.npy").unlink()
    told = refused(convert.main, *arguments)
    assert "image 42" in told and f"{tmp_path / 'cocobu_box' / '42'}.npy does not exist" in told
    np.save(tmp_path / "cocobu_box" / "42", PHOTOS[2].boxes)
    np.save(tmp_path / "cocobu_box" / "43", PHOTOS[2].boxes)
    told = refused(convert.main, *arguments)
    assert "image 43 has boxes" in told and f"{tmp_path / 'cocobu_att' / '43.npz'}" in told
    (tmp_path / "cocobu_box" / "43.npy").unlink()
    np.save(tmp_path / "cocobu_box" / "42", PHOTOS[0].boxes)
    assert "shape (3, 4), not (1, 4)" in refused(convert.main, *arguments)
    assert "for the formats npz and npy" in refused(
        convert.main, *write_tsv(tmp_path), "--boxes", tmp_path / "cocobu_box"
    )


def test_an_hdf5_image_without_boxes_among_images_with_boxes_is_an_error(tmp_path):
    source, *sizes = write_m2(tmp_path)
    with h5py.File(source, "a") as file:
        del file["42_boxes"]
    told = refused(convert.main, source, *sizes)
    assert "42_features, image 42 has no boxes" in told or "has boxes; " in told
    with h5py.File(source, "a") as file:
        file["42_boxes"] = PHOTOS[2].boxes
        del file["42_features"]
    assert "image 42 has 42_boxes, but no 42_features" in refused(convert.main, source, *sizes)


def test_an_hdf5_group_without_features_is_an_error_and_not_left_out(tmp_path):
    (source,) = write_groups(tmp_path)
    for member in ("boxes", None):
        with h5py.File(source, "a") as file:
            group = file.require_group("db/43")
            group.clear()
            if member:
                group[member] = PHOTOS[0].boxes
        told = refused(convert.main, source, "--out", tmp_path / "cache")
        assert f"{source}: the group of image db/43 has none of features" in told
    with h5py.File(source, "a") as file:
        del file["db"]
        file["42/image_size"][:] = 0
    assert "42/features, image 42: the size of the image is 0 x 0" in refused(convert.main, source)


def test_an_image_may_have_no_regions_but_not_all_images(tmp_path):
    (tmp_path / "feats").mkdir()
    np.savez(tmp_path / "feats" / "1", feat=np.zeros((0, C), np.float32))
    told = refused(convert.main, tmp_path / "feats", "--out", tmp_path / "cache")
    assert "1.npz, image 1 and all other images have no regions" in told
    np.savez(tmp_path / "feats" / "2", feat=PHOTOS[0].features)
    works(convert.main, tmp_path / "feats", "--out", tmp_path / "cache")
    features, _, count = FeatureCache(tmp_path / "cache")[1]
    assert count == 0 and not features.any()


def test_rows_without_regions_are_shown(tmp_path):
    """The statistics of --inspect use up to 500 rows, which may all have no regions."""
    (tmp_path / "feats").mkdir()
    for name, regions in (("1", 0), ("2", 1)):
        np.save(tmp_path / "feats" / name, np.ones((regions, 4), np.float16))
    works(convert.main, tmp_path / "feats", "--out", tmp_path / "cache")
    with h5py.File(tmp_path / "cache" / "shard-00000.h5", "r+") as file:
        file["counts"][:] = 0
    assert "no regions" in works(extract.main, "--inspect", tmp_path / "cache")


def test_a_source_of_no_known_format_is_one_error(tmp_path):
    (tmp_path / "a.txt").write_text("features")
    for source, expected in (
        (tmp_path / "a.txt", "no known format; known formats: tsv, npz, npy, lmdb, hdf5"),
        (tmp_path, "no .npz, .npy or data.mdb file"),
        (tmp_path / "none", "does not exist"),
    ):
        assert expected in refused(convert.main, source)
    works(convert.main, *write_tsv(tmp_path), "--out", tmp_path / "cache")
    assert "already a cache" in refused(convert.main, tmp_path / "cache")
    assert "already a cache" in refused(convert.main, tmp_path / "cache" / "shard-00000.h5")
    assert "no SOURCE" in refused(convert.main)
    assert "is the source" in refused(convert.main, tmp_path, "--out", tmp_path)


def test_lmdb_that_is_not_installed_is_named_with_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    (tmp_path / "feats.lmdb").touch()
    assert "pip install 'onceover[convert]'" in refused(convert.main, tmp_path / "feats.lmdb")


# -------------------------------------------------------------------------------- to go on, kills


def test_a_second_command_goes_on_and_refuses_other_features(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    photos = [Photo(id_) for id_ in range(7)]
    (source,) = write_tsv(tmp_path, photos)
    works(convert.main, source, "--out", tmp_path / "cache")
    whole = FeatureCache(tmp_path / "cache").rows(range(7))
    removed = shard_paths(tmp_path / "cache")[1]
    kept = {p: p.stat().st_mtime_ns for p in shard_paths(tmp_path / "cache") if p != removed}
    removed.unlink()
    told = works(convert.main, source, "--out", tmp_path / "cache")
    assert "7 images, 5 done; 2 rows" in told
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    for part, other in zip(whole, FeatureCache(tmp_path / "cache").rows(range(7)), strict=True):
        assert np.array_equal(part, other)
    assert "all images were already" in works(convert.main, source, "--out", tmp_path / "cache")

    (tmp_path / "more.tsv").write_text(tsv_line(Photo(8, 2)))
    more = [tmp_path / "more.tsv", "--out", tmp_path / "cache"]
    assert "imported: bottom-up, not more" in refused(convert.main, *more)
    works(convert.main, *more, "--name", "bottom-up")
    cache = FeatureCache(tmp_path / "cache")
    assert len(cache) == 8 and cache.shape == (3, C) and cache[8].counts == 2
    (tmp_path / "more.tsv").write_text(tsv_line(Photo(9, 4)))
    told = refused(convert.main, *more, "--name", "bottom-up")
    assert "rows of 3 regions, and SOURCE has up to 4" in told


def test_a_fault_in_a_later_shard_leaves_the_whole_shards_and_goes_on_when_corrected(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    photos = [Photo(id_) for id_ in range(5)]
    photos[3].features[0, 0] = np.nan
    write_tsv(tmp_path, photos)
    at = [tmp_path / "bottom-up.tsv", "--out", tmp_path / "cache"]
    assert "line 4, image 3: region 0 has the value nan" in refused(convert.main, *at)
    assert len(shard_paths(tmp_path / "cache")) == 1
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    write_tsv(tmp_path, [Photo(id_) for id_ in range(5)])
    assert "2 done; 3 rows" in works(convert.main, *at)
    assert len(FeatureCache(tmp_path / "cache")) == 5


def test_a_damaged_shard_is_found_and_converted_again(tmp_path):
    (source,) = write_tsv(tmp_path)
    works(convert.main, source, "--out", tmp_path / "cache")
    (shard,) = shard_paths(tmp_path / "cache")
    whole = shard.read_bytes()
    place = whole.index(PHOTOS[1].features.astype(np.float16).tobytes())
    shard.write_bytes(whole[:place] + b"damage" + whole[place + 6 :])
    result = run(extract.main, "--verify", tmp_path / "cache")
    assert result.exit_code == 1 and f"image {IDS[1]}" in result.output
    assert "remove them, and run the same pipeline.convert again" in result.output
    shard.unlink()
    works(convert.main, source, "--out", tmp_path / "cache")
    works(extract.main, "--verify", tmp_path / "cache")


def convert_slowly(arguments: list[str]) -> None:
    """pipeline.convert with shards of 4 images that each take a while."""
    shards.SHARD_IMAGES = 4
    write = convert.write_rows

    def slow(*each: object) -> None:
        time.sleep(0.05)
        write(*each)

    convert.write_rows = slow  # type: ignore[assignment]
    convert.main(arguments)


def test_a_killed_conversion_goes_on_to_the_same_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_IMAGES", 4)
    (source,) = write_tsv(tmp_path, [Photo(id_) for id_ in range(60)])
    works(convert.main, source, "--out", tmp_path / "whole")
    whole, cache = FeatureCache(tmp_path / "whole"), tmp_path / "killed"
    arguments = [str(source), "--out", str(cache)]
    for shards_before_kill in (1, 8):
        process = begin(convert_slowly, arguments, said=tmp_path / "said.txt")
        while len(shard_paths(cache)) < shards_before_kill and process.is_alive():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
        for path in shard_paths(cache):
            assert verify_shard(path) == []
        assert len(shard_paths(cache)) < 15
    works(convert.main, *arguments)
    found = FeatureCache(cache)
    assert found.ids.tolist() == whole.ids.tolist() and found.identity == whole.identity
    for part, other in zip(whole.rows(range(60)), found.rows(range(60)), strict=True):
        assert np.array_equal(part, other)
    names = sorted(path.name for path in cache.iterdir() if path.suffix != ".tmp")
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())


# ------------------------------------------------------------------------------------------- memory


def peak_memory(source: Path, cache: Path, folder: Path) -> int:
    """The largest memory of a conversion above that at its start, in bytes."""
    process = begin(measured, source, cache, folder / "peak.txt", said=folder / "said.txt")
    process.join()
    assert process.exitcode == 0, (folder / "said.txt").read_text()
    return int((folder / "peak.txt").read_text())


def measured(source: Path, cache: Path, result: Path) -> None:
    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

    shards.SHARD_IMAGES = 100
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present value
    command_main(source, cache)
    result.write_text(str(status("VmHWM") - before))


def command_main(source: Path, cache: Path) -> None:
    convert.main([str(source), "--out", str(cache)], standalone_mode=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tsv", "npz", "hdf5"])
def test_a_source_of_100_mb_needs_no_more_memory_than_one_of_20_mb(name, tmp_path):
    """A shard has 100 images of 36 regions x 512 here: 3.7 MB of features."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs")
    peaks = []
    for images in (280, 1400):  # 74 kB of float32 per image
        folder = tmp_path / str(images)
        folder.mkdir()
        source = write_large(name, folder, images)
        files = source.rglob("*") if source.is_dir() else [source]
        size = sum(file.stat().st_size for file in files)
        assert size > images / 280 * 20e6
        peaks.append(peak_memory(source, tmp_path / f"cache{images}", folder))
        assert len(FeatureCache(tmp_path / f"cache{images}")) == images
    print(f"{name}: peaks of {[f'{peak / 1e6:.1f} MB' for peak in peaks]}")
    assert peaks[1] < 40e6 and peaks[1] - peaks[0] < 16e6, peaks


def write_large(name: str, folder: Path, images: int) -> Path:
    if name == "tsv":
        with open(folder / "large.tsv", "w") as file:
            for id_ in range(images):
                file.write(tsv_line(Photo(id_, 36, 512)))
        return folder / "large.tsv"
    if name == "npz":
        (folder / "feats").mkdir()
        for id_ in range(images):
            np.savez(folder / "feats" / str(id_), feat=Photo(id_, 36, 512).features)
        return folder / "feats"
    with h5py.File(folder / "large.hdf5", "w") as file:
        for id_ in range(images):
            file[f"{id_}_features"] = Photo(id_, 36, 512).features
    return folder / "large.hdf5"


# --------------------------------------------------------------------------------- train, evaluate


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    """A drawn sample of 60 scenes, and features of its images in a TSV file, as a cache."""
    folder = tmp_path_factory.mktemp("imported")
    draw_sample(folder / "sample", count=60, seed=3)
    entries = json.loads((folder / "sample" / "dataset_sample.json").read_text())["images"]
    ids = [entry.get("cocoid", entry.get("imgid")) for entry in entries]
    write_tsv(folder, [Photo(id_, 1 + number % 6) for number, id_ in enumerate(ids)])
    works(convert.main, folder / "bottom-up.tsv", "--out", folder / "cache")
    return folder


def test_a_checkpoint_over_an_imported_cache_trains_resumes_and_evaluates(imported, tmp_path):
    at = ["--dataset", "karpathy", "--root", imported / "sample", "--features", imported / "cache"]
    works(train.main, *at, "--out", tmp_path / "run", *QUICK)
    works(train.main, *at, "--out", tmp_path / "run", *QUICK, "--resume", "--epochs", 3)
    works(evaluate.main, *at, "--checkpoint", tmp_path / "run", "--out", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["CIDEr"] is not None
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.identity == {
        "regions": "imported",
        "imported": "bottom-up",
        "boxes": "given",
        "channels": C,
    }
    assert checkpoint.describe() == "imported bottom-up"
    photo = next((imported / "sample").rglob("*.jpg"))
    told = refused(caption.main, photo, "--checkpoint", tmp_path / "run")
    assert "imported: bottom-up" in told and "cannot see new photographs" in told
    told = refused(export.main, "--checkpoint", tmp_path / "run")
    assert "it has no backbone. Pass --no-backbone" in told

    works(convert.main, imported / "bottom-up.tsv", "--name", "other", "--out", tmp_path / "other")
    other = [*at[:-1], tmp_path / "other", "--checkpoint", tmp_path / "run"]
    assert "imported: other, not bottom-up" in refused(evaluate.main, *other)


def test_an_image_that_was_not_converted_is_one_error_that_says_what_to_do(imported, tmp_path):
    lines = (imported / "bottom-up.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "few.tsv").write_text("".join(lines[:5]))
    works(convert.main, tmp_path / "few.tsv", "--out", tmp_path / "cache")
    at = ["--dataset", "karpathy", "--root", imported / "sample", "--features", tmp_path / "cache"]
    told = refused(train.main, *at, "--out", tmp_path / "run", *QUICK)
    assert "convert the sources with the missing images too" in told and "--dataset" in told
    assert "--text-only" not in told
