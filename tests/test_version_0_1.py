"""What version 0.1 wrote still works: tests/fixtures/v0.1 was made by its code (make.py there)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import PIL
import pytest

from data.cache.reader import FeatureCache
from data.datasets.sample import draw_sample
from pipeline import caption, evaluate, extract, train
from tests import test_commands
from tests.test_commands import LOOK, refused, works
from tests.test_train import interrupt_at

MADE = Path(__file__).parent / "fixtures" / "v0.1"
AT = ["--dataset", "karpathy", "--root", "sample"]
MACHINE = ["--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """A copy of all that version 0.1 made, with its photographs, as the current folder."""
    draw_sample(tmp_path / "sample", count=40, seed=3)
    shutil.copytree(MADE, tmp_path, dirs_exist_ok=True)
    for run in ("word", "bpe", "scst", "half"):
        shutil.copy(tmp_path / "cache" / "backbone.safetensors", tmp_path / run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def captions(run: str, folder: Path = Path()) -> dict[int, str]:
    lines = json.loads((folder / run / "captions-test.json").read_text())
    return {line["image_id"]: line["caption"] for line in lines}


def validations(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "dev" in line]


def losses(run: Path) -> dict[int, float]:
    """Dev loss by step. CIDEr on a small dev is another one than in version 0.1, and so is the best
    epoch.
    """
    return {line["step"]: line["dev"]["loss"] for line in validations(run)}


def test_its_cache_is_whole_and_goes_on(made):
    cache = FeatureCache("cache")
    assert (len(cache), cache.shape, cache.views) == (40, (4, 96), ("flip",))
    assert "40 rows, all checksums are correct" in works(extract.main, "--verify", "cache")
    again = [*AT, *LOOK, "--grid", "2x2", "--views", "flip", "--out", "cache", *MACHINE]
    if PIL.__version__.startswith("13."):  # as it was made: another one may decode other pixels
        assert "all images were already extracted" in works(extract.main, *again)
    else:
        assert "decode: pillow 13" in refused(extract.main, *again)


@pytest.mark.parametrize("run", ["word", "bpe", "scst", "whole"])
def test_its_runs_give_the_same_captions_and_scores(made, run):
    scores = json.loads((made / run / "scores-test.json").read_text())["scores"]
    works(
        evaluate.main, *AT, "--checkpoint", run, "--features", "cache", "--split", "test", *MACHINE
    )
    assert captions(run) == captions(run, MADE)
    assert json.loads((made / run / "scores-test.json").read_text())["scores"] == pytest.approx(
        scores
    )


@pytest.mark.parametrize("run", ["word", "bpe", "scst"])
def test_its_runs_caption_photographs(made, run):
    image_id, wanted = next(iter(captions(run).items()))
    photo = next((made / "sample").rglob(f"*{image_id:012d}.jpg"))
    output = works(caption.main, photo, "--checkpoint", run, *MACHINE)
    assert output.splitlines()[-1] == f"{photo.name}: {wanted}"


@pytest.mark.parametrize("more", [[], ["--scst"]])
@pytest.mark.parametrize("run", ["word", "bpe"])
def test_its_runs_serve_as_init(made, run, more):
    works(
        train.main,
        *AT,
        "--features",
        "cache",
        "--init",
        run,
        *more,
        "--epochs",
        1,
        "--batch",
        20,
        "--lr",
        1e-4,
        "--out",
        "new",
        *MACHINE,
    )
    kept = max(validations(MADE / run), key=lambda line: line["dev"]["CIDEr"])
    first = validations(Path("new"))[0]
    assert first["step"] == 0 and first["dev"]["loss"] == pytest.approx(
        kept["dev"]["loss"], abs=1e-5
    )


@pytest.mark.slow
def test_its_half_finished_run_goes_on_as_it_would_have(made):
    output = works(train.main, "--config", "half/config.json", "--out", "half", "--resume")
    assert "resuming half after step 71" in output
    assert losses(Path("half")) == pytest.approx(losses(MADE / "whole"), abs=1e-3)


@pytest.mark.slow
def test_its_config_trains_the_same_run_again(made, monkeypatch):
    """Up to the step where version 0.1 left the half of it: the test before goes on from there."""
    interrupt_at(71, monkeypatch)
    asked = ["--config", MADE / "whole" / "config.json", "--out", "new"]
    result = test_commands.run(train.main, *asked)
    assert result.exit_code == 130
    wanted = {step: loss for step, loss in losses(MADE / "whole").items() if step <= 71}
    assert wanted and losses(Path("new")) == pytest.approx(wanted, abs=1e-3)
