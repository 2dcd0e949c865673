"""Words, their numbers, and batches of captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data import DataError
from data.captions import CaptionedImages, pad, prefetch
from data.features import FeatureCache
from data.sources import Image
from data.vocabulary import BOS, EOS, PAD, SPECIALS, UNK, Vocabulary
from tests.test_features import some_images, write_plan

CAPTIONS = [["a", "dog", "runs"], ["a", "dog"], ["a", "cat"]]


def test_a_token_of_two_words_is_none_of_the_vocabulary():
    assert "1\xa01/2" not in Vocabulary.build([["1\xa01/2", "cups", "of", "1\xa01/2"]], 1).words


def test_words_are_ordered_by_count_then_alphabet_and_rare_ones_are_unknown():
    assert Vocabulary.build(CAPTIONS, 1).words == (*SPECIALS, "a", "dog", "cat", "runs")
    two = Vocabulary.build(CAPTIONS, 2)
    assert two.words == (*SPECIALS, "a", "dog") and two.encode(["a", "cat"]) == [4, UNK]


def test_decoding_ends_at_the_end_and_gives_the_words_back():
    vocabulary = Vocabulary.build(CAPTIONS, 1)
    assert vocabulary.decode([BOS, *vocabulary.encode(["a", "cat", "runs"]), EOS, 5, PAD]) == "a cat runs"


@pytest.mark.parametrize(("captions", "min_count"), [(CAPTIONS, 9), ([], 1), ([[]], 1)])
def test_a_vocabulary_of_no_words_is_an_error(captions, min_count):
    with pytest.raises(DataError, match=r"no words.*--min-count"):
        Vocabulary.build(captions, min_count)


def captioned(tmp_path: Path, captions: dict[int, tuple[str, ...]]) -> CaptionedImages:
    images = [Image(i, f"photos/{i}.jpg", Path(f"{i}.jpg"), "train", c) for i, c in captions.items()]
    write_plan(tmp_path / "cache", some_images(max(captions) + 1))
    return CaptionedImages(images, FeatureCache(tmp_path / "cache"), "train")


def test_every_caption_comes_once_an_epoch_beside_its_own_images_row(tmp_path):
    images = captioned(tmp_path, {i: tuple(f"word{i}" for _ in range(i % 3 + 1)) for i in range(11)})
    vocabulary = Vocabulary.build([words for group in images.tokens for words in group], 1)
    seen = []
    for batch in prefetch(images.batches(images.encode(vocabulary, 5), 4, np.random.default_rng(0))):
        for row, image_id in enumerate(batch.image_ids):
            assert set(batch.features[row].unique().tolist()) == {image_id}
            texts = [vocabulary.decode(caption) for caption in batch.tokens[row].tolist() if caption[0] == BOS]
            assert texts == [f"word{image_id}"] * (image_id % 3 + 1)
            seen.append(image_id)
    assert sorted(seen) == list(range(11)) and seen != list(range(11))


def test_a_caption_cut_at_the_limit_has_no_end(tmp_path):
    images = captioned(tmp_path, {0: ("one two three", "one two three four")})
    vocabulary = Vocabulary.build([words for group in images.tokens for words in group], 1)
    whole, cut = images.encode(vocabulary, 3)[0]
    assert whole[0] == cut[0] == BOS and whole[-1] == EOS and len(cut) == 4 and EOS not in cut


def test_an_image_without_captions_or_without_a_word_is_named(tmp_path):
    with pytest.raises(DataError, match=r"image 1 \(photos/1.jpg\) has no caption"):
        captioned(tmp_path, {0: ("a dog",), 1: ()})
    with pytest.raises(DataError, match=r"image 1 \(photos/1.jpg\) hold no word"):
        captioned(tmp_path, {0: ("a dog",), 1: ("...",)})


def test_padding_fills_short_captions_and_missing_ones():
    assert pad([[[1, 7, 2]], [[1, 2], [1, 8, 9, 2]]]).tolist() == [
        [[1, 7, 2, 0], [0, 0, 0, 0]],
        [[1, 2, 0, 0], [1, 8, 9, 2]],
    ]


def test_an_error_while_reading_ahead_reaches_the_reader():
    def broken():
        yield 1
        raise DataError("the disk is gone")

    with pytest.raises(DataError, match="the disk is gone"):
        list(prefetch(broken()))
