"""Every stage works on the regions of a grid, of a detector, and of both side by side.

Each check takes a world of one kind and a decoder. The default run has a set of pairs in which each
check meets each kind, and each decoder each kind; `-m slow` runs the full product.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.cache.reader import FeatureCache, differences
from data.datasets.sample import draw_sample
from models.regions import Regions, side_by_side
from pipeline import caption, evaluate, export, extract, train
from pipeline.checkpoints.checkpoint import load_checkpoint
from pipeline.decoding.captioner import load_captioner
from pipeline.extraction.backbone import keep_backbone
from pipeline.extraction.registry import restore
from tests.test_commands import LOOK, photos, refused, run, works
from tests.test_shards import kill
from tests.test_train import interrupt_at, told

GRID = [*LOOK, "--grid", "2x2"]
DETECTOR = ["--detector-backbone", "test_resnet", "--detector-weights", "scenes",
            "--detector-size", "96x128", "--max-regions", 7, "--min-regions", 2]  # fmt: skip
KINDS = {
    "grid": GRID,
    "detector": ["--regions", "detector", *DETECTOR],
    "grid+detector": ["--regions", "grid+detector", *GRID, *DETECTOR],
}
DECODERS = {
    "transformer": ["--width", 16, "--heads", 2, "--encoder-layers", 1, "--decoder-layers", 1,
                    "--feedforward", 16],
    "prefix": ["--width", 16, "--heads", 2, "--decoder-layers", 1, "--feedforward", 16],
    "pooled": ["--width", 16, "--heads", 2, "--decoder-layers", 1, "--feedforward", 16],
    "lstm": ["--width", 16],
}  # fmt: skip
SETTINGS = ["--epochs", 2, "--batch", 8, "--beam", 2, "--log-every", 1,
            "--device", "cpu", "--precision", "fp32", "--cache-in", "disk"]  # fmt: skip
COUNT = 24


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a kind: a drawn sample of 24 scenes, and its cache with mirrored views."""
    base, made = tmp_path_factory.mktemp("kinds"), {}

    def world(kind: str) -> Path:
        if not made:
            draw_sample(base / "sample", count=COUNT, seed=3)
        if kind not in made:
            made[kind] = base / kind
            made[kind].mkdir()
            (made[kind] / "sample").symlink_to(base / "sample")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("data.cache.writer.SHARD_IMAGES", 10)
                works(extract.main, *extracted(made[kind], kind, made[kind] / "cache"))
        return made[kind]

    return world


def at(world: Path) -> list:
    return ["--dataset", "karpathy", "--root", world / "sample"]


def extracted(world: Path, kind: str, out: Path) -> list:
    return [*at(world), *KINDS[kind], "--views", "flip", "--out", out, "--batch", 5,
            "--device", "cpu", "--precision", "fp32"]  # fmt: skip


def trained(world: Path, decoder: str, out: Path, *more: object) -> list:
    return [*at(world), "--features", world / "cache", "--decoder", decoder, *DECODERS[decoder],
            *SETTINGS, "--out", out, *more]  # fmt: skip


def same_rows(one: FeatureCache, two: FeatureCache) -> None:
    ids = one.ids.tolist()
    assert sorted(ids) == sorted(two.ids.tolist()) and one.identity == two.identity
    for view in range(1 + len(one.views)):
        views = [view] * len(ids)
        for part, other in zip(one.rows(ids, views=views), two.rows(ids, views=views), strict=True):
            assert np.array_equal(part, other)
    if one.classes:
        for part, other in zip(one.detections(ids), two.detections(ids), strict=True):
            assert np.array_equal(part, other)


# ------------------------------------------------------------------------------------------- checks


def check_resume(world: Path, kind: str, decoder: str, tmp_path: Path, patch) -> None:
    """An extraction that stopped after a shard continues to the same cache, bit for bit."""
    patch.setattr("data.cache.writer.SHARD_IMAGES", 10)
    shutil.copytree(world / "cache", tmp_path / "cache")
    for path in ("shard-00001.h5", "features.h5"):
        (tmp_path / "cache" / path).unlink()
    works(extract.main, *extracted(world, kind, tmp_path / "cache"))
    same_rows(FeatureCache(world / "cache"), FeatureCache(tmp_path / "cache"))
    other = [*extracted(world, kind, tmp_path / "cache"), "--max-regions", 6]
    if kind != "grid":
        assert "max_regions" in refused(extract.main, *other)


def check_maintenance(world: Path, kind: str, decoder: str, tmp_path: Path, patch) -> None:
    """--verify finds damage in every dataset, --pack keeps all rows, --inspect shows them."""
    cache = world / "cache"
    assert f"{COUNT} rows, all checksums are correct" in works(extract.main, "--verify", cache)
    inspected = works(extract.main, "--inspect", cache)
    assert f"{COUNT} rows of" in inspected
    reader = FeatureCache(cache)
    rows = reader.rows(reader.ids.tolist())
    start = np.zeros(COUNT, int)
    for (name, _, channels), counts in zip(
        reader.kinds, rows.counts.reshape(COUNT, -1).T, strict=True
    ):
        places = zip(rows.features, start, start + counts, strict=True)
        values = np.concatenate([features[s:e, :channels] for features, s, e in places])
        zeros = f"zeros {(values == 0).mean():.1%}"
        assert f"{name}, statistics of {COUNT} rows: mean" in inspected and zeros in inspected
        start += counts
    works(extract.main, "--out", cache, "--pack", tmp_path / "packed.h5")
    same_rows(FeatureCache(cache), FeatureCache(tmp_path / "packed.h5"))
    works(extract.main, "--verify", tmp_path / "packed.h5")
    with h5py.File(tmp_path / "packed.h5") as file:
        names = [name for name in file if name not in ("backbone", "image_ids", "names", "sizes")]
        assert ("scores" in names, "labels_detector_flip" in names) == {
            "grid": (False, False), "detector": (True, False), "grid+detector": (False, True),
        }[kind]  # fmt: skip
    with h5py.File(cache / "features.h5") as index:
        assert {*names} <= {*index}
    for name in names:
        shutil.copy(cache / "shard-00000.h5", tmp_path / "shard-00000.h5")
        with h5py.File(tmp_path / "shard-00000.h5", "r+") as file:
            values = file[name][:]
            values.reshape(len(values), -1)[3, 0] += 1
            file[name][...] = values
        assert run(extract.main, "--verify", tmp_path).exit_code == 1, name
    works(extract.main, "--inspect", cache, "--show", tmp_path / "shown", *at(world), "--limit", 3)
    assert len([*(tmp_path / "shown").glob("*.jpg")]) == 3


def check_captions(world: Path, kind: str, decoder: str, tmp_path: Path, patch) -> None:
    """The checkpoint folder alone gives a photograph the caption of its cached features."""
    works(train.main, *trained(world, decoder, tmp_path / "run"))
    files = ["--checkpoint", tmp_path / "run", "--features", world / "cache"]
    works(evaluate.main, *at(world), *files, "--split", "all", "--precision", "fp32")
    cached = {
        line["image_id"]: line["caption"]
        for line in json.loads((tmp_path / "run" / "captions-all.json").read_text())
    }
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere")
    paths = photos(world)[:5]
    out = tmp_path / "captions.json"
    works(caption.main, *paths, "--checkpoint", tmp_path / "elsewhere", "--out", out,
          "--precision", "fp32")  # fmt: skip
    ids = {cache_name.rpartition("/")[2]: image_id for image_id, cache_name in names(world).items()}
    for path, line in zip(paths, json.loads(out.read_text()), strict=True):
        assert line["caption"] == cached[ids[path.name]]


def names(world: Path) -> dict[int, str]:
    cache = FeatureCache(world / "cache")
    return {image_id: cache.name_of(image_id) for image_id in cache.ids.tolist()}


def check_training(world: Path, kind: str, decoder: str, tmp_path: Path, patch) -> None:
    """Interrupted and resumed training equals uninterrupted training; SCST starts from it."""
    options = ["--region-dropout", 0.3]
    works(train.main, *trained(world, decoder, tmp_path / "run", *options))
    with pytest.MonkeyPatch.context() as interrupted:
        interrupt_at(3, interrupted)
        half = run(train.main, *trained(world, decoder, tmp_path / "half", *options))
        assert half.exit_code == 130
    config = tmp_path / "half" / "config.json"
    works(train.main, "--config", config, "--out", tmp_path / "half", "--resume")
    assert told(tmp_path / "half") == told(tmp_path / "run")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "half")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    scst = ["--init", tmp_path / "run", "--scst", "--epochs", 1]
    assert "reward" in works(train.main, *trained(world, decoder, tmp_path / "scst", *scst))


CHECKS = [check_resume, check_maintenance, check_captions, check_training]
PRODUCT = [(check, kind, decoder) for check in CHECKS for kind in KINDS for decoder in DECODERS
           if check in (check_captions, check_training) or decoder == "transformer"]  # fmt: skip
# each check with each kind; each decoder with each kind, in a check that uses it
PAIRS = [
    (check, kind, "transformer") for check in (check_resume, check_maintenance) for kind in KINDS
] + [
    (check_captions, "grid", "prefix"),
    (check_captions, "detector", "transformer"),
    (check_captions, "grid+detector", "pooled"),
    (check_training, "grid", "lstm"),
    (check_training, "detector", "prefix"),
    (check_training, "grid+detector", "transformer"),
]


def cases() -> list:
    """The pairs run by default, the rest of the product with -m slow."""
    return [
        pytest.param(
            *case,
            id=f"{case[0].__name__[6:]}-{case[1]}-{case[2]}",
            marks=() if case in PAIRS else pytest.mark.slow,
        )
        for case in PRODUCT
    ]


@pytest.mark.parametrize(("check", "kind", "decoder"), cases())
def test_each_stage_works_on_each_kind(check, kind, decoder, worlds, tmp_path, monkeypatch):
    check(worlds(kind), kind, decoder, tmp_path, monkeypatch)


# -------------------------------------------------------------------------------------- properties


def test_regions_side_by_side_are_those_of_each_kind_without_gaps(worlds):
    """The joined rows of a cache: first the cells, then the detections, as each cache has them."""
    both, grid, detector = (
        FeatureCache(worlds(kind) / "cache") for kind in ("grid+detector", "grid", "detector")
    )
    ids = both.ids.tolist()
    assert both.kinds == [("grid", 4, 96), ("detector", 7, 128)] and both.shape == (11, 128)
    joined, cells, found = (cache.rows(ids) for cache in (both, grid, detector))
    plain = side_by_side(
        [Regions(*(torch.from_numpy(np.array(part)) for part in rows)) for rows in (cells, found)]
    )
    assert (joined.counts == plain.counts.numpy()).all()
    assert (joined.boxes == plain.boxes.numpy()).all()
    np.testing.assert_allclose(joined.features, plain.features.numpy(), atol=2e-3)
    for row, (first, second) in enumerate(joined.counts.tolist()):
        assert not joined.features[row, :first, 96:].any()
        assert not joined.features[row, first + second :].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_random_moments_leave_the_same_cache(worlds, kind, tmp_path):
    photographs = (worlds("grid") / "sample").resolve()
    options = ["--kills", 4, "--shard-images", 6, "--regions", kind]
    assert "killed 4 times" in kill(photographs, tmp_path, *options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_has_the_weights_of_its_own_backbone(worlds, kind, tmp_path):
    """Whatever an extraction with other options left that was stopped before its first shard."""
    whole, cache = worlds(kind) / "cache", tmp_path / "cache"
    cache.mkdir()
    file = cache / "backbone.safetensors"
    other = worlds("detector" if kind == "grid" else "grid") / "cache" / file.name
    for left in (other.read_bytes(), other.read_bytes()[:1000], b""):
        file.write_bytes(left)
        options = [*extracted(worlds(kind), kind, cache), "--limit", 2]
        works(extract.main, *options)
        assert file.read_bytes() == (whole / file.name).read_bytes()
        time = file.stat().st_mtime_ns
        works(extract.main, *options)
        assert file.stat().st_mtime_ns == time
        (cache / "shard-00000.h5").unlink()
    backbone = restore(whole, FeatureCache(whole).identity)
    backbone.from_hub = True
    keep_backbone(backbone, cache)
    assert not file.exists()


def test_the_message_about_other_options_names_only_what_differs():
    classes = [f"class {number}" for number in range(91)]
    grid = {"regions": "grid", "size": [224, 224]}
    detector = {"regions": "detector", "min_score": 0.2, "classes": classes}
    ours = {"regions": "grid+detector", "kinds": [grid, detector]}
    other = {"min_score": 0.3, "classes": [*classes[:90], "hat"]}
    theirs = ours | {"kinds": [grid | {"size": [384, 384]}, detector | other]}
    assert differences(ours, ours) == []
    assert differences(ours, theirs) == [
        "grid: size: [384, 384], not [224, 224]",
        "detector: min_score: 0.3, not 0.2",
        "detector: classes, entry 90: hat, not class 90",
    ]
    assert differences(detector, {**detector, "classes": classes[:81]}) == [
        "classes: 81 entries, not 91"
    ]
    assert differences(detector, grid) == ["regions: grid, not detector"]
    for damaged in ({}, {"kinds": None}, {"kinds": [grid]}, {"kinds": [grid, 5]}):
        assert differences(ours, damaged)


def test_a_mirrored_view_has_mirrored_boxes(worlds):
    """The detections of a mirrored scene are those of the scene, mirrored, for most scenes."""
    cache = FeatureCache(worlds("detector") / "cache")
    ids = cache.ids.tolist()
    plain, flipped = cache.rows(ids), cache.rows(ids, views=[1] * len(ids))
    centres = (plain.boxes[:, 0, 0] + plain.boxes[:, 0, 2]) / 2
    mirrored = 1 - (flipped.boxes[..., 0] + flipped.boxes[..., 2]) / 2
    near = np.abs(mirrored - centres[:, None]).min(1)
    assert np.median(near) < 0.05


def test_export_refuses_what_it_cannot_export(worlds, tmp_path):
    for kind, reason in (("detector", "regions of a detector"), ("grid+detector", "two kinds")):
        folder = tmp_path / kind
        works(train.main, *trained(worlds(kind), "pooled", folder, "--epochs", 1))
        assert reason in refused(export.main, "--checkpoint", folder, "--format", "torch")


def test_a_checkpoint_names_its_regions_and_damaged_weights_of_a_detector_are_refused(
    worlds, tmp_path
):
    works(train.main, *trained(worlds("detector"), "pooled", tmp_path / "run", "--epochs", 1))
    assert "test_resnet detector" in load_checkpoint(tmp_path / "run").describe()
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    for field, value, reason in (
        ("classes", ["a", "b"], "does not fit"),
        ("backbone", "../../file", "backbone are not valid"),
        ("size", [9999, 10], "size are not valid"),
        ("weights", "0000", "have the digest"),
    ):
        spoiled = json.loads(json.dumps(record))
        spoiled["features"][field] = value
        path.write_text(json.dumps(spoiled))
        photo = photos(worlds("detector"))[0]
        assert reason in refused(caption.main, photo, "--checkpoint", tmp_path / "run")


def test_captioning_from_python_takes_photographs_of_several_sizes(worlds, tmp_path):
    from PIL import Image

    works(train.main, *trained(worlds("grid+detector"), "pooled", tmp_path / "run", "--epochs", 1))
    captioner = load_captioner(tmp_path / "run", "cpu", "fp32")
    photo = Image.open(photos(worlds("grid+detector"))[0])
    several = [photo, photo.resize((100, 200)), photo.resize((300, 120))]
    assert captioner.caption(several) == [captioner.caption(each) for each in several]
