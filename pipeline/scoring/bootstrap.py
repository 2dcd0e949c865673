"""Bootstrap confidence intervals of scores, and paired bootstrap tests of two captioners.

Images are drawn with replacement (Koehn 2004). The corpus scores, also BLEU and METEOR, are
computed again from the sums of each resample. The document frequencies of CIDEr do not change: they
are those of the references.

Letters in shapes: I images, S resamples, F sums per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 95  # confidence level in per cent


@dataclass(frozen=True)
class Statistic:
    """Corpus scores that are a function of sums over images.

    names: names of the scores.
    sums: [I,F], the values of each image that are summed over images.
    scores: computes scores [S, number of names] from sums [S,F].
    """

    names: tuple[str, ...]
    sums: np.ndarray
    scores: Callable[[np.ndarray], np.ndarray]


def mean_of(name: str, per_image: np.ndarray) -> Statistic:
    """The statistic of a score that is the mean over images, without images whose score is NaN."""
    has_score = ~np.isnan(per_image)
    sums = np.stack([np.where(has_score, per_image, 0), has_score], axis=1)

    def mean(sums: np.ndarray) -> np.ndarray:
        return (sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], np.nan))[:, None]

    return Statistic((name,), sums, mean)


def mean_of_groups(name: str, values: np.ndarray, groups: Sequence[object]) -> Statistic:
    """The statistic of a score that is the mean over examples, of which whole groups are drawn.

    values: [examples]; NaN: the example has no score. groups: the group of each example, such as
        the id of its image.
    """
    rows = {group: row for row, group in enumerate(dict.fromkeys(groups))}
    row_of = np.array([rows[group] for group in groups])
    has_score = ~np.isnan(values)
    totals = np.bincount(row_of, weights=np.where(has_score, values, 0), minlength=len(rows))
    counts = np.bincount(row_of, weights=has_score, minlength=len(rows))

    def mean(sums: np.ndarray) -> np.ndarray:
        return sums[:, :1] / np.where(sums[:, 1:] > 0, sums[:, 1:], np.nan)

    return Statistic((name,), np.stack([totals, counts], axis=1), mean)


def resample(statistics: list[Statistic], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Compute the scores of each resample, [resamples] float64 by name.

    The same seed draws the same images for every captioner, so the scores can be compared in pairs.
    """
    images = len(statistics[0].sums)
    generator = np.random.default_rng(seed)
    sums = np.hstack([statistic.sums for statistic in statistics])
    resampled = np.empty((resamples, sums.shape[1]))
    for row in range(resamples):
        counts = np.bincount(generator.integers(0, images, images), minlength=images)
        resampled[row] = counts @ sums
    scores_by_name: dict[str, np.ndarray] = {}
    column = 0
    for statistic in statistics:
        width = statistic.sums.shape[1]
        scores = statistic.scores(resampled[:, column : column + width])
        column += width
        scores_by_name |= dict(zip(statistic.names, scores.T, strict=True))
    return scores_by_name


def interval(scores: np.ndarray) -> list[float]:
    """The percentile confidence interval of resampled scores, without NaN: [low, high]."""
    tail = (100 - LEVEL) / 2
    return np.nanpercentile(scores, [tail, 100 - tail]).tolist()


def p_value(difference: float, differences: np.ndarray) -> float:
    """Two-sided p-value of a difference of scores, from the differences of the resamples.

    This is the shifted paired bootstrap test, as in sacreBLEU.
    """
    shifted = np.abs(differences - differences.mean())
    return float((np.sum(shifted >= abs(difference)) + 1) / (len(differences) + 1))


def paired_difference(
    value: float, other: float, resampled: np.ndarray, other_resampled: np.ndarray
) -> dict[str, Any]:
    """Compare two scores with the paired bootstrap.

    resampled, other_resampled: [resamples], the scores of the same resamples.

    Returns the difference, its interval and its p-value.
    """
    difference, differences = value - other, resampled - other_resampled
    return {
        "value": difference,
        "interval": interval(differences),
        "p": p_value(difference, differences),
    }
