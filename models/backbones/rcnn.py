"""Networks of two-stage detectors: torchvision's R-CNN models, and Faster R-CNN over timm models.

All have the parts of torchvision's GeneralizedRCNN: transform, backbone, rpn and roi_heads. A
weight file determines the number of classes and the widths of the layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import FrozenBatchNorm2d

from models import ModelError
from models.backbones.messages import closest, hub_error
from models.backbones.timm import check_timm_name

COCO_CLASSES = 91  # of torchvision's published detectors, including the background
SIZES = 800, 1333  # torchvision's sizes of the shorter and of the longer side
# torchvision sets the epsilon of the normalisation to 0 with the published weights of these
EPS_0 = "fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"
PREDICTOR = "roi_heads.box_predictor.cls_score.weight"  # [classes, channels]
PYRAMID = "backbone.fpn.inner_blocks.0.0.weight"  # [width, channels of the first feature map,1,1]
ANCHOR_STRIDES = 8  # the side of the anchors of a feature map, in strides of the map
PROPOSALS = 300  # per image, over timm models (Ren et al. 2015)


@dataclass(frozen=True)
class Architecture:
    """What determines the layers of a detector.

    detector: one of torchvision's R-CNN models; "" for Faster R-CNN over `backbone`.
    backbone: a model of timm; "" with `detector`.
    classes: number of classes, including the background.
    size: maximum length of the shorter and of the longer side of the input, in pixels; None: the
        detector's own.
    norm_eps: epsilon of the batch normalisation; None: that of the library. torchvision's first
        published detectors were trained with 0.
    width, channels: of Faster R-CNN over `backbone`, the channels of the feature pyramid and of the
        box head's vectors.
    """

    detector: str
    backbone: str = ""
    classes: int = COCO_CLASSES
    size: tuple[int, int] | None = None
    norm_eps: float | None = None
    width: int = 256
    channels: int = 1024

    @property
    def name(self) -> str:
        return self.detector or f"fasterrcnn over {self.backbone}"


def sizes_in(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the fields of Architecture that the shapes of weights determine.

    shapes: by key of a state dict, under any prefix.
    """
    sizes = {}
    for key, shape in shapes.items():
        if key.endswith(PREDICTOR) and len(shape) == 2:
            sizes["classes"], sizes["channels"] = shape
        elif key.endswith(PYRAMID) and len(shape) == 4:
            sizes["width"] = shape[0]
    return sizes


def build_rcnn(architecture: Architecture, pretrained: bool = False) -> GeneralizedRCNN:
    """Build the network of a detector, with random weights unless `pretrained`.

    Branches for masks and keypoints are left out.
    Raises ModelError for an unknown name, for a detector without a box head, and if the weights
    cannot be downloaded.
    """
    build = _build_torchvision if architecture.detector else _build_over_timm
    network = build(architecture, pretrained)
    for branch in ("mask", "keypoint"):
        for part in ("roi_pool", "head", "predictor"):
            setattr(network.roi_heads, f"{branch}_{part}", None)
    network.roi_heads.score_thresh = 0.0
    for module in network.modules():
        is_norm = isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)
        if is_norm and architecture.norm_eps is not None:
            module.eps = architecture.norm_eps
    return network


class PublishedWeights(NamedTuple):
    """torchvision's published weights of a detector.

    classes: names of the classes. norm_eps: as in Architecture. file: name of the file. sha256: the
    first digits of the file's SHA-256, which are part of its name.
    """

    classes: Sequence[str]
    norm_eps: float | None
    file: str
    sha256: str


def published_weights(detector: str) -> PublishedWeights:
    """Return torchvision's published weights of a detector, without downloading them.

    Raises ModelError for an unknown name, and for a detector without a box head.
    """
    _check_detector(detector)
    weights = torchvision.models.get_model_weights(detector).DEFAULT
    file = weights.url.rpartition("/")[2]
    sha256 = file.rpartition("-")[2].partition(".")[0]
    norm_eps = 0.0 if detector in EPS_0 else None
    return PublishedWeights(weights.meta["categories"], norm_eps, file, sha256)


def _check_detector(name: str) -> None:
    """Raise ModelError unless torchvision has a two-stage detector of this name."""
    known = torchvision.models.list_models(module=torchvision.models.detection)
    two_stage = [model for model in known if "rcnn" in model]
    if name not in known:
        raise ModelError(
            f"no detector {name!r} in torchvision {torchvision.__version__}"
            f"{closest(name, two_stage)}; its two-stage detectors are {', '.join(two_stage)}"
        )
    if name not in two_stage:
        raise ModelError(
            f"{name} is a one-stage detector: it has no box head, so its detections have no "
            f"feature vectors. Choose one of {', '.join(two_stage)}"
        )


def _build_torchvision(architecture: Architecture, pretrained: bool) -> GeneralizedRCNN:
    name = architecture.detector
    _check_detector(name)
    arguments: dict[str, Any] = {}
    if architecture.size is not None:
        arguments = {"min_size": architecture.size[0], "max_size": architecture.size[1]}
    if not pretrained:
        arguments |= {"weights_backbone": None, "num_classes": architecture.classes}
    weights = published_weights(name) if pretrained else None
    try:
        return torchvision.models.get_model(name, weights=weights, **arguments)
    except Exception as error:
        if not pretrained:
            raise
        raise ModelError(hub_error(name, error)) from error


def _build_over_timm(architecture: Architecture, pretrained: bool) -> GeneralizedRCNN:
    name = architecture.backbone
    if pretrained:
        raise ModelError(
            f"there are no pretrained weights of a detector over {name}; use weights from a file, "
            "or random weights for a test"
        )
    body = FeaturePyramid(name, architecture.width)
    min_size, max_size = architecture.size or SIZES
    sides = [(ANCHOR_STRIDES * stride,) for stride in (*body.strides, 2 * body.strides[-1])]
    pool = MultiScaleRoIAlign([str(level) for level in range(len(body.strides))], 7, 2)
    return FasterRCNN(
        body,
        min_size=min_size,
        max_size=max_size,
        image_mean=body.mean,
        image_std=body.std,
        rpn_anchor_generator=AnchorGenerator(tuple(sides), ((0.5, 1.0, 2.0),) * len(sides)),
        rpn_post_nms_top_n_test=PROPOSALS,
        box_roi_pool=pool,
        box_head=TwoMLPHead(architecture.width * 7**2, architecture.channels),
        box_predictor=FastRCNNPredictor(architecture.channels, architecture.classes),
    )


class FeaturePyramid(nn.Module):
    """The feature maps of a timm model from stride 4 on, in a feature pyramid (Lin et al. 2017).

    name: a model of timm. width: channels of each map of the pyramid.

    Maps images [B,3,H,W] to maps by level: "0", "1", ..., and "pool" of half the last resolution.
    Attributes: `strides` of the levels except "pool"; `mean` and `std` for pixels in 0..1.
    Raises ModelError if the model gives no feature maps.
    """

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        check_timm_name(name)
        try:
            network: Any = timm.create_model(name, pretrained=False, features_only=True)
            info = network.feature_info
            levels = [level for level, stride in enumerate(info.reduction()) if stride >= 4]
            if not levels:
                raise ValueError("no feature map of stride 4 or more")
            network = timm.create_model(name, features_only=True, out_indices=levels)
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise ModelError(
                f"backbone {name} gives no feature maps for a detector: {error}"
            ) from error
        config = timm.data.resolve_model_data_config(network)
        self.mean, self.std = list(config["mean"]), list(config["std"])
        self.strides = network.feature_info.reduction()
        self.widths = network.feature_info.channels()
        self.body = network
        self.fpn = FeaturePyramidNetwork(self.widths, width, LastLevelMaxPool())
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = OrderedDict()
        for level, (feature_map, channels) in enumerate(
            zip(self.body(images), self.widths, strict=True)
        ):
            is_last = feature_map.shape[1] != channels == feature_map.shape[-1]  # channels last
            maps[str(level)] = feature_map.permute(0, 3, 1, 2) if is_last else feature_map
        return self.fpn(maps)
