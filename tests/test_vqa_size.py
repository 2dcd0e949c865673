"""Visual question answering at the size of VQA v2."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.vqa_size import TRAIN, VAL, measure


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_vqa_v2_opens_in_4_gb_and_batches_are_read_faster_than_they_are_used(tmp_path):
    """The time of each part is printed (pytest -s); only generous limits are asserted."""
    figures = measure(tmp_path)
    print(figures)
    assert figures["train, questions"] == pytest.approx(0.9 * TRAIN[0], rel=0.02)
    assert figures["val, questions"] == VAL[0]
    assert figures["train, classes"] > 2000
    assert figures["train, peak, GB"] < 4 and figures["val, peak, GB"] < 4
    assert figures["train, CPU to the first batch, s"] < 240
    assert figures["val, CPU to score, s"] < 60
    assert figures["train, batch of step"] < 0.5
    assert 0.9 < figures["val, accuracy"] <= 1
