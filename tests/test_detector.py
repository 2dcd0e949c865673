"""Detector regions: the rows of a batch are those of a plain torchvision loop, image by image."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from data.datasets.sample import draw_with_boxes, encode_jpeg, make_scene, scene_rng
from models import ModelError
from models.backbones import rcnn
from models.backbones.detector import Detector, Selection, class_names
from models.backbones.rcnn import Architecture, build_rcnn, sizes_in
from pipeline.cli import UserError
from pipeline.extraction.detector import SCENES_WEIGHTS, DetectorOptions, open_detector
from pipeline.extraction.grid import scenes_weights

SMALL = Architecture("", "test_resnet", 5, (96, 160), width=8, channels=16)


def detector_of(architecture: Architecture, seed: int = 0, **selection) -> Detector:
    """A detector with random weights, whose scores differ as those of a trained one do."""
    torch.manual_seed(seed)
    network = build_rcnn(architecture)
    predictor = network.roi_heads.box_predictor
    names = class_names(predictor.cls_score.out_features)
    detector = Detector(architecture, network, names, Selection(**selection))
    seen = []
    hook = predictor.cls_score.register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        detector(pictures((96, 160), seed=9))
        hook.remove()
        scale = 2 / seen[0].std(0)
        predictor.cls_score.weight.mul_(scale[:, None])
        predictor.cls_score.bias.copy_((predictor.cls_score.bias - seen[0].mean(0)) * scale)
        predictor.bbox_pred.weight.mul_(5)
    return detector


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    coarse = [rng.integers(0, 256, (1, 3, 6, 8)) for _ in sizes]
    return [
        F.interpolate(torch.tensor(each).float(), size, mode="bicubic")[0].clamp(0, 255).byte()
        for each, size in zip(coarse, sizes, strict=True)
    ]


@torch.no_grad()
def plain_rows(detector: Detector, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, boxes, scores and labels of one image, by torchvision's own forward pass."""
    network, choice = detector.rcnn, detector.selection
    network.roi_heads.score_thresh, network.roi_heads.detections_per_img = 0.0, 100_000
    seen: dict[str, Tensor] = {}
    heads = network.roi_heads
    hooks = [
        heads.box_head.register_forward_hook(lambda m, i, out: seen.update(vectors=out)),
        heads.box_predictor.register_forward_hook(lambda m, i, out: seen.update(logits=out[0])),
    ]
    (found,) = network([image / 255])
    for hook in hooks:
        hook.remove()
    order = found["scores"].argsort(descending=True, stable=True)
    boxes, scores, labels = (found[name][order] for name in ("boxes", "scores", "labels"))
    kept = int((scores > choice.min_score).sum())
    kept = min(max(kept, choice.min_regions), choice.max_regions, len(scores))
    # the proposal of a detection is the one that gave its class this score
    all_scores = seen["logits"].softmax(1)
    proposals = [
        int((all_scores[:, label] - score).abs().argmin())
        for score, label in zip(scores[:kept], labels[:kept], strict=True)
    ]
    vectors = seen["vectors"].flatten(1)[proposals]
    height, width = image.shape[1:]
    scale = torch.tensor([width, height, width, height])
    return vectors, boxes[:kept] / scale, scores[:kept], labels[:kept]


def assert_same_rows(detector: Detector, images: list[Tensor]) -> int:
    """Assert that the rows of a batch are those of the loop; return how many detections differ.

    A detection may differ where its score is within 1e-3 of a threshold, or where another score
    is so close that rounding changes the order.
    """
    regions, (scores, labels) = detector.with_tables(images)
    different = 0
    for number, image in enumerate(images):
        vectors, boxes, plain_scores, plain_labels = plain_rows(detector, image)
        n = int(regions.counts[number])
        assert n == len(boxes) or (plain_scores - detector.selection.min_score).abs().min() < 1e-3
        assert not regions.features[number, n:].any() and not regions.boxes[number, n:].any()
        for row in range(n):
            same = (plain_labels == labels[number, row]) & (
                (boxes - regions.boxes[number, row]).abs().amax(1) < 1e-4
            )
            if not same.any():
                different += 1
                continue
            match = int(same.float().argmax())
            assert abs(float(plain_scores[match] - scores[number, row])) < 1e-4
            cosine = F.cosine_similarity(vectors[match], regions.features[number, row], dim=0)
            assert cosine > 0.9999
    return different


def test_rows_of_a_batch_are_those_of_a_plain_loop():
    """Photographs of three sizes, of which two are equal after the transform."""
    detector = detector_of(SMALL, min_score=0.3, max_regions=20)
    images = pictures((60, 90), (90, 60), (120, 180), (60, 90), (64, 64))
    rows = int(detector(images).counts.sum())
    assert rows > 50 and assert_same_rows(detector, images) <= rows * 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "maskrcnn_resnet50_fpn",
        "keypointrcnn_resnet50_fpn",
    ],
)
def test_rows_of_torchvisions_detectors_are_those_of_a_plain_loop(name):
    classes = 2 if "keypoint" in name else 7
    architecture = Architecture(name, classes=classes, size=(128, 213))
    detector = detector_of(architecture, min_score=0.3, max_regions=20)
    images = pictures((60, 90), (120, 180), (90, 60))
    assert assert_same_rows(detector, images) <= 1


def test_fewer_than_the_minimum_are_filled_up_and_more_than_the_maximum_are_left_out():
    images = pictures((60, 90), (96, 96))
    few = detector_of(SMALL, min_score=0.999, min_regions=7, max_regions=12)
    assert few(images).counts.tolist() == [7, 7] and assert_same_rows(few, images) == 0
    many = detector_of(SMALL, min_score=0.0, min_regions=0, max_regions=12)
    assert many(images).counts.tolist() == [12, 12] and assert_same_rows(many, images) == 0


def test_an_image_without_detections_is_one_region():
    detector = detector_of(SMALL, min_score=1.0, min_regions=0, max_regions=4)
    image = pictures((60, 90))[0]
    regions, (scores, labels) = detector.with_tables([image])
    assert regions.counts.tolist() == [1] and regions.boxes[0, 0].tolist() == [0, 0, 1, 1]
    assert scores[0].tolist() == [0] * 4 and labels[0].tolist() == [0] * 4
    heads, transform = detector.rcnn.roi_heads, detector.rcnn.transform
    inputs, _ = transform([image / 255])
    size = inputs.image_sizes[0]
    box = [torch.tensor([[0.0, 0.0, size[1], size[0]]])]
    maps = detector.rcnn.backbone(inputs.tensors)
    wanted = heads.box_head(heads.box_roi_pool(maps, box, [size]))
    torch.testing.assert_close(regions.features[0, :1], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 161), (1, 160), (2, 321), (1, 1)])
def test_a_photograph_of_any_aspect_ratio_has_regions(size):
    """torchvision's own transform fails where it rounds the shorter side down to 0 pixels."""
    detector = detector_of(SMALL)
    (image,) = pictures(size)
    regions = detector([image])
    assert regions.counts.item() >= 1 and regions.features.isfinite().all()
    assert regions.boxes.min() >= 0 and regions.boxes.max() <= 1
    transform = detector.rcnn.transform
    if min(size) * 160 // max(size):
        resized, _ = transform.resize(transform.normalize(image.float() / 255))
        assert torch.equal(detector._transform(image), resized)


def test_boxes_of_a_view_are_parts_of_the_photograph():
    detector = detector_of(SMALL, min_regions=2, max_regions=6)
    images = pictures((60, 90))
    whole = detector(images)
    view = torch.tensor([[0.5, 0.2, 1.0, 0.6]])
    part = detector(images, view)
    wanted = torch.tensor([0.5, 0.2] * 2) + whole.boxes * torch.tensor([0.5, 0.4] * 2)
    n = int(whole.counts[0])
    torch.testing.assert_close(part.boxes[0, :n], wanted[0, :n])
    assert torch.equal(part.features, whole.features)


def test_bf16_keeps_the_precision_of_boxes():
    detector = detector_of(SMALL, min_score=0.3, max_regions=20)
    images = pictures((60, 90), (120, 180))
    exact = detector(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = detector(images)
    assert rounded.features.dtype == rounded.boxes.dtype == torch.float32
    near = torchvision.ops.box_iou(exact.boxes[0], rounded.boxes[0]).amax(1)
    assert near.median() > 0.97


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "ssd300_vgg16", "fcos_resnet50_fpn"])
def test_a_one_stage_detector_is_refused_with_the_reason(name):
    with pytest.raises(ModelError, match=r"one-stage detector: it has no box head"):
        build_rcnn(Architecture(name))


def test_an_unknown_detector_is_refused_with_the_nearest_names():
    with pytest.raises(ModelError, match=r"did you mean fasterrcnn_resnet50_fpn"):
        build_rcnn(Architecture("fasterrcnn_resnet50"))
    with pytest.raises(ModelError, match="no backbone 'resnet5'"):
        build_rcnn(Architecture("", "resnet5"))
    with pytest.raises(ModelError, match="no pretrained weights of a detector over test_resnet"):
        build_rcnn(SMALL, pretrained=True)


def test_a_state_dict_has_the_sizes_of_its_detector():
    state = build_rcnn(SMALL).state_dict()
    shapes = {f"model.{key}": value.shape for key, value in state.items()}
    assert sizes_in(shapes) == {"classes": 5, "channels": 16, "width": 8}


# -------------------------------------------------------------------------- the sample's detector


def held_out_scenes(count: int) -> list[tuple[Tensor, Tensor, list[str]]]:
    """Pixels, true boxes in 0..1 and class names of scenes that no training and no sample has."""
    rows = []
    for number in range(200_000, 200_000 + count):
        rng = scene_rng(0, number)
        scene = make_scene(rng)
        picture, boxes = draw_with_boxes(scene, rng)
        pixels = np.array(Image.open(io.BytesIO(encode_jpeg(picture))))
        scale = torch.tensor([scene.width, scene.height] * 2)
        names = [" ".join(thing.words) for thing in scene.things]
        rows.append((torch.tensor(pixels).permute(2, 0, 1), torch.tensor(boxes) / scale, names))
    return rows


def test_the_samples_detector_finds_the_things_of_held_out_scenes():
    """IoU of the best detection of each true box with the same label, and precision at IoU 0.5.

    A detection of the precision has a score above 0.5, as in models/weights/pretrain_detector.py.
    """
    options = DetectorOptions(min_regions=0)
    detector = open_detector(options, "sample", 0)
    assert scenes_weights(SCENES_WEIGHTS).stat().st_size <= 3_000_000
    scenes = held_out_scenes(48)
    regions, (scores, labels) = detector.with_tables([pixels for pixels, _, _ in scenes])
    ious, correct = [], []
    for number, (_, boxes, names) in enumerate(scenes):
        detected = scores[number] > options.min_score
        found = [detector.classes[label] for label in labels[number][detected].tolist()]
        same = torch.tensor([[name == other for other in names] for name in found])
        iou = torchvision.ops.box_iou(regions.boxes[number][detected].double(), boxes)
        iou = iou * same.reshape(iou.shape)
        ious += iou.amax(0).tolist() if len(found) else [0.0] * len(names)
        taken: set[int] = set()
        sure = scores[number][detected] > 0.5
        for row in iou[sure]:  # the best score first; a box is found once
            best = int(row.argmax())
            correct.append(bool(row[best] >= 0.5) and best not in taken)
            taken |= {best} if correct[-1] else set()
    assert np.mean(ious) > 0.7 and np.mean(correct) > 0.8


# -------------------------------------------------------------------------------------- the options


def weight_file(path: Path, detector: Detector, header: dict | None = None) -> Path:
    state = {key: value.contiguous() for key, value in detector.network.state_dict().items()}
    save_file(state, path, {key: json.dumps(value) for key, value in (header or {}).items()})
    return path


def test_a_weight_file_gives_classes_widths_and_names(tmp_path):
    detector = detector_of(SMALL)
    names = ["background", "cat", "dog", "cow", "hen"]
    path = weight_file(tmp_path / "w.safetensors", detector, {"classes": names, "size": [96, 160]})
    options = DetectorOptions(detector_backbone="test_resnet", detector_weights=str(path))
    opened = open_detector(options, "coco", 0)
    assert opened.classes == tuple(names) and opened.size == (96, 160)
    assert opened.digest() == detector.digest() and opened.channels == 16
    images = pictures((60, 90))
    assert torch.equal(opened(images).features, detector(images).features)
    torch.save({"model": detector.network.state_dict()}, tmp_path / "w.pth")
    options = replace(options, detector_weights=str(tmp_path / "w.pth"), detector_size="96x160")
    assert open_detector(options, "coco", 0).classes[1] == "class 1"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"classes": [1, 2, 3, 4, 5]}, "must be a list of names"),
        ({"size": [0, 5]}, "a list of two lengths"),
        ({"classes": ["a", "b", "c", "d"]}, "4 names of classes, and its weights have 5 classes"),
    ],
)
def test_a_header_with_a_mistake_is_refused(tmp_path, header, message):
    path = weight_file(tmp_path / "w.safetensors", detector_of(SMALL), header)
    options = DetectorOptions(detector_backbone="test_resnet", detector_weights=str(path))
    with pytest.raises(UserError, match=message):
        open_detector(options, "coco", 0)


def test_weights_without_a_class_besides_the_background_are_refused(tmp_path):
    network = build_rcnn(replace(SMALL, classes=1))
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="no class besides the background"):
        open_detector(DetectorOptions(None, "test_resnet", weights, "96x160"), "coco", 0)


@pytest.mark.slow
def test_torchvisions_own_file_has_its_class_names_and_its_epsilon(tmp_path, monkeypatch):
    """A file with the name and the hash of the published weights is recognized."""
    name = "fasterrcnn_resnet50_fpn"
    network = build_rcnn(Architecture(name, size=(64, 64)))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()[:8]
    published = rcnn.published_weights(name)
    assert (published.file, published.sha256, published.classes[1], published.norm_eps) == (
        "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", "258fb6c6", "person", 0.0,
    )  # fmt: skip
    named = published._replace(file="w.pth", sha256=digest)
    monkeypatch.setattr("pipeline.extraction.detector.published_weights", lambda _: named)
    options = DetectorOptions(name, detector_weights=str(tmp_path / "w.pth"))
    detector = open_detector(options, "coco", 0)
    assert detector.classes[1] == "person" and detector.identity()["norm_eps"] == 0.0
    assert detector.rcnn.backbone.body.bn1.eps == 0.0
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.extraction.detector.published_weights", lambda _: published)
        assert open_detector(options, "coco", 0).classes[1] == "class 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_regions": 40}, "--min-regions is 40 and --max-regions is 36"),
        ({"detector": "x", "detector_backbone": "y"}, "either --detector or --detector-backbone"),
        ({"boxes": Path("b.json"), "min_score": 0.3}, "leave out --min-score"),
        ({"boxes": Path("b.json"), "max_regions": 50}, "leave out --max-regions"),
        ({"detector_size": "800x600"}, "must not be longer"),
        ({"detector_size": "big"}, "--detector-size 'big'"),
        ({"detector": "ssd300_vgg16"}, "no box head.*Pass one of these as --detector"),
        ({"detector": "fasterrcnn"}, "no detector 'fasterrcnn'"),
        ({"detector_weights": "no.pth"}, "--detector-weights no.pth: no such file"),
        ({"detector_backbone": "test_resnet"}, "use --detector-weights FILE, or"),
    ],
)
def test_options_with_a_mistake_are_refused_by_name(options, message):
    with pytest.raises((UserError, ModelError), match=message):
        open_detector(DetectorOptions(**options), "coco", 0)
