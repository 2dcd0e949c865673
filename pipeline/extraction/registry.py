"""Registry of the kinds of regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models.backbones.interface import Backbone
from pipeline.cli import UserError
from pipeline.extraction.detector import DetectorOptions, open_detector, restore_detector
from pipeline.extraction.grid import GridOptions, open_grid, restore_backbone


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
}


def restore(folder: Path, identity: Mapping[str, Any]) -> Backbone:
    """Rebuild the backbone that computed the features of `identity`.

    folder: a cache or a checkpoint. Raises UserError for an unknown kind of regions.
    """
    kind = identity.get("regions")
    if kind not in REGIONS:
        raise UserError(
            f"{folder} needs regions of kind {kind!r}, which this version cannot compute from "
            f"photographs; it can compute {', '.join(REGIONS)}. Evaluate it over the cache that "
            "it was trained on"
        )
    return REGIONS[kind].restore(folder, identity)
