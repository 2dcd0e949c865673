"""Visual question answering: the reader of questions, and training, evaluation and answers."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import DataError
from data.datasets.registry import open_source
from data.datasets.sample import draw_sample
from data.sources import image_id
from data.vocabulary import BOS, PAD
from models.decoders.registry import create_decoder
from models.decoders.transfer import copy_common_weights
from models.decoders.transformer import Transformer, TransformerConfig
from models.losses import class_loss
from models.regions import Regions
from pipeline import ask, caption, evaluate, extract, train
from pipeline.checkpoints.checkpoint import load_checkpoint
from pipeline.cli import UserError
from pipeline.decoding.captioner import load_captioner
from pipeline.tasks.vqa import VisualQuestionAnswering, VqaOptions
from pipeline.training.config import TrainConfig
from pipeline.training.setup import join_val
from tests.test_captioner import WORDS, some_regions
from tests.test_commands import LOOK, refused, run, works
from tests.test_images import halves
from tests.test_train import interrupt_at

ANSWERS = ["yes"] * 6 + ["no"] * 4


def question(id_: int, image: int, text: str = "Is it red?") -> dict:
    return {"question_id": id_, "image_id": image, "question": text}


def annotation(id_: int, image: int, answers=ANSWERS, **more) -> dict:
    return {
        "question_id": id_,
        "image_id": image,
        "question_type": "is it",
        "answer_type": "yes/no",
        "multiple_choice_answer": answers[0] if answers else "",
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
            for number, answer in enumerate(answers)
        ],
        **more,
    }


def files(
    folder: Path, questions: list[dict], annotations: list[dict] | None, name: str = "one"
) -> tuple[Path, Path]:
    q, a = folder / f"{name}_questions.json", folder / f"{name}_annotations.json"
    q.write_text(json.dumps({"questions": questions}))
    if annotations is not None:
        a.write_text(json.dumps({"annotations": annotations}))
    return q, a


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "val2014").mkdir(parents=True)
    halves().save(folder / "COCO_val2014_000000000007.jpg")
    halves().save(folder / "000000000008.jpg")
    halves().save(folder / "val2014" / "COCO_val2014_000000000009.png")
    halves().save(folder / "readme.jpg")
    return folder


def opened(photographs: Path, pairs, **more):
    return open_source(
        "vqa",
        None,
        [a for _, a in pairs],
        [photographs],
        questions=[q for q, _ in pairs],
        **more,
    )


def test_pairs_of_files_give_questions_with_the_photographs_of_their_coco_ids(
    tmp_path, photographs
):
    one = files(
        tmp_path,
        [question(70, 7), question(71, 7, "What colour?"), question(80, 8)],
        [annotation(71, 7, ["red"]), annotation(70, 7), annotation(80, 8)],
    )
    two = files(tmp_path, [question(90, 9), question(50, 5)],
                [annotation(90, 9), annotation(50, 5)], "two")  # fmt: skip
    source = opened(photographs, [one, two])
    assert [q.id for q in source.questions] == [70, 71, 80, 90, 50]
    assert source.questions[1].text == "What colour?" and source.questions[1].answers == ("red",)
    assert source.questions[0].answers == tuple(ANSWERS) and source.questions[0].keys is None
    assert [(image.id, image.name) for image in source.images] == [
        (7, "COCO_val2014_000000000007.jpg"),
        (8, "000000000008.jpg"),
        (9, "val2014/COCO_val2014_000000000009.png"),
        (5, "000000000005.jpg"),
    ]
    assert [image.id for image in source.missing] == [5]
    assert source.splits == ("all",)


def test_questions_without_annotations_have_no_answers(tmp_path, photographs):
    q, _ = files(tmp_path, [question(70, 7)], None)
    source = open_source("vqa", None, None, photographs, questions=[q])
    assert source.questions[0].answers == ()


def test_official_names_under_a_root_give_the_splits(tmp_path, photographs):
    for split, image in (("train", 7), ("val", 8)):
        q, a = files(tmp_path, [question(image, image)], [annotation(image, image)])
        q.rename(tmp_path / f"v2_OpenEnded_mscoco_{split}2014_questions.json")
        a.rename(tmp_path / f"v2_mscoco_{split}2014_annotations.json")
    source = open_source("vqa", tmp_path, None, photographs)
    assert [(image.id, image.split) for image in source.images] == [(7, "train"), (8, "val")]
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(DataError, match=r"but not v2_mscoco_val2014_annotations.json"):
        open_source("vqa", tmp_path, None, photographs)


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        ([question(1, 7)], [], "question 1 has no annotation in .*one_annotations"),
        ([], [annotation(1, 7)], "annotation of question 1 has no question"),
        ([question(1, 7)] * 2, [annotation(1, 7)], "one_questions.json: question 1 occurs twice"),
        (
            [question(1, 7)],
            [annotation(1, 7) | {"answers": "yes"}],
            "the answers are 'yes', not a list of",
        ),
        ([question(1, 7, "\ud83d?")], [annotation(1, 7)], "the question .*lone surrogate"),
        ([question(1, 7)], [annotation(1, 7, ["\udc80"])], "the answer .*lone surrogate"),
        (
            [question(1, 7)],
            [annotation(1, 7, multiple_choice_answer="\udc80")],
            "the multiple_choice_answer .*lone surrogate",
        ),
        ([question(1, 7)], [annotation(1, 7)] * 2, "annotation of question 1 occurs twice"),
        ([question(1, 7)], [annotation(1, 8)], "about image 7, its annotation .* about image 8"),
        ([question(1, 7, " ")], [annotation(1, 7)], "question 1: the question is ' '"),
        ([question(1, 7)], [annotation(1, 7, [])], "question 1 has no answers"),
        ([question(1, 7)], [annotation(1, 7, [3])], "question 1: an answer is"),
        ([question("x", 7)], [annotation(1, 7)], "question x: the question id 'x'"),
    ],
)
def test_mistakes_name_the_file_and_the_question(
    tmp_path, photographs, questions, annotations, message
):
    with pytest.raises(DataError, match=message):
        opened(photographs, [files(tmp_path, questions, annotations)])


def test_a_file_in_place_of_another_is_named_with_the_option_that_takes_it(tmp_path, photographs):
    q, a = files(tmp_path, [question(1, 7)], [annotation(1, 7)])
    with pytest.raises(DataError, match=r"is not a VQA annotations file, for --annotations"):
        opened(photographs, [(q, q)])
    with pytest.raises(DataError, match=r"is not a VQA questions file, for --questions"):
        opened(photographs, [(a, a)])
    a.write_bytes(a.read_text().encode("utf-16"))
    with pytest.raises(DataError, match=r"^[^;]* is UTF-16; save it as UTF-8$"):
        opened(photographs, [(q, a)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("question;answer;image\nwhat;a;b.jpg", "lacks the column question.*separate .* by commas"),
        ("question,answer,image\nwhat,a,", "line 2: the column image is empty"),
        ("question,answer,image\nwhat,a", "line 2: the column image is empty"),
        ("question,answer,image\n,a,b.jpg", "line 2: the question is ''"),
        ("question,answer,image\nwhat,,b.jpg", "line 2: the answer is ''"),
    ],
)
def test_mistakes_of_a_table_name_the_line(tmp_path, photographs, rows, message):
    (tmp_path / "t.csv").write_text(rows)
    with pytest.raises(DataError, match=message):
        open_source("vqa", None, tmp_path / "t.csv", photographs)


def test_a_table_that_is_passed_twice_is_refused(tmp_path, photographs):
    table = tmp_path / "t.csv"
    table.write_text("question,answer,image\nwhat,a,b.jpg")
    with pytest.raises(DataError, match="is passed twice"):
        open_source("vqa", None, [table, tmp_path / "." / "t.csv"], photographs)


def test_a_question_of_two_files_and_unpaired_files_are_refused(tmp_path, photographs):
    one = files(tmp_path, [question(1, 7)], [annotation(1, 7)])
    two = files(tmp_path, [question(1, 7)], [annotation(1, 7)], "two")
    with pytest.raises(DataError, match=r"two_questions.json: question 1 occurs twice"):
        opened(photographs, [one, two])
    with pytest.raises(DataError, match="2 --questions and 1 --annotations"):
        open_source("vqa", None, one[1], photographs, questions=[one[0], two[0]])
    with pytest.raises(DataError, match="needs its --questions"):
        open_source("vqa", None, one[1], photographs)
    with pytest.raises(DataError, match="needs --questions and --annotations"):
        open_source("vqa", None, None, photographs)


def test_a_table_has_questions_by_number_and_photographs_by_name(tmp_path, photographs):
    rows = [("Question", "Answer", "IMAGE"), ("what is it", "a cup, table", "000000000008.jpg")]
    rows += [rows[1], ("how many", "2", "gone.jpg")]
    table = tmp_path / "train.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    source = open_source("vqa", None, table, photographs)
    assert [(q.id, q.text, q.answers) for q in source.questions] == [
        (1, "what is it", ("a cup, table",)),
        (2, "what is it", ("a cup, table",)),
        (3, "how many", ("2",)),
    ]
    assert [image.id for image in source.images] == [
        image_id("000000000008.jpg"), image_id("gone.jpg")]  # fmt: skip
    assert [image.name for image in source.missing] == ["gone.jpg"]
    table.write_text("question,answer\na,b\n")
    with pytest.raises(DataError, match="lacks the column image"):
        open_source("vqa", None, table, photographs)


def test_other_datasets_take_one_file_of_annotations(tmp_path, photographs):
    table = tmp_path / "a.json"
    table.write_text("{}")
    with pytest.raises(DataError, match="coco takes one --annotations; 2 are given"):
        open_source("coco", None, [table, table], photographs)


# ------------------------------------------------------------------------------------- classes


def with_classes(classes: int = 5, **sizes) -> Transformer:
    config = TransformerConfig(
        WORDS, 6, max_length=7, max_prompt=4, classes=classes, width=16, heads=2,
        encoder_layers=1, decoder_layers=2, feedforward=32, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    return create_decoder("transformer", config).eval()


PROMPTS = ([4, 5, 6], [7], [], [8, 9, 4, 5])


def test_class_logits_with_a_cache_are_those_of_whole_texts():
    """Prompts of different lengths: packed, as in training; padded on the left, as in use."""
    decoder, regions = with_classes(), some_regions(4)
    tokens = torch.zeros(4, 1, 5, dtype=torch.int64)
    padded = torch.zeros(4, 4, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, 0, : len(prompt) + 1] = torch.tensor([*prompt, BOS])
        if prompt:
            padded[row, -len(prompt) :] = torch.tensor(prompt)
    lengths = torch.tensor([[len(prompt)] for prompt in PROMPTS])
    labels = torch.rand(4, 5)
    with torch.no_grad():
        memory = decoder.encode(regions)
        first = torch.cat([padded, torch.full((4, 1), BOS)], 1)[:, None]
        logits = decoder.class_logits(first, memory, decoder.init_cache(memory, 1, padded))
        loss, count = class_loss(decoder, regions, tokens, labels, PAD, prompt_lengths=lengths)
    wanted = -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).sum()
    assert count == 4 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_questions_of_one_image_share_its_encoding_and_answer_as_each_alone():
    decoder, regions = with_classes(), some_regions(2)
    tokens = torch.tensor([[[4, 5, BOS], [6, BOS, 0]], [[7, BOS, 0], [0, 0, 0]]])
    lengths, labels = torch.tensor([[2, 1], [1, 0]]), torch.rand(3, 5)
    with torch.no_grad():
        together, count = class_loss(decoder, regions, tokens, labels, PAD, prompt_lengths=lengths)
        alone = [
            class_loss(
                decoder,
                Regions(*(part[b : b + 1] for part in regions)),
                tokens[b, k][None, None],
                labels[row : row + 1],
                PAD,
                prompt_lengths=lengths[b, k][None, None],
            )[0]
            for row, (b, k) in enumerate([(0, 0), (0, 1), (1, 0)])
        ]
    assert count == 3 and together.item() == pytest.approx(sum(alone).item(), rel=1e-5)


def test_answers_seen_often_enough_are_the_classes_with_soft_labels(tmp_path, photographs):
    answers = ["red"] * 4 + ["Blue."] * 2 + ["green"] * 2 + ["a cat", "dog"]
    pair = files(
        tmp_path,
        [question(1, 7), question(2, 7), question(3, 8), question(4, 9)],
        [
            annotation(1, 7, answers),
            annotation(2, 7, ["red"]),
            annotation(3, 8, ["blue"]),
            annotation(4, 9, ["blue"]),
        ],
    )
    source = opened(photographs, [pair])
    task = VisualQuestionAnswering(VqaOptions())
    examples = task.examples(source, "all")
    assert "2 answers; 100.0% of the train questions" in task.prepare(examples, [])
    assert task.answers == ("blue", "red")  # "Blue." is another spelling of blue
    assert sorted(task.labels(examples[0])) == [(0, 0.6), (1, 1.0)]
    assert task.labels(examples[1]) == [(1, 1.0)]
    scores = task.score({1: "Red", 2: "red", 3: "red", 4: "blue"}, examples)
    assert scores["accuracy"] == pytest.approx((1 + 1 + 0 + 1) / 4)
    assert scores["by_question_type"] == {"is it": pytest.approx(0.75)}
    with pytest.raises(UserError, match="lower --min-answer-count"):
        strict = VisualQuestionAnswering(VqaOptions(min_answer_count=9))
        strict.prepare(strict.examples(source, "all"), [])


# ------------------------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def asked(a_sample_of_any_size, tmp_path_factory) -> Path:
    """A drawn sample, its cache, and a run of each output on its questions."""
    folder = tmp_path_factory.mktemp("vqa")
    draw_sample(folder / "sample", count=120, seed=3)
    works(extract.main, *over(folder)[:4], *LOOK, "--out", folder / "cache")
    for output in ("classes", "words"):
        works(train.main, "--task", "vqa", "--output", output, *over(folder),
              "--out", folder / output, "--preset", "tiny", "--epochs", 2)  # fmt: skip
    return folder


def over(folder: Path) -> list:
    return ["--dataset", "sample", "--root", folder / "sample", "--features", folder / "cache"]


@pytest.mark.parametrize("output", ["classes", "words"])
def test_a_run_is_evaluated_and_answers_about_a_photograph_by_its_folder_alone(
    asked, tmp_path, output
):
    out = tmp_path / "scores.json"
    works(evaluate.main, "--checkpoint", asked / output, *over(asked), "--split", "test",
          "--out", out)  # fmt: skip
    record = json.loads(out.read_text())
    assert record["task"] == "vqa" and 0 <= record["scores"]["accuracy"] <= 1
    assert len(record["scores"]["by_answer_type"]) >= 4
    lines = [
        json.loads(line) for line in (tmp_path / "scores-outputs.jsonl").read_text().splitlines()
    ]
    shutil.copytree(asked / output, tmp_path / "moved")
    captioner = load_captioner(tmp_path / "moved")
    source = open_source("karpathy", asked / "sample")
    for line in lines[:10]:
        path = source.by_id[line["image_id"]].path
        assert captioner.answer(path, line["prompt"]) == line["output"]
    told = works(
        ask.main, "--checkpoint", tmp_path / "moved", path, lines[9]["prompt"], "is there a zebra?"
    )
    assert lines[9]["output"] in told and "does not know: zebra" in told and "%" in told


def test_many_questions_are_answered_as_json_lines(asked, tmp_path):
    source = open_source("karpathy", asked / "sample")
    image = source.images[0]
    entries = [{"file_name": str(image.path), "question": f"is there a {c} circle?"}
               for c in ("red", "blue")]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    works(ask.main, "--checkpoint", asked / "classes", "--questions", tmp_path / "q.jsonl",
          "--out", tmp_path / "a.jsonl")  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == [entry["question"] for entry in entries]
    assert all(len(line["answers"]) == 5 for line in lines)
    assert sum(answer["probability"] for answer in lines[0]["answers"]) <= 1 + 1e-5
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, other in enumerate(source.images[:3]):
        shutil.copy(other.path, folder / f"{number}.jpg")
    (folder / "2.jpg").write_bytes(b"no photograph")
    told = works(ask.main, "--checkpoint", asked / "classes", folder, "how many red?", "why?",
                 "--out", tmp_path / "b.jsonl")  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [Path(line["file_name"]).name for line in lines] == ["0.jpg", "0.jpg", "1.jpg", "1.jpg"]
    assert "left out: " in told and "2.jpg" in told
    (tmp_path / "empty").mkdir()
    assert "has no photographs" in refused(ask.main, "--checkpoint", asked / "classes",
                                           tmp_path / "empty", "why?")  # fmt: skip
    asking = [ask.main, "--checkpoint", asked / "classes"]
    told = works(*asking, image.path, f"{'very ' * 20}red?")
    assert "1 questions have more than" in told and "lose their first words" in told
    assert "a question is empty" in refused(*asking, image.path, " ")
    for line, message in (
        ("", "has no questions"),
        ('{"file_name": "a.jpg", "question": ""}', "line 1: the question is empty"),
        ('{"file_name": "a.jpg", "question": "why?"}', "none of 1 photographs can be read"),
        ("why?", "line 1: not JSON"),
    ):
        (tmp_path / "odd.jsonl").write_text(line)
        told = refused(
            *asking, "--questions", tmp_path / "odd.jsonl", "--out", tmp_path / "c.jsonl"
        )
        assert message in told and not (tmp_path / "c.jsonl").exists()
    assert "pass a photograph and questions" in refused(ask.main)
    assert "no question about x.jpg" in refused(ask.main, "x.jpg")


def test_questions_that_cannot_be_read_are_refused_before_any_answer(asked, tmp_path):
    asking = [ask.main, "--checkpoint", asked / "classes"]
    photograph = next((asked / "sample").rglob("*.jpg"))
    told = refused(*asking, photograph, "What", "colour", "is", "the", "dog?")
    assert 'write a question in quotes: "What colour is the dog?"' in told
    assert "lone surrogate" in refused(*asking, photograph, "is it \udc80 red?")
    assert "lone surrogate" in refused(*asking, f"{photograph}\udc80", "is it red?")
    for key in ("file_name", "question"):
        entry = {"file_name": str(photograph), "question": "is it red?", key: "\ud83d"}
        (tmp_path / "q.jsonl").write_text(json.dumps(entry))
        told = refused(*asking, "--questions", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl")
        assert f"line 1: the {key} " in told and "lone surrogate" in told
    assert not (tmp_path / "a.jsonl").exists()
    told = works(*asking, photograph, "zebra", "why?", "is there a red circle?")
    assert "'zebra' has no word that the model knows" in told and "(2 such)" in told


def test_answers_never_replace_a_file_that_was_read(asked, tmp_path):
    photograph = tmp_path / "a.jpg"
    shutil.copy(next((asked / "sample").rglob("*.jpg")), photograph)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"file_name": "a.jpg", "question": "is it red?"}')
    asking = [ask.main, "--checkpoint", asked / "classes"]
    for given, out in (
        ([photograph, "is it red?"], photograph),
        ([tmp_path, "is it red?"], tmp_path / "." / "a.jpg"),
        (["--questions", questions], questions),
        (["--questions", questions], photograph),
    ):
        before = out.read_bytes()
        assert f"--out {out} would overwrite an input file" in refused(
            *asking, *given, "--out", out)  # fmt: skip
        assert out.read_bytes() == before
    works(*asking, photograph, "is it red?", "--out", tmp_path / "new" / "folder" / "a.jsonl")
    assert (tmp_path / "new" / "folder" / "a.jsonl").exists()
    (tmp_path / "file").write_text("")
    told = refused(*asking, photograph, "is it red?", "--out", tmp_path / "file" / "a.jsonl")
    assert str(tmp_path / "file") in told and ".tmp" not in told


def test_a_run_is_used_only_for_what_it_was_trained_on(asked, tmp_path):
    photograph = next((asked / "sample").rglob("*.jpg"))
    told = refused(caption.main, photograph, "--checkpoint", asked / "classes",
                   "--out", tmp_path / "c.json")  # fmt: skip
    assert "was trained on questions, not on captions" in told and "pipeline.ask" in told
    with pytest.raises(UserError, match="was trained on questions"):
        load_captioner(asked / "words").caption(photograph)
    works(train.main, *over(asked), "--preset", "tiny", "--epochs", 1, "--out", tmp_path / "run")
    told = refused(ask.main, "--checkpoint", tmp_path / "run", photograph, f"{'very ' * 20}red?")
    assert "was not trained on questions" in told and "lose their first" not in told


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "dialog", "sentiment"])
def test_a_stopped_run_of_any_task_resumes_to_the_same_weights(asked, tmp_path, monkeypatch, task):
    options = ["--task", task, *over(asked), "--preset", "tiny", "--epochs", 2]
    whole = asked / "classes" if task == "vqa" else tmp_path / "whole"
    if task != "vqa":
        works(train.main, *options, "--out", whole)
    interrupt_at(3, monkeypatch)
    assert run(train.main, *options, "--out", tmp_path / "run").exit_code == 130
    monkeypatch.undo()
    works(train.main, *options, "--out", tmp_path / "run", "--resume")
    one, two = (load_file(f / "model.safetensors") for f in (whole, tmp_path / "run"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    if task != "vqa":
        members = ["--checkpoint", whole, "--checkpoint", tmp_path / "run"]
        out = tmp_path / "scores.json"
        works(evaluate.main, *members, *over(asked), "--split", "test", "--out", out)
        both = json.loads(out.read_text())["scores"]
        works(evaluate.main, *members[:2], *over(asked), "--split", "test", "--out", out)
        alone = json.loads(out.read_text())["scores"]
        assert both.get("MRR", both.get("accuracy")) == alone.get("MRR", alone.get("accuracy"))


# ------------------------------------------------------------------------------ other ways to train


@pytest.mark.slow
def test_vqa_starts_from_a_captioning_run_with_its_encoder_and_the_words_in_common(asked, tmp_path):
    works(train.main, *over(asked), "--out", tmp_path / "captions", "--preset", "tiny",
          "--epochs", 1)  # fmt: skip
    begun = ["--task", "vqa", *over(asked), "--init", tmp_path / "captions", "--lr", 1e-3]
    told = works(train.main, *begun, "--epochs", 2, "--out", tmp_path / "run")
    assert "words are also words of" in told
    assert f"initialised from {tmp_path / 'captions'}" in told
    init, answers = load_checkpoint(tmp_path / "captions"), load_checkpoint(tmp_path / "run")
    assert answers.captioner.config.width == init.captioner.config.width
    assert {*answers.vocabulary.words} - {*init.vocabulary.words}  # words of questions alone
    assert "--width is 64" in refused(train.main, *begun, "--width", 64, "--out", tmp_path / "w")
    again = works(train.main, *begun, "--epochs", 3, "--out", tmp_path / "run", "--resume")
    assert "epoch 3/3" in again
    assert "captioning can start from a run of captioning only" in refused(
        train.main, *over(asked), "--init", tmp_path / "run", "--out", tmp_path / "x"
    )


def test_copied_weights_are_the_rows_of_common_words_and_answers():
    sizes = {"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "feedforward": 32}
    one, two = (
        create_decoder("transformer", TransformerConfig(16, 6, max_length=m, max_prompt=p,
                                                        classes=c, **sizes))
        for m, p, c in ((7, 0, 2), (7, 5, 3))
    )  # fmt: skip
    # as many words as the width, so that sizes alone do not tell the vocabulary
    words, other_words = list("abcdefghijklmnop"), list("ponmlkjihgfedcxy")
    before = {name: tensor.clone() for name, tensor in two.state_dict().items()}
    count = copy_common_weights(two, words, ["yes", "no", "2"], one, other_words, ["no", "red"])
    own, theirs = two.state_dict(), one.state_dict()
    assert count == 14
    for name in ("word.weight", "output_bias"):
        assert torch.equal(own[name][words.index("d")], theirs[name][other_words.index("d")])
        assert torch.equal(own[name][words.index("a")], before[name][words.index("a")])
    assert torch.equal(own["head.weight"][1], theirs["head.weight"][0])
    assert torch.equal(own["head.weight"][0], before["head.weight"][0])
    assert torch.equal(own["position.weight"][:8], theirs["position.weight"])
    assert torch.equal(own["position.weight"][8:], before["position.weight"][8:])
    others = own.keys() - {"word.weight", "output_bias", "position.weight"}
    assert all(torch.equal(own[n], theirs[n]) for n in others if not n.startswith("head."))


def test_long_questions_lose_their_first_words_and_are_counted(asked, tmp_path):
    told = works(train.main, "--task", "vqa", *over(asked), "--preset", "tiny", "--epochs", 1,
                 "--max-prompt", 5, "--out", tmp_path / "run")  # fmt: skip
    assert "prompts" in told and "have more than 5 words and lose their first words" in told
    assert load_checkpoint(tmp_path / "run").captioner.config.max_prompt == 5
    scored = works(evaluate.main, "--checkpoint", tmp_path / "run", *over(asked))
    assert "questions have more than 5 words and lost their first words" in scored


def official(folder: Path, images: dict[str, list[int]]) -> Path:
    """A root with the official names: one question about each image of each split."""
    for split, ids in images.items():
        year = 2015 if split == "test" else 2014
        q, a = files(folder, [question(i, i) for i in ids], [annotation(i, i) for i in ids])
        q.rename(folder / f"v2_OpenEnded_mscoco_{split}{year}_questions.json")
        if split != "test":
            a.rename(folder / f"v2_mscoco_{split}{year}_annotations.json")
    return folder


def test_train_and_val_are_joined_and_dev_is_kept_apart(tmp_path):
    many = {"train": list(range(1, 61)), "val": list(range(100, 120))}
    for name, images in (("two", many), ("three", {**many, "test": [200]})):
        (tmp_path / name).mkdir()
        source = open_source("vqa", official(tmp_path / name, images))
        task = VisualQuestionAnswering(VqaOptions())
        config = TrainConfig(dataset="vqa", train_on="train+val", task="vqa")
        train_, dev = (task.examples(source, split) for split in ("train", "dev"))
        if name == "three":
            with pytest.raises(UserError, match="val is also dev"):
                join_val(config, task, source, train_, dev)
            config = dataclasses.replace(config, train_on_dev=True)
            joined = [*join_val(config, task, source, train_, dev), *dev]
            assert sorted(e.id for e in joined) == sorted(many["train"] + many["val"])
        else:
            joined = join_val(config, task, source, train_, dev)
            assert {e.id for e in dev} <= {*many["train"]} - {e.id for e in joined}
            assert {*many["val"]} <= {e.id for e in joined}
            assert len(joined) + len(dev) == 80


def test_a_folder_has_questions_in_its_metadata(tmp_path):
    halves().save(tmp_path / "a.jpg")
    halves().save(tmp_path / "b.jpg")
    entries = [
        {"file_name": "a.jpg", "question": "what is it?", "answer": "a cup"},
        {"file_name": "b.jpg", "question": "is it red?", "answers": ["yes", "no", "yes"]},
        {"file_name": "a.jpg", "question": "how many?"},
    ]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, entries)))
    source = open_source("folder", tmp_path)
    assert not source.notes
    assert [(q.id, q.text, q.answers, q.best) for q in source.questions] == [
        (1, "what is it?", ("a cup",), "a cup"),
        (2, "is it red?", ("yes", "no", "yes"), "yes"),
        (3, "how many?", (), ""),
    ]
    assert [q.image_id for q in source.questions] == [image_id(f"{c}.jpg") for c in "aba"]
    metadata.unlink()
    table = tmp_path / "metadata.csv"
    table.write_text('file_name,question,answers\na.jpg,what?,"[""cup"", ""mug""]"\nb.jpg,why?,\n')
    with pytest.raises(DataError, match="line 3: the question 'why\\?' has no answer"):
        open_source("folder", tmp_path)


def test_mistakes_of_training_name_the_question_and_the_image(asked, tmp_path, photographs):
    q, a = files(
        tmp_path, [question(1, 900), question(2, 901)], [annotation(1, 900), annotation(2, 901)]
    )
    common = ["--task", "vqa", "--dataset", "vqa", "--images", photographs, "--features",
              asked / "cache", "--out", tmp_path / "run"]  # fmt: skip
    told = refused(train.main, *common, "--questions", q, "--annotations", a,
                   "--min-answer-count", 1)  # fmt: skip
    assert "image 90" in told and "is not in" in told and "re-run pipeline.extract" in told
    told = refused(train.main, *common, "--questions", q)
    assert "the train questions have no answers; pass the file" in told
    told = refused(train.main, *common, "--questions", q, "--output", "words", "--features", "none")
    assert "example 2 about image 901" in told and "has no caption or other target" in told


def test_a_class_has_the_most_frequent_spelling_of_its_answer(tmp_path, photographs):
    table = tmp_path / "train.csv"
    answers_ = ["table, chair"] * 3 + ["table,chair"] + ["garbage_bin"] * 2
    rows = [("what", answer, "000000000008.jpg") for answer in answers_]
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([("question", "answer", "image"), *rows])
    task = VisualQuestionAnswering(VqaOptions())
    examples = task.examples(open_source("vqa", None, table, photographs), "all")
    task.prepare(examples, [])
    assert task.answers == ("table, chair", "garbage_bin")
    assert [task.labels(example) for example in examples[2:5]] == [
        [(0, 1.0)],
        [(0, 1.0)],  # without a space after the comma it is the same answer
        [(1, 1.0)],
    ]


def test_a_ready_list_of_answers_gives_the_classes(asked, tmp_path):
    answers_ = tmp_path / "answers.json"
    answers_.write_text(json.dumps([{"red": 0, "Blue": 1, "yes": 2, "no": 3, "blue.": 4}, {}]))
    options = ["--task", "vqa", *over(asked), "--preset", "tiny", "--epochs", 1]
    works(train.main, *options, "--answers-vocabulary", answers_, "--out", tmp_path / "run")
    assert load_checkpoint(tmp_path / "run").answers == ("red", "Blue", "yes", "no")
    works(evaluate.main, "--checkpoint", tmp_path / "run", *over(asked), "--split", "test")
    for text, message in (
        ("[]", "has no answers"),
        ('["", "a", "..."]', "has no answers"),
        ("", "is not complete JSON"),
        ('["yes", "no"', "is not complete JSON"),
        ('["zebra", "ostrich"]', "has no answer of the train questions, such as 'zebra'"),
        ('["yes", "\\ud83d"]', "lone surrogate"),
        ('{"a": "b", "c": 3}', "is neither a list of texts nor one text per line"),
    ):
        answers_.write_text(text)
        told = refused(train.main, *options, "--answers-vocabulary", answers_,
                       "--out", tmp_path / "no")  # fmt: skip
        assert message in told and not (tmp_path / "no").exists()
    plain = tmp_path / "answers.txt"
    plain.write_text('[{"yes": 0')
    told = refused(train.main, *options, "--answers-vocabulary", plain, "--out", tmp_path / "no")
    assert "is not complete JSON" in told
    plain.write_text("yes\nno\n\nthe\nred\n")
    for more in (["--answers-vocabulary", plain], ["--min-answer-count", 3]):
        told = refused(train.main, *options, *more, "--output", "words", "--out", tmp_path / "no")
        assert f"{more[0]} chooses classes; --output words has none" in told
    works(train.main, *options, "--answers-vocabulary", plain, "--out", tmp_path / "plain")
    assert load_checkpoint(tmp_path / "plain").answers == ("yes", "no", "red")


def test_questions_about_sides_are_left_out_where_the_image_is_mirrored():
    task = VisualQuestionAnswering(VqaOptions())
    assert not task.holds_mirrored(["what", "is", "left", "of", "the", "dog"])
    assert not task.holds_mirrored(["is", "it", "on", "the", "right", "side"])
    assert task.holds_mirrored(["what", "colour", "is", "the", "dog"])


@pytest.mark.parametrize("output", ["classes", "words"])
def test_an_ensemble_of_equal_members_answers_as_one_does(asked, tmp_path, output):
    run_ = asked / output
    outputs = []
    for number, checkpoints in enumerate(([run_], [run_, run_])):
        members = [part for path in checkpoints for part in ("--checkpoint", path)]
        out = tmp_path / f"{number}.json"
        works(evaluate.main, *members, *over(asked), "--split", "test", "--answers-out", out,
              "--out", tmp_path / f"{number}-scores.json")  # fmt: skip
        outputs.append(json.loads(out.read_text()))
    assert outputs[0] == outputs[1]
    shutil.copytree(asked / "classes", tmp_path / "other")
    answers_ = json.loads((tmp_path / "other" / "answers.json").read_text())
    (tmp_path / "other" / "answers.json").write_text(json.dumps(["another answer", *answers_[1:]]))
    assert "have different answers; an ensemble needs" in refused(
        evaluate.main, "--checkpoint", asked / "classes", "--checkpoint", tmp_path / "other",
        *over(asked))  # fmt: skip
