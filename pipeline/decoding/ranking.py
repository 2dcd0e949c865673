"""Ranking of candidate texts, such as the answer options of a dialogue, by their probability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache as cached_function

import numpy as np
import torch

from data.batches import pad
from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache
from data.examples import Example
from data.segmentation import segmented
from models.decoders.interface import evaluating
from models.generation.ranking import candidate_log_p
from models.regions import Regions
from pipeline.decoding.captioner import CaptionGenerator, on_every_core, read_regions

TOKENS_PER_BATCH = 16_384  # maximum number of candidate tokens in memory at a time


def rank_candidates(
    scores: Mapping[int | str, Sequence[float]],
) -> tuple[dict[int | str, list[int]], int]:
    """Return the rank of each candidate by example id, and how many examples have equal scores.

    Rank 1 is the best. Equal scores rank by the order of the candidates.
    """
    ranks: dict[int | str, list[int]] = {}
    for example_id, values in scores.items():
        order = np.argsort(-np.asarray(values, np.float64), kind="stable")
        positions = np.empty(len(order), np.int64)
        positions[order] = np.arange(1, len(order) + 1)
        ranks[example_id] = positions.tolist()
    return ranks, sum(len(set(values)) < len(values) for values in scores.values())


def candidate_scores(
    generator: CaptionGenerator,
    feature_cache: FeatureCache | NoFeatures,
    examples: Sequence[Example],
    candidates: Mapping[int | str, Sequence[str]],
    mean: bool = True,
    done: Callable[[int], None] = lambda count: None,
) -> dict[int | str, list[float]]:
    """Compute the log-probability of each candidate of each example, in nats.

    candidates: the candidate texts by example id.
    mean: divide by the number of words and <eos>, so that long texts are not at a disadvantage.
    done: function that is called with the number of examples of each finished batch.

    A candidate that is longer than the model's maximum loses its last words. A candidate without
    words has -inf. Returns the scores by example id.
    """
    vocabulary, config = generator.vocabulary, generator.captioner.config
    device = generator.machine.device

    @cached_function
    def encode(text: str) -> tuple[int, ...]:
        return tuple(vocabulary.encode(segmented(text, vocabulary.segment))[: config.max_length])

    def score(chosen: Sequence[Example]) -> list[list[float]]:
        image_ids = list(dict.fromkeys(example.image_id for example in chosen))
        index = {image_id: i for i, image_id in enumerate(image_ids)}
        regions = Regions(*(part.to(device) for part in read_regions(feature_cache, image_ids)))
        prompts = generator.encode_prompts([example.prompt for example in chosen])
        tokens = pad([[encode(text) for text in candidates[e.id]] for e in chosen]).to(device)
        with torch.inference_mode(), generator.machine.autocast():
            memory = generator.captioner.encode(regions)
            memory = memory.keep(torch.tensor([index[e.image_id] for e in chosen], device=device))
            prompts = None if prompts is None else prompts.to(device)
            log_p = candidate_log_p(generator.captioner, memory, prompts, tokens)
        if mean:
            log_p = log_p / ((tokens != 0).sum(2) + 1)
        rows = log_p.tolist()
        return [row[: len(candidates[e.id])] for row, e in zip(rows, chosen, strict=True)]

    def batches() -> Iterator[list[Example]]:
        chosen: list[Example] = []
        tokens = 0
        for example in examples:
            longest = max(len(encode(text)) for text in candidates[example.id])
            count = longest + sum(len(encode(text)) for text in candidates[example.id])
            if chosen and tokens + count > TOKENS_PER_BATCH:
                yield chosen
                chosen, tokens = [], 0
            chosen.append(example)
            tokens += count
        if chosen:
            yield chosen

    scores: dict[int | str, list[float]] = {}
    parts = list(batches())
    with evaluating(generator.captioner):
        for chosen, rows in zip(parts, on_every_core(score, parts, generator.machine), strict=True):
            scores.update(zip((example.id for example in chosen), rows, strict=True))
            done(len(chosen))
    return scores
