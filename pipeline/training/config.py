"""The settings of pipeline.train, its presets, and the learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from data.batches import ImageTexts
from data.segmentation import SEGMENTS
from data.subwords import Subwords
from data.vocabulary import Vocabulary
from models.decoders.registry import DECODERS
from pipeline.cli import DEVICES, PRECISIONS, UserError, flag_of, options_of, setting
from pipeline.runtime import Machine
from pipeline.sources import SourceOptions
from pipeline.tasks.registry import TASKS
from pipeline.training.rewards import parse_rewards

# Settings by the name of a preset, chosen by the number of captions where none is named; flags and
# --config win over it.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # a few hundred photographs (docs/results.md): all that keeps a decoder from learning them by
    # heart
    "few": {
        "width": 128,
        "heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "feedforward": 512,
        "dropout": 0.3,
        "lr": 1e-3,
        "batch": 50,
        "region_dropout": 0.5,
        "ema": 0.99,
    },
    "tiny": {
        "width": 128,
        "heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "feedforward": 512,
        "dropout": 0.1,
        "lr": 1e-3,
        "batch": 50,
    },
    "small": {
        "width": 256,
        "heads": 4,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "feedforward": 1024,
        "dropout": 0.3,
        "lr": 4e-4,
        "batch": 20,
    },
    "base": {
        "width": 512,
        "heads": 8,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "feedforward": 2048,
        "dropout": 0.1,
        "lr": 3e-4,
        "batch": 50,
    },
    "large": {
        "width": 768,
        "heads": 12,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "feedforward": 3072,
        "dropout": 0.1,
        "lr": 3e-4,
        "batch": 50,
    },
    # the best known on Flickr8k within an hour on two cores, over a cache with --views flip
    # (docs/results.md)
    "flickr8k": {
        "width": 384,
        "heads": 6,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "feedforward": 1536,
        "dropout": 0.35,
        "lr": 3e-4,
        "batch": 20,
        "schedule": "constant",
        "ema": 0.998,
        "epochs": 11,
    },
}
# With --scst, in place of a preset's.
SCST: Mapping[str, Any] = {
    "lr": 1e-5,
    "batch": 20,
    "dropout": 0.0,
    "epochs": 15,
    "temperature": 0.5,
}
# A data set of few images is passed over until it had so many steps, of a twentieth of its images
# each.
SMALL_SET_STEPS, SMALLEST_BATCH = 1000, 8
VALIDATION_STEPS = 50  # smallest number of steps between two validations of a small data set
PATIENT_STEPS = 500  # steps before which --patience does not end a run
SCHEDULES = ("cosine", "noam", "constant")
# Defaults that depend on neither the preset nor the size of the data.
DEFAULTS: Mapping[str, Any] = {"region_dropout": 0.0, "ema": 0.0, "schedule": "cosine"}


@dataclass(frozen=True)
class TrainConfig(SourceOptions):
    """The options of pipeline.train. None: chosen by `resolve` from the size of the data."""

    features: Path | None = setting(
        None,
        "cache written by pipeline.extract, or none to train without images  [cache/DATASET]",
        group="data",
        may_change_on_resume=True,
    )
    limit: int | None = setting(
        None, "use only the first N images of train and of dev", group="data", at_least=1
    )
    train_on_dev: bool = setting(
        False,
        "train on train and dev for a fixed number of epochs; keeps the last epoch",
        group="data",
    )
    views: bool = setting(
        True, "draw from the views in the cache (extract --views ...)", group="data"
    )
    vocabulary: str = setting(
        "word",
        "word: whole words; bpe: subwords by byte-pair encoding",
        choices=("word", "bpe"),
        group="data",
    )
    segment: str | None = setting(
        None,
        "unit of the captions: characters for languages without spaces between words  [words]",
        choices=SEGMENTS,
        group="data",
    )
    vocab_size: int = setting(
        4000, "vocabulary size, with --vocabulary bpe", at_least=1, group="data"
    )
    max_length: int | None = setting(
        None,
        "largest number of words (bpe: subwords) of a caption; longer ones are cut  [the 99th "
        "percentile; at least 20, bpe 30]",
        at_least=1,
        group="data",
    )
    min_count: int | None = setting(
        None,
        "smallest number of occurrences of a word in the vocabulary  [5; 1 below 10,000 captions]",
        at_least=1,
        group="data",
    )
    task: str = setting("captioning", "task", registry=TASKS, group="model")
    decoder: str = setting("transformer", "which decoder", registry=DECODERS, group="model")
    init: Path | None = setting(
        None,
        "start from the weights, sizes and vocabulary of this run (or hf-hub:user/name)",
        group="model",
        may_change_on_resume=True,
    )
    preset: str | None = setting(
        None,
        "named settings, listed below  [few, tiny, small or base by captions]",
        choices=tuple(PRESETS),
        group="model",
    )
    epochs: int | None = setting(
        None,
        "number of epochs  [enough for 300,000 captions, 12 to 60; for few images 1,000 steps; "
        "sample 18; --scst 15]",
        at_least=1,
        group="training",
    )
    minutes: float | None = setting(
        None,
        "largest training time in minutes, including validation",
        above=0,
        group="training",
    )
    batch: int | None = setting(
        None,
        "images per step over all processes, each with all its captions  [by preset; for few "
        "images a 20th of them; with --scst 20]",
        at_least=1,
        group="training",
    )
    lr: float | None = setting(
        None, "peak learning rate  [by preset; with --scst 1e-5]", above=0, group="training"
    )
    schedule: str | None = setting(
        None,
        "learning rate schedule after warm-up  [by preset, else cosine]",
        choices=SCHEDULES,
        group="training",
    )
    warmup: float = setting(
        0.05, "share of the training used for warm-up", at_least=0, below=1, group="training"
    )
    weight_decay: float = setting(
        0.01, "weight decay of AdamW, for matrices only", at_least=0, group="training"
    )
    label_smoothing: float = setting(0.1, "label smoothing", at_least=0, below=1, group="training")
    clip: float = setting(1.0, "gradient clipping norm", above=0, group="training")
    ema: float | None = setting(
        None,
        "decay of the moving average of the weights, which is scored and saved; 0: no average  [by "
        "preset, else 0]",
        at_least=0,
        below=1,
        group="training",
    )
    region_dropout: float | None = setting(
        None,
        "share of the regions of each image that a step leaves out  [by preset, else 0]",
        at_least=0,
        below=1,
        group="training",
    )
    word_dropout: float = setting(
        0.0,
        "share of the input words that are replaced by <unk>",
        at_least=0,
        below=1,
        group="training",
    )
    scheduled_sampling: float = setting(
        0.0,
        "final share of the input words that are replaced by the model's own predictions; starts "
        "at 0",
        at_least=0,
        below=1,
        group="training",
    )
    eval_steps: int | None = setting(
        None,
        "steps between validations on dev  [one epoch; for few images 50]",
        at_least=1,
        group="training",
    )
    patience: int = setting(
        5,
        "validations without a better score on dev before the early "
        "stop, from step "
        f"{PATIENT_STEPS} on",
        at_least=1,
        group="training",
    )
    beam: int = setting(
        5, "beam size for dev, stored as the run's default", at_least=1, group="training"
    )
    length_penalty: float = setting(
        1.0,
        "length penalty for dev, stored as the run's default",
        group="training",
    )
    scst: bool = setting(
        False,
        "self-critical sequence training of --init: raise the reward of its own samples",
        group="self-critical",
    )
    num_samples: int = setting(5, "samples per image", at_least=1, group="self-critical")
    samples: str = setting(
        "random",
        "random: random samples; beam: the beams of a beam search",
        choices=("random", "beam"),
        group="self-critical",
    )
    temperature: float | None = setting(
        None,
        "temperature of the sampling distribution, which is also the one that is trained  [0.5]",
        above=0,
        group="self-critical",
    )
    baseline: str = setting(
        "mean",
        "baseline of the reward: the mean of the other samples, or the reward of greedy decoding",
        choices=("mean", "greedy"),
        group="self-critical",
    )
    reward: str = setting(
        "CIDEr",
        "reward: a weighted sum such as CIDEr:1,BLEU-4:0.5, or module:callable",
        group="self-critical",
    )
    out: Path | None = setting(
        None, "folder of the run  [runs/DATASET]", group="output", may_change_on_resume=True
    )
    resume: bool = setting(
        False, "continue the run in --out", group="output", may_change_on_resume=True
    )
    save_every: float = setting(
        10.0,
        "minutes between saves within an epoch",
        at_least=0,
        group="output",
        may_change_on_resume=True,
    )
    log_every: int = setting(
        50,
        "steps between log lines in metrics.jsonl",
        at_least=1,
        group="output",
        may_change_on_resume=True,
    )
    wandb: bool = setting(
        False, "also log to Weights & Biases", group="output", may_change_on_resume=True
    )
    accumulate: int = setting(
        1,
        "gradient accumulation: split each step into this many parts",
        at_least=1,
        group="machine",
        may_change_on_resume=True,
    )
    compile: bool = setting(
        False,
        "compile the model with torch.compile; faster steps on a GPU after a slow first one",
        group="machine",
        may_change_on_resume=True,
    )
    cache_in: str = setting(
        "auto",
        "where the features are kept during training",
        choices=("auto", "disk", "ram", "device"),
        group="machine",
        may_change_on_resume=True,
    )
    device: str = setting(
        "auto", "training device", choices=DEVICES, group="machine", may_change_on_resume=True
    )
    precision: str = setting(
        "auto", "precision of matrix products", choices=PRECISIONS, group="machine"
    )
    seed: int = setting(0, "random seed of weights, data order and dropout", group="machine")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init and self.preset:
            raise UserError(
                f"--preset {self.preset} cannot be used with --init, which keeps the sizes of its "
                f"run; pass --lr and other options one by one"
            )
        if self.scst:
            self._check_scst()
        else:
            self._refuse_changed(
                "of --scst", "num_samples", "samples", "temperature", "baseline", "reward"
            )

    @property
    def decoder_options(self) -> Mapping[str, Any]:
        """The decoder options that were given or resolved, by name."""
        return self.extensions.get("decoder", {})

    def _check_scst(self) -> None:
        parse_rewards(self.reward)
        if self.init is None:
            raise UserError(
                "--scst needs --init: a run of pipeline.train, trained on the captions first"
            )
        if self.num_samples == 1 and not (self.samples == "random" and self.baseline == "greedy"):
            raise UserError(
                "--num-samples 1 leaves no other samples to compare with; pass at least 2, or "
                "--baseline greedy"
            )
        if self.samples == "beam" and self.baseline == "greedy":
            raise UserError(
                "--samples beam: beams are compared with their own mean, not with --baseline greedy"
            )
        if self.samples == "beam" and self.temperature is not None:
            raise UserError("--samples beam: beams are not sampled, so they have no --temperature")
        self._refuse_changed(
            "of training on captions, not of --scst",
            "word_dropout",
            "scheduled_sampling",
            "label_smoothing",
        )

    def _refuse_changed(self, what: str, *names: str) -> None:
        """Raise UserError if one of these settings, which would have no effect, is not its
        default.
        """
        defaults = {item.name: item.default for item in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"{flag_of(name)} is {what}")


def choose_preset(config: TrainConfig, captions: int) -> str:
    if captions < 5_000 and config.dataset != "sample":
        return "few"
    return "tiny" if captions < 15_000 else "small" if captions < 100_000 else "base"


def resolve(
    config: TrainConfig,
    train: ImageTexts,
    machine: Machine,
    sizes: Mapping[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
) -> TrainConfig:
    """Fill in each setting that the options leave open (None).

    Later sources win: DEFAULTS, the preset, the --init run, SCST, the size of the data, the given
    options. sizes, vocabulary: those of --init, which cannot change; UserError if an option
    contradicts them.
    """
    captions, images = train.texts, len(train)
    preset = config.preset or choose_preset(config, captions)
    values = {
        **DEFAULTS,
        "min_count": 5 if captions >= 10_000 else 1,
        **PRESETS[preset],
        "preset": preset,
    }
    if sizes:
        config = _with_words_of_init(config, sizes, vocabulary)
        values |= {**DEFAULTS, **sizes, "preset": None, "min_count": None}
    if config.scst:
        values |= SCST if config.samples == "random" else {**SCST, "temperature": None}
    values |= _values_by_size(config, values, captions, images)
    names = [
        item.name
        for item in options_of(
            next(f for f in fields(config) if f.name == "decoder"), config.decoder
        )
    ]
    options = {name: values[name] for name in names if name in values} | dict(
        config.decoder_options
    )
    open_ones = {
        name: values[name]
        for name in vars(config)
        if name in values and getattr(config, name) is None
    }
    extensions = {**config.extensions, **({"decoder": options} if options else {})}
    return replace(config, **open_ones, extensions=extensions, precision=machine.precision)


def _with_words_of_init(
    config: TrainConfig, sizes: Mapping[str, Any], vocabulary: Vocabulary | None
) -> TrainConfig:
    """Fill in the vocabulary settings of --init; UserError if an option contradicts its sizes or
    vocabulary.
    """
    given = {**config.decoder_options, "max_length": config.max_length}
    for name, value in given.items():
        if name != "dropout" and value not in (None, sizes.get(name)):
            raise UserError(f"{flag_of(name)} is {value}, {config.init} has {sizes.get(name)}")
    kind = "bpe" if isinstance(vocabulary, Subwords) else "word"
    if config.vocabulary not in ("word", kind):
        raise UserError(f"--vocabulary is {config.vocabulary}, {config.init} has words")
    config._refuse_changed(
        f"of a new vocabulary; that of {config.init} stays", "min_count", "vocab_size"
    )
    return replace(config, vocabulary=kind)


def _values_by_size(
    config: TrainConfig, values: Mapping[str, Any], captions: int, images: int
) -> dict[str, Any]:
    """Batch, epochs and steps between validations, from the size of the data."""
    found: dict[str, Any] = {"batch": values["batch"], "epochs": None}
    if not config.minutes or (config.preset and "epochs" in values):
        found["epochs"] = values.get("epochs") or min(60, max(12, round(300_000 / captions)))
    if config.dataset == "sample":
        if not (config.minutes or config.scst):
            found["epochs"] = 18
        return found
    found["batch"] = min(found["batch"], max(SMALLEST_BATCH, images // 20))
    steps = -(-images // (config.batch or found["batch"]))
    if steps < VALIDATION_STEPS:
        if found["epochs"] and not config.scst:
            found["epochs"] = max(found["epochs"], -(-SMALL_SET_STEPS // steps))
        if config.epochs is None:
            found["eval_steps"] = VALIDATION_STEPS
    return found


def learning_rate(config: TrainConfig, done: float) -> float:
    """Learning rate at progress `done` in 0..1.

    Linear warm-up over the first `warmup`, then cosine decay to zero, noam (inverse square root of
    the progress, Vaswani et al. 2017), or constant.
    """
    assert config.lr is not None  # by `resolve`
    if done < config.warmup:
        return config.lr * done / config.warmup
    if config.schedule == "noam":
        return config.lr * math.sqrt(max(config.warmup, 1e-3) / max(done, 1e-3))
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))
