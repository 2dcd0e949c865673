"""Exported graphs give the texts and classes of the decoder, by docs/caption_onnx.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.datasets.registry import open_source
from data.datasets.sample import draw_sample
from data.vocabulary import SPECIALS, Vocabulary
from models.generation.generate import generate_from_regions
from models.regions import Regions
from pipeline import export, extract, train
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.decoding.captioner import load_captioner
from pipeline.export import ExportConfig, make_graphs, write_graph
from tests.test_commands import LOOK, refused, works
from tests.test_decoders import CHANNELS, KINDS, PROMPT, build
from tests.test_vqa import over

IMAGES = 200


def example_program():
    path = Path(__file__).resolve().parents[1] / "docs" / "caption_onnx.py"
    spec = importlib.util.spec_from_file_location("caption_onnx", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checkpoint_of(decoder) -> Checkpoint:
    words = Vocabulary([*SPECIALS, *"abcdefg"])
    answers = tuple("pqrst"[: decoder.config.classes])
    decoding = {"beam": 5, "length_penalty": 1.0}
    identity = {"backbone": "none", "regions": "grid"}
    return Checkpoint(
        decoder, words, identity, decoding, {"task": "captioning"}, {}, answers=answers
    )


def some_images(count: int = IMAGES) -> Regions:
    generator = torch.Generator().manual_seed(3)
    low = torch.rand(count, 5, 2, generator=generator) / 2
    return Regions(
        torch.randn(count, 5, CHANNELS, generator=generator),
        torch.cat([low, low + 0.3], 2),
        torch.randint(0, 6, (count,), generator=generator),  # some without regions
    )


def check(monkeypatch, kind: str, classes: int, prompt: int, run_graph, count: int = IMAGES):
    """Texts at beam 1 and 5, or classes, equal those of the decoder for nearly all images."""
    decoder = build(kind, seed=1, classes=classes, prompt=prompt)
    for name, parameter in decoder.named_parameters():  # so that images differ in their texts
        image = "region" in name or "pooled" in name
        parameter.data *= 0.1 if "bias" in name else 4 if image else 1.5
    checkpoint = checkpoint_of(decoder)
    graphs = make_graphs(checkpoint, None)
    program, model = example_program(), export.describe(checkpoint, None, graphs)
    monkeypatch.setattr(
        program, "run", lambda folder, model, name, inputs: run_graph(graphs, name, inputs)
    )
    images = some_images(count)
    prompts = [[5, 6, 7][: n % (prompt or 1)] for n in range(count)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts]) if longest else None
    for beams in (1, 5):
        with torch.inference_mode():
            if classes:
                memory = decoder.encode(images)
                begin = torch.cat([padded, torch.ones(count, 1, dtype=torch.int64)], 1)[:, None]
                cache = decoder.init_cache(memory, 1, padded)
                best = decoder.class_logits(begin, memory, cache).argmax(1).tolist()
                wanted = [checkpoint.answers[number] for number in best]
            else:
                found = generate_from_regions(decoder, images, num_beams=beams, prompts=padded,
                                              length_penalty=1.0).tokens[:, 0]  # fmt: skip
                wanted = [checkpoint.vocabulary.decode(row) for row in found.tolist()]
        equal = 0
        for n in range(count):
            own = [part[n : n + 1].numpy() for part in images]
            memory = program.run(None, model, "encoder", own)
            equal += program.generate(None, model, memory, prompts[n], beams, 1.0) == wanted[n]
        assert equal >= count * 0.995
        assert len(set(wanted)) >= 2


@pytest.mark.parametrize(("classes", "prompt"), [(0, 0), (0, PROMPT), (5, PROMPT)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_modules_that_are_exported_give_the_texts_of_the_decoder(
    monkeypatch, kind, classes, prompt
):
    def run_graph(graphs, name, inputs):
        tensors = [torch.from_numpy(np.asarray(part)) for part in inputs]
        with monkeypatch.context() as patch, torch.inference_mode():
            # a graph cannot choose to leave out a mask
            patch.setattr(torch.compiler, "is_exporting", lambda: True)
            return [part.numpy() for part in graphs[name].module(*tensors)]

    check(monkeypatch, kind, classes, prompt, run_graph, 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "format_", "classes"),
    [  # each decoder with both formats and both outputs
        ("transformer", "onnx", 0),
        ("transformer", "torch", 5),
        ("prefix", "onnx", 5),
        ("prefix", "torch", 0),
        ("pooled", "onnx", 0),
        ("pooled", "torch", 5),
        ("lstm", "onnx", 5),
        ("lstm", "torch", 0),
    ],
)
def test_exported_graphs_give_the_texts_of_the_decoder(
    monkeypatch, tmp_path, kind, format_, classes
):
    import onnxruntime

    loaded = {}

    def run_graph(graphs, name, inputs):
        path = tmp_path / f"{name}{export.FORMATS[format_]}"
        if name not in loaded:
            assert write_graph(graphs[name], path, ExportConfig(format=format_)) < 1e-3
            if format_ == "onnx":
                loaded[name] = onnxruntime.InferenceSession(path)
            else:
                loaded[name] = torch.export.load(path).module()
        if format_ == "onnx":
            feed = dict(zip(graphs[name].inputs, map(np.asarray, inputs), strict=True))
            return loaded[name].run(None, {e.name: feed[e.name] for e in loaded[name].get_inputs()})
        with torch.inference_mode():
            tensors = [torch.from_numpy(np.asarray(part)) for part in inputs]
            return [part.numpy() for part in loaded[name](*tensors)]

    check(monkeypatch, kind, classes, PROMPT if classes else 0, run_graph)


@pytest.fixture(scope="module")
def exported(a_sample_of_any_size, tmp_path_factory) -> Path:
    """A sample of 80 scenes, and runs of captions and of questions that are exported."""
    folder = tmp_path_factory.mktemp("export")
    draw_sample(folder / "sample", 80)
    works(extract.main, "--dataset", "sample", "--root", folder / "sample", *LOOK, "--resize",
          "crop", "--out", folder / "cache")  # fmt: skip
    small = ["--preset", "tiny", "--width", 16, "--heads", 2, "--min-count", 1]
    works(train.main, *over(folder), *small, "--decoder", "pooled", "--epochs", 30, "--lr", 5e-3,
          "--out", folder / "captions")  # fmt: skip
    works(train.main, "--task", "vqa", *over(folder), *small, "--decoder", "pooled", "--epochs", 5,
          "--out", folder / "questions")  # fmt: skip
    return folder


@pytest.mark.slow
def test_a_folder_captions_and_answers_with_onnxruntime_alone(exported, monkeypatch, capsys):
    source = open_source("sample", exported / "sample")
    photos = [str(image.path) for image in source.images]
    program = example_program()

    def said(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["caption_onnx.py", *map(str, arguments)])
        program.main()
        return capsys.readouterr().out.strip()

    works(export.main, "--checkpoint", exported / "captions")
    captioner = load_captioner(exported / "captions")
    for beams in (1, 5):
        wanted = captioner.caption(photos, num_beams=beams)
        found = [said(exported / "captions-onnx", photo, "--beam", beams) for photo in photos]
        assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= len(photos) - 1
        assert len(set(wanted)) >= 2
    works(export.main, "--checkpoint", exported / "questions")
    captioner, question = load_captioner(exported / "questions"), "how many red things are there?"
    wanted = [captioner.answer(photo, question) for photo in photos]
    found = [said(exported / "questions-onnx", photo, "--prompt", question) for photo in photos]
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= len(photos) - 1
    works(export.main, "--checkpoint", exported / "captions", "--quantize", "int8", "--no-backbone",
          "--out", exported / "int8")  # fmt: skip
    sizes = [(exported / name / "step.onnx").stat().st_size for name in ("captions-onnx", "int8")]
    assert sizes[1] < sizes[0]
    works(export.main, "--checkpoint", exported / "captions", "--format", "torch")
    assert {path.name for path in (exported / "captions-torch").iterdir()} == {
        "backbone.pt2", "encoder.pt2", "begin.pt2", "step.pt2", "model.json",
    }  # fmt: skip


def test_export_refuses_what_it_cannot_do(world, tmp_path, monkeypatch):
    told = refused(export.main, "--checkpoint", world / "run", "--out", world / "run")
    assert "contains a checkpoint" in told
    told = refused(
        export.main, "--checkpoint", world / "run", "--format", "torch", "--quantize", "int8"
    )
    assert "needs --format onnx" in told
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    told = refused(export.main, "--checkpoint", world / "run", "--out", tmp_path / "out")
    assert "pip install 'onceover[onnx]'" in told and not (tmp_path / "out").exists()
