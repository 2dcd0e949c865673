"""Registry of the kinds of regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.boxes import GivenBoxes
from models.backbones.detector import Detector
from models.backbones.interface import Backbone
from models.backbones.side_by_side import SideBySide
from pipeline.cli import UserError
from pipeline.extraction.detector import (
    DetectorOptions,
    open_detector,
    restore_detector,
    use_given_boxes,
)
from pipeline.extraction.grid import GridOptions, open_grid, restore_backbone


@dataclass(frozen=True)
class GridDetectorOptions(DetectorOptions, GridOptions):
    """Options of --regions grid+detector."""

    def __post_init__(self) -> None:
        GridOptions.__post_init__(self)
        DetectorOptions.__post_init__(self)


def open_both(options: GridDetectorOptions, dataset: str, seed: int) -> SideBySide:
    """Open the backbone of the grid and the detector, for regions side by side."""
    parts = open_grid(options, dataset, seed), open_detector(options, dataset, seed)
    return SideBySide(("grid", "detector"), parts)


def restore_both(folder: Path, identity: Mapping[str, Any]) -> SideBySide:
    """Rebuild the two backbones of regions side by side, as `restore_backbone` does."""
    kinds = identity.get("kinds")
    if not isinstance(kinds, list) or [k.get("regions") for k in kinds] != ["grid", "detector"]:
        raise UserError(f"{folder}/config.json: features: kinds are not valid")
    grid, detector = kinds
    parts = (
        restore_backbone(folder, grid, "grid."),
        restore_detector(folder, detector, "detector."),
    )
    return SideBySide(("grid", "detector"), parts)


def with_given_boxes(backbone: Backbone, boxes: GivenBoxes) -> Backbone:
    """Replace the detections of a detector by given boxes, alone or beside a grid."""
    if isinstance(backbone, SideBySide):
        grid, detector = backbone.parts
        return SideBySide(backbone.kinds, (grid, with_given_boxes(detector, boxes)))
    assert isinstance(backbone, Detector)
    return use_given_boxes(backbone, boxes)


class RegionsKind(NamedTuple):
    """A kind of regions.

    open: function (options, dataset, seed) that opens the backbone for pipeline.extract.
    restore: function (folder, identity) that rebuilds the backbone of a cache from the weights in
        the folder of a cache or a checkpoint.
    Options: a frozen dataclass of options; None: no options.
    """

    open: Callable[[Any, str, int], Backbone]
    restore: Callable[[Path, Mapping[str, Any]], Backbone]
    Options: type | None = None


REGIONS: dict[str, RegionsKind] = {
    "grid": RegionsKind(open_grid, restore_backbone, GridOptions),
    "detector": RegionsKind(open_detector, restore_detector, DetectorOptions),
    "grid+detector": RegionsKind(open_both, restore_both, GridDetectorOptions),
}


def restore(folder: Path, identity: Mapping[str, Any]) -> Backbone:
    """Rebuild the backbone that computed the features of `identity`.

    folder: a cache or a checkpoint. Raises UserError for an unknown kind of regions.
    """
    kind = identity.get("regions")
    if kind == "imported":
        raise UserError(
            f"{folder} was trained on features of another program (imported: "
            f"{identity.get('imported')}), which cannot be computed here. So it cannot see new "
            "photographs. Evaluate it over the cache that it was trained on, or train on features "
            "of pipeline.extract"
        )
    if kind not in REGIONS:
        raise UserError(
            f"{folder} needs regions of kind {kind!r}, which this version cannot compute from "
            f"photographs; it can compute {', '.join(REGIONS)}. Evaluate it over the cache that "
            "it was trained on"
        )
    return REGIONS[kind].restore(folder, identity)
