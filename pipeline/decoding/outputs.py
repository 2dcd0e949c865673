"""The outputs of a task for examples: generated texts, classes, or ranks of candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache
from data.examples import Example
from pipeline.decoding.captioner import CaptionGenerator, generate_texts
from pipeline.decoding.ranking import candidate_scores, rank_candidates
from pipeline.tasks.base import Task


class Outputs(NamedTuple):
    """The outputs of examples.

    by_id: the output of each example by its id, as `Task.score` takes them.
    ranked: the number of examples whose candidates were ranked.
    ties: in how many of them candidates have equal scores.
    """

    by_id: dict[Any, Any]
    ranked: int
    ties: int


def task_outputs(
    task: Task,
    generator: CaptionGenerator,
    cache: FeatureCache | NoFeatures,
    examples: Sequence[Example],
    batch: int = 100,
    done: Callable[[int], None] = lambda count: None,
) -> Outputs:
    """Rank the candidates of the examples that have some, and generate texts for the others.

    batch: examples per batch of generation.
    done: function that is called with the number of examples of each finished batch.
    """
    if task.exclusive:
        generator = generator.with_all_classes()
    candidates = {example.id: task.candidates(example) for example in examples}
    ranked = [example for example in examples if candidates[example.id]]
    others = [example for example in examples if not candidates[example.id]]
    outputs: dict[Any, Any] = {}
    ties = 0
    if ranked:
        scores = candidate_scores(generator, cache, ranked, candidates, task.ranks_by_mean, done)
        outputs, ties = rank_candidates(scores)
    if others:
        texts = generate_texts(generator, cache, others, batch, done)
        outputs |= {example_id: task.output_of(best) for example_id, best in texts.items()}
    return Outputs(outputs, len(ranked), ties)
