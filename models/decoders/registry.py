"""The registry of decoders, by name."""

from __future__ import annotations

import math

from torch import nn

from models.decoders.interface import Decoder, DecoderConfig
from models.decoders.lstm import Lstm
from models.decoders.pooled import Pooled
from models.decoders.prefix import Prefix
from models.decoders.transformer import Transformer

DECODERS: dict[str, type[Decoder]] = {
    "transformer": Transformer,
    "prefix": Prefix,
    "pooled": Pooled,
    "lstm": Lstm,
}


def create_decoder(name: str, config: DecoderConfig) -> Decoder:
    """Create a decoder, with a linear head over the states if the config has classes.

    The bias of the head gives each class a probability of about 1 / classes. From a bias of 0, the
    first epochs would only learn that nearly all classes are wrong.
    """
    decoder = DECODERS[name](config)
    if config.classes:
        # the bias of the words has no gradient, for which several processes would wait
        decoder.output_layer()[1].requires_grad_(False)
        decoder.head = nn.Linear(decoder.output_layer()[0].shape[1], config.classes)
        nn.init.constant_(decoder.head.bias, -math.log(config.classes))
    return decoder
