"""Image-text sentiment: readers, scores, and training, evaluation and classification."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data import DataError
from data.datasets.mvsa import combined_label
from data.datasets.registry import open_source
from data.datasets.sample import draw_sample, load_scenes
from pipeline import ask, classify, evaluate, extract, train
from pipeline.cli import UserError
from pipeline.decoding.captioner import PhotoCaptioner, load_captioner
from pipeline.scoring.classification import (
    BINS,
    calibration_error,
    confusion,
    f_scores,
    label_counts,
)
from pipeline.tasks.sentiment import Sentiment, SentimentOptions
from tests.test_commands import refused, works
from tests.test_images import halves
from tests.test_vqa import over


def photograph(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    halves().save(path)
    return path


def mvsa(root: Path, lines: list[str], texts: dict[int, bytes] | None = None) -> Path:
    (root / "labelResultAll.txt").write_text("\n".join(["ID\ttext,image", *lines]) + "\n")
    for line in lines:
        id_ = int(line.split()[0])
        photograph(root / f"data/{id_}.jpg")
        (root / f"data/{id_}.txt").write_bytes((texts or {}).get(id_, b"a  tweet\n"))
    return root


# -------------------------------------------------------------------------------------- the readers


@pytest.mark.parametrize(
    ("text", "image", "label"),
    [
        ("positive", "positive", "positive"),
        ("neutral", "negative", "negative"),
        ("positive", "neutral", "positive"),
        ("neutral", "neutral", "neutral"),
        ("positive", "negative", None),
        ("positive positive negative", "neutral positive neutral", "positive"),
        ("positive neutral negative", "neutral neutral neutral", None),
        ("negative negative neutral", "positive positive positive", None),
    ],
)
def test_labels_of_text_and_photograph_combine_by_the_published_rule(text, image, label):
    assert combined_label(text.split(), image.split()) == label


def test_mvsa_has_the_pairs_with_a_label(tmp_path):
    root = mvsa(tmp_path, ["1\tpositive,neutral", "2\tpositive,negative", "5\tneutral,neutral"])
    source = open_source("mvsa", root)
    assert [image.id for image in source.images] == [1, 5] and not source.missing
    assert [(text.text, text.label) for text in source.texts] == [
        ("a tweet", "positive"), ("a tweet", "neutral"),
    ]  # fmt: skip
    assert "2 of 3 pairs have a label by the rule of MultiSentiNet" in source.notes[0]
    pairs = root / "labelResultAll.txt"
    pairs.write_text("1\tpositive,positive\n")  # without a header
    assert [text.image_id for text in open_source("mvsa", root).texts] == [1]
    pairs.write_text("1\tpositive,negative\n")
    with pytest.raises(DataError, match="none of 1 pairs has a label by the rule"):
        open_source("mvsa", root)
    three = "\t".join(["positive,neutral"] * 3)
    assert open_source("mvsa", mvsa(tmp_path, [f"1\t{three}"])).texts[0].label == "positive"
    for id_ in (1, 5):
        (root / f"data/{id_}.jpg").unlink(missing_ok=True)
    assert [image.id for image in open_source("mvsa", root).missing] == [1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1\tpositive"], "line 2: 'positive' is not a pair of positive, neutral, negative"),
        (["1\thappy,neutral"], "line 2: 'happy,neutral' is not a pair"),
        (["1\tneutral,neutral"] * 2, "line 3: 1 occurs twice"),
        (["1\tneutral,neutral\tneutral,neutral"], "is not an id with one or three pairs"),
        (["1\tneutral,neutral", "9" * 30 + "\tneutral,neutral"], "is not an id with one"),
    ],
)
def test_mistakes_of_mvsa_name_the_line(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        open_source("mvsa", mvsa(tmp_path, lines))


def test_texts_without_a_file_are_counted_and_other_encodings_name_the_byte(tmp_path):
    root = mvsa(tmp_path, ["1\tneutral,neutral", "2\tneutral,neutral"],
                {1: "ab 开心".encode("gb18030")})  # fmt: skip
    with pytest.raises(DataError, match=r"1.txt is not UTF-8 at byte 3; .* --encoding NAME"):
        open_source("mvsa", root)
    assert open_source("mvsa", root, encoding="gb18030").texts[0].text == "ab 开心"
    with pytest.raises(DataError, match="--encoding nonsense: unknown encoding"):
        open_source("mvsa", root, encoding="nonsense")
    (root / "data/2.txt").unlink()
    with pytest.raises(DataError, match=r"1 texts are not in .*data, such as 2"):
        open_source("mvsa", root)


def folder(root: Path, rows: list[dict]) -> Path:
    for row in rows:
        photograph(root / row["file_name"])
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (root / "metadata.jsonl").write_text("".join(lines))
    return root


def test_a_folder_has_labelled_texts_in_its_metadata(tmp_path):
    rows = [
        {"file_name": "a.jpg", "text": "good", "label": "yes", "split": "val"},
        {"file_name": "a.jpg", "text": "", "label": 3, "split": "val"},
        {"file_name": "b.jpg", "label": "yes", "split": "train"},
        {"file_name": "c.jpg", "text": "a caption", "split": "train"},
    ]
    source = open_source("folder", folder(tmp_path, rows))
    assert [(text.text, text.label) for text in source.texts] == [
        ("good", "yes"), ("", "3"), ("", "yes"),
    ]  # fmt: skip
    assert [image.split for image in source.images] == ["val", "train", "train"]
    (tmp_path / "metadata.jsonl").write_bytes(
        '{"file_name": "a.jpg", "text": "é"}'.encode("latin1")
    )
    with pytest.raises(DataError, match=r"is not UTF-8 at byte 32; .*--encoding"):
        open_source("folder", tmp_path)
    assert open_source("folder", tmp_path, encoding="latin1").by_id
    rows = [{"file_name": "a.jpg", "caption": "a dog", "label": "yes"},
            {"file_name": "a.jpg", "text": "no label", "label": "  "}]  # fmt: skip
    texts = open_source("folder", folder(tmp_path, rows)).texts
    assert [(text.text, text.label) for text in texts] == [("a dog", "yes")]
    folder(tmp_path, [{"file_name": "a.jpg", "label": [1]}])
    with pytest.raises(DataError, match=r"line 1: the label is \[1\], not a text"):
        open_source("folder", tmp_path)


# ------------------------------------------------------------------------------------------- scores


def slow_f1(truth: list[str], predicted: list[str], label: str) -> float:
    right = sum(t == p == label for t, p in zip(truth, predicted, strict=True))
    precision = right / predicted.count(label) if label in predicted else 0.0
    recall = right / truth.count(label) if label in truth else 0.0
    return 2 * precision * recall / (precision + recall) if right else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_labels_are_those_of_a_slow_computation(seed):
    rng = np.random.default_rng(seed)
    truth = rng.choice(["a", "b", "c"], 50, p=[0.7, 0.25, 0.05]).tolist()
    predicted = rng.choice(["a", "b", "d"], 50).tolist()
    labels = sorted({*truth, *predicted})
    accuracy, macro, weighted = f_scores(label_counts(truth, predicted, labels).sum(0)[None])[0]
    f1 = {label: slow_f1(truth, predicted, label) for label in labels}
    assert accuracy == np.mean([t == p for t, p in zip(truth, predicted, strict=True)])
    assert macro == pytest.approx(np.mean(list(f1.values())), abs=1e-12)
    assert weighted == pytest.approx(np.mean([f1[label] for label in truth]), abs=1e-12)
    counts = confusion(truth, predicted)
    assert counts["a"]["b"] == sum(
        (t, p) == ("a", "b") for t, p in zip(truth, predicted, strict=True)
    )
    assert sum(sum(row.values()) for row in counts.values()) == 50


def test_the_calibration_error_is_that_of_a_slow_computation():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(200), rng.random(200) < 0.6
    total = 0.0
    for number in range(BINS):
        inside = (confidence >= number / BINS) & (confidence < (number + 1) / BINS)
        if inside.any():
            total += inside.sum() * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration_error(confidence, right) == pytest.approx(total / 200, abs=1e-12)
    assert calibration_error([1.0, 1.0], [True, True]) == 0


def test_classes_are_the_labels_of_train_with_their_weights(tmp_path):
    rows = [{"file_name": f"{n}.jpg", "text": "x", "label": label}
            for n, label in enumerate(["b", "b", "b", "a", 7])]  # fmt: skip
    source = open_source("folder", folder(tmp_path, rows))
    task = Sentiment(SentimentOptions(class_weights="balanced"))
    examples = task.examples(source, "all")
    told = task.prepare(examples, [])
    assert task.answers == ("7", "a", "b")
    assert "3 labels: 7 1, a 1, b 3" in told and "2 labels occur once, such as 7" in told
    weights = {example.targets[0]: task.labels(example) for example in examples}
    assert weights["b"] == [(2, pytest.approx(5 / 9))] and weights["a"] == [(1, 5 / 3)]
    with pytest.raises(UserError, match="train has 1 different labels"):
        task.prepare(examples[:3], [])
    images = Sentiment(SentimentOptions(use="image")).examples(source, "all")
    assert {example.prompt for example in images} == {""}


# ------------------------------------------------------------------------- the sample, and commands


@pytest.fixture(scope="module")
def felt(a_sample_of_any_size, tmp_path_factory) -> Path:
    """A small sample with its cache and runs of --task sentiment: both, text and image."""
    at = tmp_path_factory.mktemp("sentiment")
    draw_sample(at / "sample", 80)
    works(extract.main, "--dataset", "sample", "--root", at / "sample", "--out", at / "cache")
    for use in ("both", "text", "image"):
        works(train.main, "--task", "sentiment", *over(at), "--preset", "tiny", "--epochs", 1,
              "--use", use, "--out", at / use)  # fmt: skip
    return at


def test_texts_about_scenes_say_nothing_without_the_image_and_the_reverse(felt):
    source = open_source("sample", felt / "sample")
    scenes = load_scenes(felt / "sample")
    by_image: dict[int, list] = {}
    for text in source.texts:
        by_image.setdefault(text.image_id, []).append(text)
        words = text.text.split()
        there = any({*thing.words} & {*words} for thing in scenes[text.image_id].things)
        assert text.label == ("positive" if there else "negative")
    assert by_image.keys() == scenes.keys()
    for group in by_image.values():
        assert sorted(text.label for text in group) == ["negative"] * 2 + ["positive"] * 2


@pytest.mark.parametrize("use", ["both", "text", "image"])
def test_a_run_is_evaluated_and_classifies_by_its_folder_alone(felt, tmp_path, use):
    out = tmp_path / "scores.json"
    told = works(evaluate.main, "--checkpoint", felt / use, *over(felt), "--split", "test",
                 "--out", out)  # fmt: skip
    record = json.loads(out.read_text())
    scores = record["scores"]
    assert {"accuracy", "macro_f1", "weighted_f1"} == record["intervals"].keys()
    assert {"calibration_error", "precision", "recall", "confusion"} <= scores.keys()
    assert "confusion" in told and f"use:{use}" in record["signature"]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == record["examples"] == 4 * 8
    source = open_source("sample", felt / "sample")
    texts = {text.id: text for text in source.texts}
    captioner = load_captioner(felt / use)
    for line in lines[:6]:
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
        path = source.by_id[texts[line["id"]].image_id].path
        again = captioner.classify(path, texts[line["id"]].text)
        assert again == pytest.approx(line["probabilities"], abs=2e-3)
    told = works(classify.main, "--checkpoint", felt / use, path, "--text", "i love red")
    assert "positive" in told and "%" in told
    other = tmp_path / "other"
    command = [evaluate.main, "--checkpoint", felt / use, *over(felt), "--split", "test", "--out",
               other / "s.json", "--against"]  # fmt: skip
    works(*command, tmp_path / "predictions.jsonl")
    assert (other / "s-predictions.jsonl").exists()
    broken = tmp_path / "broken.jsonl"
    for line, message in (
        ("[" * 100_000, "line 1: not JSON"),
        ('{"id": 1, "probabilities": {"a": NaN}}', "not a line of predictions"),
        ('{"id": 1, "probabilities": {"a": 5}}', "not a line of predictions"),
        ('{"id": 1, "probabilities": {"a": true}}', "not a line of predictions"),
    ):
        broken.write_text(line)
        assert message in refused(*command, broken)
    difference = json.loads((other / "s.json").read_text())["against"]["differences"]["macro_f1"]
    assert difference["value"] == 0 and difference["interval"] == [0, 0]


def test_a_folder_is_classified_as_json_lines(felt, tmp_path, monkeypatch):
    extracted, extract_regions = [], PhotoCaptioner.extract
    monkeypatch.setattr(
        PhotoCaptioner, "extract", lambda *each: extracted.append(1) or extract_regions(*each)
    )
    rows = [{"file_name": "a.jpg", "text": "i love red", "label": "positive"},
            {"file_name": "a.jpg", "text": "i hate red", "label": "negative"},
            {"file_name": "b.jpg", "text": "a star"}]  # fmt: skip
    photos = folder(tmp_path / "photos", rows)
    (photos / "b.jpg").write_bytes(b"broken")
    out = tmp_path / "new" / "labels.jsonl"
    told = works(classify.main, "--checkpoint", felt / "both", photos, "--out", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["text"] for line in lines] == ["i love red", "i hate red"]
    assert "left out: " in told and "b.jpg" in told
    assert len(extracted) == 2  # each photograph once, also with two texts
    metadata = (photos / "metadata.jsonl").read_bytes()
    command = [classify.main, "--checkpoint", felt / "both"]
    assert "would overwrite an input file" in refused(
        *command, photos, "--out", photos / "metadata.jsonl")  # fmt: skip
    assert (photos / "metadata.jsonl").read_bytes() == metadata
    assert "there is no such photograph" in refused(*command, photos / "c.jpg", "--text", "x")
    assert "--encoding is that of the metadata" in refused(
        *command, photos / "a.jpg", "--text", "x", "--encoding", "latin1")  # fmt: skip
    told = works(*command, photos / "a.jpg", "--text", "zebra red")
    assert "does not know: zebra" in told
    assert "those of an empty text" in works(*command, photos / "a.jpg")
    assert "would overwrite an input file" in refused(*command, photos, "--out", photos / "a.jpg")
    assert "omit --text" in refused(*command, photos, "--text", "x")
    assert "pass a photograph" in refused(*command, "--text", "x")
    assert "2 photographs are passed" in refused(*command, photos / "a.jpg", "love")
    assert "%" in works(classify.main, "--checkpoint", felt / "text", "--text", "i love red")
    reads_text = [
        classify.main,
        "--checkpoint",
        felt / "text",
        photos / "a.jpg",
        "--text",
        "i love",
    ]
    assert "the photograph has no effect" in works(*reads_text)


def test_sentiment_refuses_data_without_labels_and_other_checkpoints(felt, tmp_path):
    photos = folder(tmp_path / "photos", [{"file_name": "a.jpg", "text": "a star"}])
    told = refused(train.main, "--task", "sentiment", "--dataset", "folder", "--root", photos,
                   "--features", felt / "cache", "--out", tmp_path / "run")  # fmt: skip
    assert "--task sentiment needs labels" in told and "the column label" in told
    many = [{"file_name": f"{n:02}.jpg", "text": "x", "label": "ab"[n % 2]} for n in range(30)]
    many = open_source("folder", folder(tmp_path / "many", many))
    dev = {image.id for image in many.select("dev")}
    rows = [{"file_name": image.name, "text": "x", "label": "ab"[n % 2]}
            for n, image in enumerate(many.images)]  # fmt: skip
    for image, row in zip(many.images, rows, strict=True):
        row["label"] = "rare" if image.id in dev else row["label"]
    folder(tmp_path / "many", rows)
    told = refused(train.main, "--task", "sentiment", "--dataset", "folder", "--root",
                   tmp_path / "many", "--use", "text", "--out", tmp_path / "rare")  # fmt: skip
    assert "of dev has the label 'rare', which no text of train has" in told
    told = refused(ask.main, "--checkpoint", felt / "both", photos / "a.jpg", "why?")
    assert "was trained on labels; use it with python -m pipeline.classify" in told
    told = refused(evaluate.main, "--checkpoint", felt / "both", *over(felt), "--out",
                   felt / "both" / "config.json")  # fmt: skip
    assert "is a file of the checkpoint" in told
    told = refused(evaluate.main, "--checkpoint", felt / "both", *over(felt), "--out",
                   next((felt / "sample").rglob("*.jpg")))  # fmt: skip
    assert "would overwrite an input file" in told
    works(train.main, *over(felt), "--preset", "tiny", "--epochs", 1, "--out", tmp_path / "run")
    told = refused(classify.main, "--checkpoint", tmp_path / "run", photos / "a.jpg",
                   "--text", "x")  # fmt: skip
    assert "was trained for --task captioning, not on labels" in told
