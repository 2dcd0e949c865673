"""Beam search against brute force and step-by-step twins, at sizes where everything can be tried."""

from __future__ import annotations

import itertools

import pytest
import torch

from models.grid import Regions
from models.search import Generation, beam_search, sample
from tests.test_captioner import WORDS, some_regions, tiny

PAD, BOS, EOS, UNK = 0, 1, 2, 3


def search(captioner, regions, beams, max_length=7, never=(PAD, BOS, UNK), penalty=1.0, **names):
    with torch.no_grad():
        options = Generation(
            num_beams=beams, max_length=max_length, suppress_tokens=tuple(never), length_penalty=penalty, **names
        )
        found = beam_search(captioner, captioner.encode(regions), options)
        return found.tokens[:, 0], found.scores[:, 0]


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
    captioner.output_bias.data[EOS] = -3 * (seed > 1)  # also where the best are long
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
    captioner, regions = tiny(), some_regions(12)
    captioner.output_bias.data[EOS] = -3  # long captions: a beam's past matters more, the more there is of it
    tokens, scores = search(captioner, regions, beams, penalty=0.7)
    assert (tokens != EOS).sum(1).float().mean() > 4
    for b in range(12):
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


def test_a_finished_caption_is_never_lost_to_a_longer_one_that_scores_less():
    """The best score by any limit is the best over all shorter limits' captions that end."""
    captioner, regions = tiny(), some_regions(12)
    for penalty in (0.0, 1.0):
        ended = torch.full((12,), float("-inf"))
        for limit in range(1, 8):
            tokens, scores = search(captioner, regions, 8, limit, penalty=penalty)
            assert (scores >= ended - 1e-5).all()
            whole = (tokens == EOS).any(1)
            ended = torch.where(whole, torch.maximum(ended, scores), ended)


def test_ties_break_the_same_on_every_run():
    captioner = tiny()
    torch.nn.init.zeros_(captioner.word.weight)
    torch.nn.init.zeros_(captioner.output_bias)  # all words alike, always
    found = [search(captioner, some_regions(3), 4)[0] for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0][0], found[0][1])


# ------------------------------------------------------------------------------------------------------------- sampling


def draw(captioner, regions, captions, max_length=3, never=(PAD, BOS, UNK, 7, 8, 9, 10), seed=0, **options):
    with torch.no_grad():
        memory = captioner.encode(regions)
        generator = torch.Generator().manual_seed(seed)
        options = Generation(
            do_sample=True, num_return_sequences=captions, max_length=max_length, suppress_tokens=tuple(never), **options
        )
        return sample(captioner, memory, options, generator)[::2]


def probabilities(captioner, regions, max_length=3, words=(EOS, 4, 5, 6), temperature=1.0) -> dict[tuple, float]:
    """The probability of every caption over `words`, by the chain rule."""
    memory = captioner.encode(regions)
    found = {}

    def go_on(caption, so_far):
        if len(caption) == max_length or EOS in caption:
            found[(*caption, *[EOS] * (max_length - len(caption)))] = so_far
            return
        logits = captioner.decode(torch.tensor([[[BOS, *caption]]]), memory)[0, 0, -1].detach() / temperature
        for word, p in zip(words, logits[list(words)].softmax(0).tolist(), strict=True):
            go_on([*caption, word], so_far * p)

    go_on([], 1.0)
    assert sum(found.values()) == pytest.approx(1)
    return found


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_sampling_frequencies_are_the_softmax_s(temperature):
    """Chi-square over all captions of a three-word vocabulary, at 1 in 1,000."""
    captioner, regions, count = tiny(), some_regions(1), 20_000
    tokens, scores = draw(captioner, regions, count, temperature=temperature)
    wanted = probabilities(captioner, regions, temperature=temperature)
    drawn: dict[tuple, int] = {}
    for caption, score in zip(map(tuple, tokens[0].tolist()), scores[0].tolist(), strict=True):
        drawn[caption] = drawn.get(caption, 0) + 1
        assert score == pytest.approx(torch.tensor(wanted[caption]).log().item(), abs=1e-3)
    likely = [caption for caption in wanted if wanted[caption] * count >= 5]
    rest = count - sum(drawn.get(caption, 0) for caption in likely), count * (1 - sum(wanted[c] for c in likely))
    chi = sum((drawn.get(c, 0) - wanted[c] * count) ** 2 / (wanted[c] * count) for c in likely)
    chi += (rest[0] - rest[1]) ** 2 / rest[1] if rest[1] >= 5 else 0
    freedom = len(likely)
    assert chi < freedom + 3.1 * (2 * freedom) ** 0.5 + 6  # a normal bound above chi-square's 99.9th per cent point


def test_the_likeliest_words_alone_are_drawn_from():
    captioner, regions = tiny(), some_regions(2)
    with torch.no_grad():
        memory = captioner.encode(regions)
        first = captioner.decode(torch.full((2, 1, 1), BOS), memory)[:, 0, -1]
    first[:, [PAD, BOS, UNK]] = float("-inf")
    order = first.argsort(1, descending=True)
    for options, wanted in (({"top_k": 2}, 2), ({"top_p": 1e-6}, 1)):
        tokens, _ = draw(captioner, regions, 300, never=(PAD, BOS, UNK), **options)
        for image in range(2):
            assert set(tokens[image, :, 0].tolist()) == set(order[image, :wanted].tolist())
    p = first.softmax(1).sort(1, descending=True).values.cumsum(1)
    tokens, _ = draw(captioner, regions, 3000, never=(PAD, BOS, UNK), top_p=0.8)
    for image in range(2):
        kept = int((p[image] < 0.8).sum()) + 1  # the fewest that reach it
        assert set(tokens[image, :, 0].tolist()) <= set(order[image, :kept].tolist())


def test_one_seed_draws_the_same_captions_and_an_ended_one_stays_ended():
    captioner, regions = tiny(), some_regions(3)
    one, two, other = (draw(captioner, regions, 20, 7, (PAD, BOS, UNK), seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    after = (one == EOS).cumsum(2) > 0
    assert (one[after] == EOS).all() and not set(one.flatten().tolist()) & {PAD, BOS, UNK}
