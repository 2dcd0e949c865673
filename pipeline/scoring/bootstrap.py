"""How far a score would move over other images of the same kind: bootstrap intervals, and paired
tests of two captioners.

Images are drawn with replacement (Koehn 2004). Corpus scores are computed again from each
resample's sums, BLEU's and METEOR's included; CIDEr's document frequencies stay those of the
references.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEVEL = 95  # per cent of the resamples that an interval holds


@dataclass(frozen=True)
class Statistic:
    """Corpus scores that are functions of a sum over images: `scores` of (`sums` [I,F] added up)
    gives one a name.
    """

    names: tuple[str, ...]
    sums: np.ndarray
    scores: Callable[[np.ndarray], np.ndarray]  # [S,F] -> [S, names]


def mean_of(name: str, per_image: np.ndarray) -> Statistic:
    """The statistic of a score that is a mean over images. Images whose score is NaN are left
    out.
    """
    there = ~np.isnan(per_image)
    sums = np.stack([np.where(there, per_image, 0), there], axis=1)
    return Statistic(
        (name,),
        sums,
        lambda added: (added[:, 0] / np.where(added[:, 1] > 0, added[:, 1], np.nan))[:, None],
    )


def resample(statistics: list[Statistic], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Scores of each resample, [resamples] by name; one seed draws the same images for every
    captioner.
    """
    images = len(statistics[0].sums)
    generator = np.random.default_rng(seed)
    joined = np.hstack([statistic.sums for statistic in statistics])
    added = np.empty((resamples, joined.shape[1]))
    for row in range(resamples):
        added[row] = np.bincount(generator.integers(0, images, images), minlength=images) @ joined
    found: dict[str, np.ndarray] = {}
    at = 0
    for statistic in statistics:
        width = statistic.sums.shape[1]
        scores = statistic.scores(added[:, at : at + width])
        at += width
        found |= dict(zip(statistic.names, scores.T, strict=True))
    return found


def interval(scores: np.ndarray) -> list[float]:
    """The middle LEVEL per cent of resampled scores: [low, high]."""
    tail = (100 - LEVEL) / 2
    return np.percentile(scores, [tail, 100 - tail]).tolist()


def p_value(difference: float, differences: np.ndarray) -> float:
    """How often chance alone makes a difference this large, either way: the shifted paired
    bootstrap, as sacreBLEU's.
    """
    shifted = np.abs(differences - differences.mean())
    return float((np.sum(shifted >= abs(difference)) + 1) / (len(differences) + 1))
