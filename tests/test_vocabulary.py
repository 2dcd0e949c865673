"""Words, their numbers, and batches of captions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataError
from data.batches import ImageTexts, pad, prefetch
from data.cache.reader import FeatureCache, Rows
from data.cache.writer import plan_shards, write_shard
from data.examples import Example
from data.sources import Image
from data.subwords import Subwords
from data.vocabulary import BOS, EOS, PAD, SPECIALS, UNK, Vocabulary
from pipeline.tasks.captioning import Captioning
from tests.test_features import some_images, write_plan

CAPTIONS = [["a", "dog", "runs"], ["a", "dog"], ["a", "cat"]]


def test_a_token_of_two_words_is_none_of_the_vocabulary():
    assert "1\xa01/2" not in Vocabulary.build([["1\xa01/2", "cups", "of", "1\xa01/2"]], 1).words


# Tokens as captions in other scripts give them: a combining mark at the start, a sign, a blank
# inside, nothing at all.
STRANGE = [
    ["\u0301a", "cre\u0300me", "\u2764", "کتاب", "দৌড়াচ্ছে", "一只狗"],
    ["1\xa01/2", "cups", ""],
]


def test_words_with_marks_come_back_as_they_were_and_tokens_without_a_word_are_left_out():
    vocabulary = Vocabulary.build(STRANGE, 1)
    assert sorted(vocabulary.words[4:]) == sorted([*STRANGE[0], "cups"])
    assert vocabulary.decode(vocabulary.encode(STRANGE[0])) == " ".join(STRANGE[0])
    assert vocabulary.encode(STRANGE[1]) == [UNK, vocabulary.words.index("cups"), UNK]


def test_words_are_ordered_by_count_then_alphabet_and_rare_ones_are_unknown():
    assert Vocabulary.build(CAPTIONS, 1).words == (*SPECIALS, "a", "dog", "cat", "runs")
    two = Vocabulary.build(CAPTIONS, 2)
    assert two.words == (*SPECIALS, "a", "dog") and two.encode(["a", "cat"]) == [4, UNK]


def test_decoding_ends_at_the_end_and_gives_the_words_back():
    vocabulary = Vocabulary.build(CAPTIONS, 1)
    assert (
        vocabulary.decode([BOS, *vocabulary.encode(["a", "cat", "runs"]), EOS, 5, PAD])
        == "a cat runs"
    )


@pytest.mark.parametrize(("captions", "min_count"), [(CAPTIONS, 9), ([], 1), ([[]], 1)])
def test_a_vocabulary_of_no_words_is_an_error(captions, min_count):
    with pytest.raises(DataError, match=r"no words.*--min-count"):
        Vocabulary.build(captions, min_count)


def texts_of(images: list[Image], cache: FeatureCache) -> ImageTexts:
    examples = [Example(image.id, image.id, "", image.captions) for image in images]
    by_id = {image.id: image for image in images}
    return ImageTexts(examples, by_id, cache, "train", holds_mirrored=Captioning().holds_mirrored)


def captioned(tmp_path: Path, captions: dict[int, tuple[str, ...]]) -> ImageTexts:
    images = [
        Image(i, f"photos/{i}.jpg", Path(f"{i}.jpg"), "train", c) for i, c in captions.items()
    ]
    write_plan(tmp_path / "cache", some_images(max(captions) + 1))
    return texts_of(images, FeatureCache(tmp_path / "cache"))


def test_every_caption_comes_once_an_epoch_beside_its_own_images_row(tmp_path):
    images = captioned(
        tmp_path, {i: tuple(f"word{i}" for _ in range(i % 3 + 1)) for i in range(11)}
    )
    vocabulary = Vocabulary.build([words for group in images.tokens for words in group], 1)
    seen = []
    for batch in prefetch(
        images.batches(images.encode(vocabulary, 5), 4, np.random.default_rng(0))
    ):
        for row, image_id in enumerate(batch.image_ids):
            assert set(batch.features[row].unique().tolist()) == {image_id}
            texts = [
                vocabulary.decode(caption)
                for caption in batch.tokens[row].tolist()
                if caption[0] == BOS
            ]
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
    with pytest.raises(DataError, match=r"image 1 \(photos/1.jpg\) contain no words"):
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


# ------------------------------------------------------------------------------------- views, parts


def viewed(tmp_path: Path, captions: dict[int, tuple[str, ...]], view: str = "flip") -> ImageTexts:
    """Images whose features hold their id, and in the view their id + 1000."""
    cache = tmp_path / "cache"
    cache.mkdir()
    identity = {
        "backbone": "planted",
        "weights": "0",
        "grid": [2, 2],
        "channels": 3,
        "regions": "grid",
    }
    images = [
        Image(i, f"photos/{i}.jpg", Path(f"{i}.jpg"), "train", c) for i, c in captions.items()
    ]
    for shard in plan_shards(images, cache):
        ids = np.array([image.id for image in shard.images])[:, None, None] * np.ones((1, 4, 3))
        tables = np.zeros((len(ids), 4, 4)), np.full(len(ids), 4)
        rows = [Rows(ids, *tables), Rows(ids + 1000, tables[0] + 0.5, tables[1])]
        write_shard(
            shard, shard.images, rows, np.ones((len(ids), 2)), [], identity, {"views": [view]}
        )
    return texts_of(images, FeatureCache(cache))


@pytest.mark.parametrize("kept_on", [None, "cpu"])
def test_a_mirrored_photograph_goes_without_captions_of_left_and_right(tmp_path, kept_on):
    sided = ("a dog on the left", "the right one", "a leftmost dog", "right-hand side")
    images = viewed(
        tmp_path, {i: ("a dog", "it runs", *sided[: i % 5]) if i % 7 else sided for i in range(100)}
    )
    vocabulary = Vocabulary.build([words for group in images.tokens for words in group], 1)
    ids = images.encode(vocabulary, 9)
    if kept_on:
        images.keep_on(torch.device(kept_on), views=1)
    mirrored = 0
    for epoch in range(3):
        for batch in images.batches(ids, 8, np.random.default_rng(epoch), views=True):
            for row, image_id in enumerate(batch.image_ids):
                texts = [
                    vocabulary.decode(caption)
                    for caption in batch.tokens[row].tolist()
                    if caption[0] == BOS
                ]
                flipped = batch.features[row].unique().tolist() == [image_id + 1000]
                assert flipped or batch.features[row].unique().tolist() == [image_id]
                assert batch.boxes[row].unique().tolist() == [0.5 if flipped else 0]
                assert len(texts) == (2 if flipped else len(images.tokens[image_id]))
                assert not flipped or (
                    image_id % 7 and not any("left" in text or "right" in text for text in texts)
                )
                mirrored += flipped
    assert 90 < mirrored < 165  # half of the 85 that may be, three times
    assert all(
        batch.features.max() < 100 for batch in images.batches(ids, 8, np.random.default_rng(0))
    )


def test_a_crop_goes_with_all_captions_also_with_those_of_left_and_right(tmp_path):
    images = viewed(tmp_path, {i: ("a dog", "on the left") for i in range(40)}, view="crop1")
    ids = images.encode(Vocabulary.build([words for g in images.tokens for words in g], 1), 9)
    cropped = 0
    for batch in images.batches(ids, 8, np.random.default_rng(0), views=True):
        assert batch.texts == 2 * len(batch.image_ids)
        cropped += int((batch.features.amax((1, 2)) >= 1000).sum())
    assert 8 < cropped < 32


def test_asked_for_whole_a_photograph_that_would_go_without_a_caption_is_not_mirrored(tmp_path):
    images = viewed(
        tmp_path,
        {i: ("a dog", "on the left") if i % 2 else ("a dog", "it runs") for i in range(40)},
    )
    ids = images.encode(
        Vocabulary.build([words for group in images.tokens for words in group], 1), 9
    )
    mirrored = set()
    for epoch in range(8):
        for batch in images.batches(ids, 8, np.random.default_rng(epoch), views=True, whole=True):
            assert batch.texts == 2 * len(batch.image_ids)
            mirrored |= {
                i
                for i, row in zip(batch.image_ids, batch.features, strict=True)
                if row.max() >= 1000
            }
    assert mirrored == set(range(0, 40, 2))


def test_parts_of_a_batch_are_the_same_images_and_its_processes_share_them(tmp_path):
    images = captioned(
        tmp_path, {i: tuple(f"word{i}" for _ in range(i % 3 + 1)) for i in range(11)}
    )
    vocabulary = Vocabulary.build([words for group in images.tokens for words in group], 1)
    ids = images.encode(vocabulary, 5)
    whole = list(images.batches(ids, 5, np.random.default_rng(0)))
    assert [
        batch.image_ids for batch in images.batches(ids, 5, np.random.default_rng(0), skip=1)
    ] == [batch.image_ids for batch in whole[1:]]
    for batch in whole:
        parts = batch.split(3)
        assert [i for part in parts for i in part.image_ids] == batch.image_ids
        assert torch.equal(torch.cat([part.features for part in parts]), batch.features)
        assert sum(part.words for part in parts) == batch.words == 2 * batch.texts
    ranks = [
        list(images.batches(ids, 5, np.random.default_rng(0), rank=rank, world=3))
        for rank in range(3)
    ]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert sorted(i for share in shares if share.counted for i in share.image_ids) == sorted(
            batch.image_ids
        )
        assert (
            sum(share.words for share in shares) == batch.words
            and sum(share.texts for share in shares) == batch.texts
        )
    assert [share[-1].counted for share in ranks] == [
        True,
        False,
        False,
    ]  # the last batch has one image


# ---------------------------------------------------------------------------------- pieces of words


def test_pieces_of_words_with_marks_are_joined_to_the_words_they_were_cut_from():
    pieces = Subwords.build(STRANGE, 80)
    assert pieces.decode(pieces.encode(STRANGE[0])) == " ".join(STRANGE[0])
    assert pieces.decode(pieces.encode(STRANGE[1])) == "1 1/2 cups"  # the words of CIDEr


def test_pieces_are_joined_to_the_words_they_were_cut_from_even_unseen_ones():
    pytest.importorskip("tokenizers")
    words = [["the", "dogs", "run"], ["a", "dog", "runs"], ["it's", "running", "."]] * 3
    pieces = Subwords.build(words, 40)
    assert len(pieces) <= 40 and pieces.words[:4] == SPECIALS
    for caption in [*words, ["dogrun", "nu", "gout"]]:
        ids = pieces.encode(caption)
        assert len(ids) >= len(caption) and UNK not in ids
        assert pieces.decode([BOS, *ids, EOS, 5, PAD]) == " ".join(caption)
    assert pieces.encode(["xyz"]).count(UNK) == 3 or UNK in pieces.encode(["xyz"])
    again = Subwords(pieces.words, pieces.tokenizer)
    assert again.encode(["dogs", "runs"]) == pieces.encode(["dogs", "runs"])
    for _ in range(5):
        assert Subwords.build(words, 40).tokenizer == pieces.tokenizer


def test_special_words_that_stand_in_a_caption_are_unknown_words():
    assert Vocabulary.build([["a", "<eos>"]], 1).encode(["<pad>", "a", "<eos>"]) == [UNK, 4, UNK]
    pytest.importorskip("tokenizers")
    pieces = Subwords.build([["a", "dog", "<eos>"]] * 2, 30)
    assert not {PAD, BOS, EOS} & set(pieces.encode(["a", "<eos>", "x<pad>y", "<bos>"]))


@pytest.mark.parametrize("size", [5, 10])
def test_a_vocabulary_of_pieces_is_never_larger_than_asked(size):
    pytest.importorskip("tokenizers")
    assert len(Subwords.build([["the", "quick", "brown", "fox"]] * 3, size)) <= size
    with pytest.raises(DataError, match="--vocab-size"):
        Subwords.build([["a"]], 4)


def test_a_tokenizer_of_other_pieces_is_refused():
    pytest.importorskip("tokenizers")
    one, two = (Subwords.build([words] * 3, 30) for words in (["a", "dog"], ["the", "cats"]))
    with pytest.raises(DataError, match="other subwords"):
        Subwords(one.words, two.tokenizer).encode(["a"])


def test_without_its_package_pieces_are_read_but_not_made(monkeypatch):
    pytest.importorskip("tokenizers")
    pieces = Subwords.build([["a", "dog"]] * 2, 30)
    ids = pieces.encode(["dog"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    alone = Subwords(pieces.words, pieces.tokenizer)
    assert alone.decode(ids) == "dog"
    with pytest.raises(DataError, match=r"onceover\[bpe\]"):
        alone.encode(["dog"])
    with pytest.raises(DataError, match=r"onceover\[bpe\]"):
        Subwords.build([["a"]], 30)
