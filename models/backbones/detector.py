"""Frozen two-stage detectors: each detection of a photograph is a region (Anderson et al. 2018).

The feature of a region is the vector of the box head that its score was computed from: that of its
proposal, before the two predictors. Its box is the detector's final box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import boxes as box_ops

from models import ModelError
from models.backbones.interface import Pixels
from models.backbones.network import NetworkBackbone, first_convolutions_in_fp32
from models.backbones.rcnn import Architecture
from models.regions import Regions

BRANCHES = ("roi_heads.mask_head", "roi_heads.mask_predictor", "roi_heads.keypoint_head",
            "roi_heads.keypoint_predictor")  # fmt: skip
MIN_SIDE = 1e-2  # torchvision removes boxes with a side below this number of pixels
CANDIDATES = 512  # number of boxes that suppression considers first


@dataclass(frozen=True)
class Selection:
    """Which detections become regions.

    min_score: detections with a higher score are kept, after non-maximum suppression.
    min_regions: if fewer are kept, the next best after suppression fill up.
    max_regions: maximum number of regions.
    """

    min_score: float = 0.2
    min_regions: int = 10
    max_regions: int = 36

    def __post_init__(self) -> None:
        if not 0 <= self.min_regions <= self.max_regions or not self.max_regions:
            raise ModelError(
                f"min regions is {self.min_regions} and max regions is {self.max_regions}; the "
                "first must not be larger than the second"
            )


class Detections(NamedTuple):
    """The detections of one image, the best first.

    vectors: [n,C]. boxes: [n,4], x0 y0 x1 y1 in pixels of the input. scores: [n].
    labels: [n] int64, 0 for a region that is not a detection.
    """

    vectors: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Detector(NetworkBackbone):
    """A frozen two-stage detector, whose detections are regions.

    Its input are photographs of their original size, because torchvision's transform of the network
    resizes them. Images of equal size after the transform are computed together.

    classes: names of the classes; label 0 is the background.

    Attributes: `channels` C of the features.
    """

    tables = ("scores", "labels")
    batch = 8

    def __init__(
        self,
        architecture: Architecture,
        network: GeneralizedRCNN,
        classes: Sequence[str],
        selection: Selection = Selection(),
    ) -> None:
        super().__init__(architecture.name, network, BRANCHES)
        self.architecture, self.selection = architecture, selection
        self.rcnn: Any = network  # the network, whose parts have no types
        predictor = self.rcnn.roi_heads.box_predictor
        self.channels: int = predictor.cls_score.in_features
        self.classes = tuple(classes)
        if len(self.classes) != predictor.cls_score.out_features:
            raise ModelError(
                f"{self.name} has {predictor.cls_score.out_features} classes, and there are "
                f"{len(self.classes)} names of classes"
            )
        if len(self.classes) < 2:
            raise ModelError(f"{self.name} has no class besides the background")
        self.requires_grad_(False).eval()
        self._prepare()

    def _prepare(self) -> None:
        """Set the precision of the layers of the network that need fp32 where others run in bf16.

        Raises ModelError if the network gives no feature maps.
        """
        # for the arithmetic of boxes
        self.rcnn.rpn.head.register_forward_hook(
            lambda module, inputs, outputs: tuple([map.float() for map in maps] for maps in outputs)
        )
        with first_convolutions_in_fp32(self.rcnn), torch.no_grad():
            try:
                self.rcnn.backbone(torch.zeros(1, 3, 128, 128))
            except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
                raise ModelError(f"{self.name} gives no feature maps: {error}") from error

    @property
    def size(self) -> tuple[int, int]:
        """Maximum length of the shorter and of the longer side of the input, in pixels."""
        return self.rcnn.transform.min_size[-1], self.rcnn.transform.max_size

    @property
    def shape(self) -> tuple[int, int]:
        return self.selection.max_regions, self.channels

    def identity(self) -> dict[str, Any]:
        transform, heads = self.rcnn.transform, self.rcnn.roi_heads
        return {
            "detector": self.architecture.detector,
            "backbone": self.architecture.backbone,
            "weights": self.digest(),
            "size": list(self.size),
            "mean": list(transform.image_mean),
            "std": list(transform.image_std),
            "norm_eps": self.architecture.norm_eps,
            "nms": heads.nms_thresh,
            "regions": "detector",
            **asdict(self.selection),
            "channels": self.channels,
            "classes": list(self.classes),
        }

    def framing(self) -> dict[str, Any]:
        return {"size": self.size, "interpolation": "bilinear", "resize": "original"}

    def forward(self, pixels: Pixels, view_boxes: Tensor | None = None) -> Regions:
        return self.with_tables(pixels, view_boxes)[0]

    def with_tables(
        self,
        pixels: Pixels,
        view_boxes: Tensor | None = None,
        image_ids: Sequence[int] | None = None,
    ) -> tuple[Regions, tuple[Tensor, ...]]:
        """Return the regions, and scores [B,R] float32 and labels [B,R] int64 of the regions."""
        images = [self._transform(image) for image in pixels]
        groups: dict[torch.Size, list[int]] = {}
        for number, image in enumerate(images):
            groups.setdefault(image.shape, []).append(number)
        count, (regions, channels), device = len(images), self.shape, images[0].device
        features = torch.zeros(count, regions, channels, device=device)
        boxes = torch.zeros(count, regions, 4, device=device)
        scores = torch.zeros(count, regions, device=device)
        labels = torch.zeros(count, regions, dtype=torch.int64, device=device)
        counts = [0] * count
        for (_, height, width), numbers in groups.items():
            scale = torch.tensor([width, height] * 2, device=device)
            group = torch.stack([images[number] for number in numbers])
            ids = None if image_ids is None else [image_ids[number] for number in numbers]
            found = self._detect(group, ids)
            for number, detections in zip(numbers, found, strict=True):
                n = counts[number] = len(detections.boxes)
                features[number, :n] = detections.vectors
                boxes[number, :n] = self._in_photograph(
                    detections.boxes / scale, view_boxes, number
                )
                scores[number, :n], labels[number, :n] = detections.scores, detections.labels
        found_counts = torch.tensor(counts, device=device)
        return Regions(features, boxes, found_counts), (scores, labels)

    def _transform(self, image: Tensor) -> Tensor:
        """Normalise and resize an image [3,h,w] uint8 as torchvision does: [3,H,W] float32.

        torchvision fails if it rounds the shorter side of a very long image down to 0 pixels. Here
        this side has at least 1 pixel.
        """
        transform = self.rcnn.transform
        normalised = transform.normalize(image.float() / 255)
        sides = normalised.shape[1:]
        scale = transform.max_size / max(sides)
        if min(sides) * scale >= 2:  # far enough from 1 for torchvision's rounding
            return transform.resize(normalised)[0]
        scale = min(scale, self.size[0] / min(sides))
        size = [max(1, math.floor(side * scale)) for side in sides]
        return F.interpolate(normalised[None], size, mode="bilinear", align_corners=False)[0]

    def _feature_maps(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Padded images [B,3,H,W] of the transform, and their feature maps by level."""
        padded = self.rcnn.transform.batch_images(list(images), self.rcnn.transform.size_divisible)
        return padded, {name: map.float() for name, map in self.rcnn.backbone(padded).items()}

    def _detect(self, images: Tensor, image_ids: Sequence[int] | None) -> list[Detections]:
        """The detections of images [B,3,H,W] of the transform."""
        size = (images.shape[2], images.shape[3])
        padded, feature_maps = self._feature_maps(images)
        inputs = ImageList(padded, [size] * len(images))
        proposals, _ = self.rcnn.rpn(inputs, feature_maps)
        vectors = self._vectors(feature_maps, proposals, size)
        heads = self.rcnn.roi_heads
        with torch.autocast(images.device.type, enabled=False):
            logits, deltas = heads.box_predictor(vectors)
            boxes = heads.box_coder.decode(deltas, proposals)
            boxes = box_ops.clip_boxes_to_image(boxes, size)
            scores = logits.softmax(-1)
        lengths = [len(each) for each in proposals]
        detections = [
            self._select(*parts)
            for parts in zip(
                vectors.split(lengths), boxes.split(lengths), scores.split(lengths), strict=True
            )
        ]
        for number, found in enumerate(detections):
            if not len(found.boxes):
                maps = {name: map[number : number + 1] for name, map in feature_maps.items()}
                detections[number] = self._whole_image(maps, size)
        return detections

    def _vectors(
        self, feature_maps: dict[str, Tensor], boxes: list[Tensor], size: tuple[int, int]
    ) -> Tensor:
        """The box head's vectors [n,C] of boxes [n,4] in pixels, one tensor of boxes per image."""
        heads = self.rcnn.roi_heads
        pooled = heads.box_roi_pool(feature_maps, boxes, [size] * len(boxes))
        return heads.box_head(pooled).flatten(1).float()

    def _select(self, vectors: Tensor, boxes: Tensor, scores: Tensor) -> Detections:
        """Choose the detections of one image by `selection`.

        vectors: [P,C] of the proposals. boxes: [P,classes,4]. scores: [P,classes].

        Suppression works by class and from the best score down, so that boxes of a lower score
        never change which boxes are kept. Therefore only as many candidates as needed are used.
        """
        nms_thresh, classes = self.rcnn.roi_heads.nms_thresh, scores.shape[1] - 1
        flat_boxes, flat_scores = boxes[:, 1:].reshape(-1, 4), scores[:, 1:].reshape(-1)
        sides = flat_boxes[:, 2:] - flat_boxes[:, :2]
        usable = (flat_scores > 0) & (sides >= MIN_SIDE).all(1)
        flat_scores = flat_scores.where(usable, -1.0)
        total = int(usable.sum())
        above = int((flat_scores > self.selection.min_score).sum())
        limit = CANDIDATES
        while True:
            best, index = flat_scores.topk(min(limit, total))
            kept = box_ops.batched_nms(flat_boxes[index], best, index % classes, nms_thresh)
            enough = limit >= above and len(kept) >= self.selection.min_regions
            if enough or len(kept) >= self.selection.max_regions or limit >= total:
                break
            limit *= 8
        good = int((best[kept] > self.selection.min_score).sum())
        kept = kept[: min(max(good, self.selection.min_regions), self.selection.max_regions)]
        chosen = index[kept]
        return Detections(
            vectors[chosen // classes], flat_boxes[chosen], best[kept], chosen % classes + 1
        )

    def _whole_image(self, feature_maps: dict[str, Tensor], size: tuple[int, int]) -> Detections:
        """The region of an image without detections: the whole image."""
        device = next(iter(feature_maps.values())).device
        box = torch.tensor([[0.0, 0.0, size[1], size[0]]], device=device)
        vectors = self._vectors(feature_maps, [box], size)
        return Detections(
            vectors, box, box.new_zeros(1), torch.zeros(1, dtype=torch.int64, device=device)
        )

    @staticmethod
    def _in_photograph(boxes: Tensor, view_boxes: Tensor | None, number: int) -> Tensor:
        """Convert boxes in 0..1 of a view to boxes in 0..1 of the photograph."""
        if view_boxes is None:
            return boxes.clamp(0, 1)
        start, end = view_boxes[number, :2].repeat(2), view_boxes[number, 2:].repeat(2)
        return (start + boxes * (end - start)).clamp(0, 1)


class BoxedDetector(Detector):
    """A detector that computes the features of given boxes, in place of its own detections.

    boxes: by image id, boxes [n,4] in 0..1 of the photograph, their scores [n] and labels [n]. An
        image with n = 0 is one region: the whole image, with label 0 and score 0.
    sizes: by image id, (height, width) of the photograph that the boxes belong to.
    digest: digest of the boxes. largest: the largest n.
    """

    def __init__(
        self,
        detector: Detector,
        boxes: Mapping[int, tuple[Tensor, Tensor, Tensor]],
        sizes: Mapping[int, tuple[int, int]],
        classes: Sequence[str],
        digest: str,
        largest: int,
    ) -> None:
        super().__init__(detector.architecture, detector.rcnn, detector.classes)
        self.given, self.sizes, self.classes = boxes, sizes, tuple(classes)
        self.boxes_digest, self.largest = digest, largest
        self.from_hub = detector.from_hub

    def _prepare(self) -> None:
        """Do nothing: the network is prepared already, because it is that of a `Detector`."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.largest, self.channels

    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        for name in asdict(self.selection):
            del identity[name]
        return identity | {"boxes": self.boxes_digest, "max_regions": self.largest}

    def with_tables(
        self,
        pixels: Pixels,
        view_boxes: Tensor | None = None,
        image_ids: Sequence[int] | None = None,
    ) -> tuple[Regions, tuple[Tensor, ...]]:
        for image, image_id in zip(pixels, image_ids or (), strict=False):
            height, width = self.sizes[image_id]
            if abs(image.shape[1] * width - image.shape[2] * height) > 2 * (height + width):
                raise ModelError(
                    f"image {image_id} is {image.shape[2]} pixels wide and {image.shape[1]} high, "
                    f"and its boxes are of a photograph of {width}x{height}; the boxes must be "
                    "of the upright photograph"
                )
        return super().with_tables(pixels, view_boxes, image_ids)

    def _detect(self, images: Tensor, image_ids: Sequence[int] | None) -> list[Detections]:
        assert image_ids is not None
        size = (images.shape[2], images.shape[3])
        _, feature_maps = self._feature_maps(images)
        scale = torch.tensor([size[1], size[0]] * 2, device=images.device)
        detections = []
        for number, image_id in enumerate(image_ids):
            maps = {name: map[number : number + 1] for name, map in feature_maps.items()}
            boxes, scores, labels = (part.to(images.device) for part in self.given[image_id])
            if not len(boxes):
                detections.append(self._whole_image(maps, size))
                continue
            vectors = self._vectors(maps, [boxes * scale], size)
            detections.append(Detections(vectors, boxes * scale, scores, labels))
        return detections


def class_names(count: int) -> list[str]:
    """Names of unknown classes: "background", "class 1", ..."""
    return ["background", *(f"class {number}" for number in range(1, count))]


def new_detector(
    architecture: Architecture,
    network: GeneralizedRCNN,
    classes: Sequence[str] | None,
    **selection: Any,
) -> Detector:
    """Create a Detector; classes: None if their names are unknown. selection: see Selection."""
    heads: Any = network.roi_heads
    count = heads.box_predictor.cls_score.out_features
    names = class_names(count) if classes is None else classes
    return Detector(architecture, network, names, Selection(**selection))
