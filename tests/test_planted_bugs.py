"""Bugs that captioners are known for, planted one at a time: each must be caught by the tests that
name it.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.decoders import transformer as captioners
from models.decoders.attention import KVCache
from models.generation import beam_search as search
from tests import test_captioner, test_search


def caught(test, *cases) -> bool:
    """Whether a test fails for at least one of its cases."""
    for case in cases or ((),):
        try:
            test(*case)
        except (AssertionError, ValueError):
            return True
    return False


def test_a_cache_that_is_not_reordered_is_caught(monkeypatch):
    monkeypatch.setattr(KVCache, "reorder", lambda self, origin: None)
    assert caught(
        test_captioner.test_reordered_cache_equals_full_decoding_of_the_reordered_prefixes
    )
    assert caught(test_search.test_the_reported_score_is_the_captions_own, (2,), (5,))


def test_a_missing_region_mask_is_caught(monkeypatch):
    encode = captioners.Transformer.encode
    everywhere = lambda self, regions: encode(  # noqa: E731
        self, regions._replace(counts=torch.full_like(regions.counts, regions.features.shape[1]))
    )
    monkeypatch.setattr(captioners.Transformer, "encode", everywhere)
    assert caught(test_captioner.test_padded_regions_change_nothing_whatever_they_hold)
    assert caught(test_search.test_padded_regions_give_the_same_captions)


def test_a_shifted_position_is_caught(monkeypatch):
    class Shifted(nn.Module):
        def __init__(self, inner: nn.Embedding) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, places: torch.Tensor) -> torch.Tensor:
            step = len(places.unique()) == 1 and places[0] > 0
            return self.inner(
                (places + 1).clamp(max=self.inner.num_embeddings - 1) if step else places
            )

    def shifted(tiny, **changes):
        found = tiny(**changes)
        found.position = Shifted(found.position)
        return found

    for module in (test_captioner, test_search):
        monkeypatch.setattr(module, "tiny", functools.partial(shifted, module.tiny))
    assert caught(test_captioner.test_cached_decoding_equals_full_decoding_token_by_token, (1,))
    assert caught(test_search.test_the_reported_score_is_the_captions_own, (2,), (5,))


def test_a_finished_beam_that_is_lost_is_caught(monkeypatch):
    add, lost = search.BeamHypotheses.add, []

    def keep_only_the_last(pool, where, scores, words):
        pool.scores[where] = float("-inf")  # what had ended before is forgotten
        lost.append(1)
        add(pool, where, scores, words)

    monkeypatch.setattr(search.BeamHypotheses, "add", keep_only_the_last)
    cases = [(penalty, seed) for penalty in (0.0, 0.7, 1.0) for seed in (1, 2, 3)]
    assert caught(test_search.test_a_wide_beam_finds_what_brute_force_finds, *cases) and lost


def test_a_length_penalty_that_counts_twice_is_caught(monkeypatch):
    once = search.beam_search

    def twice(*arguments):
        return once(
            *arguments[:-1], replace(arguments[-1], length_penalty=2 * arguments[-1].length_penalty)
        )

    monkeypatch.setattr(test_search, "beam_search", twice)
    assert caught(test_search.test_the_reported_score_is_the_captions_own, (2,))
    assert caught(test_search.test_a_wide_beam_finds_what_brute_force_finds, (1.0, 1))


@pytest.mark.parametrize("test", [test_search.test_padded_regions_give_the_same_captions])
def test_nothing_is_caught_where_nothing_is_planted(test):
    assert not caught(test)
