"""Stage two: train a decoder on a feature cache. Many decoders can be trained on one cache."""

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
from pipeline.tasks.captioning import Captioning
from pipeline.tasks.registry import TASKS, task_of
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
    prompt_lengths,
)
from pipeline.training.state import Run
from pipeline.training.validation import best_of, should_stop, validate

FEW_DEV_IMAGES = 20  # with fewer images, the dev scores are mostly noise


def describe_preset(values: Mapping[str, Any]) -> str:
    """Return the settings of a preset as text, such as "width 128, epochs 12"."""
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items())


@command(
    TrainConfig, {"Presets": [(name, describe_preset(values)) for name, values in PRESETS.items()]}
)
def main(config: TrainConfig) -> None:
    """Train a decoder on a feature cache and keep the epoch with the best score on dev.

    Without options, the command trains on the embedded sample. It reads the cache that
    pipeline.extract writes without options.
    """
    machine = open_machine(config.device, config.seed, config.precision)
    with distributed.process_group(machine):
        with distributed.rank_zero_first(machine):  # rank 0 draws the sample if it does not exist
            source, cache, folder = open_inputs(config)
        init = open_init(config, folder, cache)
        config = choose_segment(config, source, init)
        task = task_of(config.record(), config.segment or "words")
        train, dev = open_splits(config, task, source, cache)
        config = resolve(config, train, machine, init and init.sizes, init and init.vocabulary)
        keep_features(config, cache, [train, *([dev] if dev else [])], machine)
        run = open_run(config, folder, machine, source, cache, task, train, dev, init)
        print_plan(run, cache)
        with contextlib.closing(run.journal), stopping_on_signals(run):
            try:
                while not should_stop(run):
                    validate(run, train_until_validation(run))
            except Stopped as stopped:
                save_and_exit(run, stopped.signum)
        print_result(run)


def open_inputs(config: TrainConfig) -> tuple[Source, FeatureCache | NoFeatures, Path]:
    """Open the dataset and the feature cache, and choose the run folder.

    Returns:
        The dataset, the cache and the path of the run folder.

    Raises:
        UserError: the folder already contains a run and --resume was not passed.
    """
    if config.dataset == "sample" and config.root is None:
        say(
            f"dataset: the embedded sample of drawn scenes, in {SAMPLE_ROOT}; for your own data "
            "pass --dataset ... --root ... --features ... --out ..."
        )
    name = config.dataset if config.task == Captioning.name else f"{config.dataset}-{config.task}"
    folder = config.out or Path("runs") / name
    require_utf8(folder)
    if (folder / "config.json").exists() and not config.resume:
        raise UserError(
            f"{folder} already contains a run; pass --resume to continue it, or another --out"
        )
    source = config.open_source()
    uses_images = TASKS[config.task](config.options("task")).uses_images
    cache = config.open_cache(config.features if uses_images else NoFeatures.path)
    return source, cache, folder


def print_plan(run: Run, cache: FeatureCache | NoFeatures) -> None:
    """Print the data, the vocabulary, the model and the length of the training."""
    print_data(run, cache)
    print_vocabulary(run)
    config, machine = run.config, run.machine
    if config.scst:
        samples = (
            "beams per image"
            if config.samples == "beam"
            else f"samples per image at temperature {config.temperature:g}"
        )
        say(
            f"self-critical: {config.num_samples} {samples}, reward {config.reward}, baseline "
            f"{config.baseline}"
        )
    parameters = sum(p.numel() for p in run.captioner.parameters())
    length = f"{config.epochs} epochs of {run.steps_per_epoch} steps" if config.epochs else "epochs"
    length += f", at most {config.minutes:g} minutes" if config.minutes else ""
    origin = f"initialised from {config.init}" if config.init else f"preset {config.preset}"
    processes = f", {machine.world} processes" if machine.world > 1 else ""
    say(
        f"{origin}: {run.captioner.config}, {parameters / 1e6:.1f} M parameters; {length}, "
        f"peak lr {config.lr}; on {machine}{processes}"
    )


def print_data(run: Run, cache: FeatureCache | NoFeatures) -> None:
    """Print the sizes of the cache and of the splits. Warn if dev is too small."""
    views = ""
    if run.config.views and cache.views:
        views = f", and the same size again for each view ({', '.join(cache.views)})"
    say(f"{cache.path}: {len(cache):,} images, {cache.shape[0]} regions x {cache.shape[1]}, "
        f"{human_bytes(cache.feature_bytes)}{views}")  # fmt: skip
    train = f"train {len(run.train):,} images, {run.train.texts:,} {run.task.unit}"
    if run.dev is None:
        say(f"{train}; dev images included, so no best epoch is chosen")
        return
    say(f"{train}; dev {len(run.dev):,}")
    if len(run.dev) < FEW_DEV_IMAGES:
        say(
            f"warning: dev has only {len(run.dev)} images. With fewer than about {FEW_DEV_IMAGES} "
            "images the dev scores, and so the choice of the best epoch, are mostly noise. Add "
            "photographs, or pass --train-on-dev to train on all of them without a choice"
        )


def print_vocabulary(run: Run) -> None:
    """Print the size of the vocabulary, the unknown words and the number of cut captions."""
    vocabulary, max_length = run.checkpoint.vocabulary, run.captioner.config.max_length
    unit = vocabulary.unit
    splits = {"train": run.train, **({"dev": run.dev} if run.dev else {})}
    unknown = ", ".join(
        f"{unknown_share(vocabulary, texts):.2%} of {name}" for name, texts in splits.items()
    )
    say(f"vocabulary: {run.captioner.config.words:,} {unit}; unknown: {unknown}")
    lengths = caption_lengths(vocabulary, run.train)
    if cut := sum(length > max_length for length in lengths):
        say(
            f"{cut:,} of {len(lengths):,} train {run.task.unit} ({cut / len(lengths):.1%}) have "
            f"more than {max_length} {unit} and are cut to this length; the longest has "
            f"{max(lengths):,}. Pass --max-length to change the limit"
        )
    max_prompt = run.captioner.config.max_prompt
    lengths = prompt_lengths(vocabulary, run.train)
    if cut := sum(length > max_prompt for length in lengths):
        say(
            f"{cut:,} of {len(lengths):,} train prompts ({cut / len(lengths):.1%}) have more than "
            f"{max_prompt} {unit} and lose their first {unit}; the longest has {max(lengths):,}. "
            "Pass --max-prompt to change the limit"
        )


def unknown_share(vocabulary: Vocabulary, texts: ImageTexts) -> float:
    """Return the share of a split's words (or subwords) that are not in the vocabulary."""
    token_ids = [
        token_id
        for image_texts in texts.tokens
        for words in image_texts
        for token_id in vocabulary.encode(words)
    ]
    return token_ids.count(UNK) / max(1, len(token_ids))


def print_result(run: Run) -> None:
    """Print which weights were kept, and the next command."""
    if validations := run.journal.scored:
        metric = run.task.metric
        best = validations[best_of(validations, metric)]
        say(
            f"best: epoch {best['epoch']:.4g}, step {best['step']:,}, dev {metric} "
            f"{best['dev'][metric]:.3f}, kept in {run.folder}"
        )
    else:
        say(
            f"the weights of the last epoch are kept in {run.folder}; no best epoch was chosen, "
            "because dev was part of the training data"
        )
    say(
        f"next: python -m pipeline.evaluate --checkpoint {run.folder} --features "
        f"{run.train.cache.path} {run.config.dataset_options()}"
    )


if __name__ == "__main__":
    main()
