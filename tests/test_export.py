"""Exported graphs give the texts and classes of the decoder, by docs/caption_onnx.py."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets.registry import open_source
from data.datasets.sample import draw_sample
from data.tokens import tokenize
from data.vocabulary import SPECIALS, Vocabulary
from models.export import Graph, make_graphs
from models.generation.generate import generate_from_regions
from models.regions import Regions
from pipeline import export, extract, train
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.cli import UserError
from pipeline.decoding.captioner import load_captioner
from pipeline.export import ExportConfig, largest_difference, write_graph
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
    graphs = make_graphs(decoder, None)
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


@pytest.mark.slow
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
            feed = dict(zip(graphs[name].examples[0], map(np.asarray, inputs), strict=True))
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


# ------------------------------------------------------------------------------- files and checks


@pytest.mark.parametrize(
    ("kind", "sizes", "wanted"),
    [
        ("pooled", {"width": 7, "heads": 1}, [{0: "N"}]),
        ("transformer", {"width": 49, "heads": 7}, [*[{0: "N", 2: "R"}] * 4, {0: "N", 3: "R"}]),
        ("lstm", {"width": 14}, [*[{0: "N", 1: "R"}] * 2, {0: "N"}, {0: "N", 2: "R"}]),
    ],
)
def test_a_dimension_is_dynamic_only_if_it_changes_with_the_sizes(kind, sizes, wanted):
    """Some dimensions of these decoders are as large as the regions of an example."""
    graphs = make_graphs(build(kind, prompt=2, **sizes), None)
    assert any(7 in part.shape for part in graphs["begin"].examples[0].values())
    assert graphs["encoder"].dynamic() == [{0: "B", 1: "R"}, {0: "B", 1: "R"}, {0: "B"}]
    assert graphs["begin"].dynamic() == [{0: "N"}, *wanted]
    *cache, _ = [{0: "N"}] * (len(graphs["step"].examples[0]) - 1 - len(wanted))
    assert graphs["step"].dynamic() == [{0: "N"}, {}, *cache, *wanted]


@pytest.fixture
def fake_graphs(monkeypatch):
    """A graph is written as a small text."""

    def write(graph, path, config):
        path.write_text(config.format)
        return 0.0

    monkeypatch.setattr(export, "write_graph", write)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_export_writes_no_file_in_a_checkpoint(world, tmp_path, monkeypatch, fake_graphs):
    run_, bare = tmp_path / "run", ["--format", "torch", "--no-backbone"]
    shutil.copytree(world / "run", run_)
    files = names(run_)
    for out in (run_, run_ / "onnx", run_ / ".." / "run"):
        assert "is in the checkpoint" in refused(
            export.main, "--checkpoint", run_, *bare, "--out", out
        )
    monkeypatch.chdir(run_)
    works(export.main, "--checkpoint", ".", *bare)
    assert "encoder.pt2" in names(tmp_path / "run-torch")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(export, "checkpoint_folder", lambda name: run_)
    works(export.main, "--checkpoint", "hf-hub:user/name", *bare)
    assert names(tmp_path / "here") == {"name-torch"}
    if Path("/proc/self").exists():  # even root cannot write there
        told = refused(export.main, "--checkpoint", run_, *bare, "--out", "/proc/onceover/x")
        assert "/proc/onceover/x cannot be written" in told
    assert names(run_) == files


def test_an_export_replaces_an_earlier_one_and_no_other_file(
    world, tmp_path, monkeypatch, fake_graphs
):
    def command(out: str, format_: str) -> list:
        return ["--checkpoint", world / "run", "--no-backbone", "--format", format_,
                "--out", tmp_path / out]  # fmt: skip

    works(export.main, *command("out", "torch"))
    (tmp_path / "out" / ".killed.tmp").mkdir()
    works(export.main, *command("out", "onnx"))
    whole = {"encoder.onnx", "begin.onnx", "step.onnx", "model.json"}
    assert names(tmp_path / "out") == whole
    with monkeypatch.context() as patch:

        def fail(graph, path, config):
            path.write_text("half")
            raise UserError("a fault")

        patch.setattr(export, "write_graph", fail)
        for out in ("out", "new/folder"):
            assert "a fault" in refused(export.main, *command(out, "torch"))
    assert names(tmp_path / "out") == whole and not (tmp_path / "new").exists()
    for name, text in (("notes.txt", "mine"), ("model.json", "{}"), ("encoder.onnx", "mine")):
        other = tmp_path / name.replace(".", "-")
        other.mkdir()
        (other / name).write_text(text)
        told = refused(export.main, *command(other.name, "onnx"))
        assert f"not from pipeline.export, such as {name}" in told
        assert names(other) == {name} and (other / name).read_text() == text


def test_outputs_that_differ_from_ours_are_an_error(tmp_path, monkeypatch):
    class Double(torch.nn.Module):
        def forward(self, x):
            return (2 * x,)

    monkeypatch.setattr(torch.export, "export", lambda *a, **k: None)
    monkeypatch.setattr(torch.export, "save", lambda program, file: file.write(b"program"))
    x = torch.tensor([[1.0, 100.0]])
    graph = Graph(Double(), [{"x": x}, {"x": x.repeat(2, 1)}], ["y"])
    monkeypatch.setattr(Graph, "dynamic", lambda graph: [{}])
    for error, allowed in ((0.1, True), (10.0, False), (float("nan"), False)):
        monkeypatch.setattr(
            export, "load_graph", lambda path, e=error: lambda x: [2 * x["x"].numpy() + e]
        )
        if allowed:  # by 0.1 of 200
            found = write_graph(graph, tmp_path / "y.pt2", ExportConfig(format="torch"))
            assert found == pytest.approx(5e-4, rel=1e-3)
        else:
            with pytest.raises(UserError, match="y: the outputs of the exported graph differ"):
                write_graph(graph, tmp_path / "y.pt2", ExportConfig(format="torch"))
    masks = [np.array([-np.inf, 1], np.float32)]
    assert largest_difference(masks, [torch.tensor([-torch.inf, 1.0])]) == 0
    for other in ([-torch.inf], [0.0, 1.0], [-torch.inf, torch.nan]):
        assert largest_difference(masks, [torch.tensor(other)]) == np.inf


def test_export_refuses_what_it_cannot_do(world, tmp_path, monkeypatch):
    told = refused(
        export.main, "--checkpoint", world / "run", "--format", "torch", "--quantize", "int8"
    )
    assert "needs --format onnx" in told
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    told = refused(export.main, "--checkpoint", world / "run", "--out", tmp_path / "out")
    assert "pip install 'onceover[onnx]'" in told and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------- the example


def test_the_example_splits_prompts_as_the_tokenizer_does_or_refuses_them():
    split, draw = example_program().split_words, random.Random(0)
    simple = ["", "what colour is it?", "Is the dog's ball red, blue or well-lit ?", "it's A man"]
    assert all(split(text) == tokenize(text) for text in simple)
    for text in ("can't", "12 dogs", "cannot", "no.", "a_b", "red,blue", "a's", "\u212a", "café"):
        assert split(text) is None
    pieces = [*"abC,?.'- \t\n-0_’", " a", "dog", " is", "'s", "-lit", " cannot", "n't", ", ", " ?"]
    texts = ["".join(draw.choices(pieces, k=draw.randint(1, 8))) for _ in range(5000)]
    known = [text for text in texts if split(text) is not None]
    assert len(known) > 500
    assert [split(text) for text in known] == [tokenize(text) for text in known]


@pytest.mark.parametrize(
    ("change", "prompt", "wanted"),
    [
        ({"task": "dialog"}, "is it red?", "dialogues"),
        ({"unit": "subwords"}, "", "subwords"),
        ({"segment": "characters"}, "", "without spaces"),
        ({"framing": None}, "", "--no-backbone"),
        ({"framing": {"resize": "letterbox", "size": [8, 8]}}, "", "--resize"),
        ({"task": "vqa", "max_prompt": 4}, "", "pass a question"),
        ({}, "is it red?", "reads no prompt"),
        ({"max_prompt": 4}, "is it 1 dog?", "English letters"),
        ({"photo": "missing.png"}, "", "missing.png"),
        ({"graph": "encoder.pt2"}, "", "--format onnx"),
        ({"record": "other.json"}, "", "model.json"),
    ],
)
def test_the_example_exits_with_a_message_for_what_it_does_not_support(
    tmp_path, monkeypatch, change, prompt, wanted
):
    names_ = {"photo": "photo.png", "graph": "encoder.onnx", "record": "model.json"} | change
    record = {"task": "captioning", "unit": "words", "segment": "words", "max_prompt": 0}
    record["framing"] = {"resize": "crop", "size": [8, 8], "interpolation": "bicubic"}
    (tmp_path / names_["record"]).write_text(json.dumps(record | change))
    (tmp_path / names_["graph"]).touch()
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    arguments = [str(tmp_path), str(tmp_path / names_["photo"]), "--prompt", prompt]
    monkeypatch.setattr(sys, "argv", ["caption_onnx.py", *arguments])
    with pytest.raises(SystemExit) as error:
        example_program().main()
    assert wanted in str(error.value.code)
