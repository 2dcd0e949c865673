"""References counted once: found again by name, kept on disk, with other documents' frequencies."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest

from data import DataError, characters, segmentation, tokens
from data.files import user_cache
from pipeline.scoring import ngrams as references
from pipeline.scoring.metrics import score
from pipeline.scoring.ngrams import (
    TABLES,
    References,
    cached_path,
    load_cached,
    save_cached,
)

REFERENCES = {4: ["a dog runs", "the dog"], 9: ["a red cat", "one cat sits on 1 1/2 mats"]}
CANDIDATES = {4: "a dog sits", 9: "a new cat on 1 1/2 mats"}


def test_kept_references_score_as_new_ones(tmp_path):
    references = References(REFERENCES)
    wanted = score(CANDIDATES, references)
    references.save(tmp_path / "kept.npz")
    kept = References.load(tmp_path / "kept.npz")
    for name in TABLES:
        assert np.array_equal(getattr(kept, name), getattr(References(REFERENCES), name)), name
    assert score(CANDIDATES, kept).values == wanted.values
    assert [path.name for path in tmp_path.iterdir()] == ["kept.npz"]


def test_a_kept_file_that_is_not_whole_is_an_error_that_names_it(tmp_path):
    References(REFERENCES).save(tmp_path / "kept.npz")
    whole = (tmp_path / "kept.npz").read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"no archive"):
        (tmp_path / "kept.npz").write_bytes(part)
        with pytest.raises(DataError, match=r"kept\.npz"):
            References.load(tmp_path / "kept.npz")


def test_whatever_the_counts_come_from_is_in_the_name(tmp_path):
    path = cached_path(tmp_path, b"file", b"ids")
    assert path.parent == tmp_path and cached_path(tmp_path, b"file", b"ids") == path
    others = ([b"file"], [b"file", b"other"], [b"fi", b"leids"], [b"two", b"ids"])
    assert len({path, *(cached_path(tmp_path, *parts) for parts in others)}) == 5


def test_the_user_s_cache_folder_is_that_of_the_xdg_standard(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "onceover"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for relative in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert user_cache() == tmp_path / "home" / ".cache" / "onceover"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert user_cache() is None


def tampered(path: Path) -> None:
    """A whole file of the right form whose idf is another."""
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path.open("wb"), **{**arrays, "idf": arrays["idf"] + 1})


def of_other_references(path: Path) -> None:
    References({1: ["other"]}).save(path.with_name("other.npz"))
    path.with_name("other.npz").replace(path)


@pytest.mark.parametrize(
    "damage",
    [
        tampered,
        of_other_references,
        lambda path: path.write_bytes(path.read_bytes()[:500]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no archive"),
        lambda path: np.save(path.open("wb"), np.zeros(3)),
        lambda path: np.savez(path.open("wb"), idf=np.zeros(3)),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_kept_counts_that_are_not_as_they_were_left_are_not_used(tmp_path, damage):
    path = cached_path(tmp_path, b"file")
    save_cached(References(REFERENCES), path)
    assert load_cached(path).rows == References(REFERENCES).rows
    damage(path)
    assert load_cached(path) is None


def test_a_cache_folder_keeps_what_was_used_last_and_touches_no_other_file(tmp_path, monkeypatch):
    one, two, three, four = (cached_path(tmp_path, name) for name in (b"1", b"2", b"3", b"4"))
    (tmp_path / "mine.npz").write_bytes(bytes(10**6))
    for hours, path in enumerate((one, two, three), start=1):
        save_cached(References(REFERENCES), path)
        os.utime(path, (3600 * hours, 3600 * hours))
    load_cached(one)  # now the newest
    begun = tmp_path / f".{one.name}.{'0' * 32}.tmp"  # writing that was interrupted
    begun.write_bytes(bytes(100))
    os.utime(begun, (0, 0))
    monkeypatch.setattr(references, "MAX_CACHE_BYTES", int(2.5 * one.stat().st_size))
    save_cached(References(REFERENCES), four)
    assert {path.name for path in tmp_path.iterdir()} == {one.name, four.name, "mine.npz"}
    monkeypatch.setattr(references, "MAX_CACHE_BYTES", 0)
    save_cached(References(REFERENCES), four)
    assert {path.name for path in tmp_path.iterdir()} == {four.name, "mine.npz"}


def test_a_place_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    save_cached(References(REFERENCES), tmp_path / "file" / "below" / "kept.npz")
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1

    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    save_cached(References(REFERENCES), cached_path(tmp_path / "full", b""))
    assert not list((tmp_path / "full").iterdir())


# ----------------------------------------------------------------------------- document frequencies


def test_document_frequencies_of_other_captions_are_those_of_the_larger_set():
    """A few images scored with the frequencies of all are scored as among all."""
    rng = random.Random(0)

    def sentence() -> str:
        return " ".join(rng.choices("abcdefgh", k=rng.randint(1, 9)))

    everything = {i: [sentence() for _ in range(rng.randint(1, 5))] for i in range(40)}
    candidates = {i: sentence() for i in everything}
    among_all = score(candidates, everything).per_image["CIDEr"]
    few = [3, 17, 30]
    prepared = References({i: everything[i] for i in few}, frequencies=everything)
    found = score({i: candidates[i] for i in few}, prepared)
    np.testing.assert_allclose(found.per_image["CIDEr"], among_all[few], atol=1e-12)
    alone = score({i: candidates[i] for i in few}, {i: everything[i] for i in few})
    assert not np.allclose(found.per_image["CIDEr"], alone.per_image["CIDEr"])
    assert (
        found.values["Bleu_4"] == alone.values["Bleu_4"]
        and found.values["ROUGE_L"] == alone.values["ROUGE_L"]
    )


def test_no_documents_to_take_frequencies_from_is_an_error():
    with pytest.raises(DataError, match="no captions for document frequencies"):
        References(REFERENCES, frequencies={})


def test_words_of_a_given_vocabulary_have_its_numbers():
    references = References({1: ["a dog"]}, vocabulary=["dog", "1\xa01/2", "a", "cat"])
    assert [references.vocabulary[word] for word in ("dog", "1\xa01/2", "a", "cat")] == [0, 1, 2, 3]
    assert references.tokens.tolist() == [2, 0]


def test_captions_may_be_tokens():
    tokens = {4: [["a", "dog", "runs"], ["the", "dog"]], 9: [["a", "red", "cat"]]}
    texts = {i: [" ".join(words) for words in captions] for i, captions in tokens.items()}
    candidates = {4: "a dog", 9: "cat"}
    assert score(candidates, References(tokens)).values == score(candidates, texts).values


def test_real_references_are_counted_alike_twice(real: Path):
    from tests.test_scoring import read_pair

    _, references = read_pair(real / "results" / "flickr30k_karpathy_test", "magic_result.json")
    one, two = References(references), References(dict(reversed(references.items())))
    assert one.idf.sum() == pytest.approx(two.idf.sum(), rel=1e-9) and len(one.keys) == len(
        two.keys
    )


@pytest.mark.parametrize(
    "module", [characters, segmentation, tokens], ids=lambda module: module.__name__
)
def test_a_changed_rule_about_words_has_another_name_for_the_counts(tmp_path, monkeypatch, module):
    (tmp_path / "changed.py").write_text("another rule")
    first = cached_path(tmp_path, b"one")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
    assert cached_path(tmp_path, b"one") != first
