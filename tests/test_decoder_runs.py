"""All decoders in all tasks, by the commands: train, --scst, evaluate, photographs, resume."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.datasets.registry import open_source
from data.datasets.sample import draw_sample
from models.decoders.registry import DECODERS
from pipeline import ask, caption, classify, evaluate, extract, train
from pipeline.checkpoints.checkpoint import load_checkpoint
from tests.test_commands import LOOK, refused, run, works
from tests.test_train import interrupt_at, told
from tests.test_vqa import over

TASKS = ("captioning", "vqa", "dialog", "sentiment")
# the default run: each decoder and each task at least once
SOME = [("prefix", "captioning"), ("lstm", "vqa"), ("pooled", "dialog"), ("lstm", "sentiment")]


@pytest.fixture(scope="module")
def drawn(a_sample_of_any_size, tmp_path_factory) -> Path:
    """A sample of 80 scenes and its features."""
    folder = tmp_path_factory.mktemp("decoders")
    draw_sample(folder / "sample", 80)
    root = ["--dataset", "sample", "--root", folder / "sample"]
    works(extract.main, *root, *LOOK, "--grid", "2x2", "--out", folder / "cache")
    return folder


def sizes(decoder: str) -> list:
    """Options of a small decoder, and those of one kind alone where it has some."""
    options = ["--decoder", decoder, "--preset", "tiny", "--width", 16]
    if decoder != "lstm":
        options += ["--heads", 2, "--feedforward", 32]
    if decoder == "transformer":
        options += ["--memory-slots", 3, "--meshed", "--relative-geometry"]
    return [*options, "--epochs", 2, "--min-count", 1]


def check(drawn: Path, work: Path, decoder: str, task: str) -> None:
    command = [train.main, "--task", task, *over(drawn), *sizes(decoder), "--beam", 2]
    run_ = work / "run"
    works(*command, "--out", run_)
    record = json.loads((run_ / "config.json").read_text())
    assert record["decoder"] == decoder
    told_ = works(evaluate.main, "--checkpoint", run_, *over(drawn), "--split", "test")
    assert "scores: " in told_
    source = open_source("sample", drawn / "sample")
    photo = next(image.path for image in source.images if image.split == "test")
    if task == "captioning":
        assert works(caption.main, photo, "--checkpoint", run_)
        works(evaluate.main, "--checkpoint", run_, *over(drawn), "--split", "test", "--beam", 4,
              "--consensus", 5, "--out", work / "consensus" / "scores.json")  # fmt: skip
        works(evaluate.main, "--checkpoint", run_, "--checkpoint", run_, *over(drawn), "--split",
              "test", "--out", work / "two.json")  # fmt: skip
        works(train.main, "--scst", "--init", run_, "--decoder", decoder, *over(drawn), "--epochs",
              1, "--out", work / "scst")  # fmt: skip
        record = json.loads((work / "scst" / "config.json").read_text())
        assert record["decoder"] == decoder
        other = next(name for name in DECODERS if name != decoder)
        assert f"trained with --decoder {decoder}" in refused(
            train.main, "--init", run_, "--decoder", other, *over(drawn), "--out", work / "no"
        )
    elif task == "vqa":
        assert "%" in works(ask.main, photo, "is there a star?", "--checkpoint", run_)
    elif task == "dialog":
        result = run(ask.main, "--chat", photo, "--checkpoint", run_, input="is there a star?\n")
        assert result.exit_code == 0 and result.stdout
    else:
        assert "%" in works(classify.main, photo, "--text", "i love red", "--checkpoint", run_)


@pytest.mark.parametrize(("decoder", "task"), SOME)
def test_a_decoder_trains_is_evaluated_and_reads_a_photograph(drawn, tmp_path, decoder, task):
    check(drawn, tmp_path, decoder, task)


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "task"), [*itertools.product(DECODERS, TASKS)])
def test_every_decoder_does_every_task(drawn, tmp_path, decoder, task):
    check(drawn, tmp_path, decoder, task)


@pytest.mark.parametrize("decoder", ["lstm"])
def test_a_resumed_run_equals_an_uninterrupted_one(drawn, tmp_path, monkeypatch, decoder):
    command = [train.main, *over(drawn), *sizes(decoder)]
    works(*command, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        assert run(*command, "--out", tmp_path / "half").exit_code == 130
    works(train.main, "--config", tmp_path / "half" / "config.json", "--out", tmp_path / "half",
          "--resume")  # fmt: skip
    assert told(tmp_path / "half") == told(tmp_path / "whole")


def test_an_lstm_for_questions_begins_with_one_for_captions(drawn, tmp_path, monkeypatch):
    """The LSTM of the prompts has no counterpart in the captioning run."""
    works(train.main, *over(drawn), *sizes("lstm"), "--out", tmp_path / "captions")
    begun = {}
    plan = train.print_plan  # called before the first step

    def keep_weights(run, cache):
        begun["weights"] = {n: t.clone() for n, t in run.captioner.state_dict().items()}
        begun["words"] = run.checkpoint.vocabulary.words
        plan(run, cache)

    monkeypatch.setattr(train, "print_plan", keep_weights)
    told_ = works(train.main, "--task", "vqa", *over(drawn), "--decoder", "lstm", "--epochs", 1,
                  "--init", tmp_path / "captions", "--out", tmp_path / "questions")  # fmt: skip
    assert "words are also words of" in told_
    theirs = load_file(tmp_path / "captions" / "model.safetensors")
    their_words = load_checkpoint(tmp_path / "captions").vocabulary.words
    common = [word for word in begun["words"] if word in their_words]
    rows, their_rows = ([w.index(word) for word in common] for w in (begun["words"], their_words))
    assert len(common) > 10
    for name, tensor in theirs.items():
        own = begun["weights"].pop(name)
        if name in ("word.weight", "output_bias"):
            own, tensor = own[rows], tensor[their_rows]
        assert torch.equal(own, tensor), name
    assert all(name.startswith(("prompt_", "question_", "head.")) for name in begun["weights"])
