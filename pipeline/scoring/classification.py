"""Scores of predicted labels: accuracy, F1, precision, recall, and calibration error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BINS = 15  # of confidence, for the calibration error (Guo et al. 2017)


def confusion(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count the examples by true label and predicted label. All labels are in both."""
    labels = sorted({*truth, *predicted})
    counts = {label: dict.fromkeys(labels, 0) for label in labels}
    for true, label in zip(truth, predicted, strict=True):
        counts[true][label] += 1
    return counts


def label_counts(
    truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> np.ndarray:
    """Count for each example and label: [examples, labels, 3] int64.

    The last axis is (1 if true and predicted, 1 if predicted, 1 if true).
    """
    is_true = np.array(truth)[:, None] == np.array(labels)
    is_predicted = np.array(predicted)[:, None] == np.array(labels)
    return np.stack([is_true & is_predicted, is_predicted, is_true], axis=2).astype(np.int64)


def f_scores(counts: np.ndarray) -> np.ndarray:
    """Compute accuracy, macro F1 and weighted F1 from sums of `label_counts`.

    counts: [S, labels, 3]. Returns [S, 3]. The macro F1 is the mean over the labels that are true
    or predicted somewhere; the weighted F1 weights each label by how often it is true. A label that
    is never predicted rightly has an F1 of 0. These are the definitions of scikit-learn.
    """
    right, predicted, true = np.moveaxis(counts, 2, 0)
    present = (predicted + true) > 0
    f1 = 2 * right / np.where(present, predicted + true, 1)
    total = true.sum(1)
    macro = f1.sum(1) / present.sum(1)
    weighted = (f1 * true).sum(1) / total
    return np.stack([right.sum(1) / total, macro, weighted], axis=1)


def calibration_error(confidence: Sequence[float], right: Sequence[bool]) -> float:
    """Compute the expected calibration error, 0 to 1 (Guo et al. 2017).

    It is the mean difference of confidence and accuracy over BINS bins of equal width, weighted by
    the number of examples.

    confidence: the probability of each predicted label.
    """
    confidences, is_right = np.array(confidence), np.array(right, dtype=float)
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidences - is_right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidences))
