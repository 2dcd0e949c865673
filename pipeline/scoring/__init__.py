"""Scores of captions, equal to the official evaluators' digits."""

from pipeline.scoring.metrics import score

__all__ = ["score"]
