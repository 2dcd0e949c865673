"""Stage two: train a decoder on a feature cache, any number of times."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.batches import ImageTexts
from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache
from data.sources import Source
from data.vocabulary import UNK, Vocabulary
from pipeline.checkpoints.tensors import require_utf8
from pipeline.cli import UserError, command
from pipeline.runtime import open_machine
from pipeline.sources import SAMPLE_ROOT
from pipeline.tasks.registry import task_of
from pipeline.terminal import human_bytes, say
from pipeline.training import distributed
from pipeline.training.config import PRESETS, TrainConfig, resolve
from pipeline.training.loop import Stopped, stopping_on_signals, train_until_validation
from pipeline.training.resume import save_and_exit
from pipeline.training.setup import (
    caption_lengths,
    choose_segment,
    keep_features,
    open_init,
    open_run,
    open_splits,
)
from pipeline.training.state import Run
from pipeline.training.validation import best_of, should_stop, validate

FEW_DEV_IMAGES = 20  # with fewer images, dev scores are mostly chance


def describe_preset(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items())


@command(
    TrainConfig, {"Presets": [(name, describe_preset(values)) for name, values in PRESETS.items()]}
)
def main(config: TrainConfig) -> None:
    """Train a decoder on a feature cache and keep the epoch with the best score on dev.

    Without options it trains on the embedded sample, over the cache that pipeline.extract makes
    without options.
    """
    machine = open_machine(config.device, config.seed, config.precision)
    with distributed.process_group(machine):
        with distributed.rank_zero_first(machine):  # rank 0 may have to draw the sample
            source, cache, folder = open_inputs(config)
        begun = open_init(config, folder, cache)
        config = choose_segment(config, source, begun)
        task = task_of(config.record(), config.segment or "words")
        train, dev = open_splits(config, task, source, cache)
        config = resolve(config, train, machine, begun and begun.sizes, begun and begun.vocabulary)
        keep_features(config, cache, [train, *([dev] if dev else [])], machine)
        run = open_run(config, folder, machine, source, cache, task, train, dev, begun)
        announce(run, cache)
        with contextlib.closing(run.journal), stopping_on_signals(run):
            try:
                while not should_stop(run):
                    validate(run, train_until_validation(run))
            except Stopped as stopped:
                save_and_exit(run, stopped.signum)
        finish(run)


def open_inputs(config: TrainConfig) -> tuple[Source, FeatureCache | NoFeatures, Path]:
    """Open the dataset, the cache and the run folder. Without options it is the embedded sample,
    which is printed.
    """
    if config.dataset == "sample" and config.root is None:
        say(
            f"the embedded sample of drawn scenes, in {SAMPLE_ROOT}; your own: --dataset ... "
            "--root ... --features ... --out ..."
        )
    cache = config.open_cache(config.features)
    folder = config.out or Path("runs") / config.dataset
    require_utf8(folder)
    if (folder / "config.json").exists() and not config.resume:
        raise UserError(f"{folder} holds a run; pass --resume to go on with it, or another --out")
    return config.open_source(), cache, folder


def announce(run: Run, cache: FeatureCache | NoFeatures) -> None:
    config, model = run.config, run.captioner.config
    parameters = sum(p.numel() for p in run.captioner.parameters())
    views = (
        f", and as much of each view ({', '.join(cache.views)})"
        if config.views and cache.views
        else ""
    )
    say(f"{cache.path}: {len(cache):,} images, {cache.shape[0]} regions x {cache.shape[1]}, "
        f"{human_bytes(cache.feature_bytes)}{views}")  # fmt: skip
    pieces = "pieces of words" if config.vocabulary == "bpe" else "words"
    parts = {"train": run.train, **({"dev": run.dev} if run.dev else {})}
    unknown = ", ".join(
        f"{unknown_share(run.checkpoint.vocabulary, part):.2%} of {name}"
        for name, part in parts.items()
    )
    dev = f"dev {len(run.dev):,}" if run.dev else "dev among them: nothing is chosen by it"
    say(f"train {len(run.train):,} images, {run.train.texts:,} {run.task.unit}; {dev}")
    say(f"vocabulary: {model.words:,} {pieces}; unknown: {unknown}")
    lengths = caption_lengths(run.checkpoint.vocabulary, run.train)
    if cut := sum(length > model.max_length for length in lengths):
        say(
            f"{cut:,} of {len(lengths):,} train {run.task.unit} ({cut / len(lengths):.1%}) "
            f"have more than {model.max_length} "
            f"{pieces} and are cut there; the longest has {max(lengths):,}; --max-length "
            "changes it"
        )
    if run.dev and len(run.dev) < FEW_DEV_IMAGES:
        say(
            f"warning: dev has {len(run.dev)} images; of fewer than about {FEW_DEV_IMAGES} its "
            "scores are mostly "
            "chance, and so is the choice of the best epoch. Add photographs, or pass "
            "--train-on-dev, which "
            "trains on all of them and chooses nothing"
        )
    if config.scst:
        how = (
            "beams an image"
            if config.samples == "beam"
            else f"samples an image at temperature {config.temperature:g}"
        )
        say(
            f"self-critical: {config.num_samples} {how}, reward {config.reward}, baseline "
            f"{config.baseline}"
        )
    length = f"{config.epochs} epochs of {run.steps_per_epoch} steps" if config.epochs else "epochs"
    length += f", {config.minutes:g} minutes at most" if config.minutes else ""
    name = f"of {config.init}" if config.init else f"preset {config.preset}"
    shared = f", {run.machine.world} processes" if run.machine.world > 1 else ""
    say(
        f"{name}: {model}, {parameters / 1e6:.1f} M parameters; {length}, "
        f"peak lr {config.lr}; on {run.machine}{shared}"
    )


def unknown_share(vocabulary: Vocabulary, part: ImageTexts) -> float:
    """The share of a split's words (or subwords) that are not in the vocabulary."""
    found = [
        number for group in part.tokens for words in group for number in vocabulary.encode(words)
    ]
    return found.count(UNK) / max(1, len(found))


def finish(run: Run) -> None:
    scored = run.journal.scored
    if scored:
        best = scored[best_of(scored, run.task.metric)]
        at = f"epoch {best['epoch']:.4g}, step {best['step']:,}"
        say(
            f"best: {at}, dev {run.task.metric} {best['dev'][run.task.metric]:.3f}, kept in "
            f"{run.folder}"
        )
    else:
        say(
            f"the last epoch's weights are kept in {run.folder}: trained on dev too, nothing "
            "was chosen"
        )
    say(
        f"next: python -m pipeline.evaluate --checkpoint {run.folder} --features "
        f"{run.train.cache.path} ..."
    )


if __name__ == "__main__":
    main()
