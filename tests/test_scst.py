"""Self-critical training as a command: from a run to a better one, resumed exactly, the same in two
processes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import train
from pipeline.training import loop as trainer
from pipeline.training import setup, validation
from pipeline.training.rewards import Rewards
from tests.processes import run_ranks
from tests.test_commands import at, refused, run, works
from tests.test_train import assert_same_run, interrupt_at, options, told

__all__ = ["world"]  # a fixture


@pytest.fixture(scope="module")
def world(views_world) -> Path:
    return views_world


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory) -> Path:
    """A run trained on the captions, for long enough to say something."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    works(train.main, *options(world, folder, "--epochs", 15, "--dropout", 0.1))
    return folder


def critical(world: Path, begun: Path, out: Path, *more: object) -> list[str]:
    chosen = [
        *at(world),
        "--features",
        world / "cache",
        "--out",
        out,
        "--scst",
        "--init",
        begun,
        "--beam",
        2,
        "--batch",
        8,
        "--epochs",
        2,
        "--log-every",
        3,
        "--eval-steps",
        4,
        "--lr",
        1e-3,
        *more,
    ]
    return [str(each) for each in chosen]


@pytest.fixture(scope="module")
def through(world, begun, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("through") / "run"
    works(train.main, *critical(world, begun, folder, *NOISY))
    return folder


GREEDY = pytest.param(["--baseline", "greedy"], marks=pytest.mark.slow)
BEAMS = pytest.param(["--samples", "beam", "--accumulate", 2], marks=pytest.mark.slow)
NOISY = ["--dropout", 0.1, "--ema", 0.9, "--accumulate", 2]


def test_it_begins_with_the_runs_weights_and_looks_at_dev_every_so_many_steps_and_at_the_end(
    world, begun, through
):
    scored = [line for line in told(through) if "dev" in line]
    assert [line["step"] for line in scored] == [0, 4, 8, 12] and scored[0]["train"] == {}
    best = max(line["dev"]["CIDEr"] for line in told(begun) if "dev" in line)
    assert scored[0]["dev"]["CIDEr"] == pytest.approx(best, abs=0.02)  # bf16, other batches
    for line in scored[1:]:
        assert line["train"].keys() >= {"reward", "words", "ended", "nats", "loss", "lr"}
        assert 0 < line["train"]["ended"] <= 1 and line["train"]["words"] > 1
    assert json.loads((through / "vocab.json").read_text()) == json.loads(
        (begun / "vocab.json").read_text()
    )


def test_what_is_kept_is_the_best_on_dev_the_first_weights_too(world, begun, tmp_path):
    """A rate that ruins everything: what is left is what it began with."""
    works(train.main, *critical(world, begun, tmp_path / "run", "--lr", 0.5, "--clip", 1000))
    scores = [line["dev"]["CIDEr"] for line in told(tmp_path / "run") if "dev" in line]
    assert scores[0] == max(scores) > scores[-1] + 0.1
    kept, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", begun))
    assert kept.keys() == first.keys() and all(
        torch.equal(kept[name], first[name]) for name in kept
    )


@pytest.mark.slow
def test_it_raises_the_reward_of_what_it_draws(world, begun, tmp_path):
    works(
        train.main,
        *critical(
            world, begun, tmp_path / "run", "--epochs", 10, "--eval-steps", 1000, "--lr", 2e-3
        ),
    )
    rewards = [line["train"]["reward"] for line in told(tmp_path / "run") if "dev" not in line]
    assert sum(rewards[-8:]) > 1.1 * sum(rewards[:8])  # two fifths of the steps against two fifths


@pytest.mark.parametrize(
    "step", [0, 4, 6, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 11))]
)
def test_a_run_stopped_at_any_step_goes_on_exactly(
    world, begun, through, tmp_path, monkeypatch, step
):
    """Six steps an epoch, dev after four: within the first, right before and after dev, at an
    epoch's end. The run it began with is needed no more."""
    interrupt_at(step, monkeypatch)
    result = run(train.main, *critical(world, begun, tmp_path / "run", *NOISY))
    assert result.exit_code == 130 and "saved after step" in result.output
    monkeypatch.undo()
    again = result.output[result.output.index("--config") :].split("\n")[0].split()
    monkeypatch.setattr(setup, "load_checkpoint", None)
    assert "resuming" in works(train.main, *again, "--out", tmp_path / "run")
    assert_same_run(through, tmp_path / "run")


@pytest.mark.slow
def test_a_run_killed_while_it_looks_at_dev_looks_again(
    world, begun, through, tmp_path, monkeypatch
):
    plain = validation.dev_scores

    def killed(run):
        if run.step == 4:
            raise ZeroDivisionError
        return plain(run)

    monkeypatch.setattr(validation, "dev_scores", killed)
    with pytest.raises(ZeroDivisionError):
        run(train.main, *critical(world, begun, tmp_path / "run", *NOISY))
    monkeypatch.undo()
    works(train.main, *critical(world, begun, tmp_path / "run", *NOISY, "--resume"))
    assert_same_run(through, tmp_path / "run")


@pytest.mark.slow
def test_a_run_killed_before_its_first_save_begins_again_with_what_it_began_with(
    world, begun, through, tmp_path, monkeypatch
):
    def killed(run):
        raise ZeroDivisionError

    monkeypatch.setattr(validation, "save_progress", killed)
    with pytest.raises(ZeroDivisionError):
        run(train.main, *critical(world, begun, tmp_path / "run", *NOISY))
    monkeypatch.undo()
    assert "ended before its first save; it starts again" in works(
        train.main, *critical(world, begun, tmp_path / "run", *NOISY, "--resume")
    )
    assert_same_run(through, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], BEAMS, GREEDY])
def test_two_processes_train_as_one_does(world, begun, tmp_path, more):
    """A last batch that leaves a rank without an image; fp32."""
    plain = [
        "--precision",
        "fp32",
        "--batch",
        7,
        "--limit",
        43,
        "--ema",
        0.9,
        *more,
    ]  # 43 = 6 * 7 + 1
    works(train.main, *critical(world, begun, tmp_path / "one", *plain))
    run_ranks(critical(world, begun, tmp_path / "two", *plain), 2, tmp_path)
    lines = list(zip(told(tmp_path / "one"), told(tmp_path / "two"), strict=True))
    assert len(lines) == 9
    for one, two in lines:
        assert one["step"] == two["step"] and one["train"].keys() == two["train"].keys()
        for part in ("train", "dev"):
            mine, theirs = (
                {k: v for k, v in line.get(part, {}).items() if k != "gradient"}
                for line in (one, two)
            )
            assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_a_reward_that_is_no_number_stops_a_run_that_then_goes_on_exactly(
    world, begun, through, tmp_path, monkeypatch
):
    plain, calls = Rewards.__call__, []

    def spoil(self, image_ids, samples):
        calls.append(image_ids)
        found = plain(self, image_ids, samples)
        return found * float("nan") if len(calls) == 8 else found

    monkeypatch.setattr(Rewards, "__call__", spoil)
    message = refused(
        train.main, *critical(world, begun, tmp_path / "run", *NOISY, "--save-every", 0)
    )
    assert "a reward is not a finite number at step 3, images" in message
    assert all(str(image_id) in message for image_id in calls[7])
    monkeypatch.undo()
    works(train.main, *critical(world, begun, tmp_path / "run", *NOISY, "--resume"))
    assert_same_run(through, tmp_path / "run")


def test_without_scst_a_run_that_begins_with_another_goes_on_training_on_the_captions(
    world, begun, tmp_path
):
    asked = [
        *at(world),
        "--features",
        world / "cache",
        "--out",
        tmp_path / "run",
        "--init",
        begun,
        "--batch",
        8,
        "--epochs",
        1,
    ]
    output = works(train.main, *asked, "--lr", 1e-4)
    assert f"initialised from {begun}: width" in output
    losses = [line["dev"]["loss"] for line in told(begun) if "dev" in line]
    assert told(tmp_path / "run")[0]["step"] == 0
    assert told(tmp_path / "run")[0]["dev"]["loss"] < losses[0] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("up_at", "steps"), [(0, [0]), (3, [0, 3]), (5, [0, 5]), (6, [0, 5, 6]), (7, [0, 5, 7])]
)
def test_time_that_is_up_ends_the_run_after_one_more_look_at_dev(
    world, begun, tmp_path, monkeypatch, up_at, steps
):
    """Dev after every five steps of six an epoch: up within an epoch, right after dev, at an
    epoch's end, within the next. A run that is killed in that last look takes it again."""
    monkeypatch.setattr(trainer.Run, "progress", lambda run: float(run.step >= up_at))
    plain, asked = (
        validation.dev_scores,
        [*critical(world, begun, tmp_path / "run"), "--eval-steps", "5", "--minutes", "60"],
    )

    def killed(run):
        if run.step == steps[-1]:
            raise ZeroDivisionError
        return plain(run)

    monkeypatch.setattr(validation, "dev_scores", killed)
    with pytest.raises(ZeroDivisionError):
        run(train.main, *asked)
    monkeypatch.setattr(validation, "dev_scores", plain)
    assert "best: " in works(train.main, *asked, "--resume")
    scored = [line for line in told(tmp_path / "run") if "dev" in line]
    assert [line["step"] for line in scored] == steps and [
        line["epoch"] * 6 for line in scored
    ] == steps
    works(train.main, *asked, "--resume")  # over, and no more is done
    assert [line["step"] for line in told(tmp_path / "run") if "dev" in line] == steps


def test_an_epoch_without_an_end_on_dev_goes_over_into_the_next(world, begun, tmp_path):
    works(train.main, *critical(world, begun, tmp_path / "run", "--eval-steps", 1000))
    assert [line["step"] for line in told(tmp_path / "run") if "dev" in line] == [0, 12]


@pytest.mark.slow
def test_a_run_on_pieces_of_words_goes_on_with_them_and_is_rewarded_by_its_words(world, tmp_path):
    works(
        train.main,
        *options(
            world,
            tmp_path / "first",
            *["--vocabulary", "bpe", "--vocab-size", 60, "--epochs", 8, "--eval-steps", 24],
        ),
    )
    works(
        train.main,
        *critical(world, tmp_path / "first", tmp_path / "run", "--reward", "CIDEr,BLEU-1:0.5"),
    )
    one, two = (tmp_path / name / "tokenizer.json" for name in ("first", "run"))
    assert json.loads(one.read_text()) == json.loads(two.read_text())
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["training"]["vocabulary"]
        == "bpe"
    )
    assert all(line["train"]["reward"] > 0 for line in told(tmp_path / "run") if line["train"])


@pytest.mark.parametrize(("more", "complaint"), [
    (["--width", 96], r"--width is 96, .* has 32"), (["--max-length", 9], "--max-length is 9"),
    (["--reward", "nothing"], "is not one of CIDEr"), (["--min-count", 3], "--min-count is of "
                                                                           "a new vocabulary"),
    (["--vocabulary", "bpe"], "has words"), (["--preset", "small"], "cannot be used with --init"),
    (["--decoder-layers", 3], "--decoder-layers is 3"),
])  # fmt: skip
def test_what_the_run_it_begins_with_is_not_is_refused(world, begun, tmp_path, more, complaint):
    assert re.search(
        complaint, refused(train.main, *critical(world, begun, tmp_path / "run", *more))
    )
    assert not (tmp_path / "run").exists()


def test_a_run_trained_on_dev_too_is_not_begun_with_where_dev_chooses(world, tmp_path):
    works(train.main, *options(world, tmp_path / "first", "--train-on-dev", "--epochs", 1))
    message = refused(train.main, *critical(world, tmp_path / "first", tmp_path / "run"))
    assert "was trained on dev too" in message and "--train-on-dev" in message
    output = works(
        train.main,
        *critical(world, tmp_path / "first", tmp_path / "run", "--train-on-dev", "--epochs", 1),
    )
    assert "no best epoch was chosen" in output


def test_a_checkpoint_that_is_not_there_is_named(world, tmp_path):
    assert "does not exist" in refused(
        train.main, *critical(world, tmp_path / "nothing", tmp_path / "run")
    )
