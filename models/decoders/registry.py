"""The registry of decoders, by name."""

from __future__ import annotations

from models.decoders.interface import Decoder
from models.decoders.transformer import Transformer

DECODERS: dict[str, type[Decoder]] = {"transformer": Transformer}
