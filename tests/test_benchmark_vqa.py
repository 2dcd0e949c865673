"""The functions of benchmarks/vqa.py, at a tiny size."""

from __future__ import annotations

import pytest
import torch

from benchmarks import vqa
from data.vocabulary import BOS, EOS, PAD
from pipeline.runtime import Machine
from pipeline.training.objectives import supervised_loss

CPU = Machine(torch.device("cpu"), "fp32", 0, 1)


def test_the_twin_has_the_loss_and_the_gradient_of_ours():
    decoder, batch = vqa.make_decoder(), vqa.make_batch(2, 4, questions=3)
    gradients = []
    for loss in (supervised_loss(decoder, batch) / batch.texts, vqa.twin_loss(decoder, batch)):
        decoder.zero_grad()
        loss.backward()
        weights = decoder.region.weight, decoder.decoder[2].attention.qkv.weight
        gradients.append([loss, *(weight.grad for weight in weights)])
    for ours, twin in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-5)


def test_visual_bert_reads_the_last_word_of_each_question():
    tokens = torch.tensor([[[5, 6, BOS, PAD], [7, 8, 9, BOS]]])
    words, mask = vqa.visual_bert_inputs(tokens)
    assert words.tolist() == [[BOS, 5, 6, EOS, PAD], [BOS, 7, 8, 9, EOS]]
    assert words.gather(1, (mask.sum(1) - 2)[:, None]).tolist() == [[6], [9]]


def test_steps_and_answers_are_measured(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    for name, value in {"WORDS": 100, "CLASSES": 20, "limit": lambda *_: 1e11}.items():
        monkeypatch.setattr(vqa, name, value)
    figures = vqa.measure(CPU, vqa.make_batch(2, 4, questions=2), 1, 0.1)
    assert {"ratio_twin", "ratio_hf", "of_limit", "ours, questions/s"} <= figures.keys()
    assert all(value > 0 for value in figures.values())
    answer = vqa.make_answering(CPU, 9, tmp_path)
    assert answer() == 9 and answer(4) == 4
