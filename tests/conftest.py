"""Fixtures of all tests, and the one line that counts what was skipped for the absence of real data."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny products; two threads fighting a busy neighbour take 10x as long

import pytest

REAL = Path(os.environ.get("ONCEOVER_REAL") or Path(__file__).resolve().parents[1].parent / "shared" / "real")
ABSENT = "real data absent: set ONCEOVER_REAL to its folder"


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache folder of all tests and of the commands that they start: nothing goes into the real one."""
    folder = tmp_path_factory.mktemp("user-cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real photographs, captions and weights; the test is skipped where it is absent."""
    if not (REAL / "flickr8k").is_dir():
        pytest.skip(ABSENT)
    return REAL


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if ABSENT in str(report.longrepr)]
    terminalreporter.write_line(f"{len(skipped)} tests skipped because real data is absent ({REAL})")
