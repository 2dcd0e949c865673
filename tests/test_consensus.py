"""Minimum Bayes risk: expected CIDEr is CIDEr against the samples, and the caption taken is the one
that has most of it.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.cache.reader import FeatureCache
from data.vocabulary import BOS, EOS, SPECIALS, Vocabulary
from models.generation.generate import generate
from models.regions import Regions
from pipeline import caption, evaluate
from pipeline.cli import UserError
from pipeline.decoding.captioner import load_captioner
from pipeline.decoding.consensus import (
    NAME,
    Frequencies,
    expected_cider,
    save_frequencies,
)
from pipeline.scoring.metrics import cider
from pipeline.scoring.ngrams import References
from tests.test_commands import at, photos, refused, works

WORDS = Vocabulary((*SPECIALS, *"abcdefgh"))


def some_captions(rng: np.random.Generator, count: int, longest: int = 9) -> list[list[int]]:
    """Ids of letters, few of them so that n-grams meet and repeat; some captions are empty."""
    return [
        rng.integers(4, 4 + rng.integers(2, 8), rng.integers(0, longest + 1)).tolist()
        for _ in range(count)
    ]


def table(captions: list[list[int]], longest: int = 9) -> np.ndarray:
    return np.array([caption + [EOS] * (longest + 1 - len(caption)) for caption in captions])[
        :, :longest
    ]


@pytest.mark.parametrize("seed", range(8))
def test_expected_cider_is_the_scorers_against_the_samples(seed):
    rng = np.random.default_rng(seed)
    train = [some_captions(rng, 5) for _ in range(30)]
    train = [[caption or [4] for caption in captions] for captions in train]
    candidates, samples = (
        some_captions(rng, 12),
        [caption or [5] for caption in some_captions(rng, 20)],
    )
    found = expected_cider(
        table(candidates),
        table(samples),
        Frequencies.count([[[BOS, *c, EOS] for c in g] for g in train]),
    )
    words = {
        number: [[WORDS.words[i] for i in c] for c in captions]
        for number, captions in enumerate(train)
    }
    references = References({0: [[WORDS.words[i] for i in c] for c in samples]}, WORDS.words, words)
    expected = cider(
        references, [0] * len(candidates), [[WORDS.words[i] for i in c] for c in candidates]
    )
    assert np.allclose(found, expected, atol=1e-5) and found.max() > 0


def test_frequencies_are_kept_with_a_run_and_read_back_the_same(tmp_path):
    rng = np.random.default_rng(0)
    counted = Frequencies.count(
        [[[BOS, *c, EOS] for c in some_captions(rng, 5)] for _ in range(30)]
    )
    counted.save(tmp_path)
    read = Frequencies.load(tmp_path)
    assert np.array_equal(read.ngrams, counted.ngrams) and np.array_equal(
        read.counts, counted.counts
    )
    assert (
        read.documents == 30
        and (counted.counts > 1).all()
        and (np.diff(counted.ngrams.astype(object)) > 0).all()
    )


def test_frequencies_of_one_image_are_refused_since_all_weights_are_0(tmp_path):
    Frequencies.count([[[BOS, 4, 5, EOS]]]).save(tmp_path)
    with pytest.raises(UserError, match=r"--consensus.*trained on one image: all weights are 0"):
        Frequencies.load(tmp_path)


def test_the_caption_taken_is_the_beam_of_the_highest_expected_cider(world):
    captioner, cache = (
        load_captioner(world / "run", precision="fp32"),
        FeatureCache(world / "cache"),
    )
    regions = Regions(*(torch.from_numpy(part) for part in cache.rows(cache.ids[:5].tolist())))
    found = captioner.generate(regions, num_beams=8, num_return_sequences=8, consensus=30, seed=3)
    beams = captioner.generate(regions, num_beams=8, num_return_sequences=8)
    writer = next(iter(captioner.generators.values()))
    options = dict(num_beams=1, do_sample=True, num_return_sequences=30)
    with torch.inference_mode():
        memory = captioner.captioner.encode(regions)
        draws = torch.Generator().manual_seed(3 * 1_000_003)
        drawn = generate(captioner.captioner, memory, type(writer.options)(**options), draws).tokens
    frequencies, ids = Frequencies.load(world / "run"), captioner.checkpoint.vocabulary
    for image, (ordered, unordered) in enumerate(zip(found, beams, strict=True)):
        assert {c.text for c in ordered} == {c.text for c in unordered}
        rows = [ids.encode(c.text.split()) for c in unordered]
        scores = expected_cider(table(rows, 20), drawn[image].numpy(), frequencies)
        assert [c.score for c in ordered] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
        assert ordered[0].score == pytest.approx(scores.max(), abs=1e-5)


def test_evaluate_and_caption_take_consensus_and_refuse_what_does_not_go_with_it(world, tmp_path):
    over = [
        *at(world),
        "--features",
        world / "cache",
        "--checkpoint",
        world / "run",
        "--beam",
        6,
        "--consensus",
        20,
    ]
    told = works(evaluate.main, *over, "--out", tmp_path / "scores.json")
    assert "consensus with 20 samples" in told
    assert json.loads((tmp_path / "scores.json").read_text())["decoding"]["consensus"] == 20
    one, two = (
        works(caption.main, *photos(world), "--checkpoint", world / "run", "--consensus", 20)
        for _ in range(2)
    )
    assert one == two
    assert "--consensus" in refused(evaluate.main, *over[:-4], "--consensus", 5, "--sample")
    assert "--consensus is 0" in refused(
        caption.main, *photos(world, 1), "--checkpoint", world / "run", "--consensus", 0
    )


def test_a_vocabulary_that_is_too_large_for_consensus_trains_and_only_consensus_is_refused(
    tmp_path,
):
    save_frequencies([[[1, 70_000, 2]], [[1, 5, 2]]], 70_001, tmp_path)
    assert not (tmp_path / NAME).exists()
    with pytest.raises(
        UserError, match=r"--consensus: .* vocabularies of more than 65,535 words have none"
    ):
        Frequencies.load(tmp_path)
    save_frequencies([[[1, 65_534, 2]], [[1, 5, 2]]], 65_535, tmp_path)
    assert Frequencies.load(tmp_path).documents == 2


def test_a_checkpoint_without_frequencies_or_with_broken_ones_is_named(world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "run" / NAME).unlink()
    works(caption.main, *photos(world, 1), "--checkpoint", tmp_path / "run")
    assert NAME in refused(
        caption.main, *photos(world, 1), "--checkpoint", tmp_path / "run", "--consensus", 5
    )
    tensors = load_file(world / "run" / NAME)
    for change in (
        {"names": tensors["names"].flip(0)},
        {"counts": tensors["counts"] * 0},
        {"documents": torch.tensor([3])},
        {"counts": tensors["counts"][:-1]},
        {"counts": tensors["counts"].float()},
    ):
        save_file(
            {name: value.clone() for name, value in (tensors | change).items()},
            tmp_path / "run" / NAME,
        )
        with pytest.raises(UserError, match="no valid document frequencies"):
            Frequencies.load(tmp_path / "run")
