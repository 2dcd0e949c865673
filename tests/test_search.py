"""Beam search against brute force and step-by-step twins, at sizes where everything can be
tried.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from models import ModelError
from models.generation import beam_search as searching
from models.generation import sampling
from models.generation.beam_search import beam_search
from models.generation.ensemble import Ensemble
from models.generation.generate import generate, generate_from_regions
from models.generation.options import Generation
from models.generation.sampling import sample
from models.regions import Regions
from tests.test_captioner import WORDS, some_regions, tiny
from tests.test_rules import holds, repeats

PAD, BOS, EOS, UNK = 0, 1, 2, 3


def search(captioner, regions, beams, max_length=7, never=(PAD, BOS, UNK), penalty=1.0, **names):
    with torch.no_grad():
        options = Generation(
            num_beams=beams,
            max_length=max_length,
            suppress_tokens=tuple(never),
            length_penalty=penalty,
            **names,
        )
        found = beam_search(captioner, captioner.encode(regions), options)
        return found.tokens[:, 0], found.scores[:, 0]


def brute_force(captioner, regions, words, max_length, penalty):
    """The best of all captions over `words`, ended by EOS or cut at the limit."""
    found = [
        (sum(log_p) / len(caption) ** penalty, caption)
        for caption, log_p in log_p_of_all(captioner, regions, words, max_length)
    ]
    score, best = max(found)
    return best, score


def log_p_of_all(captioner, regions, words, max_length):
    """Every caption over `words`, ended by EOS or cut at the limit, with the log p of each of its
    words by a plain softmax; captions of one length are read together.
    """
    memory, found = captioner.encode(regions), []
    for length in range(max_length + 1):
        bodies = itertools.product(words, repeat=length)
        captions = [[*body, EOS][:max_length] for body in bodies]
        tokens = torch.tensor([[[BOS, *caption[:-1]] for caption in captions]])
        logits = captioner.decode(tokens, memory)[0].detach()
        logits[..., [w for w in range(WORDS) if w not in (*words, EOS)]] = float("-inf")
        chosen = torch.tensor(captions)[..., None]
        log_p = logits.log_softmax(-1).gather(-1, chosen)[..., 0]
        found += zip(captions, log_p.tolist(), strict=True)
    return found


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
    assert torch.equal(moved, together[order]) and torch.allclose(
        moved_scores, scores[order], atol=1e-5
    )
    for b in range(7):
        alone, score = search(captioner, Regions(*(part[b : b + 1] for part in regions)), beams)
        assert torch.equal(alone[0], together[b]) and torch.allclose(score[0], scores[b], atol=1e-5)


def test_padded_regions_give_the_same_captions():
    captioner, regions = tiny(), some_regions(4)
    noise = some_regions(4, 3, seed=9)
    padded = Regions(
        torch.cat([regions.features, noise.features], 1),
        torch.cat([regions.boxes, noise.boxes], 1),
        regions.counts,
    )
    assert torch.equal(search(captioner, padded, 3)[0], search(captioner, regions, 3)[0])


@pytest.mark.parametrize("beams", [2, 5])
def test_the_reported_score_is_the_captions_own(beams):
    """A lost cache reorder or a shifted position would make the words' score another one."""
    captioner, regions = tiny(), some_regions(12)
    # long captions: a beam's past matters more, the more there is of it
    captioner.output_bias.data[EOS] = -3
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


@pytest.mark.parametrize("share", [2, 1e-9])
def test_captions_are_the_same_whether_finished_images_leave_at_once_or_stay_to_the_end(
    share, monkeypatch
):
    captioner, regions = tiny(), some_regions(40)
    options = Generation(num_beams=3, max_length=7, num_return_sequences=3)
    found = beam_search(captioner, captioner.encode(regions), options)
    monkeypatch.setattr(searching, "MIN_DONE_SHARE", share)  # 2: fixed shapes, as on a GPU
    other = beam_search(captioner, captioner.encode(regions), options)
    assert torch.equal(found.tokens, other.tokens) and torch.allclose(
        found.scores, other.scores, atol=1e-5
    )
    assert len((found.tokens[:, 0] != EOS).sum(1).unique()) > 2  # they finish at different steps


def test_what_was_given_to_the_search_is_whole_after_it():
    captioner = tiny()
    memory = captioner.encode(some_regions(40))
    before = [part.clone() for part in memory.tensors()]
    beam_search(captioner, memory, Generation(num_beams=3, max_length=7))
    assert all(torch.equal(part, kept) for part, kept in zip(memory.tensors(), before, strict=True))


def test_the_exact_search_scores_at_least_as_much_as_the_early_ones():
    captioner, regions = tiny(), some_regions(60)
    found = {
        how: search(captioner, regions, 3, early_stopping=how)[1] for how in (True, False, "never")
    }
    assert all((found["never"] >= found[early] - 1e-5).all() for early in (True, False))
    assert (found["never"] > found[True] + 1e-3).any()


def test_an_end_that_is_no_likelier_than_the_beams_does_not_stop_an_early_search():
    captioner, regions = tiny(), some_regions(30)
    captioner.output_bias.data[EOS] = -4
    tokens, _ = search(captioner, regions, 3, early_stopping=True)
    assert (tokens != EOS).sum(1).float().mean() > 3  # at each step three ends, all unlikely


@pytest.mark.parametrize("several", [False, True])
def test_beams_are_compared_by_exact_scores_where_the_output_layer_rounds(several, monkeypatch):
    """In bf16: what is found and its log p are those of an output layer in fp32 over the same
    states.
    """
    captioner, regions = tiny(), some_regions(40)
    captioner.output_bias.data[EOS] = -1
    one = Ensemble([captioner, tiny(decoder_layers=1)]) if several else captioner
    options = Generation(num_beams=4, num_return_sequences=2, max_length=7)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        memory = one.encode(regions)
        assert (
            one.next_words(torch.full((40, 1, 1), BOS), memory, one.init_cache(memory, 1))[1]
            is not None
        )
        found = beam_search(one, memory, options)

        def exactly(self, states):
            with torch.autocast("cpu", enabled=False):
                return torch.nn.functional.linear(states, self.word.weight, self.output_bias)

        monkeypatch.setattr(type(captioner), "logits", exactly)
        wanted = beam_search(one, memory, options)
    same = (found.tokens == wanted.tokens).all(2)
    assert same.float().mean() > 0.95 and torch.allclose(
        found.log_p[same], wanted.log_p[same], atol=2e-2
    )


# ----------------------------------------------------------------------------- several, under rules


def all_captions(captioner, regions, words, max_length, penalty, keep=lambda body: True):
    """Every caption over `words` whose words pass `keep`, with its score and log p, best first."""
    found = []
    for caption, log_p in log_p_of_all(captioner, regions, words, max_length):
        body = caption[:-1] if caption[-1] == EOS else caption
        if keep(body):
            found.append((sum(log_p) / len(caption) ** penalty, sum(log_p), body))
    return sorted(found, reverse=True)


RULES = {
    "n best": ({}, lambda body: True),
    "no bigram twice": ({"no_repeat_ngram_size": 2}, lambda body: not repeats(body, 2)),
    "no word twice": ({"no_repeat_ngram_size": 1}, lambda body: not repeats(body, 1)),
    "at least 3 words": ({"min_length": 3}, lambda body: len(body) >= 3),
    "bad word and phrase": (
        {"bad_words_ids": ((5,), (4, 6))},
        lambda body: 5 not in body and not holds(body, (4, 6)),
    ),
    "a forced word": ({"force_words_ids": ((5,),)}, lambda body: 5 in body),
    "forced phrases": (
        {"force_words_ids": ((5, 6), (4,))},
        lambda body: holds(body, (5, 6)) and 4 in body,
    ),
    "phrases in phrases": (
        {"force_words_ids": ((5,), (6, 5), (5,))},
        lambda body: holds(body, (6, 5)),
    ),
    "all together": (
        {
            "force_words_ids": ((6,),),
            "bad_words_ids": ((4, 4),),
            "min_length": 2,
            "no_repeat_ngram_size": 2,
        },
        lambda body: (
            6 in body and not holds(body, (4, 4)) and len(body) >= 2 and not repeats(body, 2)
        ),
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_captions_that_keep_the_rules(name, penalty):
    names, keep = RULES[name]
    words, limit, count = (4, 5, 6), 4, 7
    for seed in (1, 2):
        captioner, regions = tiny(), some_regions(1, seed=seed)
        captioner.output_bias.data[EOS] = -2 * (seed > 1)
        options = Generation(
            num_beams=3**limit,
            max_length=limit,
            length_penalty=penalty,
            num_return_sequences=count,
            suppress_tokens=tuple(w for w in range(WORDS) if w not in (*words, EOS)),
            **names,
        )
        found = beam_search(captioner, captioner.encode(regions), options)
        wanted = all_captions(captioner, regions, words, limit, penalty, keep)[:count]
        for n, (score, log_p, body) in enumerate(wanted):
            assert found.tokens[0, n].tolist() == [*body, *[EOS] * (limit - len(body))]
            assert found.scores[0, n].item() == pytest.approx(score, abs=1e-4)
            assert found.log_p[0, n].item() == pytest.approx(log_p, abs=1e-4)
        assert (found.scores[0, len(wanted) :] == float("-inf")).all()


@pytest.mark.parametrize("seed", range(6))
def test_every_rule_holds_on_every_caption_of_every_way_to_decode(seed):
    captioner, regions = tiny(), some_regions(6, seed=seed)
    captioner.output_bias.data[EOS] = (-2, 1)[seed % 2]
    rules = {
        "min_length": 3,
        "max_length": 6,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": ((9,), (4, 5), (7, 7, 8)),
    }
    ways = [
        {"num_beams": 1},
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.7, "num_return_sequences": 5},
        {"num_beams": 2, "force_words_ids": ((8,), (10, 4)), "num_return_sequences": 2},
        {"num_beams": 1, "force_words_ids": ((6, 5, 4, 6, 10, 7),)},
        {
            "do_sample": True,
            "num_return_sequences": 20,
            "temperature": 2.0,
            "top_k": 6,
            "top_p": 0.95,
        },
    ]
    for way in ways:
        memory = captioner.encode(regions)
        found = generate(
            captioner, memory, Generation(**rules, **way), torch.Generator().manual_seed(seed)
        )
        count = 0
        for tokens, score in zip(
            found.tokens.flatten(0, 1).tolist(), found.scores.flatten().tolist(), strict=True
        ):
            if score == float("-inf"):
                continue
            count += 1
            body = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
            assert 3 <= len(body) <= 6 and all(word == EOS for word in tokens[len(body) :])
            assert (
                not {PAD, BOS, UNK, 9} & set(body)
                and not holds(body, (4, 5))
                and not holds(body, (7, 7, 8))
            )
            assert not repeats(body, 2)
            assert all(holds(body, phrase) for phrase in way.get("force_words_ids", ()))
        assert count >= 6


def test_rules_that_no_caption_keeps_are_an_error():
    captioner = tiny()
    with pytest.raises(ModelError, match="no caption satisfies all constraints"):
        generate_from_regions(
            captioner, some_regions(2), force_words_ids=((4,),), bad_words_ids=((4,),)
        )


def test_samples_that_the_rules_leave_no_word_are_an_error_or_left_out():
    captioner, regions = tiny(), some_regions(2)
    rules = {"do_sample": True, "no_repeat_ngram_size": 1, "num_return_sequences": 5}
    with pytest.raises(ModelError, match="no caption satisfies all constraints"):
        generate_from_regions(
            captioner, regions, min_length=7, suppress_tokens=(PAD, BOS, UNK, 7, 8, 9, 10), **rules
        )
    found = generate_from_regions(
        captioner, regions, min_length=3, suppress_tokens=(PAD, BOS, UNK, 7, 8, 9, 10), **rules
    )
    assert torch.isfinite(found.log_p).all()


def test_training_goes_on_as_training_after_captions_even_after_an_error():
    captioner = tiny().train()
    generate_from_regions(captioner, some_regions(1))
    with pytest.raises(ModelError):
        generate_from_regions(captioner, some_regions(1), max_length=100)
    assert captioner.training


def test_groups_without_diversity_are_the_same_search_several_times():
    captioner, regions = tiny(), some_regions(5)
    captioner.output_bias.data[EOS] = -2
    alone = generate_from_regions(captioner, regions, num_beams=2, num_return_sequences=2)
    groups = generate_from_regions(
        captioner, regions, num_beams=6, num_beam_groups=3, num_return_sequences=2
    )
    assert torch.equal(alone.tokens, groups.tokens)


def test_diverse_groups_choose_as_a_plain_loop_would():
    """Two groups of two beams against nested Python loops, one image, word by word."""
    captioner, regions, limit, cost = tiny(), some_regions(1), 5, 0.8
    captioner.output_bias.data[EOS] = float("-inf")  # every caption goes to the limit
    memory = captioner.encode(regions)
    groups = [[([], 0.0)], [([], 0.0)]]
    for _ in range(limit):
        chosen: list[int] = []
        for g, beams in enumerate(groups):
            options = []
            for words, score in beams:
                logits = captioner.decode(torch.tensor([[[BOS, *words]]]), memory)[
                    0, 0, -1
                ].detach()
                logits[[PAD, BOS, UNK]] = float("-inf")
                for word, log_p in enumerate(logits.log_softmax(0).tolist()):
                    options.append(
                        (score + log_p - cost * chosen.count(word), score + log_p, [*words, word])
                    )
            options.sort(key=lambda option: -option[0])
            groups[g] = [(words, score) for _, score, words in options[:2]]
            chosen += [words[-1] for words, _ in groups[g]]
    found = generate_from_regions(
        captioner,
        regions,
        num_beams=4,
        num_beam_groups=2,
        diversity_penalty=cost,
        max_length=limit,
        num_return_sequences=4,
    )
    wanted = {tuple(words): score for beams in groups for words, score in beams}
    got = {
        tuple(words): score
        for words, score in zip(found.tokens[0].tolist(), found.log_p[0].tolist(), strict=True)
    }
    assert set(got) >= set(wanted)
    assert all(got[words] == pytest.approx(wanted[words], abs=1e-4) for words in wanted)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"top_p": 1.5, "do_sample": True}, "top_p"),
        ({"top_k": 5}, "do_sample"),
        ({"num_beams": 5, "num_beam_groups": 2}, "num_beam_groups"),
        ({"diversity_penalty": 1.0}, "num_beam_groups"),
        ({"num_return_sequences": 6}, "num_return_sequences"),
        ({"min_length": 5, "max_length": 4}, "min_length"),
        ({"max_length": 8}, "max_length"),
        ({"min_length": 8}, "min_length"),
        ({"force_words_ids": ((4,) * 8,)}, "force_words_ids"),
        ({"force_words_ids": ((4,),), "do_sample": True}, "force_words_ids"),
        ({"early_stopping": "sometimes"}, "early_stopping"),
        ({"early_stopping": 1}, "early_stopping"),
        ({"num_beams": 2.5}, "num_beams"),
        ({"num_beams": "5"}, "num_beams"),
    ],
)
def test_what_cannot_be_asked_for_is_an_error_that_names_it(names, what):
    with pytest.raises(ModelError, match=what):
        generate_from_regions(tiny(), some_regions(1), **names)


# ----------------------------------------------------------------------------------------- sampling


def draw(
    captioner,
    regions,
    captions,
    max_length=3,
    never=(PAD, BOS, UNK, 7, 8, 9, 10),
    seed=0,
    **options,
):
    with torch.no_grad():
        memory = captioner.encode(regions)
        generator = torch.Generator().manual_seed(seed)
        options = Generation(
            do_sample=True,
            num_return_sequences=captions,
            max_length=max_length,
            suppress_tokens=tuple(never),
            **options,
        )
        return sample(captioner, memory, options, generator)[::2]


def plain_samples(captioner, regions, uniforms, options):
    """Each sample by itself, all its words read again at every step: its words and log p."""
    memory = captioner.encode(regions)
    samples = []
    for of_image in uniforms.tolist():
        for of_sample in of_image:
            image = len(samples) // uniforms.shape[1]
            words, log_p = [], 0.0
            for uniform in of_sample:
                read = torch.tensor([[[BOS, *words]]])
                logits = captioner.decode(read, memory.keep(torch.tensor([image])))[0, :, -1]
                logits = logits / options.temperature
                logits[:, list(options.suppress_tokens)] = float("-inf")
                options.banned_words(logits, torch.tensor([words], dtype=torch.int64))
                p = logits[0].softmax(0).double()
                word = int((p.cumsum(0) <= uniform * p.sum()).sum())
                words, log_p = [*words, word], log_p + p[word].log().item()
                if word == EOS:
                    break
            samples.append((words + [EOS] * (uniforms.shape[2] - len(words)), log_p))
    return [list(part) for part in zip(*samples, strict=True)]


PLAIN: dict[int, list[list]] = {}


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("distinct", [0.0, 0.8, 2.0])
def test_samples_that_share_rows_equal_samples_drawn_one_by_one(monkeypatch, count, distinct):
    """distinct: 0: each sample has its own row at once; 2: equal ones share a row to the end."""
    monkeypatch.setattr(sampling, "MAX_DISTINCT_SHARE", distinct)
    captioner, regions = tiny(), some_regions(3)
    captioner.output_bias.data[EOS] = 1.0  # captions of all lengths
    options = Generation(
        num_beams=1,
        do_sample=True,
        num_return_sequences=count,
        max_length=7,
        temperature=0.7,
        min_length=2,
        no_repeat_ngram_size=2,
        suppress_tokens=(PAD, BOS, UNK, *range(9, WORDS)),
    )
    uniforms = torch.rand(3, count, 7, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        if count not in PLAIN:  # the same for every `distinct`
            PLAIN[count] = plain_samples(captioner, regions, uniforms, options)
        wanted_tokens, wanted_log_p = PLAIN[count]
        for decoder in (captioner, Ensemble([captioner, captioner])):
            memory = decoder.encode(regions)
            tokens, _, log_p = sample(decoder, memory, options, uniforms=uniforms)
            assert tokens.flatten(0, 1).tolist() == wanted_tokens
            assert log_p.flatten().tolist() == pytest.approx(wanted_log_p, abs=1e-4)
    if count == 20:
        lengths = {words.index(EOS) if EOS in words else 7 for words in wanted_tokens}
        assert len(lengths) > 3


def probabilities(
    captioner, regions, max_length=3, words=(EOS, 4, 5, 6), temperature=1.0
) -> dict[tuple, float]:
    """The probability of every caption over `words`, by the chain rule."""
    memory = captioner.encode(regions)
    found = {}

    def expand(caption, so_far):
        if len(caption) == max_length or EOS in caption:
            found[(*caption, *[EOS] * (max_length - len(caption)))] = so_far
            return
        logits = (
            captioner.decode(torch.tensor([[[BOS, *caption]]]), memory)[0, 0, -1].detach()
            / temperature
        )
        for word, p in zip(words, logits[list(words)].softmax(0).tolist(), strict=True):
            expand([*caption, word], so_far * p)

    expand([], 1.0)
    assert sum(found.values()) == pytest.approx(1)
    return found


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_sampling_frequencies_are_the_softmax_s(temperature):
    """Chi-square over all captions of a three-word vocabulary, at 1 in 1,000."""
    captioner, regions, count = tiny(), some_regions(1), 20_000
    tokens, scores = draw(captioner, regions, count, temperature=temperature)
    wanted = probabilities(captioner, regions, temperature=temperature)
    captions = [tuple(caption) for caption in tokens[0].tolist()]
    drawn = Counter(captions)
    log_p = torch.tensor([wanted[caption] for caption in captions]).log()
    torch.testing.assert_close(scores[0], log_p, rtol=0, atol=1e-3)
    likely = [caption for caption in wanted if wanted[caption] * count >= 5]
    rest = (
        count - sum(drawn.get(caption, 0) for caption in likely),
        count * (1 - sum(wanted[c] for c in likely)),
    )
    chi = sum((drawn.get(c, 0) - wanted[c] * count) ** 2 / (wanted[c] * count) for c in likely)
    chi += (rest[0] - rest[1]) ** 2 / rest[1] if rest[1] >= 5 else 0
    freedom = len(likely)
    # a normal bound above chi-square's 99.9th per cent point
    assert chi < freedom + 3.1 * (2 * freedom) ** 0.5 + 6


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
    one, two, other = (
        draw(captioner, regions, 20, 7, (PAD, BOS, UNK), seed)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    after = (one == EOS).cumsum(2) > 0
    assert (one[after] == EOS).all() and not set(one.flatten().tolist()) & {PAD, BOS, UNK}
