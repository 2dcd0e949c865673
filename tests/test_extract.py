"""The extraction stage's options, on photographs of every kind and caches in every state."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from data.cache.reader import FeatureCache
from data.images import Framing, read_image
from data.sources import Image, image_id
from models.backbones.registry import create_backbone
from models.regions import grid_regions
from pipeline import evaluate, extract, train
from pipeline.cli import UserError
from pipeline.decoding.captioner import load_captioner
from pipeline.extraction.backbone import extract_regions, framing_of
from pipeline.extraction.registry import restore
from pipeline.extraction.stream import (
    Recipe,
    Work,
    _read_in_processes,
    _read_in_threads,
    decoding_workers,
)
from pipeline.extraction.views import parse_views, view_of
from pipeline.runtime import open_machine

# a fixture
from tests.test_commands import LOOK, QUICK, at, photos, refused, run, works
from tests.test_images import RED, halves

SMALL = [*LOOK]
ROOT = Path(__file__).resolve().parents[1]


def folder(root: Path, *options: object) -> list[object]:
    return ["--dataset", "folder", "--root", root, *SMALL, *options]


# ------------------------------------------------------------------------------- every kind of file


def test_every_odd_photograph_has_its_row_or_stands_in_the_list_with_its_reason(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    photo = halves(200, 120)
    good = {
        "grey.jpg": photo.convert("L"),
        "cmyk.jpg": photo.convert("CMYK"),
        "rgba.png": photo.convert("RGBA"),
        "palette.png": photo.convert("P"),
        "sixteen.png": PillowImage.fromarray(np.full((40, 50), 30_000, np.uint16)),
        "one.png": PillowImage.new("RGB", (1, 1), RED),
        "with space.jpg": photo,
        "quo'te\".jpg": photo,
        "é 日本.jpg": photo,
    }
    for name, image in good.items():
        image.save(root / name)
    photo.save(root / "progressive.jpg", progressive=True)
    photo.convert("P").save(
        root / "animated.gif", save_all=True, append_images=[PillowImage.new("P", (200, 120))]
    )
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    photo.transpose(PillowImage.Transpose.ROTATE_90).save(root / "turned.jpg", exif=exif)
    good |= dict.fromkeys(["progressive.jpg", "animated.gif", "turned.jpg"])
    PillowImage.new("1", (20_000, 20_000)).save(root / "huge.png")
    (root / "empty.jpg").touch()
    photo.save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:900])
    (root / "text.jpg").write_text("not a photograph")
    os.symlink("loop.jpg", root / "loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    told = works(extract.main, *folder(root, "--out", tmp_path / "cache", "--allow-missing"))
    cache = FeatureCache(tmp_path / "cache")
    assert sorted(cache.ids.tolist()) == sorted(map(image_id, good))
    reasons = {record.file_name: record.reason for record in cache.unreadable.values()}
    assert (
        "more than 89,478,485 pixels" in reasons["huge.png"]
        and "not an image" in reasons["text.jpg"]
    )
    assert (
        reasons["empty.jpg"]
        and reasons["cut.jpg"]
        and f"{len(reasons)} photographs have no row" in told
    )
    assert (
        set(reasons) <= {"huge.png", "empty.jpg", "cut.jpg", "text.jpg", "loop.jpg", "pipe.jpg"}
        and len(reasons) >= 4
    )
    with h5py.File(tmp_path / "cache" / "features.h5") as file:
        sizes = dict(zip(file["names"].asstr()[:], file["sizes"][:].tolist(), strict=True))
    assert sizes["turned.jpg"] == [120, 200] and sizes["one.png"] == [1, 1]
    row = {name: cache[image_id(name)].features.astype(np.float32).ravel() for name in good}
    for name in (
        "turned.jpg",
        "progressive.jpg",
        "with space.jpg",
        "rgba.png",
        "cmyk.jpg",
        "animated.gif",
    ):
        one, two = row[name], row["quo'te\".jpg"]
        alike = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
        # of 216 colours; its second frame is black
        assert alike > (0.9 if name == "animated.gif" else 0.99), name


def test_strict_ends_at_the_first_unreadable_photograph(tmp_path):
    halves().save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("no photograph")
    message = refused(extract.main, *folder(tmp_path, "--strict", "--out", tmp_path / "cache"))
    assert f"{tmp_path}/b.jpg cannot be read" in message and not list(
        (tmp_path / "cache").glob("*shard*")
    )


def test_a_photograph_mended_since_gets_its_row_and_others_are_tried_when_asked(tmp_path):
    root, out = tmp_path / "photos", tmp_path / "cache"
    root.mkdir()
    halves().save(root / "a.png")
    for name in ("b.png", "c.png"):
        (root / name).write_text("broken")
    works(extract.main, *folder(root, "--out", out))
    before = {path.name: path.read_bytes() for path in out.glob("shard*")}
    assert "tried again" not in works(extract.main, *folder(root, "--out", out))
    halves().save(root / "b.png")
    assert "1 photographs that could not be read are tried again" in works(
        extract.main, *folder(root, "--out", out)
    )
    cache = FeatureCache(out)
    assert image_id("b.png") in cache and list(cache.unreadable) == [image_id("c.png")]
    assert np.array_equal(cache[image_id("b.png")].features, cache[image_id("a.png")].features)
    assert all((out / name).read_bytes() == content for name, content in before.items())
    assert (out / "unreadable.jsonl").read_text().count("\n") == 1
    assert "1 photographs that could not" in works(
        extract.main, *folder(root, "--out", out, "--retry-unreadable")
    )


# --------------------------------------------------------------------------- checked, shown, packed


def test_verify_exits_with_1_naming_the_row_and_repair_makes_only_that_shard_again(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr("data.cache.writer.SHARD_IMAGES", 20)
    options = [*at(world), *SMALL, "--out", tmp_path / "cache"]
    works(extract.main, *options)
    assert "60 rows, all checksums are correct" in works(
        extract.main, "--verify", tmp_path / "cache"
    )
    whole = FeatureCache(tmp_path / "cache")
    rows = whole.rows(whole.ids.tolist()).features
    path = tmp_path / "cache" / "shard-00001.h5"
    with h5py.File(path, "r+") as file:
        at_byte = file["features"].id.get_offset() + 1000
    content = bytearray(path.read_bytes())
    content[at_byte] ^= 255
    path.write_bytes(content)
    (tmp_path / "cache" / "shard-00002.h5").write_bytes(b"cut")
    result = run(extract.main, "--verify", tmp_path / "cache")
    assert (
        result.exit_code == 1
        and "shard-00001.h5: row 0, image" in result.stdout
        and "shard-00002.h5" in result.stdout
    )
    assert "remove it and re-run" in refused(extract.main, *options)
    before = (tmp_path / "cache" / "shard-00000.h5").stat().st_mtime_ns
    works(extract.main, *options, "--repair")
    assert (tmp_path / "cache" / "shard-00000.h5").stat().st_mtime_ns == before
    assert np.array_equal(FeatureCache(tmp_path / "cache").rows(whole.ids.tolist()).features, rows)
    assert sorted(path.name for path in (tmp_path / "cache").glob("*.bad")) == [
        "shard-00001.h5.bad",
        "shard-00002.h5.bad",
    ]
    works(extract.main, "--verify", tmp_path / "cache")
    assert "nothing to check" in refused(extract.main, "--verify", tmp_path)


def test_inspect_shows_identity_rows_statistics_and_three_samples(world):
    told = works(extract.main, "--inspect", world / "cache")
    assert (
        "60 rows of 25 regions" in told
        and 'backbone: "test_resnet"' in told
        and "deviation" in told
    )
    assert told.count("image ") == 3 and "precision:" in told


def test_every_later_stage_takes_a_packed_cache(world, tmp_path):
    works(extract.main, "--out", world / "cache", "--pack", tmp_path / "packed.h5")
    works(
        train.main,
        *at(world),
        "--features",
        tmp_path / "packed.h5",
        "--out",
        tmp_path / "run",
        *QUICK,
    )
    works(
        evaluate.main,
        *at(world),
        "--features",
        tmp_path / "packed.h5",
        "--checkpoint",
        tmp_path / "run",
    )
    works(
        evaluate.main, *at(world), "--features", world / "cache", "--checkpoint", tmp_path / "run"
    )
    assert load_captioner(tmp_path / "run").caption(photos(world, 1))
    assert "is not a cache; pass the cache as --out CACHE" in refused(
        extract.main, "--out", tmp_path, "--pack", tmp_path / "q"
    )


def test_another_precision_is_refused_and_another_version_only_told(world, tmp_path, monkeypatch):
    options = [*at(world), *SMALL, "--out", tmp_path / "cache"]
    works(extract.main, *options, "--precision", "fp32", "--split", "val")
    message = refused(extract.main, *options, "--precision", "bf16")
    assert "precision: fp32, not bf16, first 2 convolutions fp32" in message
    monkeypatch.setattr("pipeline.extract.DECODE_PATH", "another")
    assert "decode: pillow" in refused(extract.main, *options, "--precision", "fp32")
    monkeypatch.undo()
    monkeypatch.setattr("timm.__version__", "9.9")
    told = works(extract.main, *options, "--precision", "fp32")
    assert told.count("warning") == 1 and "timm" in told


# ------------------------------------------------------------------------------- size, grid, resize


@pytest.mark.parametrize("resize", ["crop", "letterbox"])
def test_boxes_are_true_for_every_way_to_resize_and_captions_see_what_the_cache_saw(
    world, tmp_path, resize
):
    """A photograph three times as wide as high: what its boxes cover, and the same rows when it is
    captioned.
    """
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(3):
        halves(300, 100).save(root / f"{number}.png")
        (root / "metadata.jsonl").open("a").write(
            json.dumps({"file_name": f"{number}.png", "text": "a red wall"}) + "\n"
        )
    options = folder(
        root,
        "--out",
        tmp_path / "cache",
        "--resize",
        resize,
        "--size",
        "128x96",
        "--grid",
        "4x3",
        "--precision",
        "fp32",
    )
    works(extract.main, *options)
    cache = FeatureCache(tmp_path / "cache")
    assert (cache.identity["size"], cache.identity["grid"], cache.identity["resize"]) == (
        [128, 96],
        [4, 3],
        resize,
    )
    features, boxes, count = cache[cache.ids[0]]
    there = boxes[:count]
    assert (there[:, 2:] > there[:, :2]).all() and there.min() >= 0 and there.max() <= 1
    if resize == "crop":
        assert (
            count == 12
            and np.allclose(there[:, [0, 2]].min(), 0.375, atol=0.01)
            and there[:, 1].min() == 0
        )
    # a third of 96 is 32 rows of 128, in the middle: cells two and three of four see it, half of
    # each
    else:
        assert (
            count == 6
            and there[:, 1].tolist() == [0] * 3 + [0.5] * 3
            and np.allclose(there[:, 3].max(), 1)
        )
        assert not features[count:].any() and not boxes[count:].any()
    works(
        train.main,
        "--dataset",
        "folder",
        "--root",
        root,
        "--features",
        tmp_path / "cache",
        "--out",
        tmp_path / "run",
        *QUICK,
        "--precision",
        "fp32",
    )
    works(
        evaluate.main,
        "--dataset",
        "folder",
        "--root",
        root,
        "--features",
        tmp_path / "cache",
        "--checkpoint",
        tmp_path / "run",
        "--split",
        "all",
        "--precision",
        "fp32",
        "--out",
        tmp_path / "s.json",
    )
    cached = {line["caption"] for line in json.loads((tmp_path / "captions-all.json").read_text())}
    assert (
        set(load_captioner(tmp_path / "run", precision="fp32").caption([root / "0.png"])) == cached
    )


def test_repair_begins_with_a_broken_first_shard_and_ends_with_every_image(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr("data.cache.writer.SHARD_IMAGES", 20)
    options = [*at(world), *SMALL, "--out", tmp_path / "cache"]
    works(extract.main, *options, "--limit", 25)
    works(extract.main, *options)
    for name in ("shard-00000.h5", "shard-00001.h5"):
        path = tmp_path / "cache" / name
        path.write_bytes(path.read_bytes()[:5000])
        works(extract.main, *options, "--repair")
        cache = FeatureCache(tmp_path / "cache")
        assert sorted(cache.ids.tolist()) == sorted(FeatureCache(world / "cache").ids.tolist()), (
            name
        )
    with h5py.File(tmp_path / "cache" / "features.h5") as file:
        assert len(set(file["image_ids"][:].tolist())) == len(file["image_ids"]) == 60


def test_a_cell_that_sees_the_photograph_by_rounding_alone_is_no_region():
    x = torch.arange(49.0).view(1, 1, 7, 7)
    for width, height in ((700, 300), (68, 480), (677, 480)):
        scale = 224 / max(width, height)
        inner = round(height * scale), round(width * scale)
        y, left = (224 - inner[0]) // 2, (224 - inner[1]) // 2
        frame = torch.tensor(
            [[-left / inner[1], -y / inner[0], (224 - left) / inner[1], (224 - y) / inner[0]]]
        )
        regions = grid_regions(x, frame)
        rows, columns = -(-(y + inner[0]) // 32) - y // 32, -(-(left + inner[1]) // 32) - left // 32
        assert regions.counts.item() == rows * columns
        boxes = regions.boxes[0, : regions.counts]
        assert (boxes[:, 2:] - boxes[:, :2]).min() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone-arg", "output_stride=3"], "--backbone-arg: test_resnet cannot be built"),
        (["--grid", "9x9"], "--grid 9x9: test_resnet gives 5x5 cells"),
        (["--grid", "axb"], "--grid 'axb' is neither N nor HxW"),
        (["--size", "0"], "--size '0' is neither N nor HxW"),
        (["--workers", "-1"], "--workers is -1"),
    ],
)
def test_a_size_or_grid_that_cannot_be_is_refused(world, tmp_path, options, message):
    assert message in refused(extract.main, *at(world), *SMALL, "--out", tmp_path / "c", *options)


def test_pooled_cells_are_the_means_of_those_they_cover():
    whole, pooled = (
        create_backbone("test_resnet", seed=1, size=(128, 128), grid=grid)
        for grid in (None, (2, 2))
    )
    pixels = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    fine = whole(pixels).features.view(2, 2, 2, 2, 2, -1)
    assert torch.allclose(pooled(pixels).features.view(2, 2, 2, -1), fine.mean((2, 4)), atol=1e-5)


# ----------------------------------------------------------------------------------------- decoding


def test_processes_decode_as_threads_do(tmp_path):
    paths = []
    for number in range(7):
        halves(60 + number, 40).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    paths[3].write_text("broken")
    images = [Image(number, path.name, path, "train", ()) for number, path in enumerate(paths)]
    work = [
        Work(None, tuple(images[:3]), False),
        Work(None, tuple(images[3:4]), False),
        Work(None, tuple(images[4:]), True),
    ]
    backbone = create_backbone("test_resnet")
    identity = backbone.identity()
    recipe = Recipe(
        backbone, open_machine("cpu"), "stretch", identity, {}, 3, 2, missing=frozenset([5])
    )
    framing = Framing((32, 32))
    ways = [
        list(read(iter(work), framing, recipe)) for read in (_read_in_threads, _read_in_processes)
    ]
    for (one, a), (two, b) in zip(*ways, strict=True):
        assert (
            one is two
            and torch.equal(a.pixels, b.pixels)
            and torch.equal(a.view_boxes, b.view_boxes)
        )
        assert (a.originals, a.reasons) == (b.originals, b.reasons)
    assert ways[0][1][1].reasons != [""] and ways[0][2][1].reasons == ["", "missing", ""]
    assert decoding_workers(None) >= 1 and decoding_workers(3) == 3


@pytest.mark.slow
def test_ten_times_the_photographs_take_at_most_a_tenth_more_memory(tmp_path, real):
    """Shards of 100 images, rows of 196 regions: those of 1,440 more photographs take 54 MB."""

    def peak(limit: int) -> int:
        out = tmp_path / str(limit)
        grid = ["--size", 224, "--backbone-arg", "output_stride=16"]
        more = [*grid, "--limit", limit, "--out", out]
        asked = folder(real / "flickr8k" / "images", *more)
        code = (
            "import resource; from data.cache import writer; from pipeline import extract; "
            f"writer.SHARD_IMAGES = 100; extract.main.main({[str(part) for part in asked]},"
            "standalone_mode=False); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert FeatureCache(out).shape[0] == 196 and len(FeatureCache(out).paths) > limit / 101
        return int(done.stdout.split()[-1])

    assert peak(1600) <= 1.1 * peak(160)


def test_a_moved_cache_needs_nothing_of_its_old_place_and_gives_the_same_captions(world, tmp_path):
    shutil.copytree(world / "cache", tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "moved")
    captions = []
    for number, cache in enumerate((world / "cache", tmp_path / "moved")):
        out = tmp_path / str(number) / "scores.json"
        asked = ["--checkpoint", world / "run", "--features", cache, "--out", out]
        works(evaluate.main, *at(world), *asked)
        captions.append(json.loads((out.parent / "captions-test.json").read_text()))
    assert captions[0] == captions[1] and any(line["caption"] for line in captions[0])


TORCHRUN_SCRIPT = """
import os, pathlib, signal, sys, time
from data.cache import writer
from pipeline import extract
from pipeline.extraction.stream import ShardRows
writer.SHARD_IMAGES = 5
killed, write = pathlib.Path(__file__).with_name("killed"), ShardRows.write
def die(*_):  # it holds a claim here
    killed.touch()
    os.kill(os.getpid(), signal.SIGKILL)
def wait(*arguments):  # the others hold claims too, and leave shards to the one that is killed
    while not killed.exists():
        time.sleep(0.02)
    write(*arguments)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    ShardRows.write = die if os.environ["RANK"] == "1" else wait
extract.main.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_three_processes_of_torchrun_of_which_one_is_killed_make_the_cache_of_one(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr("data.cache.writer.SHARD_IMAGES", 5)
    options = [*at(world), *SMALL, "--device", "cpu", "--precision", "fp32"]
    works(extract.main, *options, "--out", tmp_path / "one")
    (tmp_path / "script.py").write_text(TORCHRUN_SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "3", "--max-restarts", "1", str(tmp_path / "script.py")]
    done = subprocess.run(
        [*torchrun, *map(str, options), "--out", str(tmp_path / "three")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "exitcode: -9" in done.stderr, done.stderr
    one, three = FeatureCache(tmp_path / "one"), FeatureCache(tmp_path / "three")
    assert len(one.paths) == len(three.paths) == 12 and one.ids.tolist() == three.ids.tolist()
    for path in one.paths:
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes()
    names = [
        sorted(p.name for p in cache.path.iterdir() if p.suffix != ".tmp") for cache in (one, three)
    ]
    assert names[0] == names[1]


# -------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox"])
def test_a_mirrored_view_is_the_row_that_the_mirrored_photograph_would_have(tmp_path, resize):
    """Photographs and, in another folder under the same names, the same ones mirrored, all saved
    without loss.
    """
    for name in ("plain", "mirrored"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(200, 120), (90, 150), (64, 64), (64, 64)]):
        small = PillowImage.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8).astype(np.uint8))
        photo = small.resize((width, height), PillowImage.Resampling.BICUBIC)
        photo.save(tmp_path / "plain" / f"{number}.png")
        photo.transpose(PillowImage.Transpose.FLIP_LEFT_RIGHT).save(
            tmp_path / "mirrored" / f"{number}.png"
        )
    more = ["--precision", "fp32", "--resize", resize]
    works(
        extract.main,
        *folder(tmp_path / "plain", *more, "--views", "flip", "--out", tmp_path / "cache"),
    )
    works(extract.main, *folder(tmp_path / "mirrored", *more, "--out", tmp_path / "other"))
    cache, other = FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "other")
    ids = cache.ids.tolist()
    assert cache.views == ("flip",) and other.views == () and cache.identity == other.identity
    seen, plain, expected = cache.rows(ids, views=[1] * len(ids)), cache.rows(ids), other.rows(ids)
    for one, two in zip(seen, expected, strict=True):
        assert np.allclose(one, two, atol=0.02, rtol=0.02)
    assert not np.allclose(seen.features, plain.features, atol=0.02)
    works(extract.main, "--verify", tmp_path / "cache")
    works(extract.main, "--out", tmp_path / "cache", "--pack", tmp_path / "one.h5")
    for path in (tmp_path / "one.h5", tmp_path / "cache" / "features.h5"):
        with h5py.File(path) as file:
            order = [file["image_ids"][:].tolist().index(image_id) for image_id in ids]
            assert np.array_equal(file["features_flip"][:][order], seen.features)
    packed = FeatureCache(tmp_path / "one.h5")
    assert packed.views == ("flip",) and np.array_equal(
        packed.rows(ids, views=[1] * len(ids)).features, seen.features
    )


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_crops_and_colours_are_the_rows_of_the_changed_pixels(tmp_path, resize):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(200, 120), (90, 150), (64, 64), (300, 100)]):
        small = PillowImage.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8).astype(np.uint8))
        small.resize((width, height)).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"")
    more = ["--precision", "fp32", "--resize", resize, "--views", "crop:2,flip,color:1"]
    for name, batch in (("cache", 32), ("again", 1)):
        options = [*more, "--batch", batch, "--out", tmp_path / name]
        works(extract.main, *folder(tmp_path / "photos", *options))
    cache, again = FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "again")
    assert cache.views == ("crop1", "crop2", "flip", "color1") and len(cache) == 4
    backbone = restore(tmp_path / "cache", cache.identity)
    machine = open_machine("cpu", precision="fp32")
    seen = []
    for number, view in enumerate(cache.views, start=1):
        for path in sorted((tmp_path / "photos").glob("[0-9].png")):
            photo = read_image(path, framing_of(backbone))
            pixels, boxes = view_of(
                view,
                torch.from_numpy(photo.pixels)[None],
                torch.tensor([photo.frame], dtype=torch.float32),
                [image_id(path.name)],
            )
            wanted = extract_regions(backbone, pixels, machine, boxes)
            for one in (cache, again):
                row = one.rows([image_id(path.name)], views=[number])
                for part, expected in zip(row, wanted, strict=True):
                    assert np.allclose(part, expected.numpy(), atol=0.02, rtol=0.02)
            assert row.boxes.min() >= 0 and row.boxes.max() <= 1
            seen.append(row.features.tobytes())
    assert len(set(seen)) == 16
    assert refused(extract.main, *folder(tmp_path / "photos", "--views", "crop"))
    works(extract.main, "--verify", tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop", "'crop' is not one of flip, crop:N, color:N"),
        ("flip,zoom:2", "'zoom:2' is not one of"),
        ("crop:2,crop:1", "it names a type of view twice"),
        ("crop:100", "100 views; the maximum is 64"),
    ],
)
def test_views_that_cannot_be_kept_are_refused(text, message):
    assert parse_views("none") == ()
    assert parse_views("flip, crop:2,color:1") == ("flip", "crop1", "crop2", "color1")
    with pytest.raises(UserError, match=message):
        parse_views(text)


def test_a_crop_shows_half_of_the_photograph_at_least_and_says_which_part():
    """Each pixel of the photograph holds its own place, so a crop's pixels show its box."""
    ramp = torch.linspace(0, 255, 256).round().byte()
    pixels = torch.stack(
        [ramp.expand(256, 256), ramp[:, None].expand(256, 256), 0 * ramp.expand(256, 256)]
    )
    for number in range(50):
        crop, boxes = view_of("crop1", pixels[None], torch.tensor([[0.0, 0, 1, 1]]), [number])
        x0, y0, x1, y1 = (boxes[0] * 255).tolist()
        assert crop[0, 0, 128, [2, -3]].tolist() == pytest.approx([x0, x1], abs=4)
        assert crop[0, 1, [2, -3], 128].tolist() == pytest.approx([y0, y1], abs=4)
        assert (x1 - x0) * (y1 - y0) / 255**2 > 0.45


def test_a_spoiled_mirrored_row_is_found_and_caches_with_and_without_views_do_not_mix(
    world, tmp_path
):
    options = [*at(world), *SMALL, "--out", tmp_path / "cache"]
    works(extract.main, *options, "--views", "flip", "--limit", 5)
    assert "views: ['flip'], not None" in refused(extract.main, *options)
    (path,) = (tmp_path / "cache").glob("shard-*.h5")
    with h5py.File(path, "r+") as file:
        file["features_flip"][2, 0, 0] += 1
    result = run(extract.main, "--verify", tmp_path / "cache")
    assert result.exit_code == 1 and "row 2" in result.output


def test_a_checkpoint_trained_on_views_reads_a_cache_without_them_and_says_nothing(world, tmp_path):
    works(extract.main, *at(world), *SMALL, "--out", tmp_path / "cache", "--views", "flip")
    told = works(
        train.main, *at(world), "--features", tmp_path / "cache", "--out", tmp_path / "run", *QUICK
    )
    assert "the same size again for each view (flip)" in told
    told = works(
        evaluate.main, *at(world), "--features", world / "cache", "--checkpoint", tmp_path / "run"
    )
    assert "warning" not in told
