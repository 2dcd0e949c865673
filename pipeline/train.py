"""Stage two: train a decoder on a feature cache, any number of times."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.batches import ImageTexts
from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache, differences
from data.examples import Example
from data.segmentation import without_blanks
from data.sources import Source
from data.subwords import Subwords
from data.vocabulary import PAD, UNK, Vocabulary
from models.decoders.registry import DECODERS
from models.generation.options import Generation
from models.losses import caption_loss
from models.regions import Regions
from pipeline.checkpoints.checkpoint import (
    Checkpoint,
    check_features,
    copy_backbone,
    load_checkpoint,
    load_record,
    load_vocabulary,
    remove_temporary_files,
    save_description,
    save_weights,
)
from pipeline.checkpoints.hub import checkpoint_folder
from pipeline.checkpoints.tensors import require_utf8
from pipeline.cli import UserError, command, options_of
from pipeline.decoding.captioner import CaptionGenerator, generate_texts
from pipeline.decoding.consensus import save_frequencies
from pipeline.runtime import Machine, free_memory, open_machine
from pipeline.sources import SAMPLE_ROOT
from pipeline.tasks.base import Task
from pipeline.tasks.registry import task_of
from pipeline.terminal import human_bytes, progress, say
from pipeline.training import distributed
from pipeline.training.config import PATIENT_STEPS, PRESETS, TrainConfig, resolve
from pipeline.training.logger import Journal
from pipeline.training.loop import Stopped, averaged, stopping_on_signals, train_until_validation
from pipeline.training.state import Run, restore, save_progress

DEV_IMAGES = 5000  # largest number of dev images that are used
FEW_DEV_IMAGES = 20  # fewer say little


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
    with distributed.joined(machine):
        with distributed.first_alone(machine):  # rank 0 may have to draw the sample
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


class Begun(NamedTuple):
    """What --init begins with: the model's sizes, its words, and weights (None for a run that goes
    on: it has its own).
    """

    sizes: dict[str, Any]
    vocabulary: Vocabulary
    weights: dict[str, Tensor] | None


def open_init(config: TrainConfig, folder: Path, cache: FeatureCache | NoFeatures) -> Begun | None:
    """Open the run of --init. A resumed run does not need its weights."""
    if config.init is None:
        return None
    if config.resume and (folder / "last.safetensors").exists():
        return Begun(load_record(folder)["model"], load_vocabulary(folder), None)
    found = load_checkpoint(checkpoint_folder(config.init))
    check_features(found, cache)
    if found.training.get("train_on_dev") and not config.train_on_dev:
        raise UserError(
            f"--init {config.init} was trained on dev too, so dev cannot choose the best epoch: "
            f"pass "
            "--train-on-dev, or another --init"
        )
    return Begun(asdict(found.captioner.config), found.vocabulary, found.captioner.state_dict())


def choose_segment(config: TrainConfig, source: Source, begun: Begun | None) -> TrainConfig:
    """Fill in --segment: that of the --init run, else the given one.

    Raises UserError if the captions have no spaces between words and no option says how to split
    them. With subwords, scores treat each character as a word.
    """
    if begun:
        own = begun.vocabulary.segment
        if config.segment not in (None, own):
            raise UserError(f"--segment is {config.segment}, {config.init} has {own}")
        return replace(config, segment=own) if own != "words" else config
    captions = (caption for image in source.images for caption in image.captions)
    if config.segment or (example := without_blanks(captions)) is None:
        return config
    what = f"captions have no spaces between words (as {example[:40]!r})"
    if config.vocabulary == "word":
        raise UserError(
            f"{what}: pass --segment characters, or --vocabulary bpe for pieces of several "
            "characters, "
            "or --segment words to take each sentence as one word"
        )
    say(f"{what}: pieces are learnt on the text as it is, scores take each character as a word")
    return replace(config, segment="characters")


def open_splits(
    config: TrainConfig, task: Task, source: Source, cache: FeatureCache | NoFeatures
) -> tuple[ImageTexts, ImageTexts | None]:
    """Open train and dev. dev is None with --train-on-dev."""

    def texts(examples: Sequence[Example], split: str) -> ImageTexts:
        return ImageTexts(
            examples, source.by_id, cache, split, config.segment or "words", task.holds_mirrored
        )

    train = task.examples(source, "train", config.limit)
    dev = select_dev(config, task, source)
    found = (
        texts([*train, *dev] if config.train_on_dev else train, "train"),
        None if config.train_on_dev else texts(dev, "dev"),
    )
    if left_out := sum(part.left_out for part in found if part):
        say(f"{left_out} photographs are left out: {cache.path / 'unreadable.jsonl'} lists them")
    return found


def select_dev(config: TrainConfig, task: Task, source: Source) -> list[Example]:
    """The dev examples. UserError if there are none, unless --train-on-dev."""
    most = config.limit if config.train_on_dev else min(config.limit or DEV_IMAGES, DEV_IMAGES)
    try:
        return task.examples(source, "dev", most)
    except DataError as error:
        if config.train_on_dev:
            return []
        raise UserError(
            f"{error}. Choosing the best epoch needs a second photograph; pass --train-on-dev "
            "to train "
            "without choosing"
        ) from error


def keep_features(
    config: TrainConfig,
    cache: FeatureCache | NoFeatures,
    parts: Sequence[ImageTexts],
    machine: Machine,
) -> None:
    """Keep the features in memory by --cache-in, and print where they are.

    auto: on the GPU if they fit half of its free memory, else in RAM if they fit half of the free
    memory, else on disk. Without a GPU: on disk, because the operating system caches the files in
    RAM.
    """
    gpu = machine.device.type == "cuda"
    views = len(cache.views) if config.views else 0
    size = (1 + views) * sum(len(part) for part in parts) * cache.shape[0] * cache.shape[1] * 2
    chosen = config.cache_in
    if chosen == "auto":
        chosen = "disk"
        if gpu and size < torch.cuda.mem_get_info(machine.device)[0] / 2:
            chosen = "device"
        elif gpu and cache.feature_bytes < free_memory() / 2:
            chosen = "ram"
        chosen = distributed.broadcast(chosen)
    if chosen == "ram":
        memory = distributed.shared_memory(cache.feature_bytes) if machine.world > 1 else None
        if memory:
            cache.keep_in_memory(memory[0], not memory[1])
        else:
            cache.keep_in_memory()
        distributed.barrier()
    elif chosen == "device":
        for part in parts:
            part.keep_on(machine.device, views if part is parts[0] else 0)
    places = {"disk": "on the disk", "ram": "in RAM", "device": f"on {machine.device}"}
    once = (
        ", once for all processes of a machine"
        if chosen == "ram" and machine.world > 1 and memory
        else ""
    )
    say(
        f"features stay {places[chosen]} while training ({human_bytes(size)}{once}; --cache-in "
        f"{config.cache_in})"
    )


def open_run(
    config: TrainConfig,
    folder: Path,
    machine: Machine,
    source: Source,
    cache: FeatureCache | NoFeatures,
    task: Task,
    train: ImageTexts,
    dev: ImageTexts | None,
    begun: Begun | None,
) -> Run:
    """Create the model and its run folder, or resume the run in the folder."""
    if begun:
        vocabulary = begun.vocabulary
    else:
        vocabulary = distributed.broadcast(
            make_vocabulary(config, folder, train) if machine.rank == 0 else None
        )
    if config.max_length is None:
        config = replace(config, max_length=choose_max_length(config, vocabulary, train))
        assert config.max_length is not None
    max_prompt = begun.sizes["max_prompt"] if begun else longest_prompt(vocabulary, train)
    kind = DECODERS[config.decoder]
    captioner = kind(
        kind.Config(
            len(vocabulary),
            cache.shape[1],
            **config.decoder_options,
            max_length=config.max_length,
            max_prompt=max_prompt,
        )
    )
    if begun and begun.weights:
        captioner.load_state_dict(begun.weights)
    captioner.to(machine.device)
    record = config.record()
    decoding = {"beam": config.beam, "length_penalty": config.length_penalty}
    checkpoint = Checkpoint(
        captioner, vocabulary, cache.identity, decoding, record, cache.provenance, source.digest
    )
    run = Run(
        config,
        folder,
        machine,
        task,
        train,
        dev,
        checkpoint,
        Journal(folder, record, config.wandb, machine.rank == 0),
    )
    distributed.barrier()  # until all processes have read the folder
    if config.resume:
        return resume(run)
    if machine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    run.journal.begin()
    if machine.rank == 0:
        copy_backbone(cache.path, folder)
        if task.scored_as_captions:
            save_frequencies(run.train_ids, len(vocabulary), folder)
        save_description(folder, checkpoint)
    return run


def make_vocabulary(config: TrainConfig, folder: Path, train: ImageTexts) -> Vocabulary:
    """Build the vocabulary of the train captions. A resumed run keeps its tokenizer.json, because
    another version of the tokenizers package would learn other subwords.
    """
    captions = (
        words for part in (train.prompts, train.tokens) for group in part for words in group
    )
    if config.vocabulary == "word":
        assert config.min_count is not None  # by `resolve`
        return Vocabulary.build(captions, config.min_count, config.segment or "words")
    if config.resume and (folder / "tokenizer.json").exists():
        return load_vocabulary(folder)
    return Subwords.build(captions, config.vocab_size, config.segment or "words")


def choose_max_length(config: TrainConfig, vocabulary: Vocabulary, train: ImageTexts) -> int:
    """The 99th percentile of the caption lengths in words (or subwords), at least 20 (30)."""
    least = 30 if config.vocabulary == "bpe" else 20
    return max(least, int(np.percentile(caption_lengths(vocabulary, train), 99, method="higher")))


def longest_prompt(vocabulary: Vocabulary, train: ImageTexts) -> int:
    """Number of tokens of the longest train prompt, which the decoder must fit. Longer prompts lose
    their first tokens.
    """
    return max(
        (len(vocabulary.encode(prompt)) for group in train.prompts for prompt in group), default=0
    )


def caption_lengths(vocabulary: Vocabulary, part: ImageTexts) -> list[int]:
    """The length of each caption in words or subwords."""
    captions = (words for group in part.tokens for words in group)
    return [
        len(vocabulary.encode(words) if isinstance(vocabulary, Subwords) else words)
        for words in captions
    ]


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
    length = f"{config.epochs} epochs of {run.steps_an_epoch} steps" if config.epochs else "epochs"
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


def best_of(scored: Sequence[dict[str, Any]], metric: str) -> int:
    """Index of the best validation: the highest `metric` on dev; the lower loss decides ties."""
    return max(
        range(len(scored)), key=lambda at: (scored[at]["dev"][metric], -scored[at]["dev"]["loss"])
    )


def stopped_early(run: Run) -> bool:
    """Whether dev has not improved for --patience validations, not counting the first PATIENT_STEPS
    steps.
    """
    scored = run.journal.scored
    counted = [
        at for at, line in enumerate(scored) if line["step"] - run.state.begin > PATIENT_STEPS
    ]
    return (
        bool(scored)
        and sum(at > best_of(scored, run.task.metric) for at in counted) >= run.config.patience
    )


def should_stop(run: Run) -> bool:
    """Whether all epochs are done, the time is up, or early stopping applies."""
    config = run.config
    if stopped_early(run):
        say(f"no better {run.task.metric} on dev for {config.patience} validations: stopped early")
        return True
    if config.epochs and run.state.epoch >= config.epochs:
        return True
    return run.validated and distributed.broadcast(
        run.state.ended or (config.minutes is not None and run.done() >= 1)
    )


def validate(run: Run, trained: dict[str, float]) -> None:
    """Compute loss and scores on dev. Save the weights if they are the best so far (without dev:
    always), and save the training state.
    """
    save_progress(run)
    start, config = time.monotonic(), run.config
    with averaged(run):
        dev = {"loss": dev_loss(run), **dev_scores(run)} if run.dev else {}
        better = not dev or best_of([*run.journal.scored, {"dev": dev}], run.task.metric) == len(
            run.journal.scored
        )
        if better and run.machine.rank == 0:
            save_weights(run.folder, run.captioner.state_dict())
    run.reserve = time.monotonic() - start
    line = {
        "epoch": run.step / run.steps_an_epoch,
        "step": run.step,
        "train": trained,
        **({"dev": dev} if dev else {}),
        "seconds": {"validation": run.reserve, "elapsed": run.seconds},
    }
    run.journal.add(line)
    run.sums[0] = 0
    if run.state.step == run.steps_an_epoch:
        run.state = run.state.next_epoch()
    save_progress(run)
    told = [f"dev loss {dev['loss']:.3f}, dev {shown_scores(run.task, dev)}" if dev else "kept"]
    if better and dev:
        told[0] += " (best)"
    if trained:
        shown, unit = run.objective.shown, run.objective.unit
        told = [
            f"train {shown} {trained[shown]:.3f}",
            *told,
            f"{trained['captions_per_s']:.0f} {unit}/s",
            f"waiting {trained['waiting']:.1%}",
        ]
    say(
        f"epoch {line['epoch']:.4g}{f'/{config.epochs}' if config.epochs else ''}: "
        f"{', '.join(told)}"
    )


@torch.inference_mode()
def dev_loss(run: Run) -> float:
    """Cross-entropy on dev in nats per word, without label smoothing or dropout."""
    assert run.dev is not None and run.config.batch is not None
    run.captioner.eval()
    total, count = 0.0, 0
    for batch in run.dev.batches(
        run.dev_ids, run.config.batch, rank=run.machine.rank, world=run.machine.world
    ):
        batch = batch.to(run.machine.device)
        with run.machine.autocast():
            regions = Regions(batch.features, batch.boxes, batch.counts)
            loss, _ = caption_loss(
                run.captioner, regions, batch.tokens, PAD, prompt_lengths=batch.prompt_lengths
            )
        total, count = total + loss.item() * batch.counted, count + batch.words
    loss_of_all, words_of_all = distributed.all_reduce(total, count)
    return loss_of_all / words_of_all


def dev_scores(run: Run) -> dict[str, float]:
    """Scores of beam search on dev. The processes share the images."""
    config, machine = run.config, run.machine
    assert run.dev is not None
    mine = run.dev.examples[machine.rank :: machine.world]
    how = Generation(num_beams=config.beam, length_penalty=config.length_penalty)
    generator = CaptionGenerator(run.captioner, run.checkpoint.vocabulary, machine, how)

    def step(count: int) -> None:
        if run.stopping and machine.world == 1:
            raise Stopped(run.stopping)
        bar.step(count)

    with progress(len(mine), "images", "dev", enabled=machine.rank == 0) as bar:
        found = generate_texts(generator, run.dev.cache, mine, done=step) if mine else {}
    outputs = {
        id_: texts[0].text for part in distributed.all_gather(found) for id_, texts in part.items()
    }
    return distributed.broadcast(
        None if machine.rank else run.task.score(outputs, run.dev.examples, run.train.examples)
    )


def shown_scores(task: Task, scores: Mapping[str, float]) -> str:
    """The printed scores: the task's metric, then those in `shown`."""
    return ", ".join(
        f"{name} {scores[key]:.3f}"
        for key, name in {task.metric: task.metric, **task.shown}.items()
    )


def defaults_of(config: TrainConfig) -> dict[str, Any]:
    """The default of each setting and of each option of the chosen extensions."""
    found = {}
    for item in fields(config):
        found[item.name] = item.default
        found |= {
            option.name: option.default for option in options_of(item, getattr(config, item.name))
        }
    return found


def resume(run: Run) -> Run:
    """Continue the run in the folder; UserError if its settings differ."""
    if not (run.folder / "config.json").is_file():
        raise UserError(f"--resume: {run.folder} holds no run; start it without --resume")
    recorded = load_record(run.folder)
    began = defaults_of(run.config) | recorded["training"]  # the run may be older than some options
    may_change = {
        item.name for item in fields(TrainConfig) if item.metadata.get("may_change_on_resume")
    }
    if wrong := [
        name for name in ("epochs", "eval_steps") if type(began[name]) not in (int, type(None))
    ]:
        raise UserError(
            f"--resume: {run.folder}/config.json has {wrong[0]} {began[wrong[0]]!r}; copy it again"
        )
    # not given: keep the value that was chosen together with the epochs
    if run.config.eval_steps is None:
        run.config = replace(run.config, eval_steps=began["eval_steps"])
        run.checkpoint.training["eval_steps"] = began["eval_steps"]
    more = more_epochs(run, began)
    changed = [
        f"{name.replace('_', '-')}: {began[name]}, now {value}"
        for name, value in run.checkpoint.training.items()
        if name not in may_change
        and not (more and name == "epochs")
        and began[name] != json.loads(json.dumps(value))
    ]
    if (
        recorded["features"] != run.checkpoint.identity
        or recorded["trained_on"] != run.checkpoint.trained_on
    ):
        changed.append("the cache or the photographs")
    changed += differences(
        recorded["provenance"], run.checkpoint.provenance, ("views", "precision", "decode")
    )
    if load_vocabulary(run.folder).words != run.checkpoint.vocabulary.words:
        changed.append("the captions: they have another vocabulary")
    if changed:
        raise UserError(
            f"--resume: {run.folder} was begun with other settings ({'; '.join(changed)}); to use "
            f"its own settings: "
            f"python -m pipeline.train --config {run.folder}/config.json --out {run.folder} "
            "--resume"
        )
    if run.machine.rank == 0:
        remove_temporary_files(run.folder)
    if not (run.folder / "last.safetensors").exists():
        say(f"{run.folder} ended before its first save: starting it again")
        run.journal.begin()
        return run
    restore(run)
    if more:
        extend(run, began)
    at = f"step {run.step:,}" if run.state.step else f"epoch {run.state.epoch}"
    say(f"going on with {run.folder} after {at}")
    return run


def more_epochs(run: Run, began: Mapping[str, Any]) -> bool:
    """Whether --resume asks for more epochs than the run was started with."""
    return bool(began["epochs"] and run.config.epochs and run.config.epochs > began["epochs"])


def extend(run: Run, began: Mapping[str, Any]) -> None:
    """Train a finished run for more epochs, with a new learning rate schedule.

    Raises UserError for an unfinished run, because more epochs would change its current schedule,
    and for a run with --minutes.
    """
    scheduled, config = began["epochs"], run.config
    assert config.epochs is not None  # by `more_epochs`
    if config.minutes:
        raise UserError(
            f"--resume: {run.folder} ends by its --minutes, more epochs do not change that; "
            "train its weights further "
            f"in a new run: --init {run.folder} --epochs {config.epochs - scheduled} --out "
            "ANOTHER_FOLDER"
        )
    begun = 0 < run.state.begin == run.step  # an earlier start was killed before its first step
    if not (begun or run.state.epoch >= scheduled or stopped_early(run)):
        raise UserError(
            f"--resume: {run.folder} is in epoch {run.state.epoch + 1} of {scheduled}; let it "
            "end with "
            f"--epochs {scheduled} first, then resume it with --epochs {config.epochs}"
        )
    run.state.begin = run.step
    distributed.barrier()  # until all processes have read the files that are rewritten below
    save_progress(run)
    if run.machine.rank == 0:
        run.checkpoint.training["resume"] = False
        save_description(run.folder, run.checkpoint)
    done = run.step / run.steps_an_epoch
    say(
        f"{run.folder} had ended after epoch {done:.4g} of {scheduled}; the "
        f"{config.epochs - done:.4g} epochs added get a new "
        f"{config.schedule} schedule of the learning rate, up to {config.lr:g} again"
    )


def save_and_exit(run: Run, signum: int) -> None:
    """Save, print the command that resumes the run, and exit with the signal's status."""
    save_progress(run)
    distributed.barrier()  # an exiting process ends the others, which may still be writing
    launcher = (
        "python" if run.machine.world == 1 else f"torchrun --nproc-per-node {run.machine.world}"
    )
    again = (
        f"{launcher} -m pipeline.train --config {run.folder}/config.json --out "
        f"{run.folder} --resume"
    )
    say(f"saved after step {run.step:,}; go on with: {again}")
    sys.exit(128 + signum)


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
