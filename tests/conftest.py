"""Fixtures of all tests, and the one line that counts what was skipped for want of real data or
of a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

# tiny products; two threads fighting a busy neighbour take 10x as long
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

REAL = Path(
    os.environ.get("ONCEOVER_REAL")
    or Path(__file__).resolve().parents[1].parent / "shared" / "real"
)
ABSENT = "real data absent: set ONCEOVER_REAL to its folder"
NO_GPU = "no CUDA device"


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache folder of all tests and of the commands that they start: nothing goes into
    the real one.
    """
    folder = tmp_path_factory.mktemp("user-cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="module")
def a_sample_of_any_size() -> Iterator[None]:
    """Scenes that were drawn for a test are read as the embedded sample is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.sources.ensure_sample", lambda root: None)
        yield


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real photographs, captions and weights; the test is skipped where it is
    absent.
    """
    if not (REAL / "flickr8k").is_dir():
        pytest.skip(ABSENT)
    return REAL


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A drawn sample of 60 scenes, its cache and a run over it, made by the stages."""

    from data.datasets.sample import draw_sample
    from pipeline import extract, train
    from tests.test_commands import LOOK, QUICK, works

    world = tmp_path_factory.mktemp("world")
    draw_sample(world / "sample", count=60, seed=3)
    at = ["--dataset", "karpathy", "--root", world / "sample"]
    works(
        extract.main,
        *at,
        *LOOK,
        "--out",
        world / "cache",
    )
    works(train.main, *at, "--features", world / "cache", "--out", world / "run", *QUICK)
    return world


@pytest.fixture(scope="session")
def views_world(tmp_path_factory) -> Path:
    """A drawn sample of 60 scenes, captioned with unequal lengths, and its cache with mirrored
    views.
    """

    from data.datasets.sample import draw_sample
    from pipeline import extract
    from tests.test_commands import LOOK, works

    world = tmp_path_factory.mktemp("train")
    draw_sample(world / "sample", count=60, seed=3)
    path = world / "sample" / "dataset_sample.json"
    whole = json.loads(path.read_text())
    for number, image in enumerate(whole["images"]):
        image["sentences"] = image["sentences"][: 1 + number % len(image["sentences"])]
    path.write_text(json.dumps(whole))
    works(
        extract.main,
        *["--dataset", "karpathy", "--root", world / "sample"],
        *LOOK,
        "--views",
        "flip",
        "--out",
        world / "cache",
    )
    return world


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 10 images."""
    monkeypatch.setattr("data.cache.writer.SHARD_IMAGES", 10)


@pytest.fixture
def cache(tmp_path: Path, small_shards: None) -> Path:
    """A cache of 35 planted images in 4 shards, each row full of its image's id."""
    from data.cache.writer import write_index
    from tests.test_features import some_images, write_plan

    write_plan(tmp_path / "cache", some_images(35))
    write_index(tmp_path / "cache")
    return tmp_path / "cache"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    absent, no_gpu = (sum(why in reason for reason in reasons) for why in (ABSENT, NO_GPU))
    terminalreporter.write_line(
        f"{absent} tests skipped because real data is absent ({REAL}); {no_gpu} for want of a GPU"
    )
