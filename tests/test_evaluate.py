"""`pipeline.evaluate --captions`: anybody's captions, scored as published, and every mistake in
them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.datasets.coco import read
from pipeline import evaluate
from pipeline.evaluate import file as captions_files
from pipeline.scoring.java import NotComputed
from pipeline.scoring.report import NAMES
from tests.test_commands import refused, run, works

COCO = {
    "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(1, 6)],
    "annotations": [
        {"id": 10 * n + k, "image_id": n, "caption": text}
        for n in range(1, 5)
        for k, text in enumerate([f"a dog of {n} runs in the park.", f"Dog {n} running", "a dog"])
    ],
}
CAPTIONS = {1: "a dog of 1 runs in the park", 2: "a cat", 3: "dog 3 running in a park", 4: "A dog."}


@pytest.fixture
def at(tmp_path) -> Path:
    """A folder with refs.json (image 5 has no captions) and res.json."""
    (tmp_path / "refs.json").write_text(json.dumps(COCO))
    put(tmp_path / "res.json", CAPTIONS)
    return tmp_path


def put(path: Path, captions: dict[int, object]) -> Path:
    path.write_text(json.dumps([{"image_id": i, "caption": c} for i, c in captions.items()]))
    return path


def files(at: Path, results: str = "res.json") -> list[object]:
    return ["--captions", at / results, "--references", at / "refs.json"]


def record(at: Path) -> dict:
    return json.loads((at / "out.json").read_text())


# --------------------------------------------------------------------------------- what is reported


def test_a_file_is_scored_with_intervals_statistics_and_a_signature(at):
    output = works(evaluate.main, *files(at), "--out", at / "out.json")
    found = record(at)
    assert list(found["scores"]) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    for name, (low, high) in found["intervals"].items():
        assert low <= found["scores"][name] <= high
    assert found["images"] == 4
    assert found["statistics"]["words"] == {"mean": 4.5, "min": 2, "median": 4.0, "max": 8}
    assert found["statistics"]["distinct"] == 1 and found["statistics"]["novel"] is None
    assert found["not_computed"].keys() == {"METEOR", "SPICE"}
    signature = dict(part.split(":") for part in found["signature"].split("|"))
    assert signature.pop("version") and signature == {
        "n": "4",
        "refs": "refs.json",
        "nrefs": "3",
        "case": "lower",
        "tok": "ptb",
        "df": "references",
        "eos": "no",
        "bootstrap": "1000.seed0",
    }
    assert "95 % from" in output and found["signature"] in output


@pytest.mark.parametrize(("words", "unfinished"), [
    ("a dog on a", 1), ("a dog in front of", 1), ("A dog and.", 1), ("a dog with "
                                                                     "the", 1), ("a dog looks "
                                                                                 "up", 0),
    ("two men stand outside", 0), ("a dog", 0), ("", 0),
])  # fmt: skip
def test_captions_that_end_in_an_article_preposition_or_conjunction_are_counted(
    at, words, unfinished
):
    lines = json.loads((at / "res.json").read_text())
    lines[0]["caption"] = words
    (at / "res.json").write_text(json.dumps(lines))
    output = works(evaluate.main, *files(at), "--out", at / "out.json")
    assert record(at)["statistics"]["unfinished"] == unfinished / 4
    assert f"{unfinished / 4:.2%} end in an article, preposition or conjunction" in output


def test_each_image_s_scores_stand_beside_and_their_mean_is_the_score(at):
    works(evaluate.main, *files(at), "--out", at / "out.json")
    lines = [json.loads(line) for line in (at / "out-images.jsonl").read_text().splitlines()]
    assert {line["image_id"]: line["caption"] for line in lines} == CAPTIONS
    for name in ("CIDEr", "ROUGE_L"):
        mean = sum(line["scores"][name] for line in lines) / 4
        assert mean == pytest.approx(record(at)["scores"][name])


def test_the_best_and_the_worst_captions_are_shown_with_their_references(at):
    output = works(evaluate.main, *files(at), "--examples", 1)
    worst, best = (
        output.index("worst  image 2  CIDEr 0.000  a cat"),
        output.index("best  image 1  CIDEr"),
    )
    assert worst < best and "a dog of 1 runs in the park" in output[best:]


def test_novel_captions_are_those_that_no_training_caption_is(at):
    train = {
        "images": [{"id": 1, "file_name": "t"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "A cat!"}],
    }
    (at / "train.json").write_text(json.dumps(train))
    works(
        evaluate.main, *files(at), "--train-captions", at / "train.json", "--out", at / "out.json"
    )
    assert record(at)["statistics"]["novel"] == 0.75


def test_document_frequencies_of_another_file_change_cider_and_the_signature(at):
    works(evaluate.main, *files(at), "--out", at / "out.json")
    own = record(at)
    shutil.copy(at / "refs.json", at / "same.json")
    works(evaluate.main, *files(at), "--df", at / "same.json", "--out", at / "out.json")
    assert record(at)["scores"] == own["scores"] and "df:same.json" in record(at)["signature"]
    other = {
        **COCO,
        "annotations": [{**each, "caption": "a cat"} for each in COCO["annotations"][:4]],
    }
    (at / "other.json").write_text(json.dumps(other))
    works(evaluate.main, *files(at), "--df", at / "other.json", "--out", at / "out.json")
    assert record(at)["scores"]["CIDEr"] != own["scores"]["CIDEr"]
    assert record(at)["scores"]["Bleu_4"] == own["scores"]["Bleu_4"]


def test_two_captioners_are_compared_over_the_same_images(at):
    put(at / "same.json", CAPTIONS)
    put(at / "worse.json", dict.fromkeys(CAPTIONS, "nothing known"))
    output = works(
        evaluate.main, *files(at), "--against", at / "worse.json", "--out", at / "out.json"
    )
    found = record(at)["against"]
    assert found["name"] == "worse.json" and found["scores"]["CIDEr"] == 0
    assert found["differences"]["CIDEr"]["value"] == record(at)["scores"]["CIDEr"]
    assert "against worse.json" in output and "p, paired" in output
    works(evaluate.main, *files(at), "--against", at / "same.json", "--out", at / "out.json")
    assert all(
        found["p"] == 1 and found["interval"] == [0, 0]
        for found in record(at)["against"]["differences"].values()
    )


def test_examples_do_not_stand_in_the_json(at):
    result = run(evaluate.main, *files(at), "--format", "json", "--examples", 1)
    assert json.loads(result.stdout)["images"] == 4 and "worst  image 2" in result.stderr


def test_output_is_a_table_json_or_rows_of_latex(at):
    put(at / "my_other.json", dict.fromkeys(CAPTIONS, "a dog"))
    several = [*files(at), "--captions", at / "my_other.json"]
    found = json.loads(works(evaluate.main, *several, "--format", "json"))
    assert [each["name"] for each in found] == ["res.json", "my_other.json"]
    latex = works(evaluate.main, *several, "--format", "latex").splitlines()
    asked = [name for name in NAMES if name not in ("METEOR", "SPICE")]
    assert latex[0] == "% " + " & ".join(["captions", *asked]) + r" \\"
    assert latex[2].startswith(r"my\_other.json & ") and latex[2].count("&") == len(asked)
    assert f" {100 * found[1]['scores']['Bleu_1']:.1f} &" in latex[2]


def test_several_files_each_get_their_scores_in_a_folder(at):
    put(at / "b.json", dict.fromkeys(CAPTIONS, "a dog"))
    works(evaluate.main, *files(at), "--captions", at / "b.json", "--out", at / "scores")
    assert sorted(path.name for path in (at / "scores").iterdir()) == [
        "b-images.jsonl", "b.json", "res-images.jsonl", "res.json"]  # fmt: skip
    message = refused(
        evaluate.main, *files(at), "--captions", at / "b.json", "--out", at / "scores.json"
    )
    assert "must be a folder" in message


def in_cache(folder: Path) -> list[Path]:
    return list(folder.glob("*"))


def test_nothing_is_written_beside_the_files_and_counted_references_go_into_the_cache_folder(
    at, monkeypatch
):
    before = sorted(at.iterdir())
    works(evaluate.main, *files(at), "--cache-dir", at.parent / "named")
    monkeypatch.setenv("XDG_CACHE_HOME", str(at.parent / "xdg"))
    works(evaluate.main, *files(at))
    assert sorted(at.iterdir()) == before
    (named,), (user,) = in_cache(at.parent / "named"), in_cache(at.parent / "xdg" / "onceover")
    assert named.name == user.name and named.name.startswith("references-")


def test_counted_references_are_read_again_and_a_broken_file_is_made_again(at, monkeypatch):
    cache = ["--cache-dir", at / "cache", "--out", at / "out.json"]
    works(evaluate.main, *files(at), *cache)
    first = record(at)["scores"]
    (kept,) = in_cache(at / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(
            captions_files, "references_by_image", lambda *_: pytest.fail("counted again")
        )
        works(evaluate.main, *files(at), *cache)
    assert record(at)["scores"] == first
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    works(evaluate.main, *files(at), *cache)
    assert record(at)["scores"] == first and kept.read_bytes() == whole


def test_a_cache_folder_that_cannot_be_used_is_gone_without(at, monkeypatch):
    works(evaluate.main, *files(at), "--cache-dir", at / "res.json", "--out", at / "out.json")
    first = record(at)["scores"]
    monkeypatch.setattr(captions_files, "user_cache", lambda: None)
    works(evaluate.main, *files(at), "--out", at / "out.json")
    assert record(at)["scores"] == first


# ----------------------------------------------------------------------------- CIDEr over one image


@pytest.fixture
def one(at) -> Path:
    put(at / "res.json", {1: CAPTIONS[1]})
    return at


def test_cider_over_one_image_is_null_with_the_reason_and_the_rest_is_scored(one):
    for options in (["--ids", one / "ids.txt"], ["--limit", 1], []):
        (one / "ids.txt").write_text("1")
        output = works(evaluate.main, *files(one), *options, "--out", one / "out.json")
        found = record(one)
        assert found["scores"].pop("CIDEr") is None
        assert found["scores"] == pytest.approx(dict.fromkeys(found["scores"], 1))
        assert "CIDEr" not in found["intervals"] and "--df FILE" in found["not_computed"]["CIDEr"]
        assert "CIDEr not computed: " in output and "--df FILE" in output
    line = json.loads((one / "out-images.jsonl").read_text())
    assert line["scores"]["CIDEr"] is None and line["scores"]["ROUGE_L"] == pytest.approx(1)


def test_cider_over_one_image_is_computed_with_the_document_frequencies_of_several(one):
    works(evaluate.main, *files(one), "--df", one / "refs.json", "--out", one / "out.json")
    found = record(one)
    assert (
        found["scores"]["CIDEr"] > 1
        and "CIDEr" in found["intervals"]
        and "CIDEr" not in found["not_computed"]
    )


def test_a_df_of_one_image_gives_no_cider_either(at):
    put_one = {**COCO, "annotations": COCO["annotations"][:3]}
    (at / "one.json").write_text(json.dumps(put_one))
    works(evaluate.main, *files(at), "--df", at / "one.json", "--out", at / "out.json")
    assert record(at)["scores"]["CIDEr"] is None and record(at)["images"] == 4


def test_all_that_is_printed_and_compared_stands_a_missing_cider(one):
    put(one / "other.json", {1: "a dog"})
    options = ["--against", one / "other.json", "--examples", 1, "--out", one / "out.json"]
    output = works(evaluate.main, *files(one), *options)
    found = record(one)["against"]
    assert (
        found["scores"]["CIDEr"] is None
        and "CIDEr" not in found["differences"]
        and "ROUGE_L" in found["differences"]
    )
    assert "worst  image 1  ROUGE_L 1.000" in output
    printed = run(evaluate.main, *files(one), *options, "--format", "json")
    assert printed.exit_code == 0 and json.loads(printed.stdout)["scores"]["CIDEr"] is None
    latex = run(
        evaluate.main, *files(one), "--captions", one / "other.json", "--format", "latex"
    ).stdout.splitlines()
    assert (
        latex[1].endswith(r"& -- \\")
        and latex[2].startswith("% CIDEr not computed: ")
        and len(latex) == 5
    )


# ------------------------------------------------------------------------------------- which images


def test_ids_choose_the_images_and_captions_of_others_are_counted(at):
    (at / "ids.txt").write_text("3\n1\n")
    output = works(evaluate.main, *files(at), "--ids", at / "ids.txt", "--out", at / "out.json")
    assert record(at)["images"] == 2 and "2 captions are left out" in output
    put(at / "two.json", {1: CAPTIONS[1], 3: CAPTIONS[3]})
    chosen = record(at)["scores"]
    output = works(evaluate.main, *files(at, "two.json"), "--out", at / "out.json")
    assert record(at)["scores"] == pytest.approx(chosen) and "captions of 2 of 4 images" in output


def test_an_empty_caption_scores_nothing_and_is_counted(at):
    put(at / "res.json", CAPTIONS | {2: ""})
    output = works(evaluate.main, *files(at), "--out", at / "out.json")
    assert record(at)["statistics"]["empty"] == 1 and "1 empty" in output


def test_a_caption_of_100_000_words_is_scored(at):
    put(at / "res.json", CAPTIONS | {2: "a dog runs " * 33_334, 3: "x'y-z. " * 20_000})
    works(evaluate.main, *files(at), "--out", at / "out.json")
    assert record(at)["statistics"]["words"]["max"] >= 100_000
    lines = [json.loads(line) for line in (at / "out-images.jsonl").read_text().splitlines()]
    assert lines[1]["scores"]["CIDEr"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (
            CAPTIONS | {77: "a dog"},
            "image 77 of {at}/res.json has no references in {at}/refs.json (1 such)",
        ),
        (CAPTIONS | {5: "a dog"}, "image 5 of {at}/res.json has no references in {at}/refs.json"),
        (CAPTIONS | {2: 7}, "{at}/res.json, image 2: the caption is 7, not a string"),
        ({}, "{at}/res.json contains no captions"),
    ],
)
def test_captions_that_cannot_be_scored_are_refused_by_file_and_image(at, captions, message):
    put(at / "res.json", captions)
    assert message.format(at=at) in refused(evaluate.main, *files(at), "--out", at / "out.json")
    assert not (at / "out.json").exists()


def test_no_file_that_is_read_is_overwritten(at):
    before = (at / "res.json").read_text()
    for name in ("res.json", "refs.json"):
        assert "would overwrite" in refused(evaluate.main, *files(at), "--out", at / name)
    assert (at / "res.json").read_text() == before
    worse = put(at / "out-images.jsonl", CAPTIONS | {1: "a cat"})  # the name of an output
    before = worse.read_text()
    assert f"{worse} would overwrite an input file" in refused(
        evaluate.main, *files(at), "--against", worse, "--out", at / "out.json"
    )
    put(at / "other.json", CAPTIONS)
    several = [*files(at), "--captions", at / "other.json", "--out", at]  # makes at/res.json
    assert f"{at / 'res.json'} would overwrite an input file" in refused(evaluate.main, *several)
    assert worse.read_text() == before and not (at / "out.json").exists()
    (at / "sub").mkdir()
    put(at / "sub" / "res.json", CAPTIONS)
    message = refused(
        evaluate.main, *files(at), "--captions", at / "sub" / "res.json", "--out", at / "scores"
    )
    assert "several --captions are called res.json" in message
    assert f"--out {at}/sub is a folder" in refused(evaluate.main, *files(at), "--out", at / "sub")


def test_an_option_that_names_an_empty_file_is_refused_whatever_is_kept(at):
    works(evaluate.main, *files(at))
    (at / "empty").write_text("")
    assert "contains no image ids" in refused(evaluate.main, *files(at), "--ids", at / "empty")
    (at / "none.json").write_text(json.dumps({**COCO, "annotations": []}))
    for option in ("--df", "--train-captions"):
        assert "has no captions of a train split" in refused(
            evaluate.main, *files(at), option, at / "none.json"
        )


def test_limit_takes_the_first_captions_of_the_file(at):
    (at / "ids.txt").write_text("3\n1\n2\n")
    for options in ([], ["--ids", at / "ids.txt"]):
        works(evaluate.main, *files(at), "--limit", 2, "--out", at / "out.json", *options)
        assert record(at)["images"] == 2
        assert {json.loads(line)["image_id"] for line in (at / "out-images.jsonl").open()} == {1, 2}


def test_broken_and_missing_files_are_refused_by_name(at):
    (at / "res.json").write_text('[{"image_id": 1, "capt')
    assert f"{at}/res.json is not complete JSON" in refused(evaluate.main, *files(at))
    assert f"{at}/no.json: No such file" in refused(evaluate.main, *files(at, "no.json"))
    put(at / "res.json", CAPTIONS)
    (at / "refs.json").write_text(json.dumps(COCO)[:300])
    assert f"{at}/refs.json is not complete JSON" in refused(evaluate.main, *files(at))
    (at / "refs.json").write_text(json.dumps({**COCO, "annotations": []}))
    assert "has images but no captions" in refused(evaluate.main, *files(at))


def test_with_ids_each_image_must_have_its_caption_and_its_references(at):
    (at / "ids.txt").write_text("1\n2\n")
    put(at / "res.json", {1: "a dog"})
    message = refused(evaluate.main, *files(at), "--ids", at / "ids.txt")
    assert f"image 2 of {at}/ids.txt has no caption in {at}/res.json (1 such)" in message
    (at / "ids.txt").write_text("1\n88\n")
    assert f"image 88 of {at}/ids.txt is not in {at}/refs.json" in refused(
        evaluate.main, *files(at), "--ids", at / "ids.txt"
    )
    (at / "ids.txt").write_text("5\n")
    assert "image 5 has no references" in refused(
        evaluate.main, *files(at), "--ids", at / "ids.txt"
    )


def test_options_that_contradict_each_other_are_refused(at):
    assert "--captions needs --references" in refused(evaluate.main, "--captions", at / "res.json")
    assert "not both" in refused(evaluate.main, *files(at), "--checkpoint", at)
    assert "--references goes with --captions" in refused(
        evaluate.main, "--references", at / "refs.json"
    )
    assert "--against compares" in refused(
        evaluate.main, *files(at), "--against", at / "res.json", "--bootstrap", 0
    )
    put(at / "few.json", {1: "a dog"})
    message = refused(evaluate.main, *files(at), "--against", at / "few.json")
    assert f"image 2 has no caption in {at}/few.json (3 such)" in message


# --------------------------------------------------------------------------------- METEOR and SPICE


def test_a_score_that_cannot_be_computed_is_null_and_told_and_the_rest_is_written(at, monkeypatch):
    def no_java() -> None:
        raise NotComputed("METEOR needs Java, and no java is on the PATH; install a JRE")

    monkeypatch.setattr(evaluate, "Meteor", no_java)
    message = refused(evaluate.main, *files(at), "--meteor", "--out", at / "out.json")
    assert "METEOR needs Java" in message
    assert record(at)["scores"]["METEOR"] is None and record(at)["scores"]["CIDEr"] > 0
    assert "METEOR needs Java" in record(at)["not_computed"]["METEOR"]


@pytest.mark.slow
@pytest.mark.java
def test_meteor_starts_once_for_two_files_and_gives_the_published_figure(
    real, tmp_path, monkeypatch
):
    pytest.importorskip("pycocoevalcap")
    shutil.which("java") or pytest.skip("no java on the PATH")
    folder = real / "results" / "coco_karpathy_test"
    started = []
    start = evaluate.Meteor
    monkeypatch.setattr(evaluate, "Meteor", lambda: started.append(1) or start())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    works(
        evaluate.main,
        "--captions",
        folder / "jiahuei_caption_00156000.json",
        "--references",
        folder / "refs.json",
        "--meteor",
        "--against",
        folder / "showedittell_xe.json",
        "--out",
        tmp_path / "out.json",
    )
    found = record(tmp_path)
    assert len(started) == 1
    assert found["scores"]["METEOR"] == pytest.approx(0.288, abs=0.0005)
    low, high = found["intervals"]["METEOR"]
    assert 0.28 < low < found["scores"]["METEOR"] < high < 0.295
    assert found["against"]["differences"]["METEOR"]["p"] < 0.01


# --------------------------------------------------------------------------------------- real files


def test_a_published_file_is_scored_over_karpathy_s_list_at_the_printed_figures(
    real, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = real / "results" / "coco_karpathy_test"
    works(
        evaluate.main,
        "--captions",
        folder / "jiahuei_caption_00156000.json",
        "--references",
        folder / "refs.json",
        "--ids",
        real / "coco_annotations" / "karpathy_test_ids.txt",
        "--out",
        tmp_path / "out.json",
    )
    printed = {"Bleu_1": 80.6, "Bleu_4": 39.8, "ROUGE_L": 58.4, "CIDEr": 131.1}
    found = record(tmp_path)
    assert found["images"] == 5000
    assert {name: round(100 * found["scores"][name], 1) for name in printed} == printed


def test_scoring_a_file_imports_no_torch():
    """It would take seconds of a command of one second."""
    code = "import sys, pipeline.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------- the server


def test_captions_of_all_test_images_become_the_server_s_file_without_scores(tmp_path):
    images = [{"id": n, "file_name": f"COCO_test2014_{n:012d}.jpg"} for n in range(40_775)]
    (tmp_path / "image_info_test2014.json").write_text(json.dumps({"images": images}))
    put(tmp_path / "res.json", {n: "a dog" for n in range(40_775)})
    assert (
        not read("coco", tmp_path, tmp_path / "image_info_test2014.json", None).images[0].captions
    )
    output = works(
        evaluate.main,
        "--captions",
        tmp_path / "res.json",
        "--references",
        tmp_path / "image_info_test2014.json",
        "--server",
        "ours",
        "--out",
        tmp_path / "server" / "scores.json",
    )
    assert [path.name for path in (tmp_path / "server").iterdir()] == [
        "captions_test2014_ours_results.json"
    ]
    assert "nothing is scored" in output


def test_what_is_not_all_of_a_server_s_split_is_refused(at):
    message = refused(evaluate.main, *files(at), "--server", "ours", "--out", at / "out.json")
    assert (
        "the server accepts all 40,504 images of val2014" in message
        and not (at / "out.json").exists()
    )
