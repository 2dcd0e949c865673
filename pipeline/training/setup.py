"""Open what a run trains on: the --init run, the splits, the vocabulary, the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.batches import ImageTexts
from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache
from data.examples import Example
from data.segmentation import without_blanks
from data.sources import Source
from data.subwords import Subwords
from data.vocabulary import Vocabulary
from models.decoders.registry import DECODERS, create_decoder
from pipeline.checkpoints.checkpoint import (
    Checkpoint,
    check_features,
    copy_backbone,
    load_checkpoint,
    load_record,
    load_vocabulary,
    save_description,
)
from pipeline.checkpoints.hub import checkpoint_folder
from pipeline.cli import UserError
from pipeline.decoding.consensus import save_frequencies
from pipeline.runtime import Machine, free_memory
from pipeline.tasks.base import Task
from pipeline.terminal import human_bytes, say
from pipeline.training import distributed
from pipeline.training.config import TrainConfig
from pipeline.training.logger import Journal
from pipeline.training.resume import resume
from pipeline.training.state import Run

DEV_IMAGES = 5000  # largest number of dev images that are used


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
            "pass --train-on-dev, or another --init"
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

    train = task.examples(source, "train", config.limit)
    dev = select_dev(config, task, source)
    classes = task.output == "classes"
    if classes:
        say(task.choose_answers([*train, *dev] if config.train_on_dev else train))

    def texts(examples: Sequence[Example], split: str) -> ImageTexts:
        return ImageTexts(
            examples,
            source.by_id,
            cache,
            split,
            config.segment or "words",
            task.holds_mirrored,
            task.labels if classes else None,
            len(task.answers),
        )

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
    captioner = create_decoder(
        config.decoder,
        DECODERS[config.decoder].Config(
            len(vocabulary),
            cache.shape[1],
            **config.decoder_options,
            max_length=config.max_length,
            max_prompt=max_prompt,
            classes=len(task.answers),
        ),
    )
    if begun and begun.weights:
        captioner.load_state_dict(begun.weights)
    captioner.to(machine.device)
    record = config.record()
    decoding = {"beam": config.beam, "length_penalty": config.length_penalty}
    checkpoint = Checkpoint(
        captioner,
        vocabulary,
        cache.identity,
        decoding,
        record,
        cache.provenance,
        source.digest,
        answers=task.answers,
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
