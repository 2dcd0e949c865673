"""What to train and how: the settings of pipeline.train, its presets, and how the learning rate goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from data.batches import CaptionedImages
from data.datasets.registry import CAPTIONS_FROM, DATASETS
from data.segmentation import SEGMENTS
from data.subwords import Subwords
from data.vocabulary import Vocabulary
from models.decoders.registry import DECODERS
from pipeline.cli import DEVICES, PRECISIONS, UserError, setting
from pipeline.runtime import Machine
from pipeline.training.rewards import parse_rewards

SIZES = ("width", "heads", "encoder_layers", "decoder_layers", "feedforward", "dropout")
# Settings that stand under what --config and flags say; chosen by the number of captions where none is named.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # a few hundred photographs (docs/results.md): all that keeps a decoder from learning them by heart
    "few": {"width": 128, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "feedforward": 512, "dropout": 0.3,
            "lr": 1e-3, "batch": 50, "region_dropout": 0.5, "ema": 0.99},
    "tiny": {"width": 128, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "feedforward": 512, "dropout": 0.1,
             "lr": 1e-3, "batch": 50},
    "small": {"width": 256, "heads": 4, "encoder_layers": 3, "decoder_layers": 3, "feedforward": 1024, "dropout": 0.3,
              "lr": 4e-4, "batch": 20},
    "base": {"width": 512, "heads": 8, "encoder_layers": 3, "decoder_layers": 3, "feedforward": 2048, "dropout": 0.1,
             "lr": 3e-4, "batch": 50},
    "large": {"width": 768, "heads": 12, "encoder_layers": 4, "decoder_layers": 4, "feedforward": 3072, "dropout": 0.1,
              "lr": 3e-4, "batch": 50},
    # the best known on Flickr8k within an hour on two cores, over a cache with --views flip (docs/results.md)
    "flickr8k": {"width": 384, "heads": 6, "encoder_layers": 3, "decoder_layers": 3, "feedforward": 1536, "dropout": 0.35,
                 "lr": 3e-4, "batch": 20, "schedule": "constant", "ema": 0.998, "epochs": 11},
}  # fmt: skip
# With --scst, in place of a preset's.
SCST: Mapping[str, Any] = {"lr": 1e-5, "batch": 20, "dropout": 0.0, "epochs": 15, "temperature": 0.5}
# A data set of few images is passed over until it had so many steps, of a twentieth of its images each.
SMALL_SET_STEPS, SMALLEST_BATCH = 1000, 8
VALIDATION_STEPS = 50  # at least so many steps lie between two validations of a small set
PATIENT_STEPS = 500  # steps before which --patience does not end a run
SCHEDULES = ("cosine", "noam", "constant")
# between a run and its resumption
MAY_DIFFER = {"resume", "init", "out", "features", "root", "annotations", "images", "device", "cache_in", "compile",
              "accumulate", "save_every", "log_every", "wandb"}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how; None is chosen from the size of the data, and said."""

    features: Path | None = setting(None, "the cache that pipeline.extract made  [cache/DATASET]")
    dataset: str = setting("sample", "layout of the captions", choices=DATASETS)
    root: Path | None = setting(None, "folder of the dataset  [sample: datasets/sample]")
    annotations: Path | None = setting(None, "caption file, where the layout does not name it")
    images: Path | None = setting(None, "folder of the photographs, for --dataset coco")
    captions_from: str = setting("auto", "of --dataset folder: its caption files, or the .txt beside each photograph",
                                 choices=CAPTIONS_FROM)  # fmt: skip
    out: Path | None = setting(None, "folder of the run  [runs/DATASET]")
    resume: bool = setting(False, "go on with the run in --out")
    init: Path | None = setting(None, "begin with the weights, sizes and words of this run (or hf-hub:user/name)")
    scst: bool = setting(False, "self-critical training of --init: raise the reward of the captions it draws itself")
    num_samples: int = setting(5, "captions drawn of each image, with --scst")
    samples: str = setting("random", "how they are found, with --scst", choices=("random", "beam"))
    temperature: float | None = setting(None, "of the distribution they are drawn from and that is trained, with --scst  [0.5]")
    baseline: str = setting("mean", "rewards are held against the other samples' mean or that of greedy decoding, with --scst",
                            choices=("mean", "greedy"))  # fmt: skip
    reward: str = setting("CIDEr", "weighted sum, as CIDEr:1,BLEU-4:0.5; also any module:callable, with --scst")
    decoder: str = setting("transformer", "which decoder", choices=tuple(DECODERS))
    preset: str | None = setting(None, "settings by name  [few, tiny, small or base by captions]", choices=tuple(PRESETS))
    width: int | None = setting(None, "model width D  [by preset]")
    heads: int | None = setting(None, "attention heads  [by preset]")
    encoder_layers: int | None = setting(None, "layers over the regions  [by preset]")
    decoder_layers: int | None = setting(None, "layers over the words  [by preset]")
    feedforward: int | None = setting(None, "inner width of the feed-forward layers  [by preset]")
    dropout: float | None = setting(None, "dropout  [by preset; with --scst 0]")
    region_dropout: float | None = setting(None, "share of an image's regions left out of a step  [by preset, else 0]")
    word_dropout: float = setting(0.0, "share of the words read that become <unk>")
    scheduled_sampling: float = setting(0.0, "share of the words read that become the model's own, at the end; from 0 on")
    views: bool = setting(True, "draw from the views that the cache keeps (extract --views flip)")
    vocabulary: str = setting("word", "words, or pieces of words by byte-pair encoding", choices=("word", "bpe"))
    segment: str | None = setting(
        None, "what a word is: characters for captions without blanks between words  [words]", choices=SEGMENTS
    )
    vocab_size: int = setting(4000, "pieces, with --vocabulary bpe")
    max_length: int | None = setting(
        None, "words (bpe: pieces) of a caption; longer ones are cut  [so that 99 % are whole; at least 20, bpe 30]"
    )
    min_count: int | None = setting(None, "how often a word must be seen  [5; 1 below 10,000 captions]")
    epochs: int | None = setting(
        None, "passes over train  [300,000 captions in all, 12 to 60; of few images 1,000 steps; sample 18; --scst 15]"
    )
    minutes: float | None = setting(None, "end after so long, validation included; whichever of this and --epochs is first")
    batch: int | None = setting(
        None, "images a step, over all processes, with all captions  [by preset, of few images a 20th; with --scst 20]"
    )
    accumulate: int = setting(1, "parts that a step's images are taken in: less memory, the same step")
    lr: float | None = setting(None, "peak learning rate  [by preset; with --scst 1e-5]")
    schedule: str = setting("cosine", "of the learning rate, after warm-up", choices=SCHEDULES)
    warmup: float = setting(0.05, "share of the training before the peak")
    weight_decay: float = setting(0.01, "of AdamW, on matrices only")
    label_smoothing: float = setting(0.1, "mass given to all words alike")
    clip: float = setting(1.0, "largest gradient norm")
    ema: float | None = setting(
        None, "decay of a moving average of the weights, which is what is scored and kept; 0: none  [by preset, else 0]"
    )
    compile: bool = setting(False, "compile the model: faster steps on a GPU after a first slow one")
    cache_in: str = setting("auto", "where features are kept while training", choices=("auto", "disk", "ram", "device"))
    eval_steps: int | None = setting(None, "steps between validations on dev  [an epoch; for a small set 50]")
    patience: int = setting(5, f"validations without a better CIDEr on dev before the early stop, from step {PATIENT_STEPS} on")
    train_on_dev: bool = setting(False, "train on dev too, where the recipe is fixed: the last epoch is kept")
    beam: int = setting(5, "beams on dev, and the run's default")
    length_penalty: float = setting(1.0, "exponent of the length that scores are divided by, and the run's default")
    limit: int | None = setting(None, "take only the first N train images (and of dev)")
    save_every: float = setting(10.0, "minutes between saves within an epoch, for --resume")
    log_every: int = setting(50, "steps between lines of metrics.jsonl within an epoch")
    wandb: bool = setting(False, "log to Weights & Biases too")
    device: str = setting("auto", "where to train", choices=DEVICES)
    precision: str = setting("auto", "of products", choices=PRECISIONS)
    seed: int = setting(0, "of weights, order and dropout")

    def __post_init__(self) -> None:
        at_least_1 = "batch beam max_length epochs min_count limit patience accumulate log_every vocab_size eval_steps "
        at_least_1 += "num_samples"
        shares = "warmup label_smoothing region_dropout word_dropout scheduled_sampling ema"
        positive = "lr clip minutes temperature"
        for names, fits, must in (
            (at_least_1, lambda value: value >= 1, "at least 1"),
            (shares, lambda value: 0 <= value < 1, "in [0, 1)"),
            (positive, lambda value: value > 0, "above 0"),
            ("weight_decay save_every", lambda value: value >= 0, "at least 0"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise UserError(f"--{name.replace('_', '-')} is {value}, it must be {must}")
        if self.init and self.preset:
            raise UserError(f"--preset {self.preset} goes with no --init, whose sizes stay; pass --lr and others by themselves")
        if self.scst:
            self._check_scst()
        else:
            self._refuse_changed("of --scst", "num_samples", "samples", "temperature", "baseline", "reward")

    def _check_scst(self) -> None:
        parse_rewards(self.reward)
        if self.init is None:
            raise UserError("--scst needs --init: a run of pipeline.train, trained on the captions first")
        if self.num_samples == 1 and not (self.samples == "random" and self.baseline == "greedy"):
            raise UserError("--num-samples 1 leaves no others to hold it against; at least 2, or --baseline greedy")
        if self.samples == "beam" and self.baseline == "greedy":
            raise UserError("--samples beam: they are held against their own mean, with no --baseline greedy")
        if self.samples == "beam" and self.temperature is not None:
            raise UserError("--samples beam: beams are not drawn, they have no --temperature")
        self._refuse_changed("of training on captions, not of --scst", "word_dropout", "scheduled_sampling", "label_smoothing")

    def _refuse_changed(self, what: str, *names: str) -> None:
        """UserError where one of these settings, which would do nothing, is not its default."""
        defaults = {item.name: item.default for item in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"--{name.replace('_', '-')} is {what}")


def choose_preset(config: TrainConfig, captions: int) -> str:
    if captions < 5_000 and config.dataset != "sample":
        return "few"
    return "tiny" if captions < 15_000 else "small" if captions < 100_000 else "base"


def resolve(
    config: TrainConfig,
    train: CaptionedImages,
    machine: Machine,
    sizes: Mapping[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
) -> TrainConfig:
    """Choose what the options leave open from the number of captions and the machine. sizes, vocabulary: those of --init,
    which stay; UserError where an option has another."""
    captions, images = train.captions, len(train)
    preset = config.preset or choose_preset(config, captions)
    chosen = {"region_dropout": 0.0, "ema": 0.0, **PRESETS[preset], "preset": preset}
    chosen["min_count"] = 5 if captions >= 10_000 else 1
    if sizes:
        for name in (*SIZES[:-1], "max_length"):
            if getattr(config, name) not in (None, sizes[name]):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}, {config.init} has {sizes[name]}")
        kind = "bpe" if isinstance(vocabulary, Subwords) else "word"
        if config.vocabulary not in ("word", kind):
            raise UserError(f"--vocabulary is {config.vocabulary}, {config.init} has words")
        config._refuse_changed(f"of a new vocabulary; that of {config.init} stays", "min_count", "vocab_size")
        config, chosen = replace(config, vocabulary=kind), chosen | sizes | {"preset": None, "min_count": None}
        chosen |= {"region_dropout": 0.0, "ema": 0.0}
    if config.scst:
        chosen |= SCST
        if config.samples == "beam":
            del chosen["temperature"]
    if config.dataset != "sample":
        chosen["batch"] = min(chosen["batch"], max(SMALLEST_BATCH, images // 20))
    if not config.minutes:
        chosen.setdefault("epochs", min(60, max(12, round(300_000 / captions))))
    else:
        chosen.pop("epochs", None)
    if config.dataset == "sample":
        chosen |= {"epochs": 18} if not (config.minutes or config.scst) else {}
    elif (steps := -(-images // (config.batch or chosen["batch"]))) < VALIDATION_STEPS:
        if "epochs" in chosen and not config.scst:
            chosen["epochs"] = max(chosen["epochs"], -(-SMALL_SET_STEPS // steps))
        if config.epochs is None:
            chosen["eval_steps"] = VALIDATION_STEPS
    chosen = {name: chosen[name] for name in vars(config) if name in chosen and getattr(config, name) is None}
    return replace(config, **chosen, precision=machine.precision)


def learning_rate(config: TrainConfig, done: float) -> float:
    """The learning rate where `done` (0 to 1) of the training is over: a straight rise over its first `warmup`, then half a
    cosine to zero, or noam's inverse square root of the time (Vaswani et al. 2017), or no change."""
    if done < config.warmup:
        return config.lr * done / config.warmup
    if config.schedule == "noam":
        return config.lr * math.sqrt(max(config.warmup, 1e-3) / max(done, 1e-3))
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))
