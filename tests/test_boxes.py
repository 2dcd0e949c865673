"""Features of given boxes (--boxes), and the regions that --inspect --show draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.boxes import read_boxes
from data.cache.reader import FeatureCache
from data.datasets.registry import open_source
from data.datasets.sample import draw_sample
from data.sources import Image as PhotoOf
from data.sources import image_id
from pipeline import caption, extract, train
from pipeline.extraction.detector import DetectorOptions, open_detector
from pipeline.extraction.drawing import file_of
from tests.test_commands import QUICK, refused, works

DETECTOR = ["--regions", "detector", "--detector-backbone", "test_resnet",
            "--detector-weights", "random", "--detector-size", "96x128",
            "--device", "cpu", "--precision", "fp32"]  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("boxes") / "sample"
    draw_sample(folder, count=20, seed=3)
    return folder


def images_of(drawn: Path) -> list:
    return open_source("karpathy", drawn).select("all")


def boxes_file(drawn: Path, path: Path) -> dict:
    """Two boxes of each scene, but none of the last; the third scene's name is in a folder."""
    images = images_of(drawn)
    content = {
        "images": [
            {
                "id": image.id,
                "file_name": image.name.rpartition("/")[2],
                "width": 256,
                "height": 192,
            }
            for image in images
        ],
        "annotations": [
            {"image_id": image.id, "bbox": box, "category_id": category}
            for image in images[:-1]
            for box, category in (([0, 0, 128, 96], 7), ([64.0, 48.0, 100.0, 90.0], 3))
        ],
        "categories": [{"id": 3, "name": "star"}, {"id": 7, "name": "cross"}],
    }
    path.write_text(json.dumps(content))
    return content


def at(drawn: Path) -> list:
    return ["--dataset", "karpathy", "--root", drawn]


def test_features_of_given_boxes_are_the_box_heads_vectors_of_these_boxes(drawn, tmp_path):
    boxes_file(drawn, tmp_path / "b.json")
    asked = [*at(drawn), *DETECTOR, "--boxes", tmp_path / "b.json", "--out", tmp_path / "cache"]
    works(extract.main, *asked)
    cache = FeatureCache(tmp_path / "cache")
    assert cache.shape[0] == 2 and cache.classes == ["background", "star", "cross"]
    assert "all images were already extracted" in works(extract.main, *asked)
    images = images_of(drawn)
    rows = cache.rows([image.id for image in images])
    scores, labels = cache.detections([image.id for image in images])
    wanted = np.array([[0, 0, 0.5, 0.5], [0.25, 0.25, 164 / 256, 138 / 192]], np.float32)
    np.testing.assert_allclose(rows.boxes[:-1], np.tile(wanted, (19, 1, 1)), atol=1e-6)
    assert rows.counts.tolist() == [2] * 19 + [1] and rows.boxes[-1, 0].tolist() == [0, 0, 1, 1]
    assert labels[:-1].tolist() == [[2, 1]] * 19 and labels[-1].tolist() == [0, 0]
    assert scores[:-1].tolist() == [[1, 1]] * 19 and scores[-1].tolist() == [0, 0]

    options = DetectorOptions(
        detector_backbone="test_resnet", detector_weights="random", detector_size="96x128"
    )
    network = open_detector(options, "karpathy", 0).rcnn
    with torch.no_grad():
        pixels = torch.tensor(np.array(Image.open(images[4].path))).permute(2, 0, 1) / 255
        inputs, _ = network.transform([pixels])
        maps = network.backbone(inputs.tensors)
        height, width = inputs.image_sizes[0]
        boxes = torch.tensor(wanted) * torch.tensor([width, height, width, height])
        pooled = network.roi_heads.box_roi_pool(maps, [boxes], inputs.image_sizes)
        plain = network.roi_heads.box_head(pooled)
    found = torch.from_numpy(rows.features[4]).float()
    assert torch.cosine_similarity(found, plain).min() > 0.9999


def test_a_decoder_over_given_boxes_captions_no_photograph(drawn, tmp_path):
    boxes_file(drawn, tmp_path / "b.json")
    asked = [*at(drawn), *DETECTOR, "--boxes", tmp_path / "b.json", "--out", tmp_path / "cache"]
    works(extract.main, *asked)
    works(
        train.main, *at(drawn), "--features", tmp_path / "cache", "--out", tmp_path / "run", *QUICK
    )
    message = refused(caption.main, images_of(drawn)[0].path, "--checkpoint", tmp_path / "run")
    assert "given boxes" in message and "Evaluate it over the cache" in message


def spoil(content: dict, how: str) -> None:
    first, image = content["annotations"][0], content["images"][0]
    if how == "not in categories":
        first["category_id"] = 9
    elif how == "not inside the photograph":
        first["bbox"] = [200, 0, 100, 10]
    elif how == "bbox must be 4 numbers":
        first["bbox"] = [1, 2, None, 4]
    elif how == "no entry in images, or several, for 1 of 20":
        content["images"].pop()
    elif how == "not in images":
        first["image_id"] = 10**6
    elif how == "not a length in pixels":
        image["width"] = "256"
    elif how == "occurs twice":
        content["images"].append(image)
    elif how == r"the category id \[1\] is not":
        content["categories"][0]["id"] = [1]
    elif how == r"categories\[1\]: id 3 occurs twice":
        content["categories"][1]["id"] = 3
    elif how == r"categories\[1\]: name is null":
        content["categories"][1]["name"] = None
    elif how == r"category_id \[3\] is not in categories":
        first["category_id"] = [3]
    elif how == "score is 7.5; it must be 0 to 1":
        first["score"] = 7.5
    elif how == "has 32,768 boxes":
        content["annotations"] += [first] * 32766
    elif how == r"bbox is \[0, 10":
        first["bbox"] = [0, 10**400, 1, 1]
    elif how == "the lists images, annotations, categories":
        del content["categories"]


@pytest.mark.parametrize(
    "how",
    [
        "not in categories",
        "not inside the photograph",
        "bbox must be 4 numbers",
        "no entry in images, or several, for 1 of 20",
        "not in images",
        "not a length in pixels",
        "occurs twice",
        r"the category id \[1\] is not",
        r"categories\[1\]: id 3 occurs twice",
        r"categories\[1\]: name is null",
        r"category_id \[3\] is not in categories",
        "score is 7.5; it must be 0 to 1",
        "has 32,768 boxes",
        r"bbox is \[0, 10",
        "the lists images, annotations, categories",
    ],
)
def test_a_boxes_file_with_a_mistake_is_refused_with_its_place(drawn, tmp_path, how):
    content = boxes_file(drawn, tmp_path / "b.json")
    spoil(content, how)
    (tmp_path / "b.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=how):
        read_boxes(tmp_path / "b.json", images_of(drawn))


def test_photographs_with_one_file_name_in_several_folders_have_their_own_boxes(tmp_path):
    names = ["cat/1.jpg", "dog/1.jpg", "1.jpg", "cow/2.jpg"]
    entries = [
        {"id": number, "file_name": name, "width": 100, "height": 50}
        for number, name in enumerate(["dog/1.jpg", "1.jpg", "cat/1.jpg", "other/2.jpg"])
    ]
    boxes = [{"image_id": n, "bbox": [0, 0, 10 + n, 10], "category_id": 1} for n in range(4)]
    content = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "b.json").write_text(json.dumps(content))
    images = [PhotoOf(image_id(name), name, Path(name), "all", ()) for name in names]
    by_id = read_boxes(tmp_path / "b.json", images).by_id
    widths = [round(float(by_id[image.id].boxes[0, 2]) * 100) for image in images]
    assert widths == [12, 10, 11, 13]
    images.append(PhotoOf(7, "hen/1.jpg", Path("hen/1.jpg"), "all", ()))
    with pytest.raises(DataError, match=r"or several, for 1 of 5 photographs: hen/1.jpg"):
        read_boxes(tmp_path / "b.json", images)


def test_boxes_of_a_rotated_photograph_and_views_of_given_boxes_are_refused(drawn, tmp_path):
    content = boxes_file(drawn, tmp_path / "b.json")
    asked = [*at(drawn), *DETECTOR, "--boxes", tmp_path / "b.json", "--out", tmp_path / "cache"]
    assert "leave out --views" in refused(extract.main, *asked, "--views", "flip")
    for image in content["images"]:
        image["width"], image["height"] = 192, 256
    for each in content["annotations"]:
        each["bbox"] = [0, 0, 50, 50]
    (tmp_path / "b.json").write_text(json.dumps(content))
    assert "must be of the upright photograph" in refused(extract.main, *asked)


def test_show_draws_boxes_where_they_are_and_replaces_no_file(drawn, tmp_path):
    boxes_file(drawn, tmp_path / "b.json")
    cache = tmp_path / "cache"
    works(extract.main, *at(drawn), *DETECTOR, "--boxes", tmp_path / "b.json", "--out", cache)
    show = ["--inspect", cache, "--show", tmp_path / "shown", *at(drawn), "--limit", 2]
    works(extract.main, *show)
    paths = sorted((tmp_path / "shown").glob("*.jpg"))
    assert len(paths) == 2
    plain = {image.name.replace("/", "_") + ".jpg": image.path for image in images_of(drawn)}
    before = np.array(Image.open(plain[paths[0].name])).astype(int)
    after = np.array(Image.open(paths[0])).astype(int)
    changed = np.abs(after - before).max(2) > 60
    assert changed[95, 60:128].mean() > 0.8 and changed[140:, 170:].mean() < 0.02
    assert "is not empty" in refused(extract.main, *show)
    assert "pass --inspect CACHE too" in refused(extract.main, "--show", tmp_path / "x")
    other = [*show[:3], tmp_path / "other", "--dataset", "folder", "--root", tmp_path / "shown"]
    assert "no photograph of" in refused(extract.main, *other)


def test_show_draws_on_no_other_photograph_with_the_same_id(drawn, tmp_path):
    cache = tmp_path / "cache"
    works(extract.main, *at(drawn), *DETECTOR, "--limit", 2, "--out", cache)
    images = [{"id": image.id, "file_name": f"x{image.id}.jpg"} for image in images_of(drawn)[:2]]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": []}))
    dataset = ["--dataset", "coco", "--annotations", tmp_path / "c.json", "--images", tmp_path]
    show = ["--inspect", cache, "--show", tmp_path / "shown", *dataset]
    assert "the cache was made from other photographs" in refused(extract.main, *show)
    assert not (tmp_path / "shown").exists()


def test_each_shown_photograph_has_its_own_file(tmp_path):
    """Slashes become underscores, and the name of a photograph may be as long as a path."""
    names = ["a/b.jpg", "a_b.jpg", f"{'x' * 250}/c.jpg", f"{'x' * 250}/d.jpg", "é" * 101, "f.jpg"]
    files: set[str] = set()
    for number, name in enumerate(names, 2**62):
        files.add(file_of(name, number, files))
    assert len(files) == len(names) and {"a_b.jpg.jpg", "f.jpg.jpg"} <= files
    for file in files:
        (tmp_path / file).touch()
