"""What is kept of a run. Never pickle: safetensors and JSON.

A checkpoint folder captions photographs by itself, and is laid out as the Hugging Face hub has it:

    model.safetensors      the captioner's weights (the best on dev; their moving average, where
                           there is one)
    config.json            model sizes, training settings, identity of the cache, decoding defaults,
                           format number
    vocab.json             the words (or pieces of words), by id
    tokenizer.json         how words are cut into pieces, with --vocabulary bpe alone
    frequencies.safetensors  in how many training images n-grams stand, for --consensus alone
    backbone.safetensors   the backbone's weights, unless they are the hub's by name
    last.safetensors       where training stands (weights, optimiser, average, place), for --resume;
                           sharing leaves it out

A checkpoint may come from anybody: nothing in it is run, nothing in it names a path that is opened,
and its sizes are believed only where its weights have them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache, differences, packed_backbone
from data.files import atomic_write, atomic_write_text
from data.subwords import Subwords
from data.vocabulary import Vocabulary
from models import MAX_CAPTIONS, ModelError
from models.decoders.interface import Decoder
from models.decoders.registry import DECODERS
from pipeline.checkpoints.tensors import load_tensors, save_tensors, shapes_of
from pipeline.cli import UserError
from pipeline.terminal import say

FORMAT = 1
SHARED = (
    "model.safetensors",
    "config.json",
    "vocab.json",
    "tokenizer.json",
    "frequencies.safetensors",
    "backbone.safetensors",
)
LARGEST_JSON = 1 << 26


# --------------------------------------------------------------------------------------- captioners


@dataclass
class Checkpoint:
    """A captioner with all that captioning needs: its vocabulary, the identity of its features,
    decoding defaults.
    """

    captioner: Decoder
    vocabulary: Vocabulary
    identity: dict[str, Any]
    decoding: dict[str, Any]
    training: dict[str, Any]
    provenance: dict[str, Any]
    trained_on: str = ""
    folder: Path | None = None

    def describe(self) -> str:
        found = self.identity
        grid = "x".join(map(str, found["grid"])) if isinstance(found.get("grid"), list) else ""
        parts = [
            found.get("backbone"),
            found["regions"],
            grid,
            f"({found['weights']})" if "weights" in found else "",
        ]
        return " ".join(str(part) for part in parts if part)


def save_description(folder: Path, checkpoint: Checkpoint) -> None:
    """Write config.json, vocab.json and, of pieces, tokenizer.json: all of a checkpoint but its
    weights.
    """
    config = {
        "format": FORMAT,
        "decoder": name_of(checkpoint.captioner),
        "model": asdict(checkpoint.captioner.config),
        "features": checkpoint.identity,
        "provenance": checkpoint.provenance,
        "decoding": checkpoint.decoding,
        "trained_on": checkpoint.trained_on,
        "training": checkpoint.training,
    }
    if isinstance(checkpoint.vocabulary, Subwords):
        atomic_write_text(folder / "tokenizer.json", checkpoint.vocabulary.tokenizer)
    atomic_write_text(
        folder / "vocab.json", json.dumps(checkpoint.vocabulary.words, ensure_ascii=False, indent=0)
    )
    atomic_write_text(folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")


def save_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    save_tensors(folder / "model.safetensors", weights)


def load_record(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json; UserError where it is of another format or no training's."""
    config = _read_json(folder, "config.json", dict)
    path = folder / "config.json"
    if config.get("format") != FORMAT:
        newer = isinstance(config.get("format"), int) and config["format"] > FORMAT
        mend = "; it was made by a newer version: update this one" if newer else ""
        raise UserError(
            f"{path} has format {config.get('format')}, this version reads {FORMAT}{mend}"
        )
    parts = {
        "model": dict,
        "features": dict,
        "decoding": dict,
        "training": dict,
        "provenance": dict,
        "trained_on": str,
    }
    wrong = [name for name, kind in parts.items() if not isinstance(config.get(name), kind)]
    if wrong:
        raise UserError(
            f"{path} is not a checkpoint's record: {', '.join(wrong)} missing or not as it "
            "should be"
        )
    _check_decoding(path, config["decoding"])
    if not isinstance(config["features"].get("regions"), str):
        raise UserError(f"{path}: features: regions must be the name of their kind")
    return config


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder strictly; UserError names what is missing, foreign or does not
    fit.
    """
    config = load_record(folder)
    captioner = _load_decoder(folder, config.get("decoder", "transformer"), config["model"])
    if config["features"].get("channels", captioner.config.channels) != captioner.config.channels:
        raise UserError(
            f"{folder}/config.json: features and model have different numbers of channels; copy it "
            f"again"
        )
    vocabulary = load_vocabulary(folder)
    if len(vocabulary) != captioner.config.words:
        raise UserError(
            f"{folder}/vocab.json has {len(vocabulary)} words, config.json {captioner.config.words}"
        )
    rest = (
        config["features"],
        config["decoding"],
        config["training"],
        config["provenance"],
        config["trained_on"],
    )
    return Checkpoint(captioner.eval(), vocabulary, *rest, folder)


def refuse_other_features(checkpoint: Checkpoint, cache: FeatureCache | NoFeatures) -> None:
    """A checkpoint reads only features of the identity it was trained on; other provenance is one
    warning.
    """
    if found := differences(checkpoint.identity, cache.identity):
        raise UserError(
            f"checkpoint {checkpoint.folder} was trained on {checkpoint.describe()}, "
            f"{cache.path} holds other features "
            f"({'; '.join(found)}); pass the --features it was trained on"
        )
    # those are not read here
    own, other = ({**record, "views": None} for record in (checkpoint.provenance, cache.provenance))
    if found := differences(own, other):
        say(f"warning: {cache.path} and the cache of the training differ in {'; '.join(found)}")


def name_of(decoder: Decoder) -> str:
    """The name in DECODERS of a decoder."""
    return next(name for name, kind in DECODERS.items() if type(decoder) is kind)


def _load_decoder(folder: Path, name: str, sizes: Mapping[str, Any]) -> Decoder:
    """The decoder of `sizes` with its weights; no memory is taken for sizes that the weights' file
    does not have.
    """
    path, weights = folder / "config.json", folder / "model.safetensors"
    if name not in DECODERS:
        raise UserError(f"{path}: no decoder {name!r}; this version has {', '.join(DECODERS)}")
    shapes, kind = shapes_of(weights), DECODERS[name]
    try:
        config = kind.Config.from_record(sizes)
        # a network of so many layers would take minutes to build
        for field, value in asdict(config).items():
            if field.endswith("layers") and value > len(shapes):
                raise ModelError(
                    f"{field} is {value}, and model.safetensors has {len(shapes)} tensors"
                )
        with torch.device("meta"):
            captioner = kind(config)
    except (ModelError, RuntimeError) as error:
        raise UserError(f"{path} is not a checkpoint's record: model: {error}") from error
    wanted = {name: tuple(value.shape) for name, value in captioner.state_dict().items()}
    if wanted != shapes:
        name = next(
            iter({name for name in {*wanted, *shapes} if wanted.get(name) != shapes.get(name)})
        )
        found = f"{name} is {shapes.get(name, 'absent')} and should be {wanted.get(name, 'absent')}"
        raise UserError(
            f"{weights} does not fit its config.json: {found}; copy both again, or make them again"
        )
    tensors, _ = load_tensors(weights)
    if broken := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise UserError(
            f"{weights} holds numbers that are not finite, in {broken[0]}; copy it again, or "
            "make it again"
        )
    captioner.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return captioner


def load_vocabulary(folder: Path) -> Vocabulary:
    """A checkpoint's words, or pieces of words."""
    words = _read_json(folder, "vocab.json", list)
    if not all(isinstance(word, str) for word in words):
        raise UserError(f"{folder}/vocab.json has an entry that is not a word")
    segment = segment_of(load_record(folder)["training"])
    if (folder / "tokenizer.json").exists():
        return Subwords(words, json.dumps(_read_json(folder, "tokenizer.json", dict)), segment)
    return Vocabulary(words, segment)


def segment_of(training: Mapping[str, Any]) -> str:
    """What a word was in the training that config.json records, as `data.segmentation` has it."""
    return "characters" if training.get("segment") == "characters" else "words"


def _check_decoding(path: Path, decoding: Mapping[str, Any]) -> None:
    beam, penalty = decoding.get("beam"), decoding.get("length_penalty")
    fits = (
        type(beam) is int
        and 1 <= beam <= MAX_CAPTIONS
        and (type(penalty) is int or type(penalty) is float)
        and abs(penalty) <= 10
    )
    if not fits or len(decoding) != 2:
        raise UserError(
            f"{path}: decoding must be a beam of 1 to {MAX_CAPTIONS} and a length_penalty of "
            f"-10 to 10: {decoding}"
        )


def copy_backbone(cache: Path, folder: Path) -> None:
    """Take the cache's kept backbone weights, where it has them, into a checkpoint folder."""
    kept, target = cache / "backbone.safetensors", folder / "backbone.safetensors"
    weights = (
        packed_backbone(cache) if cache.is_file() else kept.read_bytes() if kept.exists() else None
    )
    if weights is not None and not target.exists():
        with atomic_write(target) as temporary:
            temporary.write_bytes(weights)


# --------------------------------------------------------------------------------- training's place


def save_training_state(
    folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Where training stands, in one file by one rename: last.safetensors, with `record` as JSON in
    its header.
    """
    save_tensors(folder / "last.safetensors", tensors, {"record": json.dumps(record)})


def load_training_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, header = load_tensors(folder / "last.safetensors")
    try:
        return tensors, json.loads(header["record"])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / 'last.safetensors'} is not what a run saved: {error!r}; start the run anew"
        ) from error


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in a run."""
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def _read_json(folder: Path, name: str, kind: type) -> Any:
    if not folder.is_dir():
        raise UserError(
            f"checkpoint {folder} is not there; make it with: python -m pipeline.train ... "
            f"--out {folder}"
        )
    if not (folder / name).is_file():
        raise UserError(
            f"{folder} has no {name}; a checkpoint is a folder that pipeline.train wrote"
        )
    if (folder / name).stat().st_size > LARGEST_JSON:
        raise UserError(
            f"{folder / name} is larger than {LARGEST_JSON >> 20} MiB: it is not a checkpoint's"
        )
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, broken, a number of thousands of digits, lists in lists
        raise UserError(f"{folder / name} is not JSON: {error}") from error
    if not isinstance(found, kind):
        raise UserError(f"{folder / name} holds {type(found).__name__}, not {kind.__name__}")
    return found
