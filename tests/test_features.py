"""The cache: rows that hold their image id, so a row read from the wrong place is seen at once."""

from __future__ import annotations

import errno
import json
import multiprocessing
import pickle
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data import DataError
from data.cache.reader import FeatureCache, Rows, Unreadable, shard_paths
from data.cache.writer import plan_shards, write_index, write_shard
from data.files import atomic_write, atomic_write_text
from data.sources import Image

IDENTITY = {"backbone": "planted", "weights": "0", "grid": [2, 2], "channels": 3, "regions": "grid"}


def some_images(count: int, start: int = 0) -> list[Image]:
    return [
        Image(i, f"photos/{i}.jpg", Path(f"{i}.jpg"), "train", ())
        for i in range(start, start + count)
    ]


def write_plan(
    cache: Path,
    images: list[Image],
    unreadable: tuple[int, ...] = (),
    only: tuple[int, ...] | None = None,
):
    cache.mkdir(exist_ok=True)
    for number, shard in enumerate(plan_shards(images, cache)):
        if shard.path.exists() or (only is not None and number not in only):
            continue
        kept = [image for image in shard.images if image.id not in unreadable]
        rows = (
            np.zeros((len(kept), 4, 3), np.float32) + np.array([i.id for i in kept])[:, None, None]
        )
        lost = [Unreadable(i.id, i.name, "broken") for i in shard.images if i.id in unreadable]
        found = Rows(rows, np.zeros((len(kept), 4, 4)), np.full(len(kept), 4))
        write_shard(
            shard, kept, [found], np.full((len(kept), 2), 7), lost, IDENTITY, {"torch": "2"}
        )


def planted(rows: np.ndarray) -> list[int]:
    assert all(len(np.unique(row)) == 1 for row in rows)
    return [int(row.flat[0]) for row in rows]


def test_each_row_is_its_own_images_in_any_order_and_repeated(cache):
    wanted = [34, 0, 9, 10, 10, 21, 33]
    assert planted(FeatureCache(cache).rows(wanted).features) == wanted
    assert planted(FeatureCache(cache)[17].features[None]) == [17]


def test_plain_h5py_reads_every_row_from_features_h5_even_after_the_folder_moved(cache, tmp_path):
    moved = cache.rename(tmp_path / "moved")
    with h5py.File(moved / "features.h5") as file:
        assert file["image_ids"][:].tolist() == list(range(35))
        assert planted(file["features"][:]) == list(range(35))
        assert file["names"].asstr()[33] == "photos/33.jpg"
        assert json.loads(file.attrs["identity"]) == IDENTITY
        assert [zlib.crc32(row.tobytes()) for row in file["features"][:]] == file["crc32"][
            :
        ].tolist()


def test_a_row_lies_contiguous_in_the_file_at_its_offset(cache):
    with h5py.File(cache / "shard-00001.h5") as file:
        data = file["features"]
        assert data.chunks is None and data.dtype == np.float16
        offset = data.id.get_offset()
    with open(cache / "shard-00001.h5", "rb") as raw:
        raw.seek(offset + 3 * 4 * 3 * 2)
        assert planted(np.frombuffer(raw.read(4 * 3 * 2), np.float16)[None]) == [13]


def test_a_pickled_cache_reads_the_same_rows(cache):
    assert planted(pickle.loads(pickle.dumps(FeatureCache(cache))).rows([3, 30]).features) == [
        3,
        30,
    ]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_right_rows_of_a_shared_cache(cache, method):
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        found = pool.map(FeatureCache(cache).rows, [[i, 34 - i] for i in range(12)])
    assert [planted(rows.features) for rows in found] == [[i, 34 - i] for i in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_dataset_gives_each_image_with_its_captions_in_any_worker(cache, method):
    captions = {i: [f"a {i}", f"the {i}"] for i in (34, 0, 17, 9)}
    dataset = FeatureCache(cache).dataset(captions)
    assert isinstance(dataset, torch.utils.data.Dataset) and len(dataset) == 4
    workers = 2 if method == "fork" else 1  # a spawned one imports torch, for seconds
    loader = DataLoader(
        dataset, batch_size=2, num_workers=workers, collate_fn=list, multiprocessing_context=method
    )
    items = [item for batch in loader for item in batch]
    for (features, boxes, count, image_id, texts), wanted in zip(items, captions, strict=True):
        assert image_id == wanted and planted(features[None].numpy()) == [wanted]
        assert features.dtype == torch.float16 and boxes.shape == (4, 4) and count == 4
        assert texts == captions[wanted]
    with pytest.raises(DataError, match="image 99 is not in"):
        FeatureCache(cache).dataset({99: ["a"]})


def test_rows_are_copied_into_given_arrays_and_from_memory_alike(cache):
    opened = FeatureCache(cache)
    out = opened.empty_rows(3)
    assert opened.rows([4, 30, 4], out) is out and planted(out.features) == [4, 30, 4]
    opened.keep_in_memory()
    assert planted(opened.rows([12, 34]).features) == [12, 34]


def test_an_interrupted_plan_goes_on_with_the_same_shards(tmp_path, small_shards):
    cache, images = tmp_path / "cache", some_images(35)
    write_plan(cache, images, only=(2,))
    before = (cache / "shard-00002.h5").read_bytes()
    write_plan(cache, images)
    assert sorted(path.name for path in cache.glob("shard*")) == [
        f"shard-0000{i}.h5" for i in range(4)
    ]
    assert (cache / "shard-00002.h5").read_bytes() == before
    assert planted(FeatureCache(cache).rows(range(35)).features) == list(range(35))


def test_another_split_adds_shards_and_never_repeats_an_image(tmp_path, small_shards):
    cache = tmp_path / "cache"
    # a second split, interrupted after 20..29
    write_plan(cache, some_images(12, start=20), only=(0,))
    write_plan(cache, some_images(35))  # all
    # the interrupted one goes on: nothing is left for it
    write_plan(cache, some_images(12, start=20))
    opened = FeatureCache(cache)
    assert sorted(opened.ids.tolist()) == list(range(35)) and len(opened) == 35
    assert planted(opened.rows(range(35)).features) == list(range(35))
    stored = [i for path in shard_paths(cache) for i in h5py.File(path)["image_ids"][:]]
    assert sorted(stored) == list(range(35))


def test_every_process_plans_the_same_however_much_is_done(tmp_path, small_shards):
    cache, images = tmp_path / "cache", some_images(35)
    before = plan_shards(images, cache)
    write_plan(cache, images, only=(0, 2))
    assert plan_shards(images, cache) == before


def test_a_failed_write_leaves_nothing_behind(tmp_path, small_shards):
    shard = plan_shards(some_images(3), tmp_path)[0]
    rows = np.full((3, 4, 3), np.inf, np.float16)
    with pytest.raises(DataError, match=r"0\.jpg.*not finite"):
        found = Rows(rows, np.zeros((3, 4, 4)), np.full(3, 4))
        write_shard(shard, shard.images, [found], np.ones((3, 2)), [], IDENTITY, {})
    assert not list(tmp_path.iterdir())


def test_unreadable_photographs_are_listed_and_left_out_and_counted(tmp_path, small_shards):
    cache, images = tmp_path / "cache", some_images(12)
    write_plan(cache, images, unreadable=(3, 11))
    assert [record.image_id for record in write_index(cache)] == [3, 11]
    lines = [json.loads(line) for line in (cache / "unreadable.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "image_id": 3,
        "file_name": "photos/3.jpg",
        "reason": "broken",
        "size": -1,
        "mtime_ns": -1,
    }
    kept, left_out = FeatureCache(cache).select(images)
    assert ([image.id for image in kept], left_out) == (
        [i for i in range(12) if i not in (3, 11)],
        2,
    )


def test_an_id_the_cache_never_saw_is_an_error_that_names_it(cache):
    for ask in (lambda c: c.rows([3, 99]), lambda c: c.select(some_images(1, start=99))):
        with pytest.raises(
            DataError, match=r"image 99 is not in .*cache \(35 images\); re-run pipeline.extract"
        ):
            ask(FeatureCache(cache))


def test_a_cache_and_captions_that_disagree_on_a_name_are_an_error(cache):
    other = Image(5, "elsewhere/6.jpg", Path("6.jpg"), "train", ())
    with pytest.raises(
        DataError, match=r"image 5 is photos/5.jpg in .* and elsewhere/6.jpg in the captions"
    ):
        FeatureCache(cache).select([other])


@pytest.mark.parametrize("damage", ["truncated", "text", "older format"])
def test_a_spoiled_shard_is_named_with_what_mends_it(cache, damage):
    path = cache / "shard-00001.h5"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "text":
        path.write_text("not HDF5")
    else:
        with h5py.File(path, "r+") as file:
            file.attrs["format"] = 0
    with pytest.raises(DataError, match=r"shard-00001.h5.*remove it and re-run pipeline.extract"):
        FeatureCache(cache)


def retyped(name: str, kind: str):
    def change(file: h5py.File) -> None:
        values = np.zeros(file[name].shape, kind)
        del file[name]
        file[name] = values

    return change


def reshaped(name: str):
    def change(file: h5py.File) -> None:
        values = file[name][:][:-1]
        del file[name]
        file[name] = values

    return change


def a_group(file: h5py.File) -> None:
    del file["sizes"]
    file.create_group("sizes")


def recorded(attribute: str, value: object):
    def change(file: h5py.File) -> None:
        file.attrs[attribute] = json.dumps(value)

    return change


def counted(count: int):
    def change(file: h5py.File) -> None:
        file["counts"][3] = count

    return change


LAYOUT_FAULTS = [
    *(
        retyped(name, "f8")
        for name in ("features", "boxes", "counts", "image_ids", "names", "sizes", "crc32")
    ),
    *(
        reshaped(name)
        for name in ("features", "boxes", "counts", "image_ids", "names", "sizes", "crc32")
    ),
    a_group,
    counted(-1),
    counted(5),
    recorded("provenance", []),
    recorded("provenance", {"views": 3}),
    recorded("identity", [1]),
    recorded("unreadable", [[]]),
    recorded("unreadable", [[1]]),
    lambda file: file.attrs.__setitem__("format", np.ones((2, 3))),
    lambda file: file.attrs.__setitem__("format", h5py.Empty("f")),
]


@pytest.mark.parametrize("change", LAYOUT_FAULTS)
def test_a_shard_whose_datasets_or_attributes_are_not_of_the_format_is_named(cache, change):
    path = cache / "shard-00001.h5"
    for other in shard_paths(cache):
        if other != path:
            other.unlink()
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=r"shard-00001\.h5"):
        FeatureCache(cache)


@pytest.mark.parametrize(
    "plan",
    [
        [],
        {},
        {"digest": "", "first": "0", "shards": 1},
        {"digest": "", "first": -1, "shards": 1},
        {"digest": "", "first": 1e300, "shards": 1},
        {"digest": "", "first": 0, "shards": 2**63},
    ],
)
def test_a_plan_that_no_extraction_makes_is_an_error_that_names_the_shard(cache, plan):
    with h5py.File(cache / "shard-00001.h5", "r+") as file:
        file.attrs["plan"] = json.dumps(plan)
    with pytest.raises(DataError, match=r"shard-00001\.h5"):
        plan_shards(some_images(50), cache)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_folder_that_is_no_cache_is_named_with_the_command_that_makes_one(tmp_path, make):
    make(tmp_path / "cache")
    with pytest.raises(DataError, match=r"python -m pipeline.extract"):
        FeatureCache(tmp_path / "cache")


def test_a_shard_of_another_identity_in_the_folder_is_an_error_field_by_field(cache):
    with h5py.File(cache / "shard-00002.h5", "r+") as file:
        file.attrs["identity"] = json.dumps({**IDENTITY, "backbone": "other"})
    with pytest.raises(DataError, match=r"shard-00002.h5 .*backbone: other, not planted"):
        FeatureCache(cache)


@pytest.mark.parametrize(
    "name", ["n" * 251 + ".txt", "é" * 125 + ".txt", "写" * 83 + ".txt", "a.txt"]
)
def test_a_file_of_any_legal_name_is_written_whole(tmp_path, name):
    atomic_write_text(tmp_path / name, "one")
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_text("two")
        assert temporary.name.startswith(".") and temporary.suffix == ".tmp"  # what sweeps look for
        assert (tmp_path / name).read_text() == "one"
    assert (tmp_path / name).read_text() == "two" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_memory_mapping_is_one_plain_error(cache, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no mapping")

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(DataError, match=r"shard-00000.h5: .*copy the cache to a local disk"):
        FeatureCache(cache)
