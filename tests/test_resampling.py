"""Bootstrap intervals hold what they should, and paired tests tell a difference from none."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.scoring.bootstrap import Statistic, interval, mean_of, p_value, resample
from pipeline.scoring.metrics import BLEU, bleu, score


def test_a_resample_scores_the_images_it_draws():
    """Sums of drawn images against scoring exactly those captions again, drawn ones as often as
    they were drawn.
    """
    references = {i: [f"a dog of {i % 3} runs in park {i % 5}", "dogs run here"] for i in range(12)}
    candidates = {i: f"a dog of {i % 2} runs in park {i % 4}" for i in references}
    scores = score(candidates, references)
    cider = mean_of("CIDEr", scores.per_image["CIDEr"])
    found = resample([Statistic(BLEU, scores.bleu_sums, bleu), cider], resamples=5, seed=3)
    generator = np.random.default_rng(3)
    for row in range(5):
        drawn = generator.integers(0, 12, 12).tolist()
        again = score(
            {n: candidates[i] for n, i in enumerate(drawn)},
            {n: references[i] for n, i in enumerate(drawn)},
        )
        for name in BLEU:
            assert found[name][row] == pytest.approx(again.values[name], abs=1e-12)
        assert found["CIDEr"][row] == pytest.approx(scores.per_image["CIDEr"][drawn].mean())


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide():
    values = np.random.default_rng(0).normal(0.5, 0.2, 4000)
    low, high = interval(resample([mean_of("x", values)], 2000, seed=0)["x"])
    error = values.std() / 4000**0.5
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_an_image_without_a_score_is_left_out_of_the_mean():
    statistic = mean_of("SPICE", np.array([0.2, np.nan, 0.4]))
    assert statistic.scores(statistic.sums.sum(0, keepdims=True))[0, 0] == pytest.approx(0.3)


def test_one_seed_draws_the_same_images_for_both_captioners_and_another_others():
    values = np.random.default_rng(1).normal(size=50)
    one, two = (resample([mean_of("x", values + shift)], 100, seed=7)["x"] for shift in (0, 1))
    np.testing.assert_allclose(two - one, 1)
    assert not np.allclose(resample([mean_of("x", values)], 100, seed=8)["x"], one)


def test_p_is_small_for_a_real_difference_and_uniform_for_none():
    generator = np.random.default_rng(2)

    def p_of(shift: float, seed: int) -> float:
        one = generator.normal(size=200)
        two = one + generator.normal(0, 0.5, size=200) + shift
        first, second = (resample([mean_of("x", values)], 500, seed)["x"] for values in (one, two))
        return p_value(two.mean() - one.mean(), second - first)

    assert p_of(0.5, 0) == pytest.approx(1 / 501)
    found = np.array([p_of(0.0, seed) for seed in range(60)])
    assert 0.35 < found.mean() < 0.65 and (found < 0.05).mean() < 0.15
    assert p_value(0.0, np.zeros(10)) == 1
