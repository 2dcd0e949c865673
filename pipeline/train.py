"""Stage two: train a Transformer decoder on a feature cache, any number of times."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.captions import Batch, CaptionedImages, prefetch
from data.features import FeatureCache, write_whole
from data.sources import DATASETS, Source, open_source
from data.vocabulary import PAD, Vocabulary
from models.captioner import Captioner, CaptionerConfig
from models.generation import Generation
from models.grid import Regions
from models.losses import caption_loss
from pipeline.checkpoint import (
    Checkpoint,
    copy_backbone,
    load_training_state,
    save_description,
    save_training_state,
    save_weights,
)
from pipeline.cli import DEVICES, PRECISIONS, UserError, command, setting
from pipeline.decoding import Writer, caption_rows
from pipeline.references import References
from pipeline.runtime import Machine, free_memory, open_machine
from pipeline.scoring import score
from pipeline.terminal import human_bytes, progress, say

PRESETS = {
    "tiny": {"width": 128, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "feedforward": 512, "dropout": 0.1},
    "small": {"width": 256, "heads": 4, "encoder_layers": 3, "decoder_layers": 3, "feedforward": 1024, "dropout": 0.3},
    "base": {"width": 512, "heads": 8, "encoder_layers": 3, "decoder_layers": 3, "feedforward": 2048, "dropout": 0.1},
    "large": {"width": 768, "heads": 12, "encoder_layers": 4, "decoder_layers": 4, "feedforward": 3072, "dropout": 0.1},
}
DEV_IMAGES = 5000  # no more than this many are looked at to choose by
# between a run and its resumption
MAY_DIFFER = {"resume", "out", "features", "root", "annotations", "images", "device", "cache_in", "compile"}


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how; None is chosen from the size of the data, and said."""

    features: Path | None = setting(None, "the cache that pipeline.extract made  [cache/DATASET]")
    dataset: str = setting("sample", "layout of the captions", choices=DATASETS)
    root: Path | None = setting(None, "folder of the dataset  [sample: datasets/sample]")
    annotations: Path | None = setting(None, "caption file, where the layout does not name it")
    images: Path | None = setting(None, "folder of the photographs, for --dataset coco")
    out: Path | None = setting(None, "folder of the run  [runs/DATASET]")
    resume: bool = setting(False, "go on with the run in --out")
    preset: str | None = setting(None, "model size  [tiny, small or base by captions]", choices=tuple(PRESETS))
    width: int | None = setting(None, "model width D  [by preset]")
    heads: int | None = setting(None, "attention heads  [by preset]")
    encoder_layers: int | None = setting(None, "layers over the regions  [by preset]")
    decoder_layers: int | None = setting(None, "layers over the words  [by preset]")
    feedforward: int | None = setting(None, "inner width of the feed-forward layers  [by preset]")
    dropout: float | None = setting(None, "dropout  [by preset]")
    max_length: int = setting(20, "words of a caption; longer ones are cut")
    min_count: int | None = setting(None, "how often a word must be seen  [5; 1 below 10,000 captions]")
    epochs: int | None = setting(None, "passes over the train images  [300,000 captions in all, 12 to 60; sample: 18]")
    batch: int | None = setting(None, "images a step, each with all its captions  [small 20, else 50]")
    lr: float | None = setting(None, "peak learning rate  [tiny 0.001, small 0.0004, else 0.0003]")
    warmup: float = setting(0.05, "share of all steps before the peak; then a cosine to zero")
    weight_decay: float = setting(0.01, "of AdamW, on matrices only")
    label_smoothing: float = setting(0.1, "mass given to all words alike")
    clip: float = setting(1.0, "largest gradient norm")
    compile: bool = setting(False, "compile the model: faster steps on a GPU after a first slow one")
    cache_in: str = setting("auto", "where features are kept while training", choices=("auto", "disk", "ram", "device"))
    patience: int = setting(5, "epochs without a better CIDEr on dev before the early stop")
    beam: int = setting(5, "beams on dev, and the run's default")
    length_penalty: float = setting(1.0, "exponent of the length that scores are divided by, and the run's default")
    limit: int | None = setting(None, "take only the first N train images (and of dev)")
    device: str = setting("auto", "where to train", choices=DEVICES)
    precision: str = setting("auto", "of products", choices=PRECISIONS)
    seed: int = setting(0, "of weights, order and dropout")

    def __post_init__(self) -> None:
        for name in ("batch", "beam", "max_length", "epochs", "min_count", "limit", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, it must be at least 1")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, it must be in [0, 1)")


@dataclass
class Run:
    """A training run in memory: what the loop changes and what it needs."""

    config: TrainConfig
    folder: Path
    machine: Machine
    train: CaptionedImages
    dev: CaptionedImages
    checkpoint: Checkpoint
    optimizer: torch.optim.Optimizer
    references: References
    metrics: list[dict[str, Any]]
    forward: torch.nn.Module  # the captioner, compiled where asked for

    @property
    def captioner(self) -> Captioner:
        return self.checkpoint.captioner

    @property
    def steps_an_epoch(self) -> int:
        return -(-len(self.train) // self.config.batch)


@command(TrainConfig)
def main(config: TrainConfig) -> None:
    """Train a Transformer decoder on a feature cache, choosing the best epoch by CIDEr on dev.

    Without options: trains on the embedded sample, over the cache that a bare pipeline.extract made of it.
    """
    machine = open_machine(config.device, config.seed, config.precision)
    if machine.world > 1:
        raise UserError("pipeline.train runs as one process; start it without torchrun")
    source, cache, folder = open_inputs(config)
    train, dev = open_splits(config, source, cache)
    keep_features(config.cache_in, cache, [train, dev], machine)
    config = settle(config, train)
    run = open_run(config, folder, machine, source, cache, train, dev)
    announce(run, cache)
    for epoch in range(len(run.metrics), config.epochs):
        if out_of_patience(run):
            say(f"no better CIDEr on dev for {config.patience} epochs: stopped early")
            break
        trained = train_epoch(run, epoch)
        validate(run, epoch, trained)
    finish(run)


def open_inputs(config: TrainConfig) -> tuple[Source, FeatureCache, Path]:
    """The captions, the cache and the run's folder; bare options name the embedded sample, and it is said."""
    root = config.root
    if config.dataset == "sample" and root is None:
        root = Path("datasets/sample")
        say(f"the embedded sample of drawn scenes, in {root}; your own: --dataset ... --root ... --features ... --out ...")
    cache = FeatureCache(config.features or Path("cache") / config.dataset)
    folder = config.out or Path("runs") / config.dataset
    if (folder / "config.json").exists() and not config.resume:
        raise UserError(f"{folder} holds a run; pass --resume to go on with it, or another --out")
    return open_source(config.dataset, root, config.annotations, config.images), cache, folder


def open_splits(config: TrainConfig, source: Source, cache: FeatureCache) -> tuple[CaptionedImages, CaptionedImages]:
    train, dev = source.select("train")[: config.limit], source.select("dev")[: config.limit][:DEV_IMAGES]
    found = CaptionedImages(train, cache, "train"), CaptionedImages(dev, cache, "dev")
    if left_out := found[0].left_out + found[1].left_out:
        say(f"{left_out} photographs are left out: {cache.path / 'unreadable.jsonl'} lists them")
    return found


def keep_features(where: str, cache: FeatureCache, parts: Sequence[CaptionedImages], machine: Machine) -> None:
    """Keep the features where --cache-in says, and say so. auto: on a GPU where they fit half of its free memory, else in
    RAM where they fit half of what is free, else on the disk; without a GPU on the disk, whose cache is RAM as well."""
    gpu = machine.device.type == "cuda"
    size = sum(len(part) for part in parts) * cache.shape[0] * cache.shape[1] * 2
    chosen = where
    if where == "auto":
        chosen = "disk"
        if gpu and size < torch.cuda.mem_get_info(machine.device)[0] / 2:
            chosen = "device"
        elif gpu and len(cache) * cache.shape[0] * cache.shape[1] * 2 < free_memory() / 2:
            chosen = "ram"
    if chosen == "ram":
        cache.keep_in_memory()
    elif chosen == "device":
        for part in parts:
            part.keep_on(machine.device)
    places = {"disk": "on the disk", "ram": "in RAM", "device": f"on {machine.device}"}
    say(f"features stay {places[chosen]} while training ({human_bytes(size)}; --cache-in {where})")


def settle(config: TrainConfig, train: CaptionedImages) -> TrainConfig:
    """Choose what the options leave open from the number of captions."""
    captions = train.captions
    preset = config.preset or ("tiny" if captions < 15_000 else "small" if captions < 100_000 else "base")
    chosen = {
        **PRESETS[preset],
        "preset": preset,
        "min_count": 5 if captions >= 10_000 else 1,
        "epochs": 18 if config.dataset == "sample" else min(60, max(12, round(300_000 / captions))),
        "batch": 20 if preset == "small" else 50,
        "lr": {"tiny": 1e-3, "small": 4e-4}.get(preset, 3e-4),
    }
    return replace(config, **{name: value for name, value in chosen.items() if getattr(config, name) is None})


def open_run(
    config: TrainConfig,
    folder: Path,
    machine: Machine,
    source: Source,
    cache: FeatureCache,
    train: CaptionedImages,
    dev: CaptionedImages,
) -> Run:
    """Make the model and its run folder, or take up where the folder stands."""
    vocabulary = Vocabulary.build((words for group in train.tokens for words in group), config.min_count)
    sizes = {name: getattr(config, name) for name in PRESETS["tiny"]}
    model = CaptionerConfig(len(vocabulary), cache.shape[1], **sizes, max_length=config.max_length)
    captioner = Captioner(model).to(machine.device)
    record = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    decoding = {"beam": config.beam, "length_penalty": config.length_penalty}
    checkpoint = Checkpoint(
        captioner, vocabulary, cache.identity, decoding, record, cache.provenance, source.digest
    )
    references = References({image.id: image.captions for image in dev.images})
    forward = torch.compile(captioner, dynamic=True) if config.compile else captioner
    run = Run(config, folder, machine, train, dev, checkpoint, make_optimizer(captioner, config), references, [], forward)
    if config.resume:
        resume(run)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        copy_backbone(cache.path, folder)
        save_description(folder, checkpoint)
    return run


def make_optimizer(captioner: Captioner, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, biases, norms and embeddings do not."""
    decayed = [p for name, p in captioner.named_parameters() if p.ndim > 1 and not name.startswith(("word", "position"))]
    chosen = {id(p) for p in decayed}
    rest = [p for p in captioner.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-9, fused=True)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """A straight rise over the first `warmup` share of all steps, then half a cosine to zero."""
    rise = max(1, round(config.warmup * steps))
    if step < rise:
        return config.lr * (step + 1) / rise
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def announce(run: Run, cache: FeatureCache) -> None:
    config, model = run.config, run.captioner.config
    parameters = sum(p.numel() for p in run.captioner.parameters())
    size = len(cache) * cache.shape[0] * cache.shape[1] * 2
    say(f"{cache.path}: {len(cache):,} images, {cache.shape[0]} regions x {cache.shape[1]}, {human_bytes(size)}")
    say(f"train {len(run.train):,} images, {run.train.captions:,} captions; dev {len(run.dev):,}; {model.words:,} words")
    say(
        f"preset {config.preset}: width {model.width}, {model.encoder_layers}+{model.decoder_layers} layers, dropout "
        f"{model.dropout}, {parameters / 1e6:.1f} M parameters; {config.epochs} epochs of {run.steps_an_epoch} steps, "
        f"peak lr {config.lr}, words seen {config.min_count} times; on {run.machine}"
    )


def train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """One pass over the train images; returns loss (nats a word), captions/s and the share of time waiting for data."""
    config, captioner, device = run.config, run.captioner, run.machine.device
    captioner.train()
    steps = config.epochs * run.steps_an_epoch
    loss_sum, words_sum = torch.zeros((), device=device), torch.zeros((), device=device)
    captions, waited, start = 0, 0.0, time.monotonic()
    with progress(run.train.captions, "captions", f"epoch {epoch + 1}/{config.epochs}") as bar:
        for number, (batch, waiting) in enumerate(timed(prefetch(train_batches(run, epoch)))):
            step = epoch * run.steps_an_epoch + number
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(config, step, steps)
            loss, words = train_step(run, batch.to(device))
            loss_sum += loss
            words_sum += words
            there = int((batch.tokens[:, :, 0] != PAD).sum())
            captions, waited = captions + there, waited + waiting
            if number % 20 == 19 or number + 1 == run.steps_an_epoch:
                mean = (loss_sum / words_sum).item()
                if not math.isfinite(mean):
                    raise UserError(f"the loss is {mean} near step {step}, lr {group['lr']:.2g}, images {batch.image_ids}")
                bar.step(0, f"loss {mean:.3f}, waiting {waited / (time.monotonic() - start):.1%}")
            bar.step(there, bar.note)
    seconds = time.monotonic() - start
    return {"loss": mean, "lr": group["lr"], "captions_per_s": captions / seconds, "waiting": waited / seconds}


def train_batches(run: Run, epoch: int) -> Iterator[Batch]:
    """The epoch's batches, in an order that follows from seed and epoch alone."""
    ids = run.train.encode(run.checkpoint.vocabulary, run.config.max_length)
    return run.train.batches(ids, run.config.batch, np.random.default_rng((run.config.seed, epoch)))


def train_step(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """One update by the mean loss over the step's words; returns the sum of losses and the number of words."""
    with run.machine.autocast():
        regions = Regions(batch.features, batch.boxes, batch.counts)
        loss, words = caption_loss(run.forward, regions, batch.tokens, PAD, run.config.label_smoothing)
    run.optimizer.zero_grad(set_to_none=True)
    (loss / words).backward()
    torch.nn.utils.clip_grad_norm_(run.captioner.parameters(), run.config.clip)
    run.optimizer.step()
    return loss.detach(), words


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds that were spent waiting for it."""
    while True:
        start = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.monotonic() - start


def validate(run: Run, epoch: int, trained: dict[str, float]) -> None:
    """Loss and scores on dev; keep the best by CIDEr, and where training stands."""
    start = time.monotonic()
    loss = dev_loss(run)
    checkpoint, config = run.checkpoint, run.config
    ids = [image.id for image in run.dev.images]
    how = Generation(num_beams=config.beam, length_penalty=config.length_penalty)
    writer = Writer(run.captioner, checkpoint.vocabulary, run.machine, how)
    with progress(len(ids), "images", "dev") as bar:
        written = caption_rows(writer, run.dev.cache, ids, done=bar.step)
    scores = score({image_id: captions[0].text for image_id, captions in written.items()}, run.references).values
    best = max((line["dev"]["CIDEr"] for line in run.metrics), default=-1.0)
    line = {
        "epoch": epoch + 1,
        "step": (epoch + 1) * run.steps_an_epoch,
        "train": trained,
        "dev": {"loss": loss, **scores},
        "seconds": {"validation": time.monotonic() - start},
    }
    run.metrics.append(line)
    better = scores["CIDEr"] > best
    if better:
        save_weights(run.folder, run.captioner.state_dict())
    save_progress(run)
    say(
        f"epoch {epoch + 1}/{config.epochs}: train loss {trained['loss']:.3f}, dev loss {loss:.3f}, "
        f"dev CIDEr {scores['CIDEr']:.3f}, BLEU-4 {scores['Bleu_4']:.3f}{' (best)' if better else ''}, "
        f"{trained['captions_per_s']:.0f} captions/s, waiting {trained['waiting']:.1%}"
    )


@torch.inference_mode()
def dev_loss(run: Run) -> float:
    """Cross-entropy on dev in nats a word, without smoothing or dropout."""
    run.captioner.eval()
    ids = run.dev.encode(run.checkpoint.vocabulary, run.config.max_length)
    total, count = 0.0, 0
    for batch in run.dev.batches(ids, run.config.batch, None):
        batch = batch.to(run.machine.device)
        with run.machine.autocast():
            loss, words = caption_loss(
                run.captioner, Regions(batch.features, batch.boxes, batch.counts), batch.tokens, PAD
            )
        total, count = total + loss.item(), count + words.item()
    return total / count


def out_of_patience(run: Run) -> bool:
    scores = [line["dev"]["CIDEr"] for line in run.metrics]
    return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= run.config.patience


def save_progress(run: Run) -> None:
    """Everything `resume` needs, the metrics so far, and the same for TensorBoard."""
    tensors = {f"model.{name}": value for name, value in run.captioner.state_dict().items()}
    for name, parameter in run.captioner.named_parameters():
        for key, value in run.optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["generator.cpu"] = torch.get_rng_state()
    if run.machine.device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(run.machine.device)
    save_training_state(run.folder, tensors, {"metrics": run.metrics})
    write_whole(run.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in run.metrics))
    write_tensorboard(run)


def write_tensorboard(run: Run) -> None:
    """The last line of metrics as TensorBoard scalars, where its package is installed (the extra `tensorboard`)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if len(run.metrics) == 1:
            say("TensorBoard is not installed (pip install 'onceover[tensorboard]'); metrics.jsonl has the same figures")
        return
    line = run.metrics[-1]
    with SummaryWriter(str(run.folder / "tensorboard"), purge_step=line["step"]) as writer:
        for part in ("train", "dev"):
            for name, value in line[part].items():
                writer.add_scalar(f"{part}/{name}", value, line["step"])


def resume(run: Run) -> None:
    """Take up weights, optimiser, generators and metrics; UserError where the settings are not the run's own."""
    path = run.folder / "config.json"
    if not path.is_file():
        raise UserError(f"--resume: {run.folder} holds no run; start it without --resume")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    wanted = run.checkpoint.training
    changed = [
        f"{name.replace('_', '-')}: {recorded['training'].get(name)}, now {value}"
        for name, value in wanted.items()
        if name not in MAY_DIFFER and recorded["training"].get(name) != json.loads(json.dumps(value))
    ]
    if recorded["features"] != run.checkpoint.identity or recorded["trained_on"] != run.checkpoint.trained_on:
        changed.append("the cache or the photographs")
    if changed:
        raise UserError(f"--resume: {run.folder} was begun with other settings ({'; '.join(changed)})")
    if not (run.folder / "last.safetensors").exists():
        say(f"{run.folder} ended within its first epoch: starting it again")
        return
    tensors, record = load_training_state(run.folder)
    run.captioner.load_state_dict({name: tensors[f"model.{name}"] for name in run.captioner.state_dict()})
    for name, parameter in run.captioner.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        run.optimizer.state[parameter] = {key: tensors[f"optimizer.{name}.{key}"].to(parameter.device) for key in keys}
    torch.set_rng_state(tensors["generator.cpu"])
    if "generator.cuda" in tensors and run.machine.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator.cuda"], run.machine.device)
    run.metrics = record["metrics"]
    say(f"going on with {run.folder} after epoch {len(run.metrics)}")


def finish(run: Run) -> None:
    best = max(run.metrics, key=lambda line: line["dev"]["CIDEr"])
    say(f"best: epoch {best['epoch']}, dev CIDEr {best['dev']['CIDEr']:.3f}, kept in {run.folder}")
    say(f"next: python -m pipeline.evaluate --checkpoint {run.folder} --features {run.train.cache.path} ...")


if __name__ == "__main__":
    main()
