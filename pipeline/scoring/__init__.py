"""Scores of captions, with the same results as the official evaluators."""

from pipeline.scoring.metrics import score

__all__ = ["score"]
