"""METEOR and SPICE: pycocoevalcap's figures where Java is, a plain reason where it cannot run."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from data.tokens import tokenize
from pipeline.scoring import java
from pipeline.scoring.java import CORENLP, Meteor, NotComputed, spice

FAKE_JAVA = f"""#!{sys.executable}
import json, sys
jar, asked, answered = (sys.argv[sys.argv.index(flag) + 1] for flag in ("-jar", "spice-1.0.jar", "-out"))
entries = json.load(open(asked))
if any("crash" in entry["test"] for entry in entries):
    sys.exit('Exception in thread "main" java.lang.OutOfMemoryError: heap\\n\\tat edu.anu.spice.SpiceScorer.main')
shared = lambda a, b: len(set(a.split()) & set(b.split())) / len(set(a.split()))
score = lambda entry: max(shared(entry["test"], ref) for ref in entry["refs"]) if entry["test"] else None
json.dump([{{"image_id": e["image_id"], "scores": {{"All": {{"f": score(e)}}}}}} for e in entries], open(answered, "w"))
"""


@pytest.fixture
def spice_folder(tmp_path, monkeypatch) -> Path:
    """A stand-in for pycocoevalcap with CoreNLP's files in place, and for the java that would read
    them.
    """
    folder = tmp_path / "spice" / "lib"
    folder.mkdir(parents=True)
    for name in CORENLP:
        (folder / name).write_bytes(b"")
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    program.write_text(FAKE_JAVA)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(java, "_program", lambda score: tmp_path)
    return folder


# -------------------------------------------------------------------------------------------- SPICE


def test_spice_is_read_by_image_and_one_without_a_graph_has_none(spice_folder):
    found = spice(["a dog", "", "a red cat"], [["the dog"], ["a man"], ["a dog", "a red cat sits"]])
    np.testing.assert_array_equal(found, [0.5, np.nan, 1.0])


def test_spice_without_its_model_files_says_which_and_where_to_get_them(spice_folder):
    (spice_folder / CORENLP[1]).unlink()
    with pytest.raises(
        NotComputed, match=r"lacks stanford-corenlp-3.6.0-models.jar.*get_stanford_models"
    ) as error:
        spice(["a dog"], [["a dog"]])
    assert str(spice_folder) in str(error.value)


def test_what_spice_s_java_complains_of_is_told_in_one_line(spice_folder):
    with pytest.raises(NotComputed) as error:
        spice(["crash"], [["a dog"]])
    assert (
        str(error.value)
        == 'SPICE\'s Java stopped: Exception in thread "main" java.lang.OutOfMemoryError: heap'
    )


@pytest.mark.java
def test_the_real_spice_with_empty_model_files_stops_with_a_plain_reason(
    spice_folder, monkeypatch, tmp_path
):
    package = pytest.importorskip("pycocoevalcap")
    real_java = shutil.which("java", path="/usr/bin:/bin:/usr/local/bin") or pytest.skip(
        "no java on the PATH"
    )
    real_folder = Path(next(iter(package.__path__))) / "spice"
    shutil.copy(real_folder / "spice-1.0.jar", spice_folder.parent)
    for jar in (real_folder / "lib").glob("*.jar"):
        if jar.name not in CORENLP:
            shutil.copy(jar, spice_folder)
    monkeypatch.setenv("PATH", str(Path(real_java).parent))
    with pytest.raises(NotComputed, match=r"SPICE's Java stopped: .*(Error|Exception)"):
        spice(["a dog"], [["a dog"]])


# -------------------------------------------------------------------------------- what is not there


def test_no_java_and_no_package_are_told_with_what_mends_them(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    if java.importlib.util.find_spec("pycocoevalcap"):
        with pytest.raises(
            NotComputed, match="METEOR needs Java, and no java is on the PATH; install"
        ):
            Meteor()
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    for start, name in ((Meteor, "METEOR"), (lambda: spice([], []), "SPICE")):
        with pytest.raises(
            NotComputed, match=name + r" needs pycocoevalcap: pip install 'onceover\[java\]'"
        ):
            start()


def test_a_java_that_stops_is_told_in_one_line(spice_folder, tmp_path):
    program = tmp_path / "bin" / "java"
    program.write_text(
        '#!/bin/sh\necho "Error: Could not reserve enough space for object heap" >&2\nexit 1\n'
    )
    (tmp_path / "meteor").mkdir()
    with (
        Meteor() as meteor,
        pytest.raises(NotComputed, match="METEOR's Java stopped: Error: Could not reserve"),
    ):
        meteor.statistics(["a dog"] * 20_000, [["a dog"]] * 20_000)


# ------------------------------------------------------------------------------------------- METEOR


@pytest.mark.slow
@pytest.mark.java
def test_meteor_of_val2017_is_the_golden_figure_and_of_each_image_pycocoevalcap_s(real: Path):
    other = pytest.importorskip("pycocoevalcap.meteor.meteor")
    shutil.which("java") or pytest.skip("no java on the PATH")
    annotations = json.loads((real / "coco_annotations" / "captions_val2017.json").read_text())[
        "annotations"
    ]
    captions: dict[int, list[str]] = {}
    for entry in annotations:
        captions.setdefault(entry["image_id"], []).append(" ".join(tokenize(entry["caption"])))
    first, rest = [c[0] for c in captions.values()], [c[1:5] for c in captions.values()]
    with Meteor() as meteor:
        sums = meteor.statistics(first, rest)
        per_image = meteor.score(sums)
        # 0.2420785 with Java's tokens, whose look-ahead lets three of the captions hang on the next
        # one; 0.2420790 with ours
        assert meteor.score(sums.sum(0, keepdims=True))[0] == pytest.approx(0.242078, abs=1.1e-6)
        few = meteor.score(sums[:300].sum(0, keepdims=True))[0]
        odd = ["", "a ||| dog", "<b title='|||'> dog", "a  dog"]
        found = meteor.score(meteor.statistics(odd, [["a dog"]] * len(odd)))
    _, each = other.Meteor().compute_score(
        {i: ["a dog"] for i in range(len(odd))}, {i: [c] for i, c in enumerate(odd)}
    )
    np.testing.assert_allclose(found, each, atol=1e-9)
    wanted, each = other.Meteor().compute_score(
        dict(enumerate(rest[:300])), {i: [c] for i, c in enumerate(first[:300])}
    )
    assert few == pytest.approx(wanted, abs=1e-9)
    np.testing.assert_allclose(per_image[:300], each, atol=1e-9)
