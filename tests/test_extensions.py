"""A task, a decoder and a kind of regions from outside: one file each (tests/toys) and one line
here.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache.reader import FeatureCache, Rows
from data.cache.writer import plan_shards, write_index, write_shard
from data.datasets.registry import open_source
from data.datasets.sample import draw_sample
from models.decoders.registry import DECODERS
from models.generation.generate import generate_from_regions
from models.regions import Regions
from pipeline import caption, evaluate, extract, train
from pipeline.checkpoints.checkpoint import load_checkpoint
from pipeline.extraction.registry import REGIONS
from pipeline.tasks.registry import TASKS
from pipeline.training.config import TrainConfig
from tests.test_commands import LOOK, SMALL, refused, run, works
from tests.test_train import interrupt_at, told
from tests.toys.bag import BagConfig, BagOfRegions
from tests.toys.counting import Counting
from tests.toys.pixels import PIXELS

QUICK = ["--batch", 20, "--beam", 2, "--log-every", 2, "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(TASKS, "counting", Counting)
    monkeypatch.setitem(DECODERS, "bag", BagOfRegions)
    monkeypatch.setitem(REGIONS, "pixels", PIXELS)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A drawn sample of 60 scenes and its grid features."""
    folder = tmp_path_factory.mktemp("extensions")
    draw_sample(folder / "sample", count=60, seed=3)
    works(
        extract.main,
        *at(folder),
        *LOOK,
        "--grid",
        "2x2",
        "--out",
        folder / "cache",
    )
    return folder


def at(folder: Path) -> list:
    return ["--dataset", "karpathy", "--root", folder / "sample"]


def over(folder: Path, out: Path, *more: object) -> list:
    return [*at(folder), "--features", folder / "cache", "--out", out, *QUICK, *more]


# --------------------------------------------------------------------------------------------- task


def test_a_task_trains_is_evaluated_and_resumes(drawn, tmp_path, monkeypatch):
    asked = ["--task", "counting", "--questions-per-image", 3, *SMALL, "--epochs", 3]
    output = works(train.main, *over(drawn, tmp_path / "run", *asked))
    # 48 train images, 3 questions each
    assert "144 questions" in output and "dev accuracy" in output
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["training"]["task"], record["training"]["questions_per_image"]) == (
        "counting",
        3,
    )
    assert record["model"]["max_prompt"] == 6

    evaluated = works(
        evaluate.main, *at(drawn), "--checkpoint", tmp_path / "run", "--features", drawn / "cache"
    )
    scores = json.loads((tmp_path / "run" / "scores-test.json").read_text())
    lines = [
        json.loads(line)
        for line in (tmp_path / "run" / "scores-test-outputs.jsonl").read_text().splitlines()
    ]
    assert (
        len(lines)
        == 3 * len({line["image_id"] for line in lines})
        == len({line["id"] for line in lines})
    )
    assert (
        scores["examples"] == len(lines)
        and f"accuracy     {scores['scores']['accuracy']:.4f}" in evaluated
    )

    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        assert run(train.main, *over(drawn, tmp_path / "half", *asked)).exit_code == 130
    again = ["--config", tmp_path / "half" / "config.json", "--out", tmp_path / "half", "--resume"]
    assert "resuming" in works(train.main, *again)
    assert told(tmp_path / "half") == told(tmp_path / "run")


@pytest.mark.slow
def test_a_task_learns_what_its_questions_ask(drawn, tmp_path):
    """Two questions on one image have their own answers: the prompt is read, not only the image."""
    asked = [
        "--task",
        "counting",
        "--questions-per-image",
        5,
        *SMALL,
        "--epochs",
        70,
        "--lr",
        0.005,
        "--dropout",
        0,
        "--train-on-dev",
        "--label-smoothing",
        0,
        "--region-dropout",
        0,
        "--ema",
        0,
    ]
    works(train.main, *over(drawn, tmp_path / "run", *asked, "--batch", 8))
    works(
        evaluate.main,
        *at(drawn),
        "--checkpoint",
        tmp_path / "run",
        "--features",
        drawn / "cache",
        "--split",
        "train",
    )
    lines = [
        json.loads(line)
        for line in (tmp_path / "run" / "scores-train-outputs.jsonl").read_text().splitlines()
    ]
    by_image: dict[int, set[str]] = {}
    for line in lines:
        by_image.setdefault(line["image_id"], set()).add(line["output"])
    assert sum(len(answers) > 1 for answers in by_image.values()) > len(by_image) / 2
    assert (
        json.loads((tmp_path / "run" / "scores-train.json").read_text())["scores"]["accuracy"] > 0.7
    )


def test_a_task_trains_without_any_image(drawn, tmp_path):
    asked = [
        *at(drawn),
        "--features",
        "none",
        "--task",
        "counting",
        *SMALL,
        "--epochs",
        2,
        "--out",
        tmp_path / "run",
        *QUICK,
    ]
    works(train.main, *asked)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["features"] == {"regions": "none"}
    works(evaluate.main, *at(drawn), "--checkpoint", tmp_path / "run")
    assert "accuracy" in json.loads((tmp_path / "run" / "scores-test.json").read_text())["scores"]
    photo = next((drawn / "sample").rglob("*.jpg"))
    assert "was trained on questions, not on captions" in refused(
        caption.main, photo, "--checkpoint", tmp_path / "run"
    )


def test_options_of_captions_and_rewards_are_refused_for_another_task(drawn, tmp_path):
    works(train.main, *over(drawn, tmp_path / "run", "--task", "counting", *SMALL, "--epochs", 1))
    answer = refused(
        evaluate.main,
        *at(drawn),
        "--checkpoint",
        tmp_path / "run",
        "--features",
        drawn / "cache",
        "--meteor",
    )
    assert "--meteor is an option of --task captioning" in answer
    asked = over(
        drawn, tmp_path / "scst", "--task", "counting", "--init", tmp_path / "run", "--scst"
    )
    assert "--task counting has no rewards" in refused(train.main, *asked)


# ------------------------------------------------------------------------------------------ decoder


def test_a_decoder_trains_is_evaluated_captions_and_resumes(drawn, tmp_path, monkeypatch):
    asked = ["--decoder", "bag", "--bag-width", 48, "--epochs", 3]
    output = works(train.main, *over(drawn, tmp_path / "run", *asked))
    assert "bag width 48" in output
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["decoder"], record["model"]["bag_width"], record["training"]["bag_width"]) == (
        "bag",
        48,
        48,
    )
    works(
        evaluate.main, *at(drawn), "--checkpoint", tmp_path / "run", "--features", drawn / "cache"
    )
    assert json.loads((tmp_path / "run" / "scores-test.json").read_text())["scores"]["CIDEr"] >= 0
    photo = next((drawn / "sample").rglob("*.jpg"))
    assert photo.name in works(caption.main, photo, "--checkpoint", tmp_path / "run")
    more = over(
        drawn,
        tmp_path / "further",
        "--decoder",
        "bag",
        "--init",
        tmp_path / "run",
        "--scst",
        "--epochs",
        1,
    )
    assert "train reward" in works(train.main, *more)
    again = [
        "--config",
        tmp_path / "run" / "config.json",
        "--out",
        tmp_path / "run",
        "--resume",
        "--epochs",
        4,
    ]
    assert "epoch 4/4" in works(train.main, *again)


def test_a_decoder_of_another_kind_searches_as_it_scores():
    torch.manual_seed(0)
    decoder = BagOfRegions(BagConfig(11, 6, max_length=7, max_prompt=3)).eval()
    regions = Regions(torch.randn(3, 5, 6), torch.rand(3, 5, 4), torch.tensor([5, 0, 3]))
    prompts = torch.tensor([[0, 0, 4], [5, 6, 7], [0, 0, 0]])
    found = generate_from_regions(
        decoder, regions, prompts=prompts, num_beams=3, num_return_sequences=3
    )
    for image in range(3):
        one = Regions(*(part[image : image + 1] for part in regions))
        prompt = prompts[image][prompts[image] > 0][None]
        alone = generate_from_regions(
            decoder,
            one,
            prompts=prompt if prompt.numel() else None,
            num_beams=3,
            num_return_sequences=3,
        )
        assert torch.equal(found.tokens[image], alone.tokens[0])
        torch.testing.assert_close(found.scores[image], alone.scores[0])


# ------------------------------------------------------------------------------------------ regions


def test_a_kind_of_regions_is_extracted_trained_on_and_captions_photographs(drawn, tmp_path):
    asked = [
        *at(drawn),
        "--regions",
        "pixels",
        "--columns",
        6,
        "--out",
        tmp_path / "cache",
        "--device",
        "cpu",
    ]
    works(extract.main, *asked)
    cache = FeatureCache(tmp_path / "cache")
    assert (cache.shape, cache.identity) == (
        (6, 16),
        {"regions": "pixels", "columns": 6, "seed": 0},
    )
    assert "all images were already extracted" in works(extract.main, *asked)
    assert "60 rows, all checksums are correct" in works(
        extract.main, "--verify", tmp_path / "cache"
    )
    works(
        train.main,
        *at(drawn),
        "--features",
        tmp_path / "cache",
        "--out",
        tmp_path / "run",
        *QUICK,
        *SMALL,
        "--epochs",
        2,
    )
    works(
        evaluate.main,
        *at(drawn),
        "--checkpoint",
        tmp_path / "run",
        "--features",
        tmp_path / "cache",
    )
    lines = {
        line["image_id"]: line["caption"]
        for line in json.loads((tmp_path / "run" / "captions-test.json").read_text())
    }
    image_id, wanted = next(iter(lines.items()))
    photo = next((drawn / "sample").rglob(f"*{image_id:012d}.jpg"))
    assert (
        works(caption.main, photo, "--checkpoint", tmp_path / "run", "--precision", "fp32")
        .splitlines()[-1]
        .endswith(wanted)
    )
    other = [*at(drawn), "--regions", "pixels", "--columns", 5, "--out", tmp_path / "cache"]
    assert "columns: 6, not 5" in refused(extract.main, *other)


def test_a_decoder_over_an_imported_cache_trains_evaluates_and_captions_no_photograph(
    drawn, tmp_path
):
    source = open_source("karpathy", drawn / "sample")
    images = source.select("all")
    (shard,) = plan_shards(images, tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    rng, count = np.random.default_rng(0), len(images)
    rows = Rows(
        rng.standard_normal((count, 3, 8)).astype(np.float16),
        rng.random((count, 3, 4)).astype(np.float32),
        rng.integers(1, 4, count).astype(np.int16),
    )
    write_shard(
        shard,
        images,
        [rows],
        np.ones((count, 2)),
        [],
        {"regions": "elsewhere", "from": "afar"},
        {},
    )
    write_index(tmp_path / "cache")
    works(
        train.main,
        *at(drawn),
        "--features",
        tmp_path / "cache",
        "--out",
        tmp_path / "run",
        *QUICK,
        *SMALL,
        "--epochs",
        1,
    )
    works(
        evaluate.main,
        *at(drawn),
        "--checkpoint",
        tmp_path / "run",
        "--features",
        tmp_path / "cache",
    )
    assert load_checkpoint(tmp_path / "run").describe() == "elsewhere"
    message = refused(caption.main, images[0].path, "--checkpoint", tmp_path / "run")
    assert "regions of kind 'elsewhere'" in message and "Evaluate it over the cache" in message


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("command", "chosen", "heading", "option"),
    [
        (train.main, ["--task", "counting"], "Options of --task counting", "--questions-per-image"),
        (train.main, ["--decoder", "bag"], "Options of --decoder bag", "--bag-width"),
        (train.main, ["--decoder=transformer"], "Options of --decoder transformer", "--heads"),
        (extract.main, ["--regions", "pixels"], "Options of --regions pixels", "--columns"),
        (extract.main, [], "Options of --regions grid", "--backbone"),
        (extract.main, ["--dataset", "folder"], "Options of --dataset folder", "--captions-from"),
    ],
)
def test_help_shows_the_options_of_what_is_chosen_under_a_heading(command, chosen, heading, option):
    shown = works(command, *chosen, "--help")
    assert heading in shown and option in shown[shown.index(heading) :]


@pytest.mark.parametrize(
    ("command", "asked", "message"),
    [
        (
            train.main,
            ["--questions-per-image", 3],
            "--questions-per-image is an option of --task counting; --task is captioning here",
        ),
        (
            train.main,
            ["--decoder", "bag", "--heads", 3],
            "--heads is an option of --decoder transformer; --decoder is bag here",
        ),
        (
            extract.main,
            ["--columns", 3],
            "--columns is an option of --regions pixels; --regions is grid here",
        ),
        (
            extract.main,
            ["--captions-from", "txt"],
            "--captions-from is an option of --dataset folder; --dataset is sample here",
        ),
        (
            train.main,
            ["--task", "counting", "--questions-per-image", 9],
            "--questions-per-image is 9, it must be at most 5",
        ),
        (train.main, ["--task", "countin"], "Did you mean 'counting'?"),
    ],
)
def test_an_option_of_what_was_not_chosen_is_refused_with_its_name(command, asked, message):
    assert message in refused(command, *asked)


def test_a_config_file_chooses_and_a_flag_wins_over_it(tmp_path):
    (tmp_path / "c.toml").write_text(
        'task = "counting"\nquestions_per_image = 4\ndecoder = "bag"\n'
    )
    chosen = train.main.make_context(
        "train", ["--config", str(tmp_path / "c.toml"), "--bag-width", "7"]
    ).params
    assert (
        chosen["task"],
        chosen["questions_per_image"],
        chosen["decoder"],
        chosen["bag_width"],
    ) == (
        "counting",
        4,
        "bag",
        7,
    )
    assert "--questions-per-image is an option of" in refused(
        train.main,
        "--config",
        tmp_path / "c.toml",
        "--task",
        "captioning",
        "--questions-per-image",
        3,
    )
    assert "questions" in refused(
        train.main, "--config", tmp_path / "c.toml", "--task", "captioning"
    )


def test_recorded_defaults_of_what_is_not_chosen_are_ignored_and_other_values_refused(tmp_path):
    """Older versions recorded the options of all entries."""
    file = tmp_path / "c.json"
    file.write_text('{"training": {"dataset": "coco", "captions_from": "auto"}}')
    params = extract.main.make_context("extract", ["--config", str(file)]).params
    assert params["dataset"] == "coco" and "captions_from" not in params
    file.write_text('{"training": {"dataset": "coco", "captions_from": "txt"}}')
    assert "unknown setting 'captions_from'" in refused(extract.main, "--config", file)


def test_python_gives_options_by_the_setting_that_chooses():
    config = TrainConfig(task="counting", extensions={"task": {"questions_per_image": 4}})
    assert (
        config.options("task").questions_per_image == 4
        and config.record()["questions_per_image"] == 4
    )
    with pytest.raises(Exception, match=r"--task captioning has no option .questions_per_image."):
        TrainConfig(extensions={"task": {"questions_per_image": 4}})
