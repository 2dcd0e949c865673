"""Checkpoint folders: the files of a training run, as safetensors and JSON, without pickle.

A checkpoint folder is enough to caption photographs. It has the layout of a repository on the
Hugging Face hub:

    model.safetensors        weights of the captioner: the best on dev, or their moving average
    config.json              model sizes, training settings, identity of the cache, decoding
                             defaults, format number
    vocab.json               the words, or subwords, by id
    tokenizer.json           the subword tokenizer; only with --vocabulary bpe
    frequencies.safetensors  document frequencies of n-grams in the training set; only for
                             --consensus
    backbone.safetensors     weights of the backbone, unless the hub has them under its name
    last.safetensors         the training state for --resume: weights, optimiser, moving average,
                             progress; it is not shared

Checkpoints are untrusted input. Loading runs no code from a checkpoint and opens no path that a
checkpoint names. It allocates no memory for sizes that the weight file does not confirm.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache, differences, kinds_of, packed_backbone
from data.files import atomic_write, atomic_write_text
from data.segmentation import prompt_tokens, segmented
from data.subwords import Subwords
from data.vocabulary import Vocabulary
from models import MAX_CAPTIONS, ModelError
from models.decoders.interface import Decoder
from models.decoders.registry import DECODERS, create_decoder
from pipeline.checkpoints.tensors import load_tensors, read_shapes, save_tensors
from pipeline.cli import UserError
from pipeline.tasks.base import Task
from pipeline.tasks.registry import task_of
from pipeline.terminal import say

FORMAT = 1
SHARED = (
    "model.safetensors",
    "config.json",
    "vocab.json",
    "answers.json",
    "tokenizer.json",
    "frequencies.safetensors",
    "backbone.safetensors",
)
MAX_JSON_BYTES = 1 << 26


# --------------------------------------------------------------------------------------- captioners


@dataclass
class Checkpoint:
    """A captioner, and the data that it needs to caption photographs.

    identity: identity of the features that the captioner was trained on.
    decoding: default options of decoding. training: settings of the training run.
    provenance: provenance of the cache. trained_on: description of the training set.
    folder: the checkpoint folder, if there is one.
    """

    captioner: Decoder
    vocabulary: Vocabulary
    identity: dict[str, Any]
    decoding: dict[str, Any]
    training: dict[str, Any]
    provenance: dict[str, Any]
    trained_on: str = ""
    folder: Path | None = None
    answers: tuple[str, ...] = ()  # the classes of the decoder's head, in order

    def describe(self) -> str:
        """Describe the features in a few words, for messages."""
        return " + ".join(map(_describe_kind, kinds_of(self.identity)))

    def new_task(self) -> Task:
        """Create the task of the checkpoint. Raises UserError if this version does not have it."""
        return task_of(self.training, self.vocabulary.segment)

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        """Return the words of texts that are not in the vocabulary, in alphabetical order."""
        words = {word for text in texts for word in segmented(text, self.vocabulary.segment)}
        return sorted(words - set(self.vocabulary.words))

    def count_cut(self, prompts: Iterable[str]) -> int:
        """Count the prompts that are longer than `max_prompt` and lose their first tokens."""
        token_lists = (prompt_tokens(prompt, self.vocabulary.segment) for prompt in prompts)
        lengths = (len(self.vocabulary.encode(words)) for words in token_lists)
        return sum(length > self.captioner.config.max_prompt for length in lengths)


def _describe_kind(identity: Mapping[str, Any]) -> str:
    grid = identity.get("grid")
    parts = [
        identity.get("detector"),
        identity.get("backbone"),
        identity["regions"],
        identity.get("imported"),
        "x".join(map(str, grid)) if isinstance(grid, list) else "",
        f"({identity['weights']})" if "weights" in identity else "",
    ]
    return " ".join(str(part) for part in parts if part)


def save_description(folder: Path, checkpoint: Checkpoint) -> None:
    """Write config.json, vocab.json and, for subwords, tokenizer.json: everything but weights."""
    config = {
        "format": FORMAT,
        "decoder": decoder_name(checkpoint.captioner),
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
    if checkpoint.answers:
        atomic_write_text(
            folder / "answers.json", json.dumps(checkpoint.answers, ensure_ascii=False, indent=0)
        )
    atomic_write_text(folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")


def save_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    save_tensors(folder / "model.safetensors", weights)


def load_record(folder: Path) -> dict[str, Any]:
    """Read the config.json of a checkpoint. Raises UserError if its format or content is wrong."""
    config = _read_json(folder, "config.json", dict)
    path = folder / "config.json"
    if config.get("format") != FORMAT:
        newer = isinstance(config.get("format"), int) and config["format"] > FORMAT
        hint = "; a newer version of Onceover wrote it: update Onceover" if newer else ""
        raise UserError(
            f"{path} has format {config.get('format')}, this version reads {FORMAT}{hint}"
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
            f"{path} is not the config of a checkpoint: {', '.join(wrong)} missing or of a wrong "
            "type"
        )
    _check_decoding(path, config["decoding"])
    kinds = config["features"].get("kinds", [config["features"]])
    if not isinstance(kinds, list) or not all(
        isinstance(kind, dict) and isinstance(kind.get("regions"), str)
        for kind in (config["features"], *kinds)
    ):
        raise UserError(f"{path}: features: regions must be the name of a kind of regions")
    return config


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a checkpoint folder strictly.

    Raises UserError if a file is missing or damaged, or if the files do not fit together.
    """
    config = load_record(folder)
    captioner = _load_decoder(folder, config.get("decoder", "transformer"), config["model"])
    if config["features"].get("channels", captioner.config.channels) != captioner.config.channels:
        raise UserError(
            f"{folder}/config.json: features and model have different numbers of channels; copy it "
            "again"
        )
    vocabulary = load_vocabulary(folder)
    if len(vocabulary) != captioner.config.words:
        raise UserError(
            f"{folder}/vocab.json has {len(vocabulary)} words, config.json says "
            f"{captioner.config.words}; copy both again"
        )
    return Checkpoint(
        captioner.eval(),
        vocabulary,
        identity=config["features"],
        decoding=config["decoding"],
        training=config["training"],
        provenance=config["provenance"],
        trained_on=config["trained_on"],
        folder=folder,
        answers=load_answers(folder, captioner),
    )


def load_answers(folder: Path, decoder: Decoder) -> tuple[str, ...]:
    """The answers of a decoder's classes. Raises UserError if they are missing or do not fit."""
    if not decoder.config.classes:
        return ()
    answers = _read_json(folder, "answers.json", list)
    if len(answers) != decoder.config.classes or not all(isinstance(a, str) for a in answers):
        raise UserError(
            f"{folder}/answers.json has {len(answers)} answers, config.json says "
            f"{decoder.config.classes}; copy both again"
        )
    return tuple(answers)


def check_features(checkpoint: Checkpoint, cache: FeatureCache | NoFeatures) -> None:
    """Check that a cache has the features that a checkpoint was trained on.

    Raises UserError if the identities differ. Prints a warning if only the provenances differ.
    """
    if different := differences(checkpoint.identity, cache.identity):
        raise UserError(
            f"checkpoint {checkpoint.folder} was trained on {checkpoint.describe()}, "
            f"{cache.path} has other features ({'; '.join(different)}); pass the --features "
            "it was trained on"
        )
    # The number of augmented views may differ: only training reads them.
    trained, given = (
        {**record, "views": None} for record in (checkpoint.provenance, cache.provenance)
    )
    if different := differences(trained, given):
        say(
            f"warning: {cache.path} differs from the cache of the training run in "
            f"{'; '.join(different)}"
        )


def decoder_name(decoder: Decoder) -> str:
    """The name of a decoder in DECODERS."""
    return next(name for name, kind in DECODERS.items() if type(decoder) is kind)


def _load_decoder(folder: Path, name: str, sizes: Mapping[str, Any]) -> Decoder:
    """Build the decoder of `sizes` and load its weights.

    The sizes are compared with the header of the weight file before memory is allocated.
    """
    path, weights = folder / "config.json", folder / "model.safetensors"
    if name not in DECODERS:
        raise UserError(f"{path}: no decoder {name!r}; this version has {', '.join(DECODERS)}")
    shapes, decoder_class = read_shapes(weights), DECODERS[name]
    try:
        config = decoder_class.Config.from_record(sizes)
        # Too many layers are an error here, because they would take minutes to build.
        for field, value in asdict(config).items():
            if field.endswith("layers") and value > len(shapes):
                raise ModelError(
                    f"{field} is {value}, and model.safetensors has {len(shapes)} tensors"
                )
        with torch.device("meta"):
            captioner = create_decoder(name, config)
    except (ModelError, RuntimeError) as error:
        raise UserError(f"{path} is not the config of a checkpoint: model: {error}") from error
    expected = {name: tuple(value.shape) for name, value in captioner.state_dict().items()}
    for name in sorted({*expected, *shapes}):
        shape, expected_shape = shapes.get(name, "missing"), expected.get(name, "missing")
        if shape != expected_shape:
            raise UserError(
                f"{weights} does not fit its config.json: {name} is {shape} and should be "
                f"{expected_shape}; copy both again, or train again"
            )
    tensors, _ = load_tensors(weights)
    if not_finite := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise UserError(
            f"{weights} has values that are not finite, in {not_finite[0]}; copy it again, or "
            "train again"
        )
    captioner.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return captioner


def load_vocabulary(folder: Path) -> Vocabulary:
    """Load the words or subwords of a checkpoint."""
    words = _read_json(folder, "vocab.json", list)
    if not all(isinstance(word, str) for word in words):
        raise UserError(f"{folder}/vocab.json has an entry that is not a string; copy it again")
    segment = segment_of(load_record(folder)["training"])
    if (folder / "tokenizer.json").exists():
        return Subwords(words, json.dumps(_read_json(folder, "tokenizer.json", dict)), segment)
    return Vocabulary(words, segment)


def segment_of(training: Mapping[str, Any]) -> str:
    """The `segment` setting of a training run, as in `data.segmentation`."""
    return "characters" if training.get("segment") == "characters" else "words"


def _check_decoding(path: Path, decoding: Mapping[str, Any]) -> None:
    beam, penalty = decoding.get("beam"), decoding.get("length_penalty")
    beam_fits = type(beam) is int and 1 <= beam <= MAX_CAPTIONS
    penalty_fits = (type(penalty) is int or type(penalty) is float) and abs(penalty) <= 10
    if not beam_fits or not penalty_fits or len(decoding) != 2:
        raise UserError(
            f"{path}: decoding is {decoding}, it must have a beam from 1 to {MAX_CAPTIONS} and a "
            "length_penalty from -10 to 10"
        )


def copy_backbone(cache: Path, folder: Path) -> None:
    """Copy the weights of the backbone from a cache, if it has them, to a checkpoint folder."""
    source, target = cache / "backbone.safetensors", folder / "backbone.safetensors"
    if cache.is_file():
        weights = packed_backbone(cache)
    else:
        weights = source.read_bytes() if source.exists() else None
    if weights is not None and not target.exists():
        with atomic_write(target) as temporary:
            temporary.write_bytes(weights)


# ----------------------------------------------------------------------------------- training state


def save_training_state(
    folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write last.safetensors atomically; its header has `record` as JSON."""
    save_tensors(folder / "last.safetensors", tensors, {"record": json.dumps(record)})


def load_training_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the record of last.safetensors. Raises UserError if it is damaged."""
    tensors, header = load_tensors(folder / "last.safetensors")
    try:
        return tensors, json.loads(header["record"])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / 'last.safetensors'} has no valid record of a run: {error!r}; start the run "
            "again without --resume"
        ) from error


def remove_temporary_files(folder: Path) -> None:
    """Remove partial files of a killed process."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _read_json(folder: Path, name: str, kind: type) -> Any:
    if not folder.is_dir():
        raise UserError(
            f"checkpoint {folder} does not exist; make it with: python -m pipeline.train ... "
            f"--out {folder}"
        )
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} has no {name}; a checkpoint is a folder from pipeline.train")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(
            f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, so it is not part of a checkpoint"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    # ValueError: not UTF-8, invalid JSON, or a number with too many digits. RecursionError: lists
    # nested too deeply.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} contains a {type(value).__name__}, not a {kind.__name__}")
    return value
