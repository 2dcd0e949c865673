"""pipeline.sweep: runs of a TOML file, what is done is skipped, and the comparison."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import evaluate, sweep, train
from pipeline.cli import UserError
from pipeline.scoring.comparison import Row, compare_runs, markdown, write_comparison
from pipeline.sweep.file import labels_of
from pipeline.sweep.process import Launcher, own_gpu
from pipeline.sweep.runs import arguments
from tests.processes import begin
from tests.test_commands import refused, run, works

SWEEP = """
out = "{out}"
[train]
dataset = "karpathy"
root = "{world}/sample"
features = "{world}/cache"
preset = "tiny"
width = 16
epochs = 1
min-count = 1
[evaluate]
split = "val"
beam = 2
[grid]
decoder = ["pooled", "lstm"]
[[runs]]
name = "wide"
decoder = "pooled"
width = 32
heads = 4
"""


@pytest.fixture
def in_process(monkeypatch) -> None:
    """The runs share this process: importing torch takes most of the time of such small ones."""

    def run_process(_, arguments):
        assert arguments[:2] == [sys.executable, "-m"]
        stage = {"pipeline.train": train, "pipeline.evaluate": evaluate}[arguments[2]]
        return run(stage.main, *arguments[3:]).exit_code, 123_000_000

    monkeypatch.setattr(Launcher, "run", run_process)


def stand_in(calls: Path, fails: tuple[str, ...] = ()) -> None:
    """Put programs that write empty files in the place of pipeline.train and pipeline.evaluate.

    calls: a file, which gets one line for each program. fails: programs that only fail.
    """

    def run_process(_, arguments):
        name = arguments[2].removeprefix("pipeline.")
        folder = Path(
            arguments[arguments.index("--out" if name == "train" else "--checkpoint") + 1]
        )
        call = f"{name} {folder.name}"
        with open(calls, "a") as file:
            file.write(f"{call}{' --resume' * ('--resume' in arguments)}\n")
        if call in fails:
            return 1, 0
        for result in {"train": ["config.json", "model.safetensors"]}.get(name, ["scores.json"]):
            (folder / result).write_text("{}")
        return 0, 5

    Launcher.run = run_process
    sweep.row_of = lambda run: row(run.name, [0.5, 0.6])


@pytest.fixture
def stands_in(monkeypatch, tmp_path):
    """`stand_in` for this test; returns the calls since the last look."""
    monkeypatch.setattr(Launcher, "run", None)
    monkeypatch.setattr(sweep, "row_of", None)
    path = tmp_path / "calls"

    def calls() -> list[str]:
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return lines

    calls.without = lambda *fails: stand_in(path, fails)
    calls.without()
    return calls


@pytest.fixture
def bare(tmp_path) -> Path:
    """A file of runs without photographs, for what happens before the first run starts."""
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.format(out=tmp_path / "runs", world=tmp_path))
    return path


@pytest.fixture
def file(world, tmp_path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.format(out=tmp_path / "runs", world=world))
    return path


def test_the_runs_of_a_file_are_trained_scored_and_compared_once(file, tmp_path, in_process):
    table = works(sweep.main, file)
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [each["name"] for each in record["runs"]] == ["pooled", "lstm", "wide"]
    assert (tmp_path / "runs" / "comparison.svg").read_text().startswith("<?xml")
    scores = {}
    for each in record["runs"]:
        own = json.loads((tmp_path / "runs" / each["name"] / "scores.json").read_text())
        assert each["scores"] == own["scores"] and own["decoding"]["beam"] == 2
        assert own["decoded_per_s"] == each["decoded_per_s"] > 0 < each["trained_per_s"]
        assert each["minutes"] > 0 and each["peak_bytes"] == 123_000_000
        scores[each["name"]] = own["scores"]["CIDEr"]
        assert re.search(rf"^\| {each['name']} +\| +{own['scores']['CIDEr']:.4f} ", table, re.M)
    assert len(record["pairs"]) == 3
    for pair in record["pairs"]:
        assert pair["value"] == pytest.approx(scores[pair["a"]] - scores[pair["b"]])


def test_only_what_is_not_done_is_run(bare, tmp_path, stands_in):
    runs = tmp_path / "runs"
    assert works(sweep.main, bare, "--dry-run").count("python -m pipeline.train") == 3
    assert not runs.exists() and stands_in() == []
    every = [
        f"{name} {run}" for run in ("pooled", "lstm", "wide") for name in ("train", "evaluate")
    ]
    works(sweep.main, bare)
    assert stands_in() == every
    works(sweep.main, bare)
    assert stands_in() == []
    bare.write_text(bare.read_text().replace("beam = 2", "beam = 1"))
    works(sweep.main, bare)
    assert stands_in() == every[1::2]
    shutil.rmtree(runs / "pooled")
    (runs / "lstm" / "scores.json").unlink()
    (runs / "wide" / "model.safetensors").unlink()
    works(sweep.main, bare)
    again = ["evaluate lstm", "train wide --resume", "evaluate wide"]
    assert stands_in() == [*every[:2], *again]
    bare.write_text(bare.read_text().replace("epochs = 1", "epochs = 2"))
    assert "was trained with epochs = 1, but the file has 2" in refused(sweep.main, bare)
    assert stands_in() == []


def test_options_may_change_until_the_run_has_begun(bare, stands_in):
    stands_in.without("train wide")
    refused(sweep.main, bare)
    bare.write_text(bare.read_text().replace("width = 32", "width = 64"))
    stands_in.without()
    stands_in()
    works(sweep.main, bare)
    assert stands_in() == ["train wide", "evaluate wide"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(file, tmp_path):
    file.write_text(file.read_text().replace("epochs = 1", "epochs = 12"))
    command = [sys.executable, "-m", "pipeline.sweep", str(file)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    saved = tmp_path / "runs" / "pooled" / "last.safetensors"
    until = time.monotonic() + 120
    while not saved.exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "runs" / "comparison.json").exists()
    told = works(sweep.main, file)
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert len(record["runs"]) == 3 and "| wide" in told
    state = json.loads((tmp_path / "runs" / "pooled" / "sweep.json").read_text())
    assert state["done"] == ["train", "evaluate"]


@pytest.mark.slow
def test_processes_of_torchrun_share_the_runs(file, tmp_path):
    """The first run fails at once, and torchrun must not end the other process for that."""
    text = file.read_text().replace('["pooled", "lstm"]', '["pooled"]').replace(
        "[[runs]]", '[[runs]]\nname = "lstm"\ndecoder = "lstm"\n[[runs]]'
    )  # fmt: skip
    file.write_text(text.replace("[grid]", "[grid]\nfeatures = ['absent']"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "pipeline.sweep", str(file)], capture_output=True, text=True
    )
    assert done.returncode and "1 of 3 runs failed: absent-pooled" in done.stderr
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert all(each["peak_bytes"] > 1e8 for each in record["runs"])
    assert {each["name"] for each in record["runs"]} == {"lstm", "wide"}


def sweep_with_stand_ins(file: str, calls: str, fails: tuple[str, ...]) -> None:
    stand_in(Path(calls), fails)
    original = Launcher.run

    def run_process(launcher, arguments):
        time.sleep(0 if os.environ["RANK"] == "0" else 1)
        return original(launcher, arguments)

    Launcher.run = run_process
    sweep.main([file])


@pytest.mark.slow
def test_a_failed_run_ends_no_process_before_the_others_have_finished(bare, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    calls = tmp_path / "calls"
    said = [tmp_path / f"said-{rank}" for rank in range(2)]
    ranks = [
        begin(sweep_with_stand_ins, str(bare), str(calls), ("train pooled",), said=said[rank],
              RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **shared)
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        process.join(120)
        process.kill()  # only one that hangs is still there
    texts = [path.read_text() for path in said]
    assert [process.exitcode for process in ranks] == [2, 0], texts
    assert calls.read_text().splitlines()[-1] == "evaluate lstm"  # of the process that is slow
    assert "1 of 3 runs failed: pooled" in texts[0]
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [each["name"] for each in record["runs"]] == ["lstm", "wide"]


GRID = 'decoder = ["pooled", "lstm"]'


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        # names of options
        (GRID, 'decodr = ["pooled"]', "[grid]: unknown option 'decodr'; did you mean 'decoder'?"),
        ("[grid]", "[grids]", "unknown key 'grids'"),
        ("beam = 2", "bem = 2", "[evaluate]: unknown option 'bem'; did you mean 'beam'?"),
        ("epochs = 1", "split = 'val'", "belongs into [evaluate]"),
        ("epochs = 1", "min_count = 2", "is set twice"),
        ("epochs = 1", "out = 'x'", "[train]: out cannot be set"),
        ("epochs = 1", "resume = true", "[train]: resume cannot be set"),
        ("epochs = 1", "config = 'x.toml'", "[train]: config cannot be set"),
        ("epochs = 1", "help = true", "[train]: unknown option 'help'"),
        ("epochs = 1", "no-meshed = true", "[train]: unknown option 'no_meshed'"),
        (GRID, "resume = [true]", "[grid]: resume cannot be set"),
        (GRID, 'name = ["a"]', "[grid]: unknown option 'name'"),
        ("heads = 4", "out = 'x'", "run 1 of [[runs]]: out cannot be set"),
        ("beam = 2", "checkpoint = 'x'", "[evaluate]: checkpoint cannot be set"),
        ("beam = 2", "captions = ['x.json']", "[evaluate]: captions cannot be set"),
        ("beam = 2", "answers = 'x.json'", "[evaluate]: answers cannot be set"),
        ("beam = 2", "ranks = 'x.json'", "[evaluate]: ranks cannot be set"),
        ("beam = 2", "answers-out = 'x.json'", "[evaluate]: answers_out cannot be set"),
        # types of values
        (GRID, 'decoder = "lstm"', "must be a list of values"),
        (GRID, "width = [[16, 32]]", "[grid]: width has a list, not a whole number"),
        ("width = 16", "width = [16]", "[train]: width is a list, not a whole number"),
        ("width = 16", "width = true", "[train]: width is bool 'True', not a whole number"),
        ("width = 16", "width = 2026-01-01", "[train]: width is date '2026-01-01'"),
        ("width = 16", "width = {a = 1}", "[train]: width is a table"),
        ("width = 16", 'init = "a\\u0000b"', "[train]: init is text with a character"),
        ("width = 16", "meshed = 'yes'", "[train]: meshed is str 'yes', not true or false"),
        ('split = "val"', "split = 1", "[evaluate]: split is int '1', not text"),
        ('out = "', 'out = "\\u0000', "out is text with a character"),
        ("[grid]", "[[grid]]", "[grid] is [{'decoder'"),
        ('name = "wide"', "name = 5", "name is 5, it must be text"),
        ("heads = 4", "heads = [", "cannot be read"),
        # values and bounds, of all runs
        (GRID, 'decoder = ["pooled", "gru"]', "run gru: Invalid value"),
        (GRID, "epochs = [1, 0]", "run epochs=0: --epochs is 0, it must be at least 1"),
        (GRID, "heads = [1, 0]", "run heads=0: --heads is 0, it must be at least 1"),
        ("heads = 4", "meshed = true", "run wide: --meshed is an option of --decoder transformer"),
        ("heads = 4", "scst = true", "run wide: --scst needs --init"),
        (GRID, "heads = [1, 5]", "run heads=5: width 16 is not a multiple of heads 5"),
        (GRID, "seed = [1, -1]", "run seed=-1: --seed is -1, it must be at least 0"),
        ("beam = 2", "beam = 0", "run pooled: --beam is 0"),
        ("beam = 2", "top-p = 0.5", "run pooled: --temperature, --top-k and --top-p need --sample"),
        (
            'preset = "tiny"\n',
            "scst = true\ninit = 'x'\nreward = 'cider'\n",
            "run pooled: --reward",
        ),
        ("beam = 2", "wups = true", "run pooled: --wups is an option of --task vqa"),
        ("epochs = 1", "task = 'vqa'", "run pooled: --beam has no effect"),
        ("beam = 2", "consensus = 0", "run pooled: --consensus is 0"),
        ("beam = 2", "sample = true\nbeam = 2", "run pooled: --sample cannot be used with --beam"),
        ('split = "val"', 'split = "vall"', "run pooled: Invalid value for '--split'"),
        ('split = "val"\n', "exclude-ids = 'x'\n[train2]\n", "unknown key 'train2'"),
        # names of runs
        ('name = "wide"', 'name = "lstm"', "two runs have the name 'lstm'"),
        ('name = "wide"', 'name = "LSTM"', "'lstm' and 'LSTM', which some systems take as equal"),
        ('name = "wide"', 'name = "a/b"', "cannot be the name of a run"),
        ('name = "wide"', "name = 'a\\b'", "cannot be the name of a run"),
        ('name = "wide"', 'name = ".."', "cannot be the name of a run"),
        ('name = "wide"', 'name = "a\\nb"', "cannot be the name of a run"),
        ('name = "wide"', f'name = "{"a" * 300}"', "cannot be the name of a run"),
        ('name = "wide"', 'name = "Comparison.json"', "is a file of the comparison"),
    ],
)
def test_mistakes_are_found_before_the_first_run(bare, tmp_path, old, new, what):
    text = bare.read_text()
    assert old in text
    bare.write_text(text.replace(old, new))
    assert what in refused(sweep.main, bare)
    assert not (tmp_path / "runs").exists()


def test_images_to_train_on_need_a_choice_of_those_to_score(bare):
    text = bare.read_text().replace("epochs = 1", 'ids = "some.txt"')
    bare.write_text(text)
    lines = works(sweep.main, bare, "--dry-run").splitlines()
    assert ["--ids some.txt" in line for line in lines] == [True, False] * 3
    bare.write_text(text.replace('split = "val"', ""))
    assert "ids chooses the images to train on" in refused(sweep.main, bare)


def test_another_dataset_to_score_takes_no_options_of_the_one_to_train_on(bare):
    bare.write_text(bare.read_text().replace("beam = 2", 'dataset = "coco"\nroot = "coco"'))
    lines = works(sweep.main, bare, "--dry-run").splitlines()
    assert "--dataset coco --root coco" in lines[1] and "--dataset karpathy" not in lines[1]


@pytest.mark.parametrize(
    ("name", "values", "labels"),
    [
        ("features", ["cache/x", "cache/y"], ["x", "y"]),
        ("features", ["cache/a/x", "cache/b/x"], ["a-x", "b-x"]),
        ("features", ["/x", "/a/x/"], ["x", "a-x"]),
        ("meshed", [True, False], ["meshed", "no-meshed"]),
        ("encoder_layers", [1, 2], ["encoder-layers=1", "encoder-layers=2"]),
        ("images", [["a/x", "a/y"], ["a/z"]], ["x+y", "z"]),
    ],
)
def test_names_of_a_grid_tell_its_values_apart(name, values, labels):
    assert labels_of(name, values) == labels


@pytest.mark.parametrize("value", ["--config", "-x", "--", "-1", "plain"])
def test_no_value_of_a_file_is_taken_for_an_option(value):
    given = arguments({"root": value, "images": [value, "folder"]})
    config = train.main.configuration(["--dataset", "coco", *given, "--out", "run"])
    assert str(config.root) == value
    assert [str(path) for path in config.images] == [value, "folder"]


def test_sizes_that_some_preset_allows_are_accepted(bare):
    bare.write_text(bare.read_text().replace('preset = "tiny"\n', "").replace("heads = 4\n", ""))
    works(sweep.main, bare, "--dry-run")  # which preset it is depends on the data
    bare.write_text(bare.read_text().replace("width = 32", "width = 37"))
    assert "run wide: width 37 is not a multiple of heads" in refused(sweep.main, bare)


def test_a_folder_of_another_origin_is_not_touched(bare, tmp_path, stands_in):
    folder = tmp_path / "runs" / "lstm"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    told = refused(sweep.main, bare)
    assert f"{folder} has a run that pipeline.sweep did not start" in told and stands_in() == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "null", "[]", "{}", "[" * 10**5, '{"train": {}, "done": "train"}', "\udcff"],
)
def test_a_damaged_record_is_a_plain_error(bare, tmp_path, content, stands_in):
    folder = tmp_path / "runs" / "lstm"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_bytes(content.encode(errors="surrogateescape"))
    assert f"{folder / 'sweep.json'} is damaged" in refused(sweep.main, bare)
    assert stands_in() == []


def test_a_second_sweep_in_the_folder_is_refused(bare, tmp_path, stands_in):
    with sweep.claimed(tmp_path / "runs", 0):
        assert "another pipeline.sweep works in" in refused(sweep.main, bare)
        assert stands_in() == []
    works(sweep.main, bare)


def launch(program: str) -> None:
    with Launcher() as launcher:
        code, _ = launcher.run([sys.executable, "-c", program])
        assert code == 7
        launcher.exit_if_stopped()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_forwarded_and_the_program_is_waited_for(tmp_path, signum):
    program = f"""
import pathlib, signal, sys, time
folder = pathlib.Path({str(tmp_path)!r})
def save(*_):
    time.sleep(0.5)
    (folder / "saved").touch()
    sys.exit(7)
signal.signal({int(signum)}, save)
(folder / "ready").touch()
time.sleep(60)
"""
    process = begin(launch, program, said=tmp_path / "said")
    until = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 128 + signum and (tmp_path / "saved").exists()
    assert "the same command continues it" in (tmp_path / "said").read_text()


@pytest.mark.parametrize(
    ("visible", "gpus", "rank", "gpu"),
    [
        (None, 2, 1, "1"),
        (None, 0, 1, None),
        (None, 2, 2, "which has 2 GPUs; start at most 2"),
        ("", 2, 0, None),
        ("-1", 2, 0, None),
        ("3, 5", 8, 1, "5"),
        ("GPU-8a,GPU-9b", 8, 0, "GPU-8a"),
        ("3", 8, 1, "which has 1 GPUs (CUDA_VISIBLE_DEVICES=3)"),
    ],
)
def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch, visible, gpus, rank, gpu):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_gpu(["auto"]) is None
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert own_gpu(["cpu"]) is None
    if gpu and " " in gpu:
        with pytest.raises(UserError, match=re.escape(gpu)):
            own_gpu(["auto"])
    else:
        assert own_gpu(["cpu", "cuda"]) == gpu


def test_a_failed_run_is_named_and_the_others_go_on(bare, tmp_path, stands_in):
    stands_in.without("train lstm", "evaluate wide")
    assert "2 of 3 runs failed: lstm, wide" in refused(sweep.main, bare)
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [each["name"] for each in record["runs"]] == ["pooled"] and record["pairs"] == []


def row(name: str, values: list[float], metric: str = "CIDEr") -> Row:
    examples = [{"image_id": n, "scores": {metric: v}} for n, v in enumerate(values)]
    scores = {metric: float(np.mean(values))}
    return Row(name, metric, scores, {}, examples, 1_000_000, 10, 10, 1, 0)


def test_only_differences_beyond_chance_are_significant():
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.2, 300)
    rows = [row("a|b", base), row("same", base + rng.normal(0, 0.2, 300)), row("c", base + 0.1)]
    comparison = compare_runs(rows)
    p = {(pair["a"], pair["b"]): pair["p"] for pair in comparison["pairs"]}
    assert p["a|b", "c"] < 0.05 < p["a|b", "same"]
    runs, _, pairs = markdown(comparison).partition("\n\n")
    lines = [line for line in pairs.splitlines() if line.startswith("| a\\|b ")]
    assert [line.split()[-2] for line in lines] == ["no", "yes"]
    assert "-0.1000" in lines[1] and "not corrected" in pairs
    # aligned: all lines are as long as the first, and numbers are on the right
    assert {len(line) for line in runs.splitlines()} == {len(runs.splitlines()[0])}
    assert runs.splitlines()[1].count("-:") == 7
    with pytest.raises(UserError, match="different examples"):
        compare_runs([row("a", base), row("b", base[:200])])


def test_a_run_without_the_score_or_without_examples_is_in_the_table_and_in_no_pair(tmp_path):
    full = row("full", [0.1, 0.2, 0.4])
    with_unscored = replace(row("unscored", [0.2, 0.2, 0.2]), minutes=None, trained_per_s=None)
    unscored = {"image_id": 9}
    with_unscored = replace(with_unscored, examples=[*with_unscored.examples, unscored])
    no_examples = replace(row("bare", [0.5]), examples=[])
    no_score = replace(row("none", [0.5, 0.5, 0.5]), scores={}, examples=[unscored])
    null = replace(row("null", [0.5] * 3), scores={"CIDEr": None})
    null = replace(null, examples=[e | {"scores": {"CIDEr": None}} for e in null.examples])
    comparison = compare_runs([no_examples, full, no_score, with_unscored, null])
    assert [(pair["a"], pair["b"]) for pair in comparison["pairs"]] == [("full", "unscored")]
    table = write_comparison(comparison, tmp_path)
    order = re.findall(r"^\| (\w+)", table.partition("\n\n")[0], re.M)
    assert order == ["run", "bare", "full", "unscored", "none", "null"]
    assert table.count("not computed") == 7 and table.count("unknown") == 7
    assert (
        json.loads((tmp_path / "comparison.json").read_text())["runs"][4]["scores"]["CIDEr"] is None
    )
    assert compare_runs([no_score, no_examples])["pairs"] == []
