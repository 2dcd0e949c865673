"""CIDEr of token ids is pycocoevalcap's on the same words."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from data import DataError
from data.tokens import tokenize_all
from data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary
from pipeline.scoring.token_cider import TokenCider


def oracle(
    samples: list[tuple[int, list[str]]], references: dict[int, list[list[str]]]
) -> np.ndarray:
    """pycocoevalcap's CIDEr of each (image, words); document frequencies from all the
    references.
    """
    base = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer
    documents = np.log(float(len(references)))

    class Scorer(base):  # it takes the number of samples for that of documents
        ref_len = property(lambda self: documents, lambda self, value: None)

    scorer, counted = Scorer(), Scorer()
    for image_id, words in samples:
        scorer += (" ".join(words), [" ".join(caption) for caption in references[image_id]])
    for captions in references.values():
        counted += ("", [" ".join(caption) for caption in captions])
    counted.compute_doc_freq()
    scorer.document_frequency = counted.document_frequency
    return np.array(scorer.compute_cider())


def ids(vocabulary: Vocabulary, words: list[str], length: int, end: bool = True) -> list[int]:
    found = vocabulary.encode(words)[:length] + ([EOS] if end else [])
    return (found + [PAD] * length)[:length]


def drawn(
    seed: int,
) -> tuple[dict[int, list[list[str]]], Vocabulary, list[int], list[list[list[str]]]]:
    """References by image, a vocabulary that lacks some of their words, and 3 samples for each of
    some images.
    """
    rng = random.Random(seed)

    def sentence(words: str) -> list[str]:
        return rng.choices(words, k=rng.choice([0, 1, 2, 3, 4, 5, 8, 11]))

    images = rng.sample(range(10**12), 12)
    references = {
        image_id: [sentence("abcdefghijk") for _ in range(rng.randint(1, 5))] for image_id in images
    }
    # i j k are unknown, x y z unseen
    vocabulary = Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>", *"abcdefghxyz"))
    owners = [rng.choice(images) for _ in range(6)]
    return (
        references,
        vocabulary,
        owners,
        [[sentence("abcdefghxyz") for _ in range(3)] for _ in owners],
    )


@pytest.mark.parametrize("eos", [False, True], ids=["words", "words and the end"])
@pytest.mark.parametrize("seed", range(15))
def test_random_samples_score_as_pycocoevalcap_scores_their_words(seed, eos):
    references, vocabulary, owners, samples = drawn(seed)
    cider = TokenCider(references, vocabulary, eos)
    tokens = np.array([[ids(vocabulary, words, 9) for words in group] for group in samples])
    found = cider(cider.rows(owners), tokens)
    assert found.shape == (6, 3) and found.dtype == np.float32
    end = ["<eos>"] if eos else []
    ended = {
        image_id: [[*words, *end] for words in captions]
        for image_id, captions in references.items()
    }
    words = [
        (i, [*w[:9], *(end if len(w) < 9 else [])])
        for i, group in zip(owners, samples, strict=True)
        for w in group
    ]
    np.testing.assert_allclose(found.ravel(), oracle(words, ended), atol=1e-5)


@pytest.mark.parametrize("eos", [False, True], ids=["words", "words and the end"])
def test_250_samples_of_real_captions_score_as_pycocoevalcap_scores_them(real: Path, eos):
    from tests.test_scoring import read_pair

    _, references = read_pair(real / "results" / "flickr30k_karpathy_test", "magic_result.json")
    tokens = {image_id: tokenize_all(captions) for image_id, captions in references.items()}
    vocabulary = Vocabulary.build((words for group in tokens.values() for words in group), 3)
    rng = random.Random(1)
    owners = rng.sample(list(tokens), 50)
    samples = [
        [
            vocabulary.decode(
                vocabulary.encode(rng.choice(tokens[rng.choice([image_id, *owners[:2]])]))
            ).split(" ")[:20]
            for _ in range(5)
        ]
        for image_id in owners
    ]
    batch = np.array(
        [[ids(vocabulary, words, 20, len(words) < 20) for words in group] for group in samples]
    )
    end = ["<eos>"] if eos else []
    ended = {
        image_id: [[*words, *end] for words in captions] for image_id, captions in tokens.items()
    }
    words = [
        (i, [*w, *(end if len(w) < 20 else [])])
        for i, group in zip(owners, samples, strict=True)
        for w in group
    ]
    wanted = oracle(words, ended)
    cider = TokenCider(tokens, vocabulary, eos)
    rows = cider.rows(owners)
    np.testing.assert_allclose(cider(rows, batch).ravel(), wanted, atol=1e-5)


def test_a_sampled_unk_matches_no_reference_word():
    references = {1: [["a", "rare", "dog"]], 2: [["a", "cat"]]}
    vocabulary = Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>", "a", "dog", "cat"))
    for cider in [TokenCider(references, vocabulary)]:
        rows = cider.rows([1])
        unknown, wrong = (cider(rows, np.array([[[4, word, 5, EOS]]])).item() for word in (UNK, 6))
        assert 0 < unknown == wrong < 2  # the rare word itself would make it 7.5


def test_what_stands_behind_the_end_does_not_count():
    references, vocabulary, owners, _ = drawn(0)
    a, b = vocabulary.encode(["a", "b"])
    for eos in (False, True):
        for cider in [TokenCider(references, vocabulary, eos)]:
            rows = cider.rows(owners[:1])
            plain = cider(rows, np.array([[[a, b, EOS, PAD, PAD]]]))
            assert np.array_equal(cider(rows, np.array([[[a, b, EOS, EOS, PAD]]])), plain)
            assert np.array_equal(cider(rows, np.array([[[a, b, EOS, a, EOS]]])), plain)
            unended = cider(rows, np.array([[[a, b, PAD, EOS, PAD]]]))
            assert np.array_equal(cider(rows, np.array([[[a, b]]])), unended)
            assert np.array_equal(plain, unended) is not eos or plain.item() == 0


def test_an_image_with_itself_scores_ten_times_its_share_of_long_n_grams():
    references = {1: [["a", "b", "c", "d", "e"]], 2: [["f", "g"]]}
    vocabulary = Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>", *"abcdefg"))
    cider = TokenCider(references, vocabulary)
    tokens = np.array([[vocabulary.encode("abcde")]])
    assert cider(cider.rows([1]), tokens).item() == pytest.approx(10)
    assert cider(
        cider.rows([2]), np.array([[[*vocabulary.encode("fg"), EOS]]])
    ).item() == pytest.approx(5)


def test_document_frequencies_may_come_from_other_captions():
    references, vocabulary, owners, samples = drawn(3)
    few = dict(list(references.items())[:4])
    own = [image_id for image_id in owners if image_id in few] or list(few)[:1]
    tokens = np.array([[ids(vocabulary, words, 9) for words in samples[0]] for _ in own])
    among_all, alone = (
        TokenCider(references, vocabulary),
        TokenCider(few, vocabulary, frequencies=references),
    )
    wanted = among_all(among_all.rows(own), tokens)
    assert np.allclose(alone(alone.rows(own), tokens), wanted, atol=1e-6)


def test_references_without_words_score_nothing():
    vocabulary = Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>", "a"))
    for cider in [TokenCider({1: [[]]}, vocabulary)]:
        assert cider(cider.rows([1]), np.array([[[4, EOS], [EOS, PAD]]])).tolist() == [[0, 0]]


def test_an_unknown_image_is_an_error_that_names_it():
    vocabulary = Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>", "a"))
    with pytest.raises(DataError, match="image 7 "):
        TokenCider({1: [["a"]]}, vocabulary).rows([1, 7])
    assert BOS == 1  # samples come without it
