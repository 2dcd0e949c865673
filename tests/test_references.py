"""References counted once: found again by name, kept on disk, with other documents' frequencies."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from data import DataError, characters
from pipeline.references import TABLES, HashTable, References, keep, prepared_path
from pipeline.scoring import score

REFERENCES = {4: ["a dog runs", "the dog"], 9: ["a red cat", "one cat sits on 1 1/2 mats"]}
CANDIDATES = {4: "a dog sits", 9: "a new cat on 1 1/2 mats"}


def test_a_hash_table_finds_every_key_and_nothing_else():
    generator = np.random.default_rng(0)
    for count in (0, 1, 2, 30, 5000):
        keys = np.unique(generator.integers(0, 1 << 62, count))
        near = np.unique(np.concatenate([keys + 1, generator.integers(0, 1 << 20, 1000)]))
        others = np.setdiff1d(near, keys)
        table = HashTable(keys)
        assert table.find(keys).tolist() == list(range(len(keys)))
        assert (table.find(others) == -1).all()


def test_a_hash_table_holds_keys_that_differ_in_a_few_bits():
    keys = (np.arange(300)[:, None] << 32 | np.arange(300)).ravel()
    assert HashTable(keys).find(keys[::-1].copy()).tolist() == list(range(len(keys)))[::-1]


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


def test_a_changed_file_has_another_name_for_its_counts(tmp_path):
    file = tmp_path / "refs.json"
    file.write_text("one")
    first = prepared_path(file)
    assert first.parent == tmp_path and prepared_path(file) == first
    assert prepared_path(file, b"ids") != first
    file.write_text("two")
    assert prepared_path(file) != first


def test_counts_of_a_folder_that_is_read_only_are_kept_in_the_user_s_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "refs.json").write_text("[]")
    folder.chmod(0o555)
    try:
        path = prepared_path(folder / "refs.json")
        assert path.parent == tmp_path / "home" / "onceover"
        keep(References(REFERENCES), path)
        assert path.exists() and os.listdir(folder) == ["refs.json"]
    finally:
        folder.chmod(0o755)


def test_a_place_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    keep(References(REFERENCES), tmp_path / "file" / "below" / "kept.npz")


# ------------------------------------------------------------------------------------------------- document frequencies


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
    assert found.values["Bleu_4"] == alone.values["Bleu_4"] and found.values["ROUGE_L"] == alone.values["ROUGE_L"]


def test_no_documents_to_take_frequencies_from_is_an_error():
    with pytest.raises(DataError, match="no captions to take document frequencies from"):
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
    assert one.idf.sum() == pytest.approx(two.idf.sum(), rel=1e-9) and len(one.keys) == len(two.keys)


def test_a_changed_table_of_characters_has_another_name_for_the_counts(tmp_path, monkeypatch):
    (tmp_path / "refs.json").write_text("one")
    (tmp_path / "characters.py").write_text("another table")
    first = prepared_path(tmp_path / "refs.json")
    monkeypatch.setattr(characters, "__file__", str(tmp_path / "characters.py"))
    assert prepared_path(tmp_path / "refs.json") != first
