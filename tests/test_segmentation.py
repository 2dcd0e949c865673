"""Captions without spaces between words: cut into characters, joined again, noticed, trained and
scored.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image as PillowImage

from data.segmentation import characters, join_characters, segmented, without_blanks
from data.subwords import Subwords
from data.vocabulary import Vocabulary
from pipeline import caption, evaluate, extract, train
from pipeline.scoring.metrics import score
from pipeline.scoring.ngrams import References
from tests.test_commands import LOOK, SMALL, refused, works

CHINESE = [
    "一只狗在草地上奔跑。",
    "两个孩子在公园里玩耍。",
    "一个男人在骑自行车。",
    "一个女孩坐着。",
]
THAI = ["ผู้ชายกำลังขี่จักรยานบนถนน", "เด็กสองคนเล่นในสวน", "สุนัขวิ่งบนสนามหญ้า"]
JAPANESE = ["犬が草の上を走っています。", "赤いボールと青いボール。", "女の子が座っています"]
KHMER = ["ឆ្កែមួយក្បាលកំពុងរត់លើស្មៅ"]
BURMESE = ["ခွေးတစ်ကောင်သည်မြက်ခင်းပေါ်တွင်ပြေးနေသည်"]
LAO = ["ໝາກຳລັງແລ່ນຢູ່ສະໜາມຫຍ້າ"]


@pytest.mark.parametrize(
    "captions",
    [CHINESE, THAI, JAPANESE, KHMER, BURMESE, LAO],
    ids=["zh", "th", "ja", "km", "my", "lo"],
)
def test_captions_without_blanks_are_noticed_and_those_cut_into_words_are_not(captions):
    assert without_blanks(captions) in captions
    assert without_blanks([*captions, "a dog runs", "two dogs"] * 3) in captions
    assert without_blanks(["a dog runs", "two dogs", "a cat", "a bird", *captions[:1]]) is None
    size = 2 if captions in (CHINESE, JAPANESE) else 4
    cut = [" ".join(text[at : at + size] for at in range(0, len(text), size)) for text in captions]
    assert without_blanks(cut) is None


@pytest.mark.parametrize(
    "caption_",
    [
        "ผู้ชายสวมเสื้อสีแดง กำลังขี่จักรยานบนถนน",
        "赤い服を着た男性が 自転車に乗っている。",
        "一只棕色的狗， 在草地上奔跑。",
        "一个男人在玩 iPhone 手机",
        "ခွေးတစ်ကောင်သည် မြက်ခင်းပေါ်တွင် ပြေးနေသည်",
    ],
)
def test_a_blank_between_clauses_is_not_one_between_words(caption_):
    assert without_blanks([caption_] * 4) == caption_
    assert without_blanks([caption_, caption_, "a dog runs", "two dogs", "a cat"]) == caption_


@pytest.mark.parametrize(
    "captions",
    [
        ["a dog runs", "a cat"],
        ["개가 잔디 위를 달린다", "두 아이"],
        ["собака бежит"],
        ["كلب يركض"],
        ["कुत्ता दौड़ता है"],
        [],
        [""],
    ],
    ids=["en", "ko", "ru", "ar", "hi", "none", "empty"],
)
def test_captions_of_scripts_with_blanks_are_left_alone(captions):
    assert without_blanks(captions) is None
    assert [segmented(text, "characters") for text in captions] == [
        segmented(text) for text in captions
    ]


def test_a_character_is_a_token_with_its_marks_and_other_words_stay_whole():
    assert segmented("一只dog狗5g", "characters") == ["一", "只", "dog", "狗", "5g"]
    assert characters("ที่นี่") == ["ที่", "นี่"] and characters("\U00020000一") == ["\U00020000", "一"]
    assert characters(unicodedata.normalize("NFD", "が行く")) == [
        unicodedata.normalize("NFD", "が"),
        "行",
        "く",
    ]
    assert segmented("crème 一", "characters") == ["crème", "一"]
    assert segmented("一只狗看着iPhone 12。", "characters") == [
        "一",
        "只",
        "狗",
        "看",
        "着",
        "iphone",
        "12",
        "。",
    ]


@pytest.mark.parametrize(
    "text", [*CHINESE, *THAI, *JAPANESE, *KHMER, *BURMESE, *LAO, "一只狗看着iphone 12和pc"]
)
def test_characters_joined_are_the_text_again(text):
    assert join_characters(" ".join(segmented(text, "characters"))) == text


def test_a_perfect_caption_of_characters_scores_full_and_half_of_it_in_between():
    references = References(
        {number: [text] for number, text in enumerate(CHINESE)}, segment="characters"
    )
    full = score(dict(enumerate(CHINESE)), references)
    assert full.values["CIDEr"] == pytest.approx(10) and full.values["Bleu_4"] == pytest.approx(1)
    half = score({number: text[:5] for number, text in enumerate(CHINESE)}, references)
    assert 0 < half.values["CIDEr"] < 9
    by_words = score(
        {number: text[:5] for number, text in enumerate(CHINESE)},
        {n: [t] for n, t in enumerate(CHINESE)},
    )
    assert by_words.values["CIDEr"] == 0


def test_words_and_pieces_of_characters_come_back_as_text():
    pytest.importorskip("tokenizers")
    groups = [segmented(text, "characters") for text in CHINESE]
    for vocabulary in (
        Vocabulary.build(groups, 1, "characters"),
        Subwords.build(groups, 60, "characters"),
    ):
        for text, tokens in zip(CHINESE, groups, strict=True):
            assert vocabulary.decode(vocabulary.encode(tokens)) == text
    assert any(len(piece) > 2 for piece in Subwords.build(groups * 5, 60, "characters").words[4:])


@pytest.fixture(scope="module")
def chinese(tmp_path_factory) -> Path:
    """Twelve photographs with Chinese captions, and their cache."""
    world = tmp_path_factory.mktemp("chinese")
    lines = []
    for number in range(12):
        PillowImage.new("RGB", (64, 64), (20 * number, 90, 200)).save(world / f"{number:02}.png")
        lines.append(json.dumps({"file_name": f"{number:02}.png", "text": CHINESE[number % 4]}))
    (world / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    works(
        extract.main,
        "--dataset",
        "folder",
        "--root",
        world,
        *LOOK,
        "--out",
        world.with_name("cache"),
    )
    return world


def training(chinese: Path, out: Path, *more: object) -> list[object]:
    return [
        "--dataset",
        "folder",
        "--root",
        chinese,
        "--features",
        chinese.with_name("cache"),
        "--out",
        out,
        *SMALL,
        "--epochs",
        30,
        "--eval-steps",
        1000,
        "--lr",
        0.003,
        *more,
    ]


def test_training_on_captions_without_blanks_asks_what_a_word_is(chinese, tmp_path):
    message = refused(train.main, *training(chinese, tmp_path / "run"))
    assert "no spaces between words" in message and "--segment characters" in message
    assert not (tmp_path / "run").exists()
    works(train.main, *training(chinese, tmp_path / "run", "--segment", "words", "--epochs", 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [["--segment", "characters"], ["--vocabulary", "bpe", "--vocab-size", 80]]
)
def test_captions_without_blanks_are_trained_and_scored_by_characters(chinese, tmp_path, how):
    works(train.main, *training(chinese, tmp_path / "run", *how))
    scored = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["dev"]
    assert scored["CIDEr"] > 0.1
    at = [
        "--checkpoint",
        tmp_path / "run",
        "--dataset",
        "folder",
        "--root",
        chinese,
        "--split",
        "train",
    ]
    works(evaluate.main, *at, "--features", chinese.with_name("cache"), "--bootstrap", 0)
    found = json.loads((tmp_path / "run" / "scores-train.json").read_text())
    assert "ptb+characters" in found["signature"] and found["scores"]["CIDEr"] > 0.1
    written = works(
        caption.main, "--checkpoint", tmp_path / "run", chinese / "00.png", "--force-words", "在"
    )
    assert "在" in written and " " not in written.partition(": ")[2].strip()


def test_a_file_of_captions_without_blanks_is_scored_by_characters_where_asked(tmp_path):
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(4)]
    annotations = [{"id": n, "image_id": n, "caption": text} for n, text in enumerate(CHINESE)]
    (tmp_path / "references.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    results = [{"image_id": n, "caption": text[:4]} for n, text in enumerate(CHINESE)]
    (tmp_path / "results.json").write_text(json.dumps(results))
    asked = [
        "--captions",
        tmp_path / "results.json",
        "--references",
        tmp_path / "references.json",
        "--out",
        tmp_path / "scores.json",
    ]
    for _ in range(2):  # the second time the references come from the cache
        assert works(evaluate.main, *asked).count("pass --segment characters") == 1
    assert "pass --segment characters" in works(evaluate.main, *asked, "--limit", 2)
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["CIDEr"] == 0
    assert "warning" not in works(evaluate.main, *asked, "--segment", "characters")
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["CIDEr"] > 1
