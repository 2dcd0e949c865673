"""pipeline.evaluate on answers to questions: files, intervals, comparisons, and WUPS."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data.datasets.registry import open_source
from pipeline import evaluate
from pipeline.scoring import wups as wups_module
from pipeline.scoring.bootstrap import mean_of_groups, resample
from pipeline.scoring.wups import NotInstalled, wups
from tests.test_commands import refused, works
from tests.test_vqa import annotation, files, question

TWO_PEOPLE = ["red"] * 2 + ["blue"] * 8


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Four questions about three images; the last one has one answer."""
    return files(
        tmp_path,
        [question(1, 7), question(2, 7, "What colour?"), question(3, 8), question(4, 9)],
        [
            annotation(1, 7),
            annotation(2, 7, TWO_PEOPLE, answer_type="other", question_type="what colour"),
            annotation(3, 8),
            annotation(4, 9, ["yes"]),
        ],
    )


def answers(folder: Path, given: dict[int, str], name: str = "results") -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps([{"question_id": q, "answer": a} for q, a in given.items()]))
    return file


RIGHT = {1: "Yes.", 2: "red", 3: "no", 4: "yes"}


def of(pair) -> list:
    return ["--questions", pair[0], "--annotations", pair[1]]


def test_a_file_of_answers_is_scored_with_types_variants_and_intervals(pair, tmp_path):
    out = tmp_path / "scores.json"
    told = works(evaluate.main, "--answers", answers(tmp_path, RIGHT), *of(pair), "--out", out)
    record = json.loads(out.read_text())
    scores = record["scores"]
    assert scores["accuracy"] == pytest.approx((1 + 0.6 + 1 + 1) / 4)
    assert scores["by_answer_type"] == {"other": pytest.approx(0.6), "yes/no": pytest.approx(1)}
    assert scores["by_question_type"]["what colour"] == pytest.approx(0.6)
    assert scores["by_variant"] == {"equality": 1, "vqa": pytest.approx(2.6 / 3)}
    low, high = record["intervals"]["accuracy"]
    assert 0.6 <= low < scores["accuracy"] < high <= 1
    assert "accuracy:equality.1+vqa.3" in record["signature"] and record["signature"] in told
    lines = (tmp_path / "scores-outputs.jsonl").read_text().splitlines()
    assert [json.loads(line)["scores"]["accuracy"] for line in lines] == pytest.approx(
        [1, 0.6, 1, 1]
    )


def test_files_of_okvqa_are_scored_by_their_own_variant(pair, tmp_path):
    out = tmp_path / "scores.json"
    given = answers(tmp_path, {**RIGHT, 2: "red"})
    command = [evaluate.main, "--answers", given, *of(pair), "--out", out]
    works(*command, "--accuracy", "okvqa")
    assert json.loads(out.read_text())["scores"]["by_question_type"]["what colour"] == 2 / 3
    renamed = pair[1].with_name("okvqa_annotations.json")
    pair[1].rename(renamed)
    command[4:] = [*of((pair[0], renamed)), "--out", out]
    works(*command[:1], "--answers", given, *of((pair[0], renamed)), "--out", out)
    record = json.loads(out.read_text())
    assert record["scores"]["by_question_type"]["what colour"] == 2 / 3
    assert "okvqa.3" in record["signature"]


def test_answers_are_compared_with_another_file_in_pairs(pair, tmp_path):
    out = tmp_path / "scores.json"
    ours, theirs = answers(tmp_path, RIGHT), answers(tmp_path, {**RIGHT, 3: "2"}, "theirs")
    works(evaluate.main, "--answers", ours, "--against", theirs, *of(pair), "--out", out)
    against = json.loads(out.read_text())["against"]
    difference = against["differences"]["accuracy"]
    assert against["name"] == "theirs.json" and difference["value"] == pytest.approx(0.25)
    assert difference["interval"][0] >= 0
    works(evaluate.main, "--answers", ours, "--against", ours, *of(pair), "--out", out)
    same = json.loads(out.read_text())["against"]["differences"]["accuracy"]
    assert same["value"] == 0 and same["interval"] == [0, 0] and same["p"] == 1


def test_answers_to_a_test_split_without_annotations_are_written_for_the_server(pair, tmp_path):
    given = answers(tmp_path, RIGHT)
    told = works(evaluate.main, "--answers", given, "--questions", pair[0], "--server", "mine",
                 "--out", tmp_path / "made" / "scores.json",
                 "--answers-out", tmp_path / "more" / "answers.json")  # fmt: skip
    assert "nothing is scored" in told and not (tmp_path / "made" / "scores.json").exists()
    expected = [{"question_id": q, "answer": a} for q, a in RIGHT.items()]
    for file in ("made/one_mine_results.json", "more/answers.json"):
        assert json.loads((tmp_path / file).read_text()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({1: "yes"}, "question 2 has no answer in .*results.json \\(3 such\\)"),
        ({**RIGHT, 5: "no"}, "question 5 is not in .*one_questions.json"),
        ({}, "contains no answers"),
    ],
)
def test_mistakes_of_a_file_of_answers_name_the_question(pair, tmp_path, given, message):
    assert re.search(message, refused(evaluate.main, "--answers", answers(tmp_path, given),
                                      *of(pair)))  # fmt: skip


def test_options_of_captions_and_of_answers_do_not_mix(pair, tmp_path):
    given = answers(tmp_path, RIGHT)
    assert "--meteor is an option of --task captioning" in refused(
        evaluate.main, "--answers", given, *of(pair), "--meteor")  # fmt: skip
    assert "--answers goes with neither" in refused(
        evaluate.main, "--answers", given, *of(pair), "--checkpoint", tmp_path)  # fmt: skip
    assert "--beam is a decoding option" in refused(
        evaluate.main, "--answers", given, *of(pair), "--beam", 3)  # fmt: skip
    captions = tmp_path / "captions.json"
    captions.write_text("[]")
    assert "--wups is an option of --task vqa" in refused(
        evaluate.main, "--captions", captions, "--references", captions, "--wups")  # fmt: skip


def test_no_file_that_a_command_derives_replaces_an_input_or_another_output(pair, tmp_path):
    """The names are made from --out and --server. All inputs are read before a file is written."""
    given = answers(tmp_path, RIGHT)
    command = [evaluate.main, "--answers", given, *of(pair)]
    for theirs, more in (
        ("one_mine_results", ["--server", "mine", "--out", tmp_path / "scores.json"]),
        ("scores-outputs", ["--out", tmp_path / "scores.json"]),
    ):
        against = answers(tmp_path, {**RIGHT, 3: "2"}, theirs)
        if theirs == "scores-outputs":
            against = against.rename(tmp_path / "scores-outputs.jsonl")
        before = against.read_bytes()
        told = refused(*command, "--against", against, *more)
        assert f"{against} would overwrite an input file" in told
        assert against.read_bytes() == before and not (tmp_path / "scores.json").exists()
    out = tmp_path / "out"
    for name, more in (
        ("scores.json", []),
        ("scores-outputs.jsonl", []),
        ("one_mine_results.json", ["--server", "mine"]),
    ):
        told = refused(*command, *more, "--out", out / "scores.json", "--answers-out", out / name)
        assert "write the same file" in told and not out.exists()


def test_a_wrong_file_to_compare_with_is_refused_before_anything_is_written(pair, tmp_path):
    given, short = answers(tmp_path, RIGHT), answers(tmp_path, {1: "yes"}, "short")
    told = refused(evaluate.main, "--answers", given, *of(pair), "--against", short, "--server",
                   "mine", "--out", tmp_path / "out" / "scores.json",
                   "--answers-out", tmp_path / "more" / "answers.json")  # fmt: skip
    assert f"question 2 has no answer in {short}" in told
    assert not (tmp_path / "out").exists() and not (tmp_path / "more").exists()


def test_answers_of_a_part_are_scored_by_that_part(tmp_path):
    """--limit takes a file with the answers of these images only, --split says what it lacks."""
    ids = range(1, 31)
    pair = files(tmp_path, [question(i, i) for i in ids], [annotation(i, i) for i in ids])
    part = answers(tmp_path, {1: "yes", 2: "yes"})
    command = [evaluate.main, *of(pair), "--answers"]
    assert "accuracy" in works(*command, part, "--limit", 2)
    assert "question 3 has no answer" in refused(*command, part, "--limit", 3)
    every = answers(tmp_path, dict.fromkeys(ids, "yes"), "every")
    assert "accuracy" in works(*command, every, "--limit", 2)
    told = refused(*command, every, "--split", "dev")
    assert "is not in split dev of" in told and "pass --split all" in told
    assert "question 99 is not in" in refused(
        *command, answers(tmp_path, {**dict.fromkeys(ids, "yes"), 99: "no"}), "--split", "all"
    )


def test_no_output_file_replaces_an_input_file(pair, tmp_path):
    given = answers(tmp_path, RIGHT)
    for flag, other in (("--out", "--answers-out"), ("--answers-out", "--out")):
        for file in (given, *pair):
            before = file.read_bytes()
            told = refused(evaluate.main, "--answers", given, *of(pair), flag, file, other,
                           tmp_path / "new.json")  # fmt: skip
            assert f"{flag} {file} would overwrite an input file" in told
            assert file.read_bytes() == before and not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--examples", 3], "--examples is an option of --task captioning"),
        (["--features", "cache"], "--features is the feature cache of a checkpoint"),
        (["--format", "latex"], "--format latex is a table of captioning scores"),
        (["--segment", "characters"], "--segment is an option of --task captioning"),
        (["--server", "a/b"], "pass a name of letters"),
        (["--server", "a", "--limit", 2], "the answers to all questions"),
    ],
)
def test_options_without_an_effect_on_answers_are_refused(pair, tmp_path, options, message):
    given = answers(tmp_path, RIGHT)
    assert message in refused(evaluate.main, "--answers", given, *of(pair), *options)


def test_answers_without_questions_are_refused_with_the_options_that_name_them(tmp_path):
    told = refused(evaluate.main, "--answers", answers(tmp_path, RIGHT))
    assert "vqa needs --questions and --annotations" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accuracy", "vqa"], "--accuracy is for scores, but the questions have no answers"),
        (["--format", "json"], "--format json prints scores, but the questions have no answers"),
        ([], "nothing is scored, because the questions have no answers"),
    ],
)
def test_options_of_scores_are_refused_where_nothing_is_scored(pair, tmp_path, options, message):
    given = answers(tmp_path, RIGHT)
    command = [evaluate.main, "--answers", given, "--questions", pair[0], *options]
    assert message in refused(*command)
    assert "--against is for scores" in refused(*command, "--against", given)


def test_the_server_takes_no_answers_to_a_table(tmp_path):
    (tmp_path / "t.csv").write_text("question,answer,image\nwhat,a,b.jpg")
    told = refused(evaluate.main, "--answers", answers(tmp_path, {1: "a"}), "--annotations",
                   tmp_path / "t.csv", "--server", "mine")  # fmt: skip
    assert "--server writes the answers to the questions of a VQA questions file" in told


def test_val_is_scored_by_default_where_test_has_no_answers(tmp_path):
    for split, image in (("train", 7), ("val", 8), ("test", 9)):
        q, a = files(tmp_path, [question(image, image)], [annotation(image, image)])
        year = 2015 if split == "test" else 2014
        q.rename(tmp_path / f"v2_OpenEnded_mscoco_{split}{year}_questions.json")
        if split != "test":
            a.rename(tmp_path / f"v2_mscoco_{split}2014_annotations.json")
    assert open_source("vqa", tmp_path).reported() == "val"


def test_resampled_means_are_those_of_whole_groups():
    """Against a slow bootstrap that draws the groups' examples one by one."""
    generator = np.random.default_rng(5)
    values, groups = generator.random(30), generator.integers(0, 9, 30).tolist()
    drawn = resample([mean_of_groups("x", values, groups)], 20, seed=3)["x"]
    order = list(dict.fromkeys(groups))
    again = np.random.default_rng(3)
    for mean in drawn:
        chosen = again.integers(0, len(order), len(order))
        members = [v for i in chosen for v, g in zip(values, groups, strict=True) if g == order[i]]
        assert mean == pytest.approx(np.mean(members))


class _Noun:
    def __init__(self, name: str) -> None:
        self.name = name

    def wup_similarity(self, other: "_Noun") -> float:
        pair = tuple(sorted((self.name, other.name)))
        return {("cup", "mug"): 0.95, ("cup", "table"): 0.5}.get(pair, 0.2)


class _WordNet:
    NOUN = "n"

    def synsets(self, word: str, pos: str) -> list[_Noun]:
        return [] if word == "of" else [_Noun(word)]


def test_wups_is_the_smaller_product_of_best_similarities(monkeypatch):
    monkeypatch.setattr(wups_module, "open_wordnet", _WordNet)
    wups_module.similarity.cache_clear()
    assert wups("cup", "cup") == {"WUPS@0.9": 1, "WUPS@0.0": 1}
    assert wups("cup", "mug") == {"WUPS@0.9": 0.95, "WUPS@0.0": 0.95}
    assert wups("cup", "table") == {"WUPS@0.9": pytest.approx(0.05), "WUPS@0.0": 0.5}
    assert wups("of", "table") == {"WUPS@0.9": 0, "WUPS@0.0": 0}
    # of the two words of the truth, table is similar to cup by 0.5 at most
    both = wups("cup", "cup, table")
    assert both["WUPS@0.0"] == pytest.approx(min(1, 1 * 0.5))
    wups_module.similarity.cache_clear()


def test_wups_without_wordnet_is_refused_with_the_line_that_installs_it(
    pair, tmp_path, monkeypatch
):
    def absent() -> None:
        raise NotInstalled("WUPS needs WordNet: install it with python -m nltk.downloader wordnet")

    monkeypatch.setattr("pipeline.tasks.vqa.open_wordnet", absent)
    assert "python -m nltk.downloader wordnet" in refused(
        evaluate.main, "--answers", answers(tmp_path, RIGHT), *of(pair), "--wups")  # fmt: skip
