"""Beam search against brute force and step-by-step twins, at sizes where everything can be tried."""

from __future__ import annotations

import itertools

import pytest
import torch

from models.grid import Regions
from models.search import beam_search
from tests.test_captioner import WORDS, some_regions, tiny

PAD, BOS, EOS, UNK = 0, 1, 2, 3


def search(captioner, regions, beams, max_length=7, never=(PAD, BOS, UNK), penalty=1.0):
    with torch.no_grad():
        return beam_search(captioner, captioner.encode(regions), beams, max_length, BOS, EOS, never, penalty)


def brute_force(captioner, regions, words, max_length, penalty):
    """The best of all captions over `words`, ended by EOS or cut at the limit."""
    memory = captioner.encode(regions)
    best, best_score = None, float("-inf")
    captions = [
        [*body, EOS] for length in range(max_length) for body in itertools.product(words, repeat=length)
    ] + [list(body) for body in itertools.product(words, repeat=max_length)]
    for caption in captions:
        tokens = torch.tensor([[[BOS, *caption[:-1]]]])
        logits = captioner.decode(tokens, memory)[0, 0].detach()
        logits[:, [w for w in range(WORDS) if w not in (*words, EOS)]] = float("-inf")
        scores = logits.log_softmax(-1)
        score = sum(scores[t, word].item() for t, word in enumerate(caption)) / len(caption) ** penalty
        if score > best_score:
            best, best_score = caption, score
    return best, best_score


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_wide_beam_finds_what_brute_force_finds(penalty, seed):
    captioner, regions, words, limit = tiny(), some_regions(1, seed=seed), (4, 5, 6), 4
    never = [w for w in range(WORDS) if w not in (*words, EOS)]
    tokens, score = search(captioner, regions, len(words) ** limit, limit, never, penalty)
    best, best_score = brute_force(captioner, regions, words, limit, penalty)
    found = tokens[0].tolist()
    assert found[: len(best)] == best and all(word == EOS for word in found[len(best) :])
    assert score.item() == pytest.approx(best_score, abs=1e-4)


def test_one_beam_is_greedy_decoding():
    captioner, regions = tiny(), some_regions(6)
    tokens, _ = search(captioner, regions, 1, penalty=0.0)
    for b in range(6):
        memory = captioner.encode(Regions(*(part[b : b + 1] for part in regions)))
        words = [BOS]
        while len(words) <= 7 and words[-1] != EOS:
            logits = captioner.decode(torch.tensor([[words]]), memory)[0, 0, -1].detach()
            logits[[PAD, BOS, UNK]] = float("-inf")
            words.append(int(logits.argmax()))
        found = tokens[b].tolist()
        # the greedy path may be left for an <eos> that scored better on the way; then it ends there
        end = found.index(EOS) if EOS in found else 7
        assert found[:end] == words[1 : end + 1]


@pytest.mark.parametrize("beams", [1, 3, 5])
def test_an_image_decodes_alone_as_in_any_batch_and_position(beams):
    captioner, regions = tiny(), some_regions(7)
    together, scores = search(captioner, regions, beams)
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    moved, moved_scores = search(captioner, Regions(*(part[order] for part in regions)), beams)
    assert torch.equal(moved, together[order]) and torch.allclose(moved_scores, scores[order], atol=1e-5)
    for b in range(7):
        alone, score = search(captioner, Regions(*(part[b : b + 1] for part in regions)), beams)
        assert torch.equal(alone[0], together[b]) and torch.allclose(score[0], scores[b], atol=1e-5)


def test_padded_regions_give_the_same_captions():
    captioner, regions = tiny(), some_regions(4)
    noise = some_regions(4, 3, seed=9)
    padded = Regions(
        torch.cat([regions.features, noise.features], 1), torch.cat([regions.boxes, noise.boxes], 1), regions.counts
    )
    assert torch.equal(search(captioner, padded, 3)[0], search(captioner, regions, 3)[0])


@pytest.mark.parametrize("beams", [2, 5])
def test_the_reported_score_is_the_captions_own(beams):
    """A lost cache reorder or a shifted position would make the words' score another one."""
    captioner, regions = tiny(), some_regions(5)
    tokens, scores = search(captioner, regions, beams, penalty=0.7)
    for b in range(5):
        words = tokens[b].tolist()
        words = words[: words.index(EOS) + 1] if EOS in words else words
        memory = captioner.encode(Regions(*(part[b : b + 1] for part in regions)))
        logits = captioner.decode(torch.tensor([[[BOS, *words[:-1]]]]), memory)[0, 0].detach()
        logits[:, [PAD, BOS, UNK]] = float("-inf")
        total = logits.log_softmax(-1)[range(len(words)), words].sum().item()
        assert scores[b].item() == pytest.approx(total / len(words) ** 0.7, abs=1e-4)


def test_what_must_never_be_generated_never_is():
    captioner, regions = tiny(), some_regions(8)
    tokens, _ = search(captioner, regions, 4, never=(PAD, BOS, UNK, 7, 8))
    assert not set(tokens.flatten().tolist()) & {PAD, BOS, UNK, 7, 8}


def test_more_beams_than_words_are_no_mistake():
    tokens, scores = search(tiny(), some_regions(2), 50, max_length=3)
    assert tokens.shape == (2, 3) and torch.isfinite(scores).all()
