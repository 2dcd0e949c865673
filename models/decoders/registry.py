"""The registry of decoders, by name."""

from __future__ import annotations

from torch import nn

from models.decoders.interface import Decoder, DecoderConfig
from models.decoders.transformer import Transformer

DECODERS: dict[str, type[Decoder]] = {"transformer": Transformer}


def create_decoder(name: str, config: DecoderConfig) -> Decoder:
    """A new decoder, with a linear head over the states if the config has classes."""
    decoder = DECODERS[name](config)
    if config.classes:
        decoder.head = nn.Linear(decoder.output_layer()[0].shape[1], config.classes)
    return decoder
