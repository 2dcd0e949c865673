"""What self-critical training rewards: CIDEr and BLEU as scorers give them, their sums, and
callables of anybody's.
"""

from __future__ import annotations

import sys
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from data.subwords import Subwords
from data.vocabulary import EOS, PAD, Vocabulary
from pipeline.cli import UserError
from pipeline.scoring.metrics import cider, score
from pipeline.scoring.ngrams import References
from pipeline.scoring.token_cider import TokenCider
from pipeline.training.config import TrainConfig
from pipeline.training.rewards import GROUP, Rewards, parse_rewards

CPU = torch.device("cpu")
CAPTIONS = {
    7: ["A dog runs through the grass.", "The brown dog is running.", "Dog, running!"],
    2**62: ["Two men on a bench.", "Two men sit on a wooden bench outside."],
    3: ["A surfer rides a wave."],
}
WORDS = {
    image_id: [caption.lower().strip(".!").replace(",", "").split() for caption in group]
    for image_id, group in CAPTIONS.items()
}
TRAIN = types.SimpleNamespace(
    images=[types.SimpleNamespace(id=i, captions=group) for i, group in CAPTIONS.items()],
    tokens=list(WORDS.values()),
)
VOCABULARY = Vocabulary.build((words for group in WORDS.values() for words in group), 1)
SAID = [
    ["a dog runs", "a dog a dog a dog"],
    ["two men sit on a", ""],
    ["a surfer rides a wave", "a wave"],
]


def samples(
    vocabulary: Vocabulary, said: list[list[str]], length: int, cut: bool = False
) -> torch.Tensor:
    """Ids [B,K,L], <eos> after their end, which those of `length` have not."""
    rows = [[vocabulary.encode(text.split())[:length] for text in group] for group in said]
    return torch.tensor([[row + [EOS] * (length - len(row)) for row in group] for group in rows])


def slow_cider(ids: list[int], texts: list[list[str]], ended: list[list[bool]]) -> np.ndarray:
    """By the scorer, each caption by itself, its end a word of its own as the references' ends
    are.
    """
    references = References(
        {i: [[*words, "<eos>"] for words in group] for i, group in WORDS.items()}
    )
    return np.array(
        [
            [
                cider(references, [i], [[*text.split(), *(["<eos>"] if end else [])]])[0]
                for text, end in zip(*pair, strict=True)
            ]
            for i, *pair in zip(ids, texts, ended, strict=True)
        ]
    )


def test_cider_is_the_scorers_with_the_end_a_word_and_none_where_a_sample_was_cut():
    rewards = Rewards("CIDEr", TRAIN, VOCABULARY)
    ids = list(CAPTIONS)
    found = rewards(ids, samples(VOCABULARY, SAID, 5))
    texts = [[" ".join(text.split()[:5]) for text in group] for group in SAID]
    ended = [[len(text.split()) < 5 for text in group] for group in SAID]
    assert found.shape == (3, 2) and found.dtype == torch.float32
    np.testing.assert_allclose(found, slow_cider(ids, texts, ended), rtol=1e-5)
    assert found[2, 0] > 0 and found[1, 1] >= 0
    whole = rewards(ids[2:], samples(VOCABULARY, SAID[2:], 6))
    # the same words, without their end
    assert whole[0, 0] == pytest.approx(10.0) and found[2, 0] < whole[0, 0]


def test_the_end_as_a_word_is_what_makes_an_unfinished_sample_worth_less():
    """By words alone "on a" ends a caption well, since references go on so; no reference ends
    there.
    """
    said = samples(VOCABULARY, [["two men on a", "two men on a bench"]], 9)
    unfinished, whole = Rewards("CIDEr", TRAIN, VOCABULARY)([2**62], said)[0].tolist()
    by_words = TokenCider(WORDS, VOCABULARY)
    unfinished_by_words, whole_by_words = by_words(by_words.rows([2**62]), said.numpy())[0].tolist()
    assert unfinished / whole < 0.9 * unfinished_by_words / whole_by_words


@pytest.mark.parametrize("spec", ["CIDEr:1,BLEU-4:0.5", "BLEU-1", "BLEU-2:2,CIDEr:-1"])
def test_a_mix_is_the_weighted_sum_of_what_the_scorer_gives_each_caption(spec):
    rewards = Rewards(spec, TRAIN, VOCABULARY)
    found = rewards(list(CAPTIONS), samples(VOCABULARY, SAID, 9))
    end = {i: [[*words, "<eos>"] for words in group] for i, group in WORDS.items()}
    for column in (0, 1):
        per_image = score(
            {i: [*said[column].split(), "<eos>"] for i, said in zip(CAPTIONS, SAID, strict=True)},
            end,
        ).per_image
        wanted = sum(
            weight * per_image[name.replace("BLEU-", "Bleu_")]
            for name, weight in parse_rewards(spec)
        )
        np.testing.assert_allclose(found[:, column], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["CIDEr", "CIDEr:1,BLEU-4:0.5"])
def test_pieces_of_words_are_rewarded_as_the_words_they_make(spec):
    pieces = Subwords.build((words for group in WORDS.values() for words in group), 40)
    by_piece, by_word = (Rewards(spec, TRAIN, vocabulary) for vocabulary in (pieces, VOCABULARY))
    assert any(
        len(pieces.encode([word])) > 1
        for group in WORDS.values()
        for words in group
        for word in words
    )
    for _ in range(2):  # words that only pieces make are forgotten again
        known = len(by_piece.references.vocabulary)
        found = by_piece(
            list(CAPTIONS), samples(pieces, [*SAID[:2], ["a surfer rides a wave", "wavegrass"]], 30)
        )
        assert len(by_piece.references.vocabulary) == known
    wanted = by_word(list(CAPTIONS), samples(VOCABULARY, SAID, 30))
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[:2], wanted[:2], rtol=1e-5, atol=1e-6)
    assert found[2, 1] < 0.1


@pytest.fixture
def mine(monkeypatch) -> types.ModuleType:
    module = types.ModuleType("mine_of_tests")
    monkeypatch.setitem(sys.modules, "mine_of_tests", module)
    module.calls = []

    def brevity(captions, references, image_ids):
        module.calls.append((captions, references, image_ids))
        return [-len(caption.split()) for caption in captions]

    module.brevity = brevity
    return module


def test_a_callable_gets_each_sample_with_its_references_and_is_weighed(mine):
    plain = Rewards("CIDEr", TRAIN, VOCABULARY)(list(CAPTIONS), samples(VOCABULARY, SAID, 9))
    found = Rewards("CIDEr, mine_of_tests:brevity:0.1", TRAIN, VOCABULARY)(
        list(CAPTIONS), samples(VOCABULARY, SAID, 9)
    )
    words = torch.tensor([[len(text.split()) for text in group] for group in SAID])
    torch.testing.assert_close(found, plain - 0.1 * words)
    captions, references, image_ids = mine.calls[0]
    assert captions == [text for group in SAID for text in group] and image_ids == [
        7,
        7,
        2**62,
        2**62,
        3,
        3,
    ]
    assert references == [CAPTIONS[i] for i in image_ids]


def test_an_installed_package_names_its_reward_in_the_entry_point_group(mine, monkeypatch):
    point = metadata.EntryPoint("brevity", "mine_of_tests:brevity", GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == GROUP else [])
    found = Rewards("brevity", TRAIN, VOCABULARY)([3], samples(VOCABULARY, SAID[2:], 9))
    assert found.tolist() == [[-5, -2]]


def test_the_worked_example_of_the_documents_pays_for_colours_that_are_there(tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[1] / "docs" / "rewards.md").read_text()
    (tmp_path / "colours.py").write_text(text.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    said = samples(VOCABULARY, [["a brown dog", "a dog"]], 9)
    plain, found = (
        Rewards(spec, TRAIN, VOCABULARY)([7], said) for spec in ("CIDEr", "CIDEr,colours:named:0.3")
    )
    torch.testing.assert_close(found - plain, torch.tensor([[0.3, 0.0]]))
    colours = sys.modules["colours"]
    assert colours.named(["a red dog", "a brown dog"], [CAPTIONS[7]] * 2, [7, 7]) == [-1, 1]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ([1.0], "returned 1 numbers for 2 captions"),
        (["a", "b"], "does not return a number for each caption"),
        (None, "does not return a number for each caption"),
        ([None, 1], "does not return a number for each caption"),
    ],
)
def test_a_callable_that_gives_no_numbers_is_named(mine, answer, complaint):
    mine.wrong = lambda **_: answer
    with pytest.raises(UserError, match=complaint):
        Rewards("mine_of_tests:wrong", TRAIN, VOCABULARY)([3], samples(VOCABULARY, SAID[2:], 9))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("CIDER", "is not one of CIDEr, BLEU-1"),
        ("no_such_module:f", "cannot be imported"),
        (":f", "cannot be imported"),
        ("wrong_of_tests:f", "cannot be imported: SyntaxError"),
        ("json:dumps", "must take captions, references and image_ids"),
        ("math:no_such", "cannot be imported"),
        ("math:pi", "is float, not a callable"),
    ],
)
def test_a_reward_that_is_not_there_is_named(spec, complaint, tmp_path, monkeypatch):
    (tmp_path / "wrong_of_tests.py").write_text("def f(captions:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=complaint):
        Rewards(spec, TRAIN, VOCABULARY)


@pytest.mark.parametrize("spec", ["", "CIDEr,", ":1", "CIDEr:nan", "CIDEr:inf"])
def test_a_reward_that_is_no_sum_is_refused_before_anything_is_read(spec, tmp_path):
    with pytest.raises(UserError, match="is not NAME or NAME:WEIGHT"):
        TrainConfig(scst=True, init=tmp_path, reward=spec)


def test_padding_after_the_end_changes_no_reward():
    rewards = Rewards("CIDEr:1,BLEU-4:1", TRAIN, VOCABULARY)
    short, ids = samples(VOCABULARY, SAID, 9), list(CAPTIONS)
    padded = torch.cat([short, torch.full((3, 2, 4), PAD)], dim=2)
    torch.testing.assert_close(rewards(ids, short), rewards(ids, padded), rtol=0, atol=0)


@pytest.mark.parametrize("spec", ["CIDEr", "BLEU-4,CIDEr:0.5"])
def test_cider_of_one_training_image_is_refused_and_another_reward_is_not(spec):
    one = types.SimpleNamespace(images=TRAIN.images[:1], tokens=TRAIN.tokens[:1])
    with pytest.raises(UserError, match=r"of one image all weights are 0.*BLEU-4"):
        Rewards(spec, one, VOCABULARY)
    assert Rewards("BLEU-4", one, VOCABULARY)([7], samples(VOCABULARY, SAID[:1], 9)).shape == (1, 2)
