"""Scores of ranked answer options, as the official VisDial evaluation computes them.

Das et al. 2017; NDCG as in the challenge of 2018.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RECALLS = (1, 5, 10)


def retrieval_scores(rank: int) -> dict[str, float]:
    """The scores of one round, from the rank of its true answer (1 is the best).

    R@k: whether the rank is at most k. mean_rank: the rank. MRR: 1 / rank.
    """
    recalls = {f"R@{k}": float(rank <= k) for k in RECALLS}
    return {**recalls, "mean_rank": float(rank), "MRR": 1 / rank}


def ndcg(ranks: Sequence[int], relevance: Sequence[float]) -> float:
    """Normalized discounted cumulative gain of one round, in 0..1.

    ranks: of each option; 1 is the best. relevance: of each option, in 0..1.

    With k options of a relevance above 0, only the best k ranks count. The gain of an option is its
    relevance, and the discount is log2(rank + 1). NaN if no option has a relevance above 0.
    """
    k = sum(value > 0 for value in relevance)
    if not k:
        return math.nan
    by_rank = [value for _, value in sorted(zip(ranks, relevance, strict=True))]
    return _gain(by_rank[:k]) / _gain(sorted(relevance, reverse=True)[:k])


def _gain(relevance: Sequence[float]) -> float:
    return sum(value / math.log2(rank + 1) for rank, value in enumerate(relevance, start=1))
