"""Checkpoints shared: as folders, as the hub's repositories (against a local stand-in), and hostile
ones.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import caption, evaluate
from pipeline.checkpoints.checkpoint import FORMAT, load_checkpoint
from pipeline.checkpoints.hub import checkpoint_folder
from pipeline.cli import UserError
from pipeline.decoding.captioner import PhotoCaptioner, load_captioner
from tests.test_commands import at, photos, refused, works

FILES = {
    "model.safetensors",
    "config.json",
    "vocab.json",
    "backbone.safetensors",
    "frequencies.safetensors",
    "README.md",
}


def test_a_saved_captioner_is_the_runs_without_what_only_training_needs(world, tmp_path):
    captioner = PhotoCaptioner.from_pretrained(world / "run", precision="fp32")
    captioner.save_pretrained(tmp_path / "shared")
    assert {path.name for path in (tmp_path / "shared").iterdir()} == FILES
    again = PhotoCaptioner.from_pretrained(tmp_path / "shared", precision="fp32")
    assert again.caption(photos(world)) == captioner.caption(photos(world))
    assert (tmp_path / "shared/model.safetensors").read_bytes() == (
        world / "run/model.safetensors"
    ).read_bytes()
    card = (tmp_path / "shared/README.md").read_text()
    assert "pipeline_tag: image-to-text" in card and "library_name: onceover" in card
    with pytest.raises(UserError, match="itself"):
        captioner.save_pretrained(world / "run")
    assert (world / "run/config.json").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that stands in for the hub: what is uploaded lies there, and is fetched from
    there.
    """
    folder = tmp_path / "hub"

    def create(self, repo_id, **options):
        (folder / repo_id).mkdir(parents=True)
        return type("Created", (), {"repo_id": repo_id})

    def upload(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)
        return f"{folder}/{repo_id}"

    def snapshot(repo_id, allow_patterns, **options):
        target = tmp_path / "fetched" / repo_id
        target.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (folder / repo_id / name).exists():
                shutil.copy(folder / repo_id / name, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr("pipeline.checkpoints.hub.go_offline_if_hub_is_unreachable", lambda: None)
    return folder


def test_a_captioner_pushed_to_the_hub_captions_from_there(world, tmp_path, hub):
    captioner = PhotoCaptioner.from_pretrained(world / "run", precision="fp32")
    captioner.push_to_hub("someone/captions")
    assert {path.name for path in (hub / "someone/captions").iterdir()} == FILES
    captions = captioner.caption(photos(world))
    assert (
        PhotoCaptioner.from_pretrained("someone/captions", precision="fp32").caption(photos(world))
        == captions
    )
    told = works(
        caption.main,
        *photos(world),
        "--checkpoint",
        "hf-hub:someone/captions",
        "--precision",
        "fp32",
    )
    assert all(text in told for text in captions)
    over = [*at(world), "--features", world / "cache", "--checkpoint", "hf-hub:someone/captions"]
    assert "--out" in refused(evaluate.main, *over)
    works(evaluate.main, *over, "--out", tmp_path / "scores.json")


def test_a_hub_that_is_not_there_is_a_plain_error(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="could not be fetched from the hub"):
        checkpoint_folder("hf-hub:someone/captions", cache_dir=tmp_path)
    with pytest.raises(UserError, match="no repository with this name"):
        checkpoint_folder("hf-hub:../../etc", cache_dir=tmp_path)


# ------------------------------------------------------------------------------------------ hostile


@pytest.fixture
def copy(world, tmp_path) -> Path:
    shutil.copytree(world / "run", tmp_path / "copy")
    return tmp_path / "copy"


class Trap:
    """What runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "backbone.safetensors", "config.json", "vocab.json"]
)
@pytest.mark.parametrize("how", [pickle.dump, torch.save])
def test_a_pickle_in_place_of_a_file_is_never_run(copy, tmp_path, name, how):
    with open(copy / name, "wb") as file:
        how({"x": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(UserError, match=name):
        load_captioner(copy)
    assert not (tmp_path / "sprung").exists()


def test_sizes_that_the_weights_have_not_take_no_memory(copy):
    record = json.loads((copy / "config.json").read_text())
    for name in (
        "width",
        "feedforward",
        "words",
        "channels",
        "max_length",
        "encoder_layers",
        "decoder_layers",
        "heads",
    ):
        for value in (10**12, -1, 0, 2.0, "32", None, [32], True):
            if (name, value) == ("encoder_layers", True):
                continue
            changed = {**record, "model": {**record["model"], name: value}}
            (copy / "config.json").write_text(json.dumps(changed))
            with pytest.raises(UserError, match=r"config\.json"):
                load_checkpoint(copy)


def test_a_file_that_declares_more_than_it_holds_is_refused(copy):
    header = json.dumps(
        {"word.weight": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}
    ).encode()
    for head in (struct.pack("<Q", len(header)) + header, struct.pack("<Q", 2**62) + header):
        (copy / "model.safetensors").write_bytes(head)
        with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
            load_checkpoint(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"word.weight": t["word.weight"][:-1]},
        lambda t: t | {"more": torch.ones(1)},
        lambda t: {k: v for k, v in t.items() if k != "norm.weight"},
    ],
)
def test_weights_of_other_shapes_or_names_are_refused(copy, change):
    save_file(change(load_file(copy / "model.safetensors")), copy / "model.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        load_checkpoint(copy)


FOREIGN = [
    ("features", "backbone", "local-dir:/etc"),
    ("features", "backbone", "hf-hub:someone/pickled"),
    ("features", "backbone", "../../etc/passwd"),
    ("features", "backbone", "/etc/passwd"),
    ("features", "arguments", {"checkpoint_path": "/etc/passwd"}),
    ("features", "arguments", {"pretrained_cfg": {"file": "/etc/passwd"}}),
    ("features", "arguments", {"depth": {"a": [1]}}),
    ("features", "size", [10**9, 10**9]),
    ("features", "size", [4096, 4096]),
    ("features", "size", "224"),
    ("features", "mean", [0.5]),
    ("features", "resize", "../x"),
    ("features", "channels", 7),
    ("decoding", "beam", 10**9),
    ("decoding", "length_penalty", "x"),
    ("decoding", "max_length", 3),
]


@pytest.mark.parametrize("part, name, value", FOREIGN)
def test_a_record_that_no_training_wrote_is_refused_before_anything_is_opened(
    copy, part, name, value
):
    record = json.loads((copy / "config.json").read_text())
    record[part][name] = value
    (copy / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"config\.json"):
        load_captioner(copy)


def test_a_network_larger_than_its_weights_takes_no_memory(copy, monkeypatch):
    record = json.loads((copy / "config.json").read_text())
    record["features"] |= {"backbone": "resnet18", "arguments": {"layers": [60] * 4}}
    (copy / "config.json").write_text(json.dumps(record))
    monkeypatch.setattr(
        "pipeline.extraction.grid.create_backbone", lambda *_: pytest.fail("it was built")
    )
    with pytest.raises(UserError, match="does not fit resnet18"):
        load_captioner(copy)


def test_as_many_layers_as_a_file_has_tensors_are_not_built(copy):
    weights = load_file(copy / "model.safetensors") | {f"x{n}": torch.empty(0) for n in range(300)}
    save_file(weights, copy / "model.safetensors")
    record = json.loads((copy / "config.json").read_text())
    for layers in (300, 90):
        record["model"]["encoder_layers"] = layers
        (copy / "config.json").write_text(json.dumps(record))
        with pytest.raises(
            UserError, match=f"encoder_layers is {layers}|does not fit its config.json"
        ):
            load_checkpoint(copy)


def test_weights_that_are_not_finite_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    weights["norm.weight"][3] = float("nan")
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"not finite, in norm\.weight"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", "[]", '{"format": ' + "9" * 10_000 + "}", "\udcff"]
)
def test_json_that_is_none_is_a_plain_error(copy, text):
    (copy / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"config\.json"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    "words", [[1, 2], ["<pad>"], {"a": 1}, ["<pad>", "<bos>", "<eos>", "<unk>", "a", "a"]]
)
def test_a_vocabulary_that_is_none_is_a_plain_error(copy, words):
    (copy / "vocab.json").write_text(json.dumps(words))
    assert "voc" in refused(caption.main, "setup.cfg", "--checkpoint", copy)


def test_a_checkpoint_of_a_newer_format_says_so(copy):
    record = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps({**record, "format": FORMAT + 1, "model": "of another kind"})
    )
    with pytest.raises(UserError, match="a newer version of Onceover wrote it: update"):
        load_checkpoint(copy)
