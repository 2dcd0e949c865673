"""The demo: the whole path on the embedded sample, judged by the scenes that were drawn."""

import json
import re

import click
import pytest
from click.testing import CliRunner

from data.datasets.registry import open_source
from data.datasets.sample import load_scenes
from pipeline import demo, train


@pytest.mark.slow
def test_the_demo_captions_held_out_scenes_truly_and_only_by_looking(tmp_path, monkeypatch):
    """Trained for a third of its epochs, in smaller steps: 94 % of the captions are true.

    The same cache serves visual question answering, trained for three epochs in place of a minute.
    """
    plain, fewer = demo.run_command, ["--epochs", "6", "--batch", "12"]

    def shorter(command: click.Command, *arguments: str) -> None:
        captioning = command is train.main and "vqa" not in arguments
        plain(command, *arguments, *(fewer if captioning else []))

    monkeypatch.setattr(demo, "run_command", shorter)
    monkeypatch.setattr(demo, "VQA_LENGTH", ("--epochs", "3"))
    result = CliRunner().invoke(demo.main, ["--work", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.stdout.strip().splitlines()
    true = float(re.fullmatch(r"scene-true captions: ([\d.]+) %", lines[-1])[1])
    shuffled = float(re.search(r"shuffled between images: ([\d.]+) %", lines[-2])[1])
    assert true >= 90 and shuffled < 10
    held_out = {
        image.id for image in open_source("sample", tmp_path / "datasets/sample").select("test")
    }
    results = json.loads((tmp_path / "runs/sample/captions-test.json").read_text())
    written = {line["image_id"]: line["caption"] for line in results}
    assert written.keys() == held_out
    assert true == pytest.approx(
        100 * demo.scene_true_share(tmp_path / "datasets/sample", written), abs=0.06
    )
    assert len(load_scenes(tmp_path / "datasets/sample")) == 2500
    shown = json.loads((tmp_path / "captions.json").read_text())
    assert len(shown) == demo.SHOWN and all(line["caption"] for line in shown)
    assert result.stdout.count("true answer: ") == result.stdout.count("pipeline.ask") == 3
    assert len(set(re.findall(r"pipeline.ask \S+/(\w+).jpg", result.stdout))) == 3
    correct, by_chance = (
        float(re.search(rf"^correct answers{name}: ([\d.]+) %", result.stdout, re.MULTILINE)[1])
        for name in ("", ", features shuffled between images")
    )
    scores = json.loads((tmp_path / "runs/sample-vqa/scores-test.json").read_text())
    assert correct == pytest.approx(100 * scores["scores"]["accuracy"], abs=0.06)
    assert correct >= 55 and by_chance < 45
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == ["sample"]
