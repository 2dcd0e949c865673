"""Registry of the kinds of regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models.backbones.interface import Backbone
from pipeline.cli import UserError
from pipeline.extraction.grid import GridOptions, open_grid, restore_backbone


class RegionsKind(NamedTuple):
    """A kind of regions.

    open(options, dataset, seed): the backbone that the options of pipeline.extract name.
    restore(folder, identity): the backbone that made a cache, from the weights in a cache's or
    checkpoint's folder. Options: a frozen dataclass of its own options, or None.
    """

    open: Callable[[Any, str, int], Backbone]
    restore: Callable[[Path, Mapping[str, Any]], Backbone]
    Options: type | None = None


REGIONS: dict[str, RegionsKind] = {"grid": RegionsKind(open_grid, restore_backbone, GridOptions)}


def restore(folder: Path, identity: Mapping[str, Any]) -> Backbone:
    """Rebuild the backbone that made the features of `identity`; UserError if this version
    cannot.
    """
    kind = identity.get("regions")
    if kind not in REGIONS:
        raise UserError(
            f"{folder} reads regions of kind {kind!r}, which this version cannot make from a "
            "photograph; "
            f"it makes {', '.join(REGIONS)}. Evaluate it over the cache that it was trained on"
        )
    return REGIONS[kind].restore(folder, identity)
