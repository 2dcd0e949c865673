"""Training as a whole: it goes on exactly wherever it was stopped, is the same in one process and
in two, and stops plainly.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.tokens import tokenize
from pipeline import caption, extract, train
from pipeline.checkpoints.checkpoint import load_training_state
from pipeline.training import loop as trainer
from pipeline.training import objectives, validation
from pipeline.training.config import PRESETS, TrainConfig, learning_rate, resolve
from tests.processes import begin, command, run_ranks
from tests.test_commands import LOOK, SMALL, at, photos, refused, run, works

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(views_world) -> Path:
    return views_world


def options(world: Path, out: Path, *more: object) -> list[str]:
    chosen = [
        *at(world),
        "--features",
        world / "cache",
        "--out",
        out,
        "--preset",
        "tiny",
        *SMALL,
        "--min-count",
        1,
        "--beam",
        2,
        "--batch",
        8,
        "--epochs",
        2,
        "--log-every",
        3,
        *more,
    ]
    return [str(each) for each in chosen]


NOISY = [
    "--dropout",
    0.1,
    "--ema",
    0.9,
    "--region-dropout",
    0.2,
    "--word-dropout",
    0.1,
    "--scheduled-sampling",
    0.3,
    "--accumulate",
    2,
]


def told(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what hangs on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
        for name in ("captions_per_s", "waiting"):
            line["train"].pop(name, None)
    return lines


def assert_same_run(one: Path, two: Path) -> None:
    assert told(one) == told(two)
    for name in ("model.safetensors", "last.safetensors"):
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def through(world, tmp_path_factory) -> Path:
    """A run that nothing interrupts, with all that training can draw."""
    folder = tmp_path_factory.mktemp("through") / "run"
    works(train.main, *options(world, folder, *NOISY))
    return folder


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while this step is done."""
    plain = trainer.train_step

    def asked_to_stop(run, *arguments):
        if run.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(run, *arguments)

    monkeypatch.setattr(trainer, "train_step", asked_to_stop)


@pytest.mark.parametrize("step", [0, 2, 5, 6, 9])
def test_a_run_stopped_at_any_step_goes_on_exactly(world, through, tmp_path, monkeypatch, step):
    """Six steps an epoch: in the first, within each epoch, and in the last before dev."""
    interrupt_at(step, monkeypatch)
    result = run(train.main, *options(world, tmp_path / "run", *NOISY))
    assert (
        result.exit_code == 130
        and "saved after step" in result.output
        and "Traceback" not in result.output
    )
    monkeypatch.undo()
    again = result.output[result.output.index("--config") :].split("\n")[0].split()
    assert "resuming" in works(train.main, *again, "--out", tmp_path / "run")
    assert_same_run(through, tmp_path / "run")


def test_saving_at_every_step_changes_nothing(world, through, tmp_path):
    works(train.main, *options(world, tmp_path / "run", *NOISY, "--save-every", 0))
    assert_same_run(through, tmp_path / "run")


def test_a_run_begun_before_an_option_was_there_goes_on(world, tmp_path):
    works(train.main, *options(world, tmp_path / "run", "--epochs", 1))
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    for name in ("init", "scst", "num_samples", "eval_steps"):
        del record["training"][name]
    path.write_text(json.dumps(record))
    assert "resuming" in works(
        train.main, *options(world, tmp_path / "run", "--epochs", 1, "--resume")
    )


def test_a_run_that_fails_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    world, through, tmp_path, monkeypatch
):
    plain, writes = os.replace, []

    def fail(source, target):
        if Path(target).name == "last.safetensors":
            writes.append(target)
            if len(writes) == 4:
                raise ZeroDivisionError
        plain(source, target)

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ZeroDivisionError):
        run(train.main, *options(world, tmp_path / "run", *NOISY, "--save-every", 0))
    monkeypatch.undo()
    works(train.main, *options(world, tmp_path / "run", *NOISY, "--resume"))
    assert_same_run(through, tmp_path / "run")


def start(arguments: list[str], processes: int = 1, **environment: str) -> subprocess.Popen:
    """pipeline.train as a process of its own, or several by torchrun."""
    launcher = [sys.executable, "-m", "pipeline.train"]
    if processes > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "-m",
            "pipeline.train",
        ]
    return subprocess.Popen(
        [*launcher, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.slow
def test_a_run_killed_with_sigkill_anywhere_goes_on_exactly(world, through, tmp_path):
    """Six kills, each once something was saved since the one before: three while a file is
    half-written, three at any time.
    """
    folder, rng, killed = tmp_path / "run", np.random.default_rng(0), 0
    folder.mkdir()
    for number in range(6):
        resumed = ["--resume"] if (folder / "config.json").exists() else []
        asked = options(world, folder, *NOISY, "--save-every", 0, *resumed)
        process = begin(command, "pipeline.train", asked, said=tmp_path / "said.txt")
        before = (
            (folder / "last.safetensors").stat().st_ino
            if (folder / "last.safetensors").exists()
            else 0
        )
        until, ripe = time.time() + 60, False
        while time.time() < until and process.is_alive() and not ripe:
            saved = (folder / "last.safetensors").exists() and (
                folder / "last.safetensors"
            ).stat().st_ino != before
            ripe = saved and (number % 2 == 1 or any(folder.glob(".last*.tmp")))
        time.sleep(rng.uniform(0, 0.05) if number % 2 else 0)
        process.kill()
        process.join()
        assert ripe or process.exitcode == 0
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 3  # the others were done before
    asked = options(world, folder, *NOISY, "--resume")
    process = begin(command, "pipeline.train", asked, said=tmp_path / "said.txt")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "said.txt").read_text()
    assert_same_run(through, folder)
    assert not list(folder.glob(".*.tmp"))


def test_a_full_disk_leaves_the_checkpoint_before_whole(world, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here (it takes root)")
    try:
        works(train.main, *options(world, folder / "run", "--epochs", 1))
        before = (folder / "run/last.safetensors").read_bytes()
        room = 3_000_000 - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        (folder / "filler").write_bytes(b"x" * max(0, room - len(before) // 2))
        config = json.loads((folder / "run/config.json").read_text())
        config["training"]["epochs"] = 2  # what was begun for one epoch goes on for two
        (folder / "run/config.json").write_text(json.dumps(config))
        message = refused(train.main, *options(world, folder / "run", "--resume"))
        assert "last.safetensors could not be written" in message or "No space left" in message
        assert (folder / "run/last.safetensors").read_bytes() == before and not list(
            (folder / "run").glob(".*.tmp")
        )
        (folder / "filler").unlink()
        works(train.main, *options(world, folder / "run", "--resume"))
    finally:
        subprocess.run(["umount", folder], check=True)


# -------------------------------------------------------------------------------- several processes


BY_TORCHRUN = pytest.param(["--accumulate", "2", "--cache-in", "ram"], marks=pytest.mark.slow)


def questions(world: Path, folder: Path) -> list:
    """Options of training on one to three questions about each image, with closed answers."""
    answers, asked = ("red", "blue", "green"), []
    for n in range(1, 44):
        asked += [(10 * n + k, n, "is it red" + " or blue" * k) for k in range(1 + n % 3)]
    rows = [{"question_id": id_, "image_id": n, "question": text} for id_, n, text in asked]
    targets = [
        {"question_id": id_, "image_id": n, "answers": [{"answer": answers[id_ % 3]}] * 10}
        for id_, n, _ in asked
    ]
    (folder / "questions.json").write_text(json.dumps({"questions": rows}))
    (folder / "answers.json").write_text(json.dumps({"annotations": targets}))
    return ["--task", "vqa", "--dataset", "vqa", "--questions", folder / "questions.json",
            "--annotations", folder / "answers.json", "--images", world / "sample"]  # fmt: skip


CLASSES = pytest.param("classes", marks=pytest.mark.slow)


@pytest.mark.parametrize("more", [[], BY_TORCHRUN, CLASSES])
def test_two_processes_train_as_one_does(world, tmp_path, more):
    """Captions of unequal number and length a rank, a last batch that leaves a rank without an
    image, fp32, no dropout. The second case is begun by torchrun itself. The third has questions.
    """
    task = questions(world, tmp_path) if more == "classes" else []
    more = [] if task else more
    plain = [
        "--dropout",
        0,
        "--precision",
        "fp32",
        "--batch",
        7,
        "--limit",
        43,
        "--ema",
        0.9,
        *task,
    ]  # 43 = 6 * 7 + 1
    works(train.main, *options(world, tmp_path / "one", *plain))
    asked = options(world, tmp_path / "two", *plain, *more)
    if more:
        process = start(asked, processes=2)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    else:
        output = run_ranks(asked, 2, tmp_path)
    assert output.count("epoch 2/2: train loss") == 1 and "2 processes" in output
    if more:
        assert "in RAM" in output and "once for all processes of a machine" in output
    for one, two in zip(told(tmp_path / "one"), told(tmp_path / "two"), strict=True):
        assert one["train"]["loss"] == pytest.approx(two["train"]["loss"], abs=1e-5)
        assert one["step"] == two["step"] and one.get("dev", {}).keys() == two.get("dev", {}).keys()
        for name, score in one.get("dev", {}).items():
            if isinstance(score, float):
                assert score == pytest.approx(two["dev"][name], abs=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    apart = torch.cat([(weights[0][key] - weights[1][key]).abs().flatten() for key in weights[0]])
    # where a gradient is nothing but rounding, Adam's steps are its sign
    assert apart.quantile(0.99) < 1e-4


@pytest.mark.slow
def test_a_dead_rank_ends_the_run_and_leaves_it_to_be_resumed(world, tmp_path):
    folder = tmp_path / "run"
    process = start(
        options(world, folder, "--save-every", 0, "--epochs", 2000, "--patience", 2000), processes=2
    )
    until = time.time() + 60
    while not (folder / "last.safetensors").exists() and time.time() < until:
        time.sleep(0.05)
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and ("SIGKILL" in output or "Signal 9" in output)
    load_training_state(folder)


# ------------------------------------------------------------------------------------- what it does


def test_parts_of_a_step_add_up_to_the_step(world, tmp_path):
    plain = ["--dropout", 0, "--precision", "fp32"]
    for name, more in (("whole", []), ("parts", ["--accumulate", 3])):
        works(train.main, *options(world, tmp_path / name, *plain, *more))
    for one, two in zip(told(tmp_path / "whole"), told(tmp_path / "parts"), strict=True):
        assert one["train"]["loss"] == pytest.approx(two["train"]["loss"], abs=1e-5)


def test_the_average_kept_is_that_of_the_weights_after_each_step(world, tmp_path, monkeypatch):
    weights, plain = [], trainer.train_step

    def watched(run, *arguments):
        found = plain(run, *arguments)
        weights.append(
            {
                name: value.detach().double().clone()
                for name, value in run.captioner.named_parameters()
            }
        )
        return found

    first = []
    begin = trainer.Run.__post_init__

    def begun(self):
        begin(self)
        first.append(
            {
                name: value.detach().double().clone()
                for name, value in self.captioner.named_parameters()
            }
        )

    monkeypatch.setattr(trainer, "train_step", watched)
    monkeypatch.setattr(trainer.Run, "__post_init__", begun)
    works(train.main, *options(world, tmp_path / "run", "--ema", 0.8, "--epochs", 1))
    mean = first[0]
    for number, after in enumerate(weights):
        decay = min(0.8, (1 + number) / (10 + number))
        mean = {name: decay * mean[name] + (1 - decay) * after[name] for name in mean}
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.allclose(kept[name].double(), mean[name], atol=1e-5) for name in mean)
    assert any(
        not torch.allclose(kept[name].double(), weights[-1][name], atol=1e-6) for name in mean
    )


def test_minutes_end_a_run_in_time_and_its_learning_rate_with_it(world, tmp_path, monkeypatch):
    """Six seconds by a clock that goes on by 1/25 s each time that it is looked at."""
    looks = itertools.count()
    monkeypatch.setattr(trainer.Run, "seconds", property(lambda run: next(looks) / 25))
    monkeypatch.setattr(
        validation, "time", types.SimpleNamespace(monotonic=lambda: next(looks) / 25)
    )
    works(
        train.main,
        *options(
            world, tmp_path / "run", "--minutes", 0.1, "--patience", 10_000, "--epochs", 100_000
        ),
    )
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    rates = [line["train"]["lr"] for line in lines]
    assert 5 < lines[-1]["seconds"]["elapsed"] < 7 and rates[-1] < 0.1 * max(rates)
    assert lines[-1]["step"] > 10


def test_a_run_whose_time_was_up_is_scored_after_it_was_stopped_in_dev(
    world, tmp_path, monkeypatch
):
    whole = validation.dev_scores

    def stopped(run):
        if run.state.ended:
            raise trainer.Stopped(signal.SIGINT)
        return whole(run)

    monkeypatch.setattr(validation, "dev_scores", stopped)
    # up within the first epoch
    monkeypatch.setattr(trainer.Run, "progress", lambda run: 1.0 if run.step >= 3 else 0.5)
    timed = options(
        world, tmp_path / "run", "--minutes", 5, "--patience", 10_000, "--epochs", 100_000
    )
    assert run(train.main, *timed).exit_code == 130
    before = told(tmp_path / "run")
    monkeypatch.setattr(validation, "dev_scores", whole)
    works(train.main, *timed, "--resume")
    after = told(tmp_path / "run")
    assert len(after) == len(before) + 1 and after[:-1] == before and "dev" in after[-1]


@pytest.mark.slow
def test_two_processes_go_by_one_clock(world, tmp_path):
    """With --minutes everything that hangs on the time is the same in both, to the last digit of
    every weight.
    """
    told_by = tmp_path / "sums"
    told_by.mkdir()
    watch = """
import os, sys
from pipeline import train
plain, folder = train.print_result, sys.argv[1]
def finish(run):
    total = sum(weight.double().sum().item() for weight in run.captioner.parameters())
    open(os.path.join(folder, os.environ["RANK"]), "w").write(repr((run.step, run.state.lr, total)))
    plain(run)
train.print_result = finish
train.main(sys.argv[2:], standalone_mode=False)
"""
    (tmp_path / "watch.py").write_text(watch)
    trained = options(
        world, tmp_path / "run", "--minutes", 0.12, "--patience", 10_000, "--epochs", 100_000
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [str(tmp_path / "watch.py"), str(told_by), *trained]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    one, two = ((told_by / rank).read_text() for rank in "01")
    assert one == two and int(one[1:].split(",")[0]) > 20


@pytest.mark.parametrize("schedule", ["cosine", "noam", "constant"])
def test_the_learning_rate_rises_to_its_peak_and_goes_as_its_schedule_says(schedule):
    config = TrainConfig(lr=2.0, warmup=0.1, schedule=schedule)
    assert learning_rate(config, 0.05) == pytest.approx(1.0) and learning_rate(
        config, 0.1
    ) == pytest.approx(2.0)
    expected = {"cosine": 1.0, "noam": 2.0 * (0.1 / 0.55) ** 0.5, "constant": 2.0}[schedule]
    assert learning_rate(config, 0.55) == pytest.approx(expected)
    assert learning_rate(config, 1.0) == pytest.approx(
        {"cosine": 0.0, "noam": 2.0 * 0.1**0.5, "constant": 2.0}[schedule]
    )


def test_dev_is_trained_on_where_asked_and_then_chooses_nothing(world, tmp_path):
    output = works(train.main, *options(world, tmp_path / "run", "--train-on-dev"))
    assert "no best epoch was chosen, because dev was part of the training data" in output
    lines = told(tmp_path / "run")
    assert not any("dev" in line for line in lines)
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["training"]["train_on_dev"]
        is True
    )
    weights, last = (
        load_file(tmp_path / "run/model.safetensors"),
        load_file(tmp_path / "run/last.safetensors"),
    )
    assert all(torch.equal(weights[name], last[f"model.{name}"]) for name in weights)


def test_a_preset_stands_under_a_config_file_and_flags(world, tmp_path):
    (tmp_path / "c.toml").write_text("lr = 0.002\nwidth = 32\n")
    few = [*at(world), "--features", world / "cache", "--epochs", 1, "--limit", 4, "--beam", 1]
    works(
        train.main,
        *few,
        "--config",
        tmp_path / "c.toml",
        "--preset",
        "tiny",
        "--width",
        64,
        "--out",
        tmp_path / "run",
    )
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["training"]["lr"] == 0.002 and record["model"]["width"] == 64
    assert record["model"]["feedforward"] == PRESETS["tiny"]["feedforward"]


@pytest.mark.parametrize(
    "option, value",
    [("--lr", 0), ("--ema", 1), ("--word-dropout", 1.5), ("--accumulate", 0), ("--minutes", -1)],
)
def test_an_option_out_of_its_range_is_named(option, value):
    assert f"{option} is" in refused(train.main, option, value)


def test_a_dropout_of_nearly_one_keeps_something(world, tmp_path):
    works(train.main, *options(world, tmp_path / "run", "--dropout", 0.999, "--epochs", 1))


def test_a_resumed_run_that_is_not_the_same_run_is_named(world, tmp_path):
    works(train.main, *options(world, tmp_path / "run", "--epochs", 1))
    again = options(world, tmp_path / "run", "--epochs", 1, "--resume")
    works(
        extract.main,
        *at(world),
        *LOOK,
        "--out",
        tmp_path / "plain",
    )
    assert "views: None, not ['flip']" in refused(
        train.main, *again, "--features", tmp_path / "plain"
    )
    assert "precision" in refused(
        train.main, *again, "--precision", "fp32" if trained_in(tmp_path) == "bf16" else "bf16"
    )
    for name, text in (
        ("config.json", '{"model_type": "bert"}'),
        ("config.json", "{"),
        ("vocab.json", "[1]"),
    ):
        kept = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text(text)
        assert name in refused(train.main, *again)
        (tmp_path / "run" / name).write_text(kept)
    state = load_file(tmp_path / "run" / "last.safetensors")
    save_file(state, tmp_path / "run" / "last.safetensors")
    assert "last.safetensors has no valid record of a run" in refused(train.main, *again)
    save_file(
        state,
        tmp_path / "run" / "last.safetensors",
        metadata={"record": json.dumps({"place": {}, "epochs": 3})},
    )
    assert "last.safetensors does not fit the run" in refused(train.main, *again)


def test_what_a_spoilt_run_folder_records_is_named_when_it_goes_on(world, tmp_path):
    works(train.main, *options(world, tmp_path / "run", "--epochs", 1))
    again, last = (
        options(world, tmp_path / "run", "--epochs", 1, "--resume"),
        tmp_path / "run" / "last.safetensors",
    )
    with safe_open(last, "pt") as file:
        record = json.loads(file.metadata()["record"])
    (line,), state = record["epochs"], load_file(last)
    places = [
        {"epoch": "1"},
        {"step": 1.5},
        {"step": -1},
        {"epoch": 10**300},
        {"seconds": float("nan")},
        {"ended": 1},
    ]
    lines = [
        [3],
        [{}],
        {"a": 1},
        "text",
        [line | {"step": "1"}],
        [line | {"seconds": 3}],
        [line | {"dev": {"CIDEr": None}}],
    ]
    wrong = [record | {"place": record["place"] | place} for place in places] + [
        record | {"epochs": each} for each in lines
    ]
    for each in [*wrong, [], 3, record | {"place": []}]:
        save_file(state, last, metadata={"record": json.dumps(each)})
        assert "last.safetensors does not fit the run" in refused(train.main, *again)
    save_file(state | {"sums": state["sums"].half()}, last, metadata={"record": json.dumps(record)})
    before = told(tmp_path / "run")
    # what is no line of a journal is left out
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n[]\n3\n{"step": "a"}\n{"train": {}}\n' + b"[" * 100_000)
    works(train.main, *again)
    assert told(tmp_path / "run") == before
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for name, value in (("epochs", "1"), ("epochs", [1]), ("eval_steps", "2")):
        changed = config | {"training": config["training"] | {name: value}}
        (tmp_path / "run" / "config.json").write_text(json.dumps(changed))
        assert "config.json" in refused(train.main, *again[:-1], "--epochs", 2, "--resume")


def test_weights_too_large_for_a_caption_are_named(world, tmp_path):
    message = refused(train.main, *options(world, tmp_path / "run", "--lr", 1e9, "--epochs", 1))
    assert "lower --lr" in message


def trained_in(tmp_path: Path) -> str:
    return json.loads((tmp_path / "run" / "config.json").read_text())["training"]["precision"]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named_and_changes_nothing(world, tmp_path, monkeypatch, what):
    plain = objectives.caption_loss

    def spoil(captioner, regions, *arguments):
        loss, words = plain(captioner, regions, *arguments)
        if captioner.training and len(made) == 3:
            loss = (
                loss * float("nan")
                if what == "loss"
                else loss + (captioner.output_bias.sum() * 0).sqrt()
            )
        made.append(loss)
        return loss, words

    made = []
    monkeypatch.setattr(objectives, "caption_loss", spoil)
    message = refused(train.main, *options(world, tmp_path / "run", "--save-every", 0))
    assert "is nan at step 3" in message and "lr" in message and "images" in message
    monkeypatch.undo()
    works(train.main, *options(world, tmp_path / "run", "--resume"))
    works(train.main, *options(world, tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# ----------------------------------------------------------------------------------------- journals


def test_lines_within_an_epoch_and_at_its_end_go_to_metrics_and_to_tensorboard(world, tmp_path):
    works(train.main, *options(world, tmp_path / "run"))
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    within, ends = ([line for line in lines if ("seconds" in line) == end] for end in (False, True))
    assert [line["step"] for line in within] == [3, 6, 9, 12] and [
        line["epoch"] for line in ends
    ] == [1, 2]
    assert (
        within[0]["epoch"] == pytest.approx(3 / 6)
        and {"loss", "lr", "gradient"} <= within[0]["train"].keys()
    )
    assert {"loss", "CIDEr", "Bleu_4"} <= ends[0]["dev"].keys() and {
        "captions_per_s",
        "waiting",
    } <= ends[0]["train"].keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6, 6, 9, 12, 12]
    assert [event.step for event in events.Scalars("dev/CIDEr")] == [6, 12]


def test_weights_and_biases_is_told_where_asked_and_its_absence_is_a_plain_error(
    world, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install 'onceover[wandb]'" in refused(
        train.main, *options(world, tmp_path / "run", "--wandb")
    )
    assert not (tmp_path / "run").exists()
    stand_in = types.SimpleNamespace(calls=[])
    stand_in.init = lambda **given: stand_in.calls.append(given) or types.SimpleNamespace(id="one")
    stand_in.log = lambda values, step: stand_in.calls.append((step, values))
    stand_in.finish = lambda: stand_in.calls.append("finished")
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    works(train.main, *options(world, tmp_path / "run", "--wandb"))
    first, *logged, last = stand_in.calls
    assert (
        first["config"]["batch"] == 8
        and first["name"] == "run"
        and first["id"] is None
        and last == "finished"
    )
    assert [step for step, _ in logged] == [3, 6, 6, 9, 12, 12] and "dev/CIDEr" in logged[2][1]
    stand_in.calls.clear()
    works(train.main, *options(world, tmp_path / "run", "--wandb", "--resume"))
    assert stand_in.calls[0]["id"] == "one" and stand_in.calls[0]["resume"] == "allow"


@pytest.mark.slow
def test_a_run_on_pieces_of_words_is_scored_and_captions_in_words(world, tmp_path):
    told = works(
        train.main,
        *options(world, tmp_path / "run", "--vocabulary", "bpe", "--vocab-size", 60, "--epochs", 8),
    )
    assert "60 subwords; unknown: 0.00% of train, 0.00% of dev" in told
    pieces = json.loads((tmp_path / "run" / "vocab.json").read_text())
    assert len(pieces) == 60 and (tmp_path / "run" / "tokenizer.json").exists()
    line = works(caption.main, *photos(world, 1), "--checkpoint", tmp_path / "run")
    assert "▁" not in line and "  " not in line
    works(
        caption.main,
        *photos(world, 1),
        "--checkpoint",
        tmp_path / "run",
        "--force-words",
        "left of",
    )
    again = options(
        world,
        tmp_path / "run",
        "--vocabulary",
        "bpe",
        "--vocab-size",
        60,
        "--epochs",
        8,
        "--resume",
    )
    assert "resuming" in run_ranks(again, 1, tmp_path)  # a new process reads tokenizer.json


def test_the_share_of_unknown_words_is_shown(world, tmp_path):
    assert "unknown: 0.00% of train, 0.00% of dev" in works(
        train.main, *options(world, tmp_path / "a", "--epochs", 1)
    )
    told = works(train.main, *options(world, tmp_path / "b", "--epochs", 1, "--min-count", 20))
    share = float(told.split("unknown: ")[1].split("%")[0])
    assert 0 < share < 100


# ---------------------------------------------------------------------------------- small data sets


def few(world: Path, folder: Path, count: int, **more: object) -> Path:
    """A folder of the first `count` scenes with one caption each, as people give them."""
    folder.mkdir()
    images = json.loads((world / "sample" / "dataset_sample.json").read_text())["images"][:count]
    lines = []
    for number, image in enumerate(images):
        (source,) = (world / "sample").rglob(image["filename"])
        (folder / f"{number:03}.jpg").write_bytes(source.read_bytes())
        lines.append(
            json.dumps(
                {"file_name": f"{number:03}.jpg", "text": image["sentences"][0]["raw"]} | more
            )
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    works(
        extract.main,
        "--dataset",
        "folder",
        "--root",
        folder,
        *LOOK,
        "--out",
        folder.with_name("few_cache"),
    )
    return folder


def few_options(folder: Path, *more: object) -> list[object]:
    run = folder.with_name("few_run")
    return [
        "--dataset",
        "folder",
        "--root",
        folder,
        "--features",
        folder.with_name("few_cache"),
        "--out",
        run,
        *more,
    ]


@pytest.mark.parametrize("images", [1, 2, 10, 90, 450, 900])
def test_a_small_data_set_gets_enough_steps_and_few_validations(images):
    class Train:
        texts = images

        def __len__(self) -> int:
            return images

    machine = types.SimpleNamespace(precision="fp32")
    config = resolve(TrainConfig(dataset="folder"), Train(), machine)
    steps = -(-images // config.batch)
    assert config.epochs * steps >= 1000 and config.eval_steps == 50
    assert config.batch == min(50, max(8, images // 20))
    asked = resolve(TrainConfig(dataset="folder", epochs=7, batch=3), Train(), machine)
    assert (asked.epochs, asked.batch, asked.eval_steps) == (7, 3, None)


class Many:
    texts = 40_000

    def __len__(self) -> int:
        return 8_000


def test_a_preset_means_the_same_on_the_command_line_and_in_python():
    machine = types.SimpleNamespace(precision="fp32")
    command = train.main.make_context("train", ["--dataset", "folder", "--preset", "flickr8k"])
    own = {
        name: value
        for name, value in command.params.items()
        if name in {item.name for item in fields(TrainConfig)}
    }
    by_command, by_python = TrainConfig(**own), TrainConfig(dataset="folder", preset="flickr8k")
    found = [resolve(config, Many(), machine) for config in (by_command, by_python)]
    assert found[0] == found[1]
    assert (found[0].schedule, found[0].ema, found[0].epochs) == ("constant", 0.998, 11)
    assert found[0].decoder_options["width"] == 384
    asked = resolve(
        TrainConfig(dataset="folder", preset="flickr8k", ema=0.5, schedule="noam"), Many(), machine
    )
    assert (asked.schedule, asked.ema, asked.epochs) == ("noam", 0.5, 11)


def scored(*lines: tuple[int, float, float]) -> list[dict]:
    return [{"step": step, "dev": {"CIDEr": cider, "loss": loss}} for step, cider, loss in lines]


def test_of_equal_cider_the_lower_loss_on_dev_is_the_better():
    assert validation.best_of(scored((1, 0.0, 3.0), (2, 0.0, 2.0), (3, 0.0, 2.5)), "CIDEr") == 1
    assert validation.best_of(scored((1, 0.0, 1.0), (2, 0.1, 9.0), (3, 0.1, 9.0)), "CIDEr") == 1


@pytest.mark.parametrize(
    ("first", "begin", "stops"),
    [(100, 0, False), (600, 0, True), (600, 400, False), (1000, 400, True)],
)
def test_patience_counts_only_after_the_first_steps(first, begin, stops):
    lines = scored(*((first + 50 * number, 0.5 - 0.1 * number, 1.0) for number in range(6)))
    journal = types.SimpleNamespace(scored=lines)
    run = types.SimpleNamespace(
        journal=journal,
        state=types.SimpleNamespace(begin=begin),
        config=types.SimpleNamespace(patience=5),
        task=types.SimpleNamespace(metric="CIDEr"),
    )
    assert validation.stopped_early(run) is stops


@pytest.mark.slow
def test_a_run_on_twelve_photographs_learns_and_its_one_dev_image_has_a_score(world, tmp_path):
    folder = few(world, tmp_path / "few", 12)
    tiny = [
        "--preset",
        "tiny",
        *SMALL,
        "--batch",
        8,
        "--epochs",
        60,
        "--eval-steps",
        40,
        "--lr",
        0.003,
    ]
    output = works(train.main, *few_options(folder, *tiny))
    assert "warning: dev has" in output
    lines = [line for line in told(tmp_path / "few_run") if "dev" in line]
    assert lines[-1]["step"] == 120 and lines[-1]["train"]["loss"] < 0.7 * lines[0]["train"]["loss"]
    assert max(line["dev"]["CIDEr"] for line in lines) > 0


@pytest.mark.slow
def test_one_photograph_trains_with_train_on_dev_and_is_a_plain_error_without(world, tmp_path):
    folder = few(world, tmp_path / "few", 1)
    assert "--train-on-dev" in refused(train.main, *few_options(folder, *SMALL))
    tiny = ["--preset", "tiny", *SMALL, "--dropout", 0, "--epochs", 60, "--lr", 0.01]
    works(train.main, *few_options(folder, *tiny, "--train-on-dev"))
    caption_of = json.loads((folder / "metadata.jsonl").read_text())["text"]
    written = works(caption.main, "--checkpoint", tmp_path / "few_run", folder / "000.jpg")
    assert written.strip().endswith(" ".join(tokenize(caption_of)))


def test_long_captions_are_whole_by_default_and_what_is_cut_is_counted(world, tmp_path):
    folder = few(world, tmp_path / "few", 12)
    long = " ".join(
        ["a man in a red shirt and a woman with a dog walk along a road beside a field"] * 2
    )
    lines = [
        json.dumps({"file_name": f"{n:03}.jpg", "text": f"{long} near {n} trees"})
        for n in range(12)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for more in ([], ["--vocabulary", "bpe", "--vocab-size", 60]):
        out = tmp_path / f"run{len(more)}"
        options = [*few_options(folder, *SMALL, "--epochs", 1, *more)]
        options[options.index("--out") + 1] = out
        assert "are cut" not in works(train.main, *options)
        assert json.loads((out / "config.json").read_text())["model"]["max_length"] > 38
    options[options.index("--out") + 1] = tmp_path / "cut"
    output = works(train.main, *options[:-4], "--max-length", 15)
    assert re.search(
        r"(\d+) of \1 train captions \(100.0%\) have more than 15 words and are cut", output
    )


# -------------------------------------------------------------------------------------- more epochs


def test_a_finished_run_is_trained_for_more_epochs_with_a_new_schedule(world, tmp_path):
    run = tmp_path / "run"
    works(train.main, *options(world, run))
    last = [line for line in told(run) if "dev" in line][-1]
    output = works(train.main, *options(world, run, "--resume", "--epochs", 5))
    assert "the 3 epochs added get a new cosine learning rate schedule" in output
    lines = told(run)
    steps = last["step"] // 2
    assert [line["step"] for line in lines if "dev" in line] == [
        steps * epoch for epoch in range(1, 6)
    ]
    added = [line["train"]["lr"] for line in lines if line["step"] > last["step"]]
    assert max(added) > 5 * last["train"]["lr"] and added[-1] < max(added)
    assert json.loads((run / "config.json").read_text())["training"]["epochs"] == 5
    before = load_file(run / "last.safetensors")
    works(train.main, *options(world, run, "--resume", "--epochs", 5))  # nothing is left to do
    after = load_file(run / "last.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_more_epochs_stopped_anywhere_go_on_exactly(world, tmp_path, monkeypatch):
    for name in ("through", "stopped"):
        works(train.main, *options(world, tmp_path / name))
    works(train.main, *options(world, tmp_path / "through", "--resume", "--epochs", 4))
    with monkeypatch.context() as patch:
        interrupt_at(17, patch)
        run_result = run(
            train.main, *options(world, tmp_path / "stopped", "--resume", "--epochs", 4)
        )
    assert run_result.exit_code == 128 + signal.SIGINT
    works(train.main, *options(world, tmp_path / "stopped", "--resume", "--epochs", 4))
    assert_same_run(tmp_path / "through", tmp_path / "stopped")


def test_a_run_that_is_not_finished_takes_no_more_epochs(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        run(train.main, *options(world, tmp_path / "run"))
    message = refused(train.main, *options(world, tmp_path / "run", "--resume", "--epochs", 5))
    assert "is in epoch 1 of 2" in message
    works(train.main, *options(world, tmp_path / "run", "--resume"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_sent_twice_at_once_lets_the_run_save_and_a_later_one_ends_it(
    signum, monkeypatch
):
    """Slurm and pipeline.sweep both signal the run."""
    ended = []
    before = signal.signal(signum, lambda *_: ended.append(True))
    try:
        stopped = types.SimpleNamespace(stop_signal=0)
        with trainer.stopping_on_signals(stopped):
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signum)
            assert stopped.stop_signal == signum and not ended
            monkeypatch.setattr(trainer, "REPEAT_SECONDS", 0)
            os.kill(os.getpid(), signum)
            assert ended
    finally:
        signal.signal(signum, before)
