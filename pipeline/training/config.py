"""Settings and presets of pipeline.train, and the learning rate schedules."""

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

# Presets by name. Without --preset, the number of captions selects one. Options on the command line
# and --config override the values of the preset.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # for a few hundred photographs: strong regularization against overfitting (docs/results.md)
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
    # the best known settings for Flickr8k within an hour on two cores, over a cache with
    # --views flip (docs/results.md)
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
# With --scst, these values replace those of the preset.
SCST: Mapping[str, Any] = {
    "lr": 1e-5,
    "batch": 20,
    "dropout": 0.0,
    "epochs": 15,
    "temperature": 0.5,
}
# A small data set has a batch of a twentieth of its images, and enough epochs for this many steps.
SMALL_SET_STEPS, MIN_BATCH = 1000, 8
VALIDATION_STEPS = 50  # minimum number of steps between two validations on a small data set
PATIENT_STEPS = 500  # --patience does not count validations in the first steps
SCHEDULES = ("cosine", "noam", "constant")
# Defaults that depend on neither the preset nor the size of the data.
DEFAULTS: Mapping[str, Any] = {"region_dropout": 0.0, "ema": 0.0, "schedule": "cosine"}


@dataclass(frozen=True)
class TrainConfig(SourceOptions):
    """The options of pipeline.train. `resolve` replaces None by a value, often from the data."""

    features: Path | None = setting(
        None,
        "cache written by pipeline.extract; none: train without images  [cache/DATASET]",
        group="data",
        may_change_on_resume=True,
    )
    limit: int | None = setting(
        None, "use only the first N images of train and of dev", group="data", at_least=1
    )
    train_on: str = setting(
        "train",
        "split to train on; train+val joins them, as for published scores on test",
        choices=("train", "train+val"),
        group="data",
    )
    train_on_dev: bool = setting(
        False,
        "train on train and dev for a fixed number of epochs, and keep the last epoch",
        group="data",
    )
    views: bool = setting(
        True,
        "in each epoch use the original or a random view of each image (see pipeline.extract "
        "--views)",
        group="data",
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
        "maximum number of words (bpe: subwords) of a caption; longer captions are cut  [the 99th "
        "percentile; at least 20, bpe 30]",
        at_least=1,
        group="data",
    )
    max_prompt: int | None = setting(
        None,
        "maximum number of words (bpe: subwords) of a prompt, such as a question; longer prompts "
        "lose their first words  [the longest prompt of train]",
        at_least=1,
        group="data",
    )
    min_count: int | None = setting(
        None,
        "minimum number of occurrences of a word in the vocabulary  [5; 1 below 10,000 captions]",
        at_least=1,
        group="data",
    )
    task: str = setting("captioning", "task to train", registry=TASKS, group="model")
    decoder: str = setting("transformer", "decoder to train", registry=DECODERS, group="model")
    init: Path | None = setting(
        None,
        "run to start from: its weights and sizes, and for captioning its vocabulary; a folder or "
        "hf-hub:user/name",
        group="model",
        may_change_on_resume=True,
    )
    preset: str | None = setting(
        None,
        "named settings, listed below  [few, tiny, small or base, by the number of captions]",
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
        "maximum training time in minutes, including validation",
        above=0,
        group="training",
    )
    batch: int | None = setting(
        None,
        "images per step over all processes, each with all its captions  [by preset; for few "
        "images a twentieth of them; with --scst 20]",
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
        0.05, "share of the training that is warm-up", at_least=0, below=1, group="training"
    )
    weight_decay: float = setting(
        0.01, "weight decay of AdamW, for matrices only", at_least=0, group="training"
    )
    label_smoothing: float = setting(0.1, "label smoothing", at_least=0, below=1, group="training")
    clip: float = setting(1.0, "gradient clipping: maximum norm", above=0, group="training")
    ema: float | None = setting(
        None,
        "decay of the moving average of the weights; the averaged weights are scored and saved; "
        "0: no average  [by preset, else 0]",
        at_least=0,
        below=1,
        group="training",
    )
    region_dropout: float | None = setting(
        None,
        "share of the regions of each image that are removed in a step  [by preset, else 0]",
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
        "share of the input words that are replaced by the model's own predictions at the end of "
        "the training; it increases from 0",
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
        "early stopping: number of validations without a better score on dev, counted after step "
        f"{PATIENT_STEPS}",
        at_least=1,
        group="training",
    )
    beam: int = setting(
        5,
        "beam size for dev, stored as the default of this run",
        at_least=1,
        group="training",
    )
    length_penalty: float = setting(
        1.0,
        "length penalty for dev, stored as the default of this run",
        group="training",
    )
    scst: bool = setting(
        False,
        "self-critical sequence training: continue --init, and raise the reward of its samples",
        group="self-critical",
    )
    num_samples: int = setting(5, "samples per image", at_least=1, group="self-critical")
    samples: str = setting(
        "random",
        "random: random samples; beam: the captions of a beam search",
        choices=("random", "beam"),
        group="self-critical",
    )
    temperature: float | None = setting(
        None,
        "temperature of the distribution that is sampled and trained  [0.5]",
        above=0,
        group="self-critical",
    )
    baseline: str = setting(
        "mean",
        "baseline of the reward; mean: mean reward of the other samples; greedy: reward of the "
        "greedy caption",
        choices=("mean", "greedy"),
        group="self-critical",
    )
    reward: str = setting(
        "CIDEr",
        "reward: a weighted sum such as CIDEr:1,BLEU-4:0.5, or module:callable",
        group="self-critical",
    )
    out: Path | None = setting(
        None,
        "folder of the run  [runs/DATASET; for a task other than captioning runs/DATASET-TASK]",
        group="output",
        may_change_on_resume=True,
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
        "gradient accumulation: number of parts of a step",
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
        "location of the features during training",
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
    seed: int = setting(
        0, "random seed of weights, data order and dropout", at_least=0, group="machine"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init and self.preset:
            raise UserError(
                f"--preset {self.preset} cannot be used with --init, because the sizes are those "
                "of the --init run; pass --lr and other options one by one"
            )
        if self.scst:
            self._check_scst()
        else:
            self._refuse_changed(
                "of --scst; also pass --scst, or omit this option",
                "num_samples",
                "samples",
                "temperature",
                "baseline",
                "reward",
            )

    @property
    def decoder_options(self) -> Mapping[str, Any]:
        """The decoder options by name, as given or resolved."""
        return self.extensions.get("decoder", {})

    def _check_scst(self) -> None:
        parse_rewards(self.reward)
        if self.init is None:
            raise UserError(
                "--scst needs --init: first train on the captions without --scst, then pass that "
                "run as --init"
            )
        if self.num_samples == 1 and not (self.samples == "random" and self.baseline == "greedy"):
            raise UserError(
                "--num-samples 1: each sample is compared with the other samples of its image; "
                "pass at least 2, or --baseline greedy"
            )
        if self.samples == "beam" and self.baseline == "greedy":
            raise UserError(
                "--samples beam cannot be used with --baseline greedy: the baseline is the mean "
                "of the beams"
            )
        if self.samples == "beam" and self.temperature is not None:
            raise UserError(
                "--samples beam cannot be used with --temperature: beam search does not sample"
            )
        self._refuse_changed(
            "of training on captions, not of --scst; omit it",
            "word_dropout",
            "scheduled_sampling",
            "label_smoothing",
        )

    def _refuse_changed(self, reason: str, *names: str) -> None:
        """Raise UserError if one of these settings is not its default.

        Such a setting would have no effect. reason: completes the message "--option is ...".
        """
        defaults = {item.name: item.default for item in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"{flag_of(name)} is {reason}")


def choose_preset(config: TrainConfig, captions: int) -> str:
    """Choose the preset for a number of captions."""
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
    """Replace each setting that is None by a value.

    The values come from DEFAULTS, the preset, the --init run, SCST and the size of the data. A
    later source in this list overrides an earlier one. Options that the user gave are unchanged.

    sizes, vocabulary: those of the --init run, which cannot change; vocabulary is None if the run
    builds a new one. Raises UserError if an option contradicts them.
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
        _check_sizes(config, sizes)
        values |= {**DEFAULTS, **sizes, "preset": None, "max_prompt": None}
    if vocabulary:
        config = _with_vocabulary_of_init(config, vocabulary)
        values["min_count"] = None
    if config.scst:
        values |= SCST if config.samples == "random" else {**SCST, "temperature": None}
    values |= _values_by_size(config, values, captions, images)
    decoder_field = next(item for item in fields(config) if item.name == "decoder")
    names = [item.name for item in options_of(decoder_field, config.decoder)]
    decoder_options = {name: values[name] for name in names if name in values}
    decoder_options |= config.decoder_options
    resolved = {
        name: values[name]
        for name in vars(config)
        if name in values and getattr(config, name) is None
    }
    extensions = dict(config.extensions)
    if decoder_options:
        extensions["decoder"] = decoder_options
    return replace(config, **resolved, extensions=extensions, precision=machine.precision)


def _check_sizes(config: TrainConfig, sizes: Mapping[str, Any]) -> None:
    """Raise UserError if an option contradicts the sizes of the --init run."""
    given = {
        **config.decoder_options,
        "max_length": config.max_length,
        "max_prompt": config.max_prompt,
    }
    for name, value in given.items():
        if name in sizes and name != "dropout" and value not in (None, sizes[name]):
            raise UserError(f"{flag_of(name)} is {value}, {config.init} has {sizes[name]}")


def _with_vocabulary_of_init(config: TrainConfig, vocabulary: Vocabulary) -> TrainConfig:
    """Set --vocabulary to that of the --init run.

    Raises UserError if an option contradicts the vocabulary of the run.
    """
    kind = "bpe" if isinstance(vocabulary, Subwords) else "word"
    if config.vocabulary not in ("word", kind):
        raise UserError(f"--vocabulary is {config.vocabulary}, {config.init} has words")
    config._refuse_changed(
        f"of a new vocabulary, but the run keeps that of {config.init}; omit it",
        "min_count",
        "vocab_size",
    )
    return replace(config, vocabulary=kind)


def _values_by_size(
    config: TrainConfig, values: Mapping[str, Any], captions: int, images: int
) -> dict[str, Any]:
    """Choose the batch, the epochs and the steps between validations for the size of the data."""
    batch, epochs = values["batch"], None
    if not config.minutes or (config.preset and "epochs" in values):
        epochs = values.get("epochs") or min(60, max(12, round(300_000 / captions)))
    if config.dataset == "sample":
        if not (config.minutes or config.scst):
            epochs = 18
        return {"batch": batch, "epochs": epochs}
    batch = min(batch, max(MIN_BATCH, images // 20))
    result = {"batch": batch, "epochs": epochs}
    steps_per_epoch = -(-images // (config.batch or batch))
    if steps_per_epoch < VALIDATION_STEPS:
        if epochs and not config.scst:
            result["epochs"] = max(epochs, -(-SMALL_SET_STEPS // steps_per_epoch))
        if config.epochs is None:
            result["eval_steps"] = VALIDATION_STEPS
    return result


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Learning rate at a progress of the training, 0 to 1.

    Linear warm-up over the first `warmup` of the training, then --schedule: cosine decay to zero,
    noam (inverse square root of the progress, Vaswani et al. 2017), or constant.
    """
    assert config.lr is not None  # set by `resolve`
    warmup = config.warmup
    if progress < warmup:
        return config.lr * progress / warmup
    if config.schedule == "noam":
        return config.lr * math.sqrt(max(warmup, 1e-3) / max(progress, 1e-3))
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
