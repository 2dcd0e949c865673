"""What is kept of a run. Never pickle: safetensors and JSON.

A checkpoint folder captions photographs by itself:

    model.safetensors      the captioner's weights (the best on dev)
    config.json            model sizes, training settings, identity of the cache, decoding defaults, format number
    vocab.json             the words, by id
    backbone.safetensors   the backbone's weights, unless they are the hub's by name
    last.safetensors       where training stands (weights, optimiser, generators), for --resume; not needed to caption
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.features import packed_backbone, write_whole
from data.vocabulary import Vocabulary
from models.captioner import Captioner, CaptionerConfig
from pipeline.cli import UserError
from pipeline.tensors import load_tensors, save_tensors

FORMAT = 1


# ---------------------------------------------------------------------------------------------------------- captioners


@dataclass
class Checkpoint:
    """A captioner with all that captioning needs: its vocabulary, the identity of its features, decoding defaults."""

    captioner: Captioner
    vocabulary: Vocabulary
    identity: dict[str, Any]
    decoding: dict[str, Any]
    training: dict[str, Any]
    provenance: dict[str, Any]
    trained_on: str = ""

    def describe(self) -> str:
        grid = "x".join(map(str, self.identity["grid"]))
        return f"{self.identity['backbone']} {self.identity['regions']} {grid} ({self.identity['weights']})"


def save_description(folder: Path, checkpoint: Checkpoint) -> None:
    """Write config.json and vocab.json: all of a checkpoint but its weights."""
    config = {
        "format": FORMAT,
        "model": asdict(checkpoint.captioner.config),
        "features": checkpoint.identity,
        "provenance": checkpoint.provenance,
        "decoding": checkpoint.decoding,
        "trained_on": checkpoint.trained_on,
        "training": checkpoint.training,
    }
    write_whole(folder / "vocab.json", json.dumps(checkpoint.vocabulary.words, ensure_ascii=False, indent=0))
    write_whole(folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")


def save_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    save_tensors(folder / "model.safetensors", weights)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder strictly; UserError names what is missing, foreign or does not fit."""
    config = _read_json(folder, "config.json", dict)
    if config.get("format") != FORMAT:
        raise UserError(f"{folder}/config.json has format {config.get('format')}, this version reads {FORMAT}")
    vocabulary = Vocabulary(_read_json(folder, "vocab.json", list))
    try:
        captioner = Captioner(CaptionerConfig(**config["model"]))
        rest = (config["features"], config["decoding"], config["training"], config["provenance"], config["trained_on"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.json is not a checkpoint's record: {error}") from error
    weights, _ = load_tensors(folder / "model.safetensors")
    try:
        captioner.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder}/model.safetensors does not fit its config.json: {error}") from error
    if len(vocabulary) != captioner.config.words:
        raise UserError(f"{folder}/vocab.json has {len(vocabulary)} words, config.json {captioner.config.words}")
    return Checkpoint(captioner.eval(), vocabulary, *rest)


def copy_backbone(cache: Path, folder: Path) -> None:
    """Take the cache's kept backbone weights, where it has them, into a checkpoint folder."""
    kept, target = cache / "backbone.safetensors", folder / "backbone.safetensors"
    weights = packed_backbone(cache) if cache.is_file() else kept.read_bytes() if kept.exists() else None
    if weights is not None and not target.exists():
        temporary = folder / f".backbone.safetensors.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(weights)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------- training's place


def save_training_state(folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Where training stands, in one file by one rename: last.safetensors, with `record` as JSON in its header."""
    save_tensors(folder / "last.safetensors", tensors, {"record": json.dumps(record)})


def load_training_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, header = load_tensors(folder / "last.safetensors")
    return tensors, json.loads(header["record"])


def _read_json(folder: Path, name: str, kind: type) -> Any:
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} is not there; make it with: python -m pipeline.train ... --out {folder}")
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}; a checkpoint is a folder that pipeline.train wrote")
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / name} is not JSON: {error}") from error
    if not isinstance(found, kind):
        raise UserError(f"{folder / name} holds {type(found).__name__}, not {kind.__name__}")
    return found
