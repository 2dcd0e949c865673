"""Detector regions: opens the detector for an extraction, and rebuilds it for captioning."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from data.boxes import MAX_COUNT, GivenBoxes
from models.backbones.detector import BoxedDetector, Detector, Selection, new_detector
from models.backbones.rcnn import (
    Architecture,
    PublishedWeights,
    build_rcnn,
    published_weights,
    sizes_in,
)
from pipeline.cli import UserError
from pipeline.extraction.grid import (
    SCENES_BACKBONE,
    by_option,
    load_weights,
    parse_size,
    read_weights,
    restore_weights,
    scenes_weights,
    stored_shapes,
)

MAX_SIDE = 4096  # maximum length of a side of the input, in pixels
DEFAULT_DETECTOR = "fasterrcnn_resnet50_fpn_v2"
SCENES_WEIGHTS = "detector_scenes.safetensors"  # of the detector over SCENES_BACKBONE
# words of the messages of models.backbones, and the options that they are about
FLAGS = {
    "weights from a pip package, ": "",
    "weights from a file": "--detector-weights FILE",
    "random weights": "--detector-weights random",
    "Choose one of": "Pass one of these as --detector:",
    "in the folder HF_HOME": "in the folder TORCH_HOME",
}
SELECTION = tuple(item.name for item in fields(Selection))  # also names of options


@dataclass(frozen=True)
class DetectorOptions:
    """Options of --regions detector."""

    detector: str | None = field(
        default=None,
        metadata={
            "help": "one of torchvision's R-CNN models  [fasterrcnn_resnet50_fpn_v2; sample: "
            "--detector-backbone test_resnet]"
        },
    )
    detector_backbone: str | None = field(
        default=None,
        metadata={"help": "a timm model; the detector is Faster R-CNN over its feature maps"},
    )
    detector_weights: str | None = field(
        default=None,
        metadata={
            "help": "pretrained: torchvision's, from COCO; random; scenes: Onceover's own, for "
            "test_resnet; or a file  [pretrained; sample: scenes]"
        },
    )
    detector_size: str | None = field(
        default=None,
        metadata={
            "help": "largest shorter and longer side of the detector's input in pixels: SHORTxLONG"
            "  [that of the weights, else 800x1333]"
        },
    )
    min_score: float = field(
        default=Selection.min_score,
        metadata={"help": "keep detections with a higher score", "at_least": 0, "at_most": 1},
    )
    min_regions: int = field(
        default=Selection.min_regions,
        metadata={
            "help": "number of regions that detections of a lower score fill up",
            "at_least": 0,
            "at_most": MAX_COUNT,
        },
    )
    max_regions: int = field(
        default=Selection.max_regions,
        metadata={
            "help": "maximum number of regions of an image",
            "at_least": 1,
            "at_most": MAX_COUNT,
        },
    )
    boxes: Path | None = field(
        default=None,
        metadata={
            "help": "extract the features of the boxes in this file (COCO's annotation format), in "
            "place of detections"
        },
    )

    def __post_init__(self) -> None:
        if self.min_regions > self.max_regions:
            raise UserError(
                f"--min-regions is {self.min_regions} and --max-regions is {self.max_regions}; "
                "the first must not be larger than the second"
            )
        passed = [name for name in SELECTION if getattr(self, name) != getattr(Selection, name)]
        if self.boxes and passed:
            raise UserError(
                f"--boxes takes all boxes of the file; leave out --{passed[0].replace('_', '-')}"
            )
        if self.detector and self.detector_backbone:
            raise UserError(
                f"--detector {self.detector} has its own backbone; pass either --detector or "
                "--detector-backbone"
            )
        sides = parse_size("detector-size", self.detector_size)
        if sides and (sides[0] > sides[1] or sides[1] > MAX_SIDE):
            raise UserError(
                f"--detector-size {self.detector_size}: the first side must not be longer than the "
                f"second, and the second at most {MAX_SIDE} pixels"
            )

    @property
    def selection(self) -> dict[str, Any]:
        """The fields of models.backbones.detector.Selection."""
        return {name: getattr(self, name) for name in SELECTION}


def open_detector(options: DetectorOptions, dataset: str, seed: int) -> Detector:
    """Open the detector of the options, with its weights.

    The default for the embedded sample is Onceover's own detector over test_resnet.
    Raises ModelError or UserError if it cannot be created, or if the weights do not fit.
    """
    with by_option(FLAGS):
        return _open(options, dataset, seed)


def _open(options: DetectorOptions, dataset: str, seed: int) -> Detector:
    if dataset == "sample" and not options.detector and not options.detector_backbone:
        options = replace(
            options,
            detector_backbone=SCENES_BACKBONE,
            detector_weights=options.detector_weights or "scenes",
        )
    name = "" if options.detector_backbone else options.detector or DEFAULT_DETECTOR
    architecture = Architecture(
        name,
        options.detector_backbone or "",
        size=parse_size("detector-size", options.detector_size),
    )
    weights = options.detector_weights or "pretrained"
    if weights in ("pretrained", "random"):
        pretrained = weights == "pretrained"
        published = published_weights(name) if name and pretrained else None
        if published:
            architecture = replace(architecture, norm_eps=published.norm_eps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_rcnn(architecture, pretrained)
        classes = published.classes if published else None
        detector = new_detector(architecture, network, classes, **options.selection)
        detector.from_hub = pretrained
        return detector
    path = scenes_weights(SCENES_WEIGHTS) if weights == "scenes" else Path(weights)
    if not path.is_file():
        raise UserError(
            f"--detector-weights {path}: no such file; pass a file, 'pretrained', 'random' or "
            "'scenes'"
        )
    state_dict = read_weights(path, "--detector-weights")
    header = read_header(path)
    sizes: dict[str, Any] = sizes_in({key: value.shape for key, value in state_dict.items()})
    if name:
        sizes.pop("channels", None)  # a property of torchvision's detector
        sizes.pop("width", None)
    architecture = replace(architecture, size=architecture.size or header.size, **sizes)
    names = header.classes
    if published := published_file(name, path):
        architecture = replace(architecture, norm_eps=published.norm_eps)
        names = published.classes
    if names is not None and len(names) != architecture.classes:
        raise UserError(
            f"--detector-weights {path}: its header has {len(names)} names of classes, and its "
            f"weights have {architecture.classes} classes; the first name is that of the background"
        )
    network = build_rcnn(architecture)
    detector = new_detector(architecture, network, names, **options.selection)
    model_flag = "--detector, or the --detector-backbone,"
    load_weights(detector, state_dict, path, "--detector-weights", model_flag)
    return detector


def use_given_boxes(detector: Detector, boxes: GivenBoxes) -> BoxedDetector:
    """Return a detector that computes the features of given boxes."""
    tensors = {
        image_id: tuple(map(torch.from_numpy, (each.boxes, each.scores, each.labels)))
        for image_id, each in boxes.by_id.items()
    }
    sizes = {image_id: each.size for image_id, each in boxes.by_id.items()}
    return BoxedDetector(
        detector,
        tensors,  # type: ignore[arg-type]
        sizes,
        boxes.classes,
        boxes.digest,
        boxes.largest,
    )


def published_file(detector: str, path: Path) -> PublishedWeights | None:
    """Return torchvision's published weights of a detector if a file has them, by name and hash."""
    published = published_weights(detector) if detector else None
    if published is None or path.name != published.file:
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return published if digest.startswith(published.sha256) else None


@dataclass(frozen=True)
class Header:
    """What the header of a safetensors file says of a detector; None: it does not say."""

    classes: Sequence[str] | None = None
    size: tuple[int, int] | None = None


def read_header(path: Path) -> Header:
    """Read `classes` and `size` (JSON) from the header of a weight file, if they are there."""
    if path.suffix.lower() != ".safetensors":
        return Header()
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        classes = json.loads(metadata.get("classes", "null"))
        size = json.loads(metadata.get("size", "null"))
    except ValueError as error:
        raise UserError(
            f"--detector-weights {path}: classes and size in its header are not JSON"
        ) from error
    if not _is_names(classes) or not _is_sides(size):
        raise UserError(
            f"--detector-weights {path}: classes in its header must be a list of names, and size a "
            "list of two lengths in pixels"
        )
    return Header(classes, None if size is None else (size[0], size[1]))


def _is_names(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value is None or is_list


def _is_sides(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) == 2
    return value is None or (
        is_list and all(type(side) is int and 0 < side <= MAX_SIDE for side in value)
    )


def check_identity(origin: str, identity: Mapping[str, Any]) -> None:
    """Raise UserError if the identity of a checkpoint is not a valid `Detector.identity`.

    origin: the file of the identity, for messages. The check is for security, as in `grid`.
    """

    def is_count(value: Any, at_least: int) -> bool:
        return type(value) is int and at_least <= value <= MAX_COUNT

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and 0 <= value <= 1

    def is_name(value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(r"[\w.-]*", value) is not None

    classes = identity.get("classes")
    is_valid = {
        "detector": is_name(identity.get("detector")),
        "backbone": is_name(identity.get("backbone")),
        "weights": isinstance(identity.get("weights"), str),
        "size": identity.get("size") is not None and _is_sides(identity["size"]),
        "norm_eps": identity.get("norm_eps") in (None, 0.0),
        "min_score": is_number(identity.get("min_score")),
        "min_regions": is_count(identity.get("min_regions"), 0),
        "max_regions": is_count(identity.get("max_regions"), 1),
        "channels": is_count(identity.get("channels"), 1),
        "classes": classes is not None and _is_names(classes) and is_count(len(classes), 2),
    }
    if invalid := [key for key, valid in is_valid.items() if not valid]:
        raise UserError(f"{origin}: features: {', '.join(invalid)} are not valid")


def restore_detector(folder: Path, identity: Mapping[str, Any], prefix: str = "") -> Detector:
    """Rebuild the detector of a cache or checkpoint from backbone.safetensors, else from the hub.

    prefix: as in `restore_backbone`.

    Raises UserError if the weights do not have the digest in `identity`.
    """
    if "boxes" in identity:
        raise UserError(
            f"{folder} needs the features of given boxes (--boxes), which a photograph alone does "
            "not have. Evaluate it over the cache that it was trained on"
        )
    check_identity(f"{folder}/config.json", identity)
    shapes, classes = stored_shapes(folder, prefix), identity["classes"]
    from_hub = not shapes
    architecture = Architecture(
        identity["detector"],
        identity["backbone"],
        len(classes),
        (identity["size"][0], identity["size"][1]),
        identity["norm_eps"],
        channels=identity["channels"],
    )
    if not from_hub:
        # checked before the network is built, which could be too large for the memory
        if not architecture.detector:
            architecture = replace(architecture, width=sizes_in(shapes).get("width", 1))
        with torch.device("meta"):
            expected = build_rcnn(architecture).state_dict()
        if {key: tuple(value.shape) for key, value in expected.items()} != shapes:
            file = folder / "backbone.safetensors"
            raise UserError(f"{file} does not fit {architecture.name}; copy it again")
    network = build_rcnn(architecture, from_hub)
    selection = {name: identity[name] for name in SELECTION}
    detector = new_detector(architecture, network, classes, **selection)
    restore_weights(detector, folder, identity, prefix, from_hub)
    return detector
