"""Our BLEU, ROUGE-L and CIDEr are pycocoevalcap's, on real outputs and on the corners."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data import DataError
from data.tokens import tokenize, tokenize_all
from pipeline.scoring.metrics import _common_lengths, cider, score
from pipeline.scoring.ngrams import References

OUTPUTS = {
    "coco_karpathy_test": [
        "jiahuei_caption_00156000.json",
        "nucleus_result_run_1.json",
        "showedittell_xe.json",
        "top_k_result_run_1.json",
        "zerocap_result.json",
    ],
    "flickr30k_karpathy_test": ["magic_result.json", "nucleus_result_run_1.json"],
}
NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]


def by_image(annotations: list[dict]) -> dict[int, list[str]]:
    captions: dict[int, list[str]] = {}
    for annotation in annotations:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return captions


def read_pair(folder: Path, name: str) -> tuple[dict[int, str], dict[int, list[str]]]:
    references = by_image(json.loads((folder / "refs.json").read_text())["annotations"])
    outputs = by_image(json.loads((folder / name).read_text()))
    return {image_id: captions[0] for image_id, captions in outputs.items()}, references


def oracle(candidates: dict[int, str], references: dict[int, list[str]]) -> tuple[dict, dict]:
    """pycocoevalcap's own scorers on our tokens: corpus values and per-image arrays by name."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = {
        i: [" ".join(words) for words in tokenize_all(captions)]
        for i, captions in references.items()
    }
    given = {i: [" ".join(tokenize(candidates[i]))] for i in references}
    bleu, bleu_per_image = Bleu().compute_score(truth, given, verbose=0)
    rouge, rouge_per_image = Rouge().compute_score(truth, given)
    cider, cider_per_image = Cider().compute_score(truth, given)
    values = dict(zip(NAMES, [*bleu, rouge, cider], strict=True))
    return values, dict(
        zip(NAMES, [*bleu_per_image, rouge_per_image, cider_per_image], strict=True)
    )


def assert_equals_oracle(candidates: dict[int, str], references: dict[int, list[str]]) -> None:
    ours = score(candidates, references)
    values, per_image = oracle(candidates, references)
    names = NAMES if len(references) > 1 else NAMES[:-1]  # no CIDEr over one image
    assert list(ours.values) == list(ours.per_image) == names
    assert ours.image_ids.tolist() == list(references)
    for name in names:
        assert ours.values[name] == pytest.approx(values[name], abs=1e-6), name
        np.testing.assert_allclose(ours.per_image[name], per_image[name], atol=1e-6, err_msg=name)


# ---------------------------------------------------------------- equal to pycocoevalcap


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder, names in OUTPUTS.items() for name in names]
)
def test_every_published_output_scores_as_pycocoevalcap_scores_it(
    real: Path, folder: str, name: str
):
    pytest.importorskip("pycocoevalcap")
    candidates, references = read_pair(real / "results" / folder, name)
    references = dict(list(references.items())[::4])
    assert_equals_oracle({image_id: candidates[image_id] for image_id in references}, references)


def test_a_published_output_scores_as_pycocoevalcap_scores_it(real: Path):
    pytest.importorskip("pycocoevalcap")
    candidates, references = read_pair(
        real / "results" / "flickr30k_karpathy_test", "nucleus_result_run_1.json"
    )
    references = dict(list(references.items())[:300])
    assert_equals_oracle({image_id: candidates[image_id] for image_id in references}, references)


CORNERS = {
    "one image, identical": ({1: "a dog runs in a park"}, {1: ["a dog runs in a park"]}),
    "one image, two words": ({1: "a dog"}, {1: ["a dog runs in a park", "dogs"]}),
    "no words": ({1: "", 2: "a cat"}, {1: ["a dog"], 2: ["a cat sits here"]}),
    "no words on both sides": ({1: ".", 2: "a cat"}, {1: ["!", "a dog"], 2: [","]}),
    "fewer than four words": (
        {1: "dog", 2: "red cat", 3: "one two three"},
        {1: ["dog"], 2: ["red cat"], 3: ["one two three"]},
    ),
    "repeated words": (
        {1: "a a a a a a a", 2: "the the the"},
        {1: ["a a a", "a b a b a a a"], 2: ["the"]},
    ),
    "repeated pairs, 2 and 3 references": (
        {7: "x y x y x y z", 3: "z z x y"},
        {7: ["x y x y", "y x y x y"], 3: ["x y z z", "z", "z z z x y"]},
    ),
    "unknown words": (
        {1: "never seen never seen never seen", 2: "a cat"},
        {1: ["a dog"], 2: ["a cat"]},
    ),
    "a token with a no-break space": (
        {1: "a cut 1 1/2 inches wide", 2: "a cat"},
        {1: ["1 1/2 inches wide"], 2: ["1/2 a cat"]},
    ),
    "combining marks, signs and wide spaces in words": (
        {
            1: "\u0301a cre\u0300me \u2764\ufe0f",
            2: "see http://a.com/x\u3000y now",
            3: "مَدْرَسَةٌ جَمِيلَةٌ",
            4: "দৌড়াচ্ছে",
        },
        {
            1: ["a cre\u0300me \u2764", "\u0301a creme"],
            2: ["see http://a.com/x\u3000y", "y now"],
            3: ["مدرسة جَمِيلَةٌ"],
            4: ["এক দৌড়াচ্ছে", "\u200d"],
        },
    ),
}


@pytest.mark.parametrize(("candidates", "references"), CORNERS.values(), ids=CORNERS)
def test_corners_score_as_pycocoevalcap_scores_them(
    candidates: dict[int, str], references: dict[int, list[str]]
):
    pytest.importorskip("pycocoevalcap")
    assert_equals_oracle(candidates, references)


@pytest.mark.parametrize("seed", range(40))
def test_random_tiny_corpora_score_as_pycocoevalcap_scores_them(seed: int):
    pytest.importorskip("pycocoevalcap")
    rng = random.Random(seed)

    def sentence(words: str) -> str:
        return " ".join(rng.choices(words, k=rng.choice([0, 1, 2, 3, 4, 5, 8, 13])))

    images = rng.sample(range(10**12), rng.randint(1, 6))
    references = {
        image_id: [sentence("abcde") for _ in range(rng.randint(1, 6))] for image_id in images
    }
    assert_equals_oracle({image_id: sentence("abcdexyz") for image_id in images}, references)


def test_captions_without_any_word_score_without_a_warning():  # pycocoevalcap stops at them
    values = score({1: "", 2: "!"}, {1: [""], 2: ["."]}).values
    assert values == {"Bleu_1": 0, "Bleu_2": 0, "Bleu_3": 0, "Bleu_4": 0, "ROUGE_L": 1, "CIDEr": 0}


# ---------------------------------------------------------------- figures known from elsewhere


def test_first_captions_of_val2017_against_the_others_give_the_golden_figures(real: Path):
    captions = by_image(
        json.loads((real / "coco_annotations" / "captions_val2017.json").read_text())["annotations"]
    )
    ours = score({i: c[0] for i, c in captions.items()}, {i: c[1:5] for i, c in captions.items()})
    golden = dict(
        zip(NAMES, [0.634317, 0.437234, 0.293976, 0.195416, 0.471679, 0.886518], strict=True)
    )
    assert ours.values == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize("name", ["jiahuei_caption_00156000.json", "showedittell_xe.json"])
def test_published_figures_are_met_at_their_printed_precision(real: Path, name: str):
    folder = real / "results" / "coco_karpathy_test"
    published = json.loads((folder / "published_scores.json").read_text())[name]["scores"]
    ours = score(*read_pair(folder, name)).values
    for metric in NAMES:
        digits = len(str(published[metric]).partition(".")[2])
        assert ours[metric] == pytest.approx(
            published[metric], abs=max(0.5001 * 10**-digits, 1e-6)
        ), metric


# ---------------------------------------------------------------- CIDEr over one image


def test_cider_is_not_computed_with_the_document_frequencies_of_one_image():
    one, three = {1: ["a dog runs", "the dog"]}, {1: ["a cat"], 2: ["a dog"], 3: ["a bird"]}
    for references in (
        one,
        References(one),
        References({**one, 2: ["a cat"]}, frequencies={9: ["a dog runs"]}),
    ):
        found = score(
            {i: "a dog runs" for i in getattr(references, "rows", references)}, references
        )
        assert (
            list(found.values) == list(found.per_image) == NAMES[:-1]
            and found.values["ROUGE_L"] > 0
        )
        assert found.not_computed.keys() == {"CIDEr"} and "--df FILE" in found.not_computed["CIDEr"]
    found = score({1: "a dog runs"}, References(one, frequencies=three))
    assert found.values["CIDEr"] > 0 and not found.not_computed
    with pytest.raises(DataError, match=r"CIDEr is not computed: .*--df FILE"):
        cider(References(one), [1], ["a dog runs"])


def test_cider_of_images_whose_captions_are_all_the_same_is_0_by_definition():
    found = score({1: "a dog", 2: "a dog"}, {1: ["a dog"], 2: ["a dog"]})
    assert found.values["CIDEr"] == 0 and not found.not_computed


# ---------------------------------------------------------------- prepared once


def test_prepared_references_score_again_and_again():
    references = {4: ["a dog runs", "the dog"], 9: ["a red cat", "one cat sits"]}
    prepared = References(references)
    for candidates in (
        {4: "a dog", 9: "a cat"},
        {4: "one new word", 9: "a red cat"},
        {4: "a dog", 9: "a cat"},
    ):
        assert score(candidates, prepared).values == score(candidates, references).values


def test_cider_of_many_samples_an_image_is_that_of_each_alone():
    rng = random.Random(0)

    def sentence(words: str) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 9)))

    references = {i: [sentence("abcdefgh") for _ in range(rng.randint(1, 5))] for i in range(30)}
    prepared = References(references)
    owners = [rng.randrange(30) for _ in range(200)]
    samples = [rng.choices("abcdefghxyz", k=rng.randint(0, 9)) for _ in owners]
    together = cider(prepared, owners, samples)
    for owner, words, value in zip(owners, samples, together, strict=True):
        alone = score({i: " ".join(words) if i == owner else "" for i in references}, prepared)
        assert value == pytest.approx(alone.per_image["CIDEr"][owner], abs=1e-12)


# ---------------------------------------------------------------- how a caption may be given

TWO = {7: ["A dog runs here.", "A brown dog runs."], 8: ["Running.", "There is a red car."]}
SAID = {7: "A dog runs here.", 8: "Running."}


@pytest.mark.parametrize(
    "give",
    [
        lambda c: [c],
        lambda c: (c,),
        np.str_,
        lambda c: np.array([c]),
        lambda c: np.array(c),
        lambda c: tokenize(c),
        lambda c: tuple(tokenize(c)),
        lambda c: np.array(tokenize(c)),
    ],
    ids=[
        "list",
        "tuple",
        "numpy string",
        "array of one",
        "array",
        "tokens",
        "tuple of tokens",
        "array of tokens",
    ],
)
def test_a_caption_may_be_a_string_a_list_with_it_or_its_tokens(give):
    wanted = score(SAID, TWO)
    references = {
        image_id: [give(caption) for caption in captions] for image_id, captions in TWO.items()
    }
    for found in (
        score({i: give(caption) for i, caption in SAID.items()}, TWO),
        score(SAID, references),
    ):
        for name in NAMES:
            np.testing.assert_array_equal(
                found.per_image[name], wanted.per_image[name], err_msg=name
            )


def test_one_token_stays_that_token_and_may_hold_a_no_break_space():
    references = {1: [["1\xa01/2"], ["m&m"]], 2: [["-lrb-"]], 3: [["<eos>"]]}
    found = score({1: ["1\xa01/2"], 2: ["-lrb-"], 3: ["<eos>"]}, references)
    assert found.per_image["ROUGE_L"].tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    "text", ["Running.", "running!", "Dog", "狗在跑。", "a dog", "dog\n", " dog"]
)
def test_one_string_in_a_list_that_is_no_token_is_a_caption(text: str):
    references = {1: [text], 2: ["a cat"]}
    assert (
        score({1: [text], 2: "a cat"}, references).values
        == score({1: text, 2: "a cat"}, references).values
    )


def test_no_tokens_are_an_empty_caption():
    assert score({7: [], 8: ()}, TWO).values == score({7: "", 8: ""}, TWO).values


def test_references_may_be_any_collection_of_captions():
    wanted = score(SAID, TWO).values
    for kind in (tuple, np.array, iter, set):
        assert score(
            SAID, {i: kind(captions) for i, captions in TWO.items()}
        ).values == pytest.approx(wanted)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({1: "a", 5: "b"}, {1: ["a"]}, "image 5 has a candidate but no references"),
        ({1: "a"}, {1: ["a"], 6: ["b"]}, "image 6 has references but no candidate"),
        ({1: "a", 7: "b"}, {1: ["a"], 7: []}, "image 7 has no references"),
        (
            {1: "a", 8: None},
            {1: ["a"], 8: ["b"]},
            "image 8: a caption is NoneType None, not a string",
        ),
        ({1: "a", 9: "b"}, {1: ["a"], 9: ["b", 3]}, "image 9: a caption is int 3, not a string"),
        ({1: "a", 2: "b"}, {1: ["a"], 2: "b"}, "image 2: the references are one string"),
        ({}, {}, "no references"),
        (
            {1: ["A dog.", "A brown dog."]},
            {1: ["a"]},
            "image 1: 2 sentences instead of one caption, list .*A brown dog",
        ),
        ({1: ["Dog.", "A dog."]}, {1: ["a"]}, "image 1: 2 sentences instead of one caption"),
        (
            {1: "a"},
            {1: [["A dog.", "A brown dog."]]},
            "image 1: 2 sentences instead of one caption",
        ),
        ({1: 3.5}, {1: ["a"]}, "image 1: a caption is float 3.5, not a string"),
        ({1: float("nan")}, {1: ["a"]}, "image 1: a caption is float nan, not a string"),
        ({1: b"a dog"}, {1: ["a"]}, "image 1: a caption is bytes b'a dog', not a string"),
        ({1: {"caption": "a dog"}}, {1: ["a"]}, "image 1: a caption is dict .*, not a string"),
        ({1: ["a", None]}, {1: ["a"]}, "image 1: a caption is list .*, not a string"),
        ({1: [["a", "dog"]]}, {1: ["a"]}, "image 1: a caption is list .*, not a string"),
        ({1: np.array([1, 2])}, {1: ["a"]}, "image 1: a caption is list .*, not a string"),
        ({1: "a"}, {1: None}, "image 1: the references are NoneType None; pass a list of captions"),
        ({1: "a"}, {1: 5}, "image 1: the references are int 5; pass a list"),
        ({1: "a"}, {1: {"caption": "a"}}, "image 1: the references are dict .*; pass a list"),
        ({1: "a"}, {1: np.str_("a dog")}, "image 1: the references are one string"),
        ({1: "a"}, {1: np.array([])}, "image 1 has no references"),
        (["a"], {1: ["a"]}, "candidates are list; pass a dict: a caption by image id"),
        ({1: "a"}, [["a"]], "references are list; pass a dict: lists of captions by image id"),
    ],
)
def test_bad_input_is_an_error_that_names_the_image(
    candidates: dict, references: dict, message: str
):
    with pytest.raises(DataError, match=message):
        score(candidates, references)


def test_cider_of_an_unknown_image_is_an_error_that_names_it():
    with pytest.raises(DataError, match="image 5 has a candidate"):
        cider(References({1: ["a"], 2: ["b"]}), [1, 5], [["a"], ["b"]])
    with pytest.raises(DataError, match="1 captions for 2 image ids"):
        cider(References({1: ["a"], 2: ["b"]}), [1, 1], [["a"]])
    assert cider(References(TWO), [7], ["A dog runs here."]) == cider(
        References(TWO), [7], [["a", "dog", "runs", "here"]]
    )


@pytest.mark.parametrize("most", [3, 40, 64, 65, 150])
def test_the_longest_common_subsequence_is_that_of_the_whole_table(most: int):
    def table(a: list[int], b: list[int]) -> int:
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                rows[i + 1][j + 1] = (
                    rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
                )
        return rows[-1][-1]

    rng = random.Random(most)
    ours, theirs = (
        [rng.choices(range(6), k=rng.choice([0, 1, most // 2, most])) for _ in range(12)]
        for _ in range(2)
    )
    of = [rng.randrange(12) for _ in theirs]
    flat = [
        np.array([word for words in captions for word in words], np.int64)
        for captions in (ours, theirs)
    ]
    counts = [np.array([len(words) for words in captions]) for captions in (ours, theirs)]
    found = _common_lengths(flat[0], counts[0], np.array(of), flat[1], counts[1])
    assert found.tolist() == [table(ours[i], words) for i, words in zip(of, theirs, strict=True)]
