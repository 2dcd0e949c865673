"""Visual dialog: the reader, prompts, ranking scores, training, evaluation and conversations."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import real_dialog
from data import DataError
from data.datasets.registry import open_source
from data.datasets.sample import draw_sample, holds, load_scenes
from data.datasets.scene_dialogs import ANSWERS, CANDIDATES
from data.segmentation import MARKS, prompt_tokens, without_marks
from pipeline import ask, evaluate, extract, train
from pipeline.cli import UserError
from pipeline.decoding.captioner import load_captioner
from pipeline.decoding.ranking import rank_candidates
from pipeline.scoring.visdial import ndcg, retrieval_scores
from pipeline.tasks.dialog import DialogOptions, VisualDialog, dialog_prompt
from tests.test_commands import refused, run, works
from tests.test_vqa import over

TEXTS = ["yes", "no", "red", "a dog", "yes"]


def round_(
    question: int = 0, answer: int | None = 0, options=(0, 1, 2), gt: int | None = 0
) -> dict:
    entry: dict = {"question": question}
    if answer is not None:
        entry["answer"] = answer
    if options:
        entry["answer_options"] = list(options)
    if gt is not None and options:
        entry["gt_index"] = gt
    return entry


def dialogs(
    folder: Path, entries: list, name: str = "dialogs", split: str = "val2018", **data
) -> Path:
    file = folder / f"{name}.json"
    content = {"questions": ["is it red?", "what is it?"], "answers": TEXTS, "dialogs": entries}
    file.write_text(json.dumps({"version": "1.0", "split": split, "data": content | data}))
    return file


def dialog(image: int, rounds: list | None = None, **more) -> dict:
    rounds = [round_(), round_(1, 3, (2, 3, 1), 1)] if rounds is None else rounds
    return {"image_id": image, "caption": "A big dog.", "dialog": rounds, **more}


def opened(*files: Path, **more):
    return open_source("visdial", None, None, None, dialogs=files, text_only=True, **more)


# --------------------------------------------------------------------------------------- the reader


def test_dialogues_have_their_rounds_options_and_photographs(tmp_path):
    photographs = tmp_path / "images" / "sub"
    photographs.mkdir(parents=True)
    for name in ("COCO_train2014_000000000007.jpg", "VisualDialog_val2018_000000000008.jpg"):
        (photographs / name).write_bytes(b"")
    file = dialogs(tmp_path, [dialog(7), dialog(8, [round_(options=())]), dialog(9)])
    source = open_source("visdial", None, None, photographs.parent, dialogs=[file])
    assert [image.name for image in source.images] == [
        "sub/COCO_train2014_000000000007.jpg", "sub/VisualDialog_val2018_000000000008.jpg",
        "000000000009.jpg",
    ]  # fmt: skip
    assert [image.id for image in source.missing] == [9]
    first, second = source.dialogs[7].rounds
    assert (first.question, first.answer, first.gt_index) == ("is it red?", "yes", 0)
    assert second.candidates == ["red", "a dog", "no"] and second.answer == "a dog"
    assert source.dialogs[8].rounds[0].candidates == []
    assert source.splits == ("all",)


def test_files_of_train_and_another_split_keep_their_splits(tmp_path):
    parts = {"train2018": 1, "val2018": 2, "test2018": 3}
    files = [dialogs(tmp_path, [dialog(i)], name, name) for name, i in parts.items()]
    assert [image.split for image in opened(*files).images] == ["train", "val", "test"]
    assert [image.split for image in opened(*files[1:]).images] == ["all", "all"]
    old = [dialogs(tmp_path, [dialog(i)], name, name) for name, i in (("train", 1), ("val", 2))]
    assert opened(*old).splits == ("train", "val")


def test_dense_annotations_belong_to_one_round(tmp_path):
    file = dialogs(tmp_path, [dialog(7), dialog(8)])
    for key in ("gt_relevance", "relevance"):
        dense = tmp_path / "dense.json"
        dense.write_text(json.dumps([{"image_id": 8, "round_id": 2, key: [0, 0.5, 1]}]))
        source = opened(file, dense=dense)
        assert source.dialogs[8].rounds[1].relevance == (0, 0.5, 1)
        assert source.dialogs[8].rounds[0].relevance is None
        assert source.dialogs[7].rounds[1].relevance is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([dialog(7), dialog(7)], "image 7 has two dialogues"),
        ([dialog("7")], "dialogue number 0: the image id '7'"),
        ([dialog(7, [])], 'image 7 has no list "dialog"'),
        ([dialog(7, [round_(9)])], "image 7, round 1: the question is 9, not a position in the 2"),
        (
            [dialog(7, [round_(), round_(0, 9)])],
            "round 2: the answer is 9, not a position in the 5",
        ),
        ([dialog(7, [round_(options=(0, 5))])], '"answer_options" must be positions in the 5'),
        ([dialog(7, [round_(options=(0, "a"))])], '"answer_options" must be positions in the 5'),
        ([dialog(7, [round_(gt=3)])], "gt_index 3 is not one of 3 options"),
        ([dialog(7, [round_(gt=1)])], "the answer is 'yes', but the option at gt_index 1 is 'no'"),
        ([dialog(7, [round_() | {"answer_options": 5}])], '"answer_options" must be positions'),
        ([dialog(7, [round_() | {"answer_options": True}])], '"answer_options" must be positions'),
        ([dialog(7, caption="\ud83d")], "lone surrogate"),
        (["x"], "dialogue number 0 is no object"),
        ({}, "is not a VisDial file, for --dialogs"),
    ],
)
def test_mistakes_of_dialogues_name_the_file_and_the_round(tmp_path, entries, message):
    with pytest.raises(DataError, match=message) as error:
        opened(dialogs(tmp_path, entries))
    assert "dialogs.json" in str(error.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_id": 1}, "no dialogue about this image"),
        ({"round_id": 3}, "the dialogue has the rounds 1 to 2"),
        ({"round_id": 0}, "the dialogue has the rounds 1 to 2"),
        ({"gt_relevance": [1]}, "1 relevances for 3 options"),
        ({"gt_relevance": [0, 1, 2]}, "must be a number in 0..1"),
        ({"gt_relevance": None}, "0 relevances for 3 options"),
    ],
)
def test_mistakes_of_dense_annotations_name_the_round(tmp_path, entry, message):
    dense = tmp_path / "dense.json"
    for entries, all_message in (([], "contains no dense"), ([{}, 3], "is not a file of dense")):
        dense.write_text(json.dumps(entries))
        with pytest.raises(DataError, match=all_message):
            opened(dialogs(tmp_path, [dialog(7)]), dense=dense)
    whole = {"image_id": 7, "round_id": 1, "gt_relevance": [0, 0, 1]}
    dense.write_text(json.dumps([whole | entry]))
    with pytest.raises(DataError, match=message):
        opened(dialogs(tmp_path, [dialog(7)]), dense=dense)


# ------------------------------------------------------------------------------- prompts and scores


def test_null_is_absent_and_the_true_option_is_found_by_its_text(tmp_path):
    absent = {"question": 0, "answer": None, "answer_options": None, "gt_index": None}
    file = dialogs(tmp_path, [dialog(7, [absent, round_(1, 3, (2, 3, 1), None)])])
    first, second = opened(file).dialogs[7].rounds
    assert first.answer is None and len(first.options) == 0 and first.gt_index is None
    assert second.gt_index == 1


def test_no_text_of_a_user_becomes_a_mark():
    for text in ("<answer>", "<<answer>>", "<<<question>>> <caption>", "<<<answer>question>"):
        assert not any(mark in prompt_tokens(without_marks(text)) for mark in MARKS)


def test_a_prompt_has_the_caption_and_the_rounds_so_far_with_marks():
    prompt = dialog_prompt("A dog.", [("is it red?", "yes")], "what <answer> is it?")
    assert prompt_tokens(prompt) == [
        "<caption>", "a", "dog", "<question>", "is", "it", "red", "<answer>", "yes",
        "<question>", "what", "answer", "is", "it",
    ]  # fmt: skip
    assert prompt_tokens(dialog_prompt("", [], "why?")) == ["<question>", "why"]


def test_examples_are_rounds_with_their_history_or_without(tmp_path):
    source = opened(dialogs(tmp_path, [dialog(7), dialog(8, [round_(), round_(1, None)])]))
    examples = VisualDialog().examples(source, "all")
    assert [e.id for e in examples] == ["7-1", "7-2", "8-1", "8-2"]
    assert examples[1].prompt == dialog_prompt("A big dog.", [("is it red?", "yes")], "what is it?")
    assert examples[1].targets == ("a dog",) and examples[3].targets == ()
    short = VisualDialog(DialogOptions(history=False)).examples(source, "all")
    assert short[1].prompt == dialog_prompt("", [], "what is it?")


def test_ranking_scores_are_those_computed_by_hand():
    assert retrieval_scores(1) == {"R@1": 1, "R@5": 1, "R@10": 1, "mean_rank": 1, "MRR": 1}
    assert retrieval_scores(6) == {"R@1": 0, "R@5": 0, "R@10": 1, "mean_rank": 6, "MRR": 1 / 6}
    # three relevant options; the best three ranks hold relevances 0.5, 0 and 1
    value = ndcg([4, 1, 3, 2], [0.2, 0.5, 1.0, 0.0])
    gained = 0.5 / math.log2(2) + 0 / math.log2(3) + 1.0 / math.log2(4)
    best = 1.0 / math.log2(2) + 0.5 / math.log2(3) + 0.2 / math.log2(4)
    assert value == pytest.approx(gained / best, abs=1e-12)
    assert ndcg([2, 1], [0.0, 0.4]) == 1 and math.isnan(ndcg([1, 2], [0, 0]))


def test_equal_scores_rank_by_their_order_and_are_counted():
    ranks, ties = rank_candidates({"a": [-1.0, -0.5, -1.0, -math.inf], "b": [0.0, 1.0]})
    assert ranks == {"a": [2, 1, 3, 4], "b": [2, 1]} and ties == 1


def ranks_file(folder: Path, ranks: dict[tuple[int, int], list[int]], name="ranks") -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(
        [{"image_id": i, "round_id": r, "ranks": values} for (i, r), values in ranks.items()]
    ))  # fmt: skip
    return file


def test_a_file_of_ranks_is_scored_over_its_rounds_and_dialogues(tmp_path):
    entries = [dialog(7), dialog(8), dialog(9, [round_(options=())])]
    file = dialogs(tmp_path, entries)
    dense = tmp_path / "dense.json"
    dense.write_text(json.dumps([{"image_id": 8, "round_id": 1, "gt_relevance": [0.5, 0, 1]}]))
    given = {(7, 1): [1, 2, 3], (7, 2): [1, 2, 3], (8, 1): [3, 1, 2], (8, 2): [2, 3, 1]}
    ranks = ranks_file(tmp_path, given)
    command = [evaluate.main, "--dialogs", file, "--ranks"]
    out = tmp_path / "scores.json"
    works(*command, ranks, "--dense", dense, "--out", out)
    record = json.loads(out.read_text())
    scores = record["scores"]
    assert scores["R@1"] == 1 / 4 and scores["mean_rank"] == (1 + 2 + 3 + 3) / 4
    assert scores["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 3) / 4)
    expected = (1 / math.log2(3)) / (1 + 0.5 / math.log2(3))
    assert scores["NDCG"] == pytest.approx(expected, abs=1e-12)
    assert record["examples"] == 4 and record["images"] == 2
    low, high = record["intervals"]["MRR"]
    assert low == pytest.approx(1 / 3) and high == pytest.approx(3 / 4)  # one dialogue alone
    best = ranks_file(tmp_path, {**given, (8, 1): [1, 2, 3]}, "best")
    works(*command, best, "--against", ranks, "--out", tmp_path / "best-scores.json")
    record = json.loads((tmp_path / "best-scores.json").read_text())
    assert record["against"]["differences"]["R@1"]["value"] == pytest.approx(1 / 4)
    works(*command, ranks, "--server", "mine", "--out", out)
    again = json.loads((tmp_path / "dialogs_mine_results.json").read_text())
    assert {(e["image_id"], e["round_id"]): e["ranks"] for e in again} == given


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({(8, 2): [1, 1, 2]}, "image 8, round 2: the ranks are not the numbers 1 to 3"),
        ({(8, 2): [1, 2]}, "image 8, round 2: the ranks are not the numbers 1 to 3"),
        ({(8, 2): [1.0, 2, 3]}, '"ranks" is not a list of whole numbers'),
        ({(5, 1): [1, 2, 3]}, "round 5-1 is not in"),
    ],
)
def test_mistakes_of_a_file_of_ranks_name_the_round(tmp_path, changed, message):
    given = {(image, number): [1, 2, 3] for image in (7, 8) for number in (1, 2)}
    command = [evaluate.main, "--dialogs", dialogs(tmp_path, [dialog(7), dialog(8)]), "--ranks"]
    assert message in refused(*command, ranks_file(tmp_path, given | changed))
    ids = tmp_path / "ids.txt"
    ids.write_text("7")
    assert "MRR" in works(*command, ranks_file(tmp_path, given), "--ids", ids)
    del given[8, 1]
    assert "round 8-1 has no ranks in" in refused(*command, ranks_file(tmp_path, given))


def test_dev_without_options_ranks_against_the_same_drawn_answers(tmp_path):
    answers_ = [f"answer {n}" for n in range(300)]
    entries = [dialog(i, [round_(0, i % 300, ())]) for i in range(1, 400)]
    source = opened(dialogs(tmp_path, entries, answers=answers_))
    drawn = []
    for _ in range(2):
        task = VisualDialog()
        train_, dev = task.examples(source, "train"), task.examples(source, "dev")
        assert "dev_MRR_drawn" in task.prepare(train_, dev) and task.metric == "dev_MRR_drawn"
        drawn.append({example.id: list(task.candidates(example)) for example in dev})
    assert drawn[0] == drawn[1]
    for example in dev:
        candidates = drawn[0][example.id]
        assert len(set(candidates)) == len(candidates) == 100 and example.targets[0] in candidates
    positions = {drawn[0][example.id].index(example.targets[0]) for example in dev}
    assert len(positions) > 10
    right = {e.id: rank_candidates({0: [c == e.targets[0] for c in task.candidates(e)]})[0][0]
             for e in dev}  # fmt: skip
    assert task.score(right, dev) == {"dev_MRR_drawn": 1}


# ------------------------------------------------------------------------------ the sample's scenes


def test_scenes_have_dialogues_with_a_hundred_candidates_each(talked):
    source = open_source("sample", talked / "sample")
    assert len(source.dialogs) > 0.8 * len(source.images)
    for each in source.dialogs.values():
        assert 3 <= len(each.rounds) <= 6
        for round_ in each.rounds:
            candidates = round_.candidates
            assert len(set(candidates)) == len(candidates) == CANDIDATES
            assert candidates[round_.gt_index] == round_.answer
            kind = next(k for k, group in ANSWERS.items() if round_.answer in group)
            assert sum(text in ANSWERS[kind] for text in candidates) >= 20
    scenes = load_scenes(talked / "sample")
    for image_id, each in source.dialogs.items():
        for round_ in each.rounds:  # no candidate is right for being in the scene alone
            if (
                round_.question.startswith(("what is ", "what else"))
                and "shape" not in round_.question
            ):
                phrases = {f"the {' '.join(it.words)}" for it in scenes[image_id].things}
                assert phrases <= set(round_.candidates)
    positions = [each.rounds[0].gt_index for each in source.dialogs.values()]
    assert np.std(positions) > 20


def test_answers_about_scenes_are_true_when_the_questions_are_read_in_order(talked):
    """The oracle follows what "it", "that" and "one" stand for."""
    source = open_source("sample", talked / "sample")
    scenes = load_scenes(talked / "sample")
    kinds = set()
    for image_id, each in source.dialogs.items():
        scene, thing, attribute = scenes[image_id], None, ""
        of_colour = {it.colour: it for it in scene.things}
        for question, answer in ((round_.question, round_.answer) for round_ in each.rounds):
            words = question.rstrip("?").split()
            kinds.add(words[1])
            if words[:3] == ["is", "there", "anything"]:
                thing = of_colour.get(words[3], thing)
                assert answer == ("yes" if words[3] in of_colour else "no")
                continue
            if words[1] == "else":
                (thing,) = (it for it in scene.things if it is not thing)
                assert answer == f"the {thing.size} {thing.colour} {thing.shape}"
                continue
            if words[1] == "the":
                thing = of_colour[words[2]]
            elif relation := next(
                (r for r in ("left", "right", "above", "below") if r in words), 0
            ):
                (thing,) = (it for it in scene.things if holds(it, relation, thing))
                assert answer == f"the {thing.size} {thing.colour} {thing.shape}"
                continue
            else:
                attribute = "shape" if "shape" in words else "size"
            assert answer == (f"a {thing.shape}" if attribute == "shape" else thing.size)
    assert kinds == {"there", "the", "it", "shape", "is", "else"}


@pytest.fixture(scope="module")
def talked(a_sample_of_any_size, tmp_path_factory) -> Path:
    """A small sample with its cache and a run of --task dialog."""
    folder = tmp_path_factory.mktemp("dialog")
    draw_sample(folder / "sample", 80)
    root = ["--dataset", "sample", "--root", folder / "sample"]
    works(extract.main, *root, "--out", folder / "cache")
    works(train.main, "--task", "dialog", *root, "--features", folder / "cache", "--preset", "tiny",
          "--epochs", 2, "--max-prompt", 30, "--out", folder / "run")  # fmt: skip
    return folder


def test_a_run_ranks_answers_and_talks_by_its_folder_alone(talked, tmp_path):
    out = tmp_path / "scores.json"
    told = works(evaluate.main, "--checkpoint", talked / "run", *over(talked), "--split", "test",
                 "--server", "mine", "--out", out)  # fmt: skip
    record = json.loads(out.read_text())
    assert {"R@1", "R@5", "R@10", "mean_rank", "MRR"} == record["scores"].keys()
    assert record["ranked"] == record["examples"] and "which are ranked" in told
    sums = tmp_path / "sum.json"
    works(evaluate.main, "--checkpoint", talked / "run", *over(talked), "--split", "test",
          "--rank", "sum", "--out", sums)  # fmt: skip
    assert "rank:sum" in json.loads(sums.read_text())["signature"]
    source = open_source("sample", talked / "sample")
    path = next(image.path for image in source.images if image.split == "test")
    chat = load_captioner(talked / "run").chat(path, "a picture with two things")
    answers_ = [chat.ask(question) for question in ("is there a star?", "what colour is it?")]
    saved = tmp_path / "saved" / "chat.json"
    talking = [ask.main, "--checkpoint", talked / "run", "--chat"]
    lines = f"is there a star?\n\nwhat colour is it?\n/save {saved}\n/quit\nno more\n"
    result = run(*talking, path, "--caption", "a picture with two things", input=lines)
    assert result.exit_code == 0 and result.stdout.splitlines() == answers_
    record = json.loads(saved.read_text())
    assert [each["answer"] for each in record["rounds"]] == answers_
    other = [image.path for image in source.images][5]
    lines = f"/photo {other}\n/photo {tmp_path}/none.jpg\n/reset\n/sing\nis it large?\n"
    result = run(*talking, "--resume", saved, input=lines)
    assert result.exit_code == 0 and result.stdout.startswith("> is there a star?\n" + answers_[0])
    assert "none.jpg" in result.output and "the commands are /save" in result.output
    question = "what is left of the very large star beside it?"
    result = run(*talking, path, input=f"{question}\n" * 4)
    assert "the oldest rounds no longer fit" in result.output


def test_conversations_refuse_what_they_cannot_do(talked, tmp_path):
    path = next((talked / "sample").rglob("*.jpg"))
    talking = [ask.main, "--checkpoint", talked / "run", "--chat"]
    assert "--chat takes one photograph" in refused(*talking, path, "is it red?")
    assert "--chat asks questions one by one" in refused(*talking, path, "--out", tmp_path / "x")
    assert "omit --top" in refused(*talking, path, "--top", 3)
    (tmp_path / "x.json").write_text('{"photo": "a.jpg", "caption": "", "rounds": [{}]}')
    assert "is not a conversation" in refused(*talking, "--resume", tmp_path / "x.json")
    assert "also pass --chat" in refused(ask.main, path, "why?", "--caption", "a dog")
    mine = shutil.copy(path, tmp_path / "mine.jpg")
    before = Path(mine).read_bytes()
    lines = f"/save {mine}\n/save {tmp_path}\n/save a\0b\nis it red?\n"
    result = run(*talking, mine, input=lines)
    assert result.exit_code == 0 and Path(mine).read_bytes() == before
    assert "exists and is not a conversation" in result.output and "is a folder" in result.output
    assert len(result.stdout.splitlines()) == 1  # the answer
    works(train.main, *over(talked), "--preset", "tiny", "--epochs", 1, "--out", tmp_path / "run")
    with pytest.raises(UserError, match="not on dialogues"):
        load_captioner(tmp_path / "run").chat(path)


def test_runs_without_history_read_each_question_alone(talked, tmp_path):
    path = next((talked / "sample").rglob("*.jpg"))
    works(train.main, "--task", "dialog", *over(talked), "--preset", "tiny", "--epochs", 1,
          "--no-history", "--out", tmp_path / "run")  # fmt: skip
    talking = [ask.main, "--checkpoint", tmp_path / "run", "--chat", path]
    result = run(*talking, input="is it red?\nis it large?\nis it red?\n")
    first, _, again = result.stdout.splitlines()
    assert first == again and "reads each question alone" in result.output
    assert "reads no caption" in refused(*talking, "--caption", "two things")


def test_options_of_beam_search_are_refused_where_all_rounds_are_ranked(talked):
    told = refused(evaluate.main, "--checkpoint", talked / "run", *over(talked), "--beam", 3)
    assert "--beam has no effect: all rounds" in told


def test_dialogues_without_features_train_without_regions(talked, tmp_path):
    """--text-only, with a cache that has some of the images and without one."""
    source = open_source("sample", talked / "sample")
    known = [image.id for image in source.images if image.split == "train"][:12]
    file = dialogs(tmp_path, [dialog(i) for i in (*known, *range(900_001, 900_013))])
    command = [train.main, "--task", "dialog", "--dataset", "visdial", "--dialogs", file,
               "--preset", "tiny", "--epochs", 1, "--min-count", 1]  # fmt: skip
    told = refused(*command, "--images", talked / "sample", "--features", talked / "cache",
                   "--out", tmp_path / "no")  # fmt: skip
    assert "12 images are not in" in told and "900001, 900002, 900003" in told
    assert "--text-only" in told
    works(*command, "--text-only", "--features", talked / "cache", "--images", talked / "sample",
          "--out", tmp_path / "some")  # fmt: skip
    works(*command, "--text-only", "--out", tmp_path / "none")
    for name, features in (("some", ["--features", talked / "cache"]), ("none", [])):
        out = tmp_path / name / "scores.json"
        works(evaluate.main, "--checkpoint", tmp_path / name, "--dataset", "visdial", "--dialogs",
              file, "--text-only", *features, "--images", talked / "sample", "--split", "all",
              "--out", out)  # fmt: skip
        assert json.loads(out.read_text())["examples"] == 48
    excluded = tmp_path / "ids.txt"
    excluded.write_text("\n".join(map(str, known)))
    told = works(*command, "--text-only", "--exclude-ids", excluded, "--out", tmp_path / "part")
    assert "12 of 24 images are used" in told


# ----------------------------------------------------------------------------------- real dialogues


def test_the_real_dialogues_that_are_scored_are_not_trained_on(real):
    """The dialogues with options are also in the file of all dialogues: --exclude-ids is needed."""
    folder = real / "tasks" / "visdial"
    scored = real_dialog.dialogs_of(folder / real_dialog.SCORED)
    everything = real_dialog.dialogs_of(*(folder / name for name in real_dialog.TRAIN))
    assert len(scored.dialogs) == 107 and len(everything.dialogs) == 1588 + 728
    trained = everything.dialogs.keys() - scored.dialogs.keys()
    assert len(trained) == 1481 + 728 and not trained & scored.dialogs.keys()
    assert sum(len(each.rounds) for each in scored.dialogs.values()) == 1070


def test_answers_ranked_by_their_frequency_have_the_scores_that_were_published(real, tmp_path):
    """R@1 .156, MRR .273, NDCG .248, by the README of the data."""
    folder = real / "tasks" / "visdial"
    scored = real_dialog.dialogs_of(folder / real_dialog.SCORED)
    ranks = tmp_path / "ranks.json"
    ranks.write_text(json.dumps(real_dialog.ranks_by_frequency(folder, scored)))
    out = tmp_path / "scores.json"
    works(evaluate.main, "--ranks", ranks, "--dialogs", folder / real_dialog.SCORED, "--dense",
          folder / real_dialog.DENSE, "--out", out)  # fmt: skip
    scores = json.loads(out.read_text())["scores"]
    assert scores["R@1"] == pytest.approx(0.156, abs=0.02)
    assert scores["MRR"] == pytest.approx(0.273, abs=0.02)
    assert scores["NDCG"] == pytest.approx(0.248, abs=0.03)
