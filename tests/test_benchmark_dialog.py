"""The functions of benchmarks/dialog.py, at a tiny size."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import dialog
from models.decoders.transformer import TransformerConfig
from pipeline.runtime import Machine

CPU = Machine(torch.device("cpu"), "fp32", 0, 1)


@pytest.mark.parametrize(("name", "encodings"), [("twin", 3), ("twin_encoded", 1)])
def test_the_twin_encodes_the_image_for_each_option(name, encodings, monkeypatch):
    sizes = {"width": 8, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "feedforward": 8}
    for constant, value in {
        "ROUNDS": 2,
        "OPTIONS": 3,
        "TransformerConfig": functools.partial(TransformerConfig, **sizes),
    }.items():
        monkeypatch.setattr(dialog, constant, value)
    encoded = []

    def watched(decoder, memory, *arguments):
        encoded.append(memory.images)
        return plain(decoder, memory, *arguments)

    plain = dialog.plain_log_p
    monkeypatch.setattr(dialog, "plain_log_p", watched)
    log_p = dialog.make_ranking(name, CPU, 1)()
    assert encoded == [encodings, encodings]
    torch.testing.assert_close(log_p, dialog.make_ranking("ours", CPU, 1)())
