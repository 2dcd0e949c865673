"""Set up a training run: open --init, the splits, the vocabulary and the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data import DataError
from data.batches import ImageTexts
from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache
from data.examples import Example
from data.segmentation import without_blanks
from data.sources import Source
from data.subwords import Subwords
from data.vocabulary import SPECIALS, Vocabulary
from models.decoders.registry import DECODERS, create_decoder
from models.decoders.transfer import copy_common_weights
from pipeline.checkpoints.checkpoint import (
    Checkpoint,
    check_features,
    copy_backbone,
    decoder_name,
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
from pipeline.tasks.captioning import Captioning
from pipeline.terminal import human_bytes, say
from pipeline.training import distributed
from pipeline.training.config import TrainConfig
from pipeline.training.logger import Journal
from pipeline.training.resume import resume
from pipeline.training.state import Run


class InitRun(NamedTuple):
    """The run of --init.

    sizes: sizes of its model that the new run keeps.
    segment: unit of its texts, one of data.segmentation.SEGMENTS.
    vocabulary: its vocabulary if the new run keeps it, as in captioning. None: the new run builds
        its own, and `copy_common_weights` copies the weights of common words.
    checkpoint: None for a resumed run, which has its own weights.
    """

    sizes: dict[str, Any]
    segment: str
    vocabulary: Vocabulary | None
    checkpoint: Checkpoint | None


def open_init(
    config: TrainConfig, folder: Path, cache: FeatureCache | NoFeatures
) -> InitRun | None:
    """Open the run of --init; None without --init.

    Raises UserError if its features differ from those of the cache, if it has another decoder or
    was trained on dev, or if captioning would start from a run of another task.
    """
    if config.init is None:
        return None
    if config.resume and (folder / "last.safetensors").exists():
        return make_init(config, load_record(folder)["model"], load_vocabulary(folder), None)
    checkpoint = load_checkpoint(checkpoint_folder(config.init))
    check_features(checkpoint, cache)
    init_task = checkpoint.training.get("task", Captioning.name)
    if config.task == Captioning.name != init_task:
        raise UserError(
            f"--init {config.init} was trained for --task {init_task}; captioning can start from a "
            "run of captioning only"
        )
    decoder = decoder_name(checkpoint.captioner)
    if decoder != config.decoder:
        raise UserError(
            f"--init {config.init} was trained with --decoder {decoder}; pass --decoder {decoder}"
        )
    if checkpoint.training.get("train_on_dev") and not config.train_on_dev:
        raise UserError(
            f"--init {config.init} was trained on dev too, so dev cannot choose the best epoch: "
            "pass --train-on-dev, or another --init"
        )
    sizes = asdict(checkpoint.captioner.config)
    return make_init(config, sizes, checkpoint.vocabulary, checkpoint)


def make_init(
    config: TrainConfig,
    sizes: dict[str, Any],
    vocabulary: Vocabulary,
    checkpoint: Checkpoint | None,
) -> InitRun:
    """Keep the vocabulary and all sizes in captioning, else only the decoder's own sizes."""
    if config.task == Captioning.name:
        return InitRun(sizes, vocabulary.segment, vocabulary, checkpoint)
    options = DECODERS[config.decoder].Options
    names = {item.name for item in fields(options)} if options else set()
    own_sizes = {name: value for name, value in sizes.items() if name in names}
    return InitRun(own_sizes, vocabulary.segment, None, checkpoint)


def choose_segment(config: TrainConfig, source: Source, init: InitRun | None) -> TrainConfig:
    """Fill in --segment: the value of the --init run, else the given value.

    If the captions have no spaces between words, subwords are learnt on the whole text, and scores
    treat each character as a word. Raises UserError if such captions have neither --segment nor
    --vocabulary bpe.
    """
    if init:
        segment = init.segment
        if config.segment not in (None, segment):
            raise UserError(f"--segment is {config.segment}, {config.init} has {segment}")
        return replace(config, segment=segment) if segment != "words" else config
    captions = (caption for image in source.images for caption in image.captions)
    if config.segment or (example := without_blanks(captions)) is None:
        return config
    problem = f"captions have no spaces between words (such as {example[:40]!r})"
    if config.vocabulary == "word":
        raise UserError(
            f"{problem}: pass --segment characters, or --vocabulary bpe for units of several "
            "characters, or --segment words to treat each sentence as one word"
        )
    say(
        f"{problem}: subwords are learnt on the whole text, and scores treat each character as a "
        "word"
    )
    return replace(config, segment="characters")


def open_splits(
    config: TrainConfig, task: Task, source: Source, cache: FeatureCache | NoFeatures
) -> tuple[ImageTexts, ImageTexts | None]:
    """Open the splits train and dev. dev is None with --train-on-dev."""

    train = task.examples(source, "train", config.limit)
    dev = select_dev(config, task, source)
    if config.train_on == "train+val":
        train = join_val(config, task, source, train, dev)
    if task.may_lack_targets:
        train, dev = ([e for e in examples if e.targets] for examples in (train, dev))
    if config.train_on_dev:
        train, dev = [*train, *dev], []
    has_classes = task.output == "classes"
    if message := task.prepare(train, dev):
        say(message)

    def texts(examples: Sequence[Example], split: str) -> ImageTexts:
        return ImageTexts(
            examples,
            source.by_id,
            cache,
            split,
            config.segment or "words",
            task.holds_mirrored,
            task.labels if has_classes else None,
            len(task.answers),
            task.exclusive,
        )

    splits = (
        texts(train, "train"),
        None if config.train_on_dev else texts(dev, "dev"),
    )
    if left_out := sum(split.left_out for split in splits if split):
        say(
            f"{left_out} photographs are left out, because they have no features: "
            f"{cache.path / 'unreadable.jsonl'} lists them"
        )
    return splits


def join_val(
    config: TrainConfig,
    task: Task,
    source: Source,
    train: Sequence[Example],
    dev: Sequence[Example],
) -> list[Example]:
    """Return the examples of train and val.

    Raises UserError if there is no val, or if val is dev and chooses the best epoch.
    """
    val = task.examples(source, "val", config.limit)
    if {e.id for e in val} & {e.id for e in dev} and not config.train_on_dev:
        raise UserError(
            "--train-on train+val: val is also dev, which chooses the best epoch; also pass "
            "--train-on-dev to keep the last epoch instead"
        )
    known = {e.id for e in (*train, *dev)}
    return [*train, *(e for e in val if e.id not in known)]


def select_dev(config: TrainConfig, task: Task, source: Source) -> list[Example]:
    """Select the dev examples. Raises UserError if there are none, unless --train-on-dev is set."""
    most = task.dev_images
    limit = config.limit if config.train_on_dev else min(config.limit or most, most)
    try:
        return task.examples(source, "dev", limit)
    except DataError as error:
        if config.train_on_dev:
            return []
        raise UserError(
            f"{error}. Dev needs photographs, because its scores choose the best epoch; pass "
            "--train-on-dev to train without dev and keep the last epoch"
        ) from error


def keep_features(
    config: TrainConfig,
    cache: FeatureCache | NoFeatures,
    parts: Sequence[ImageTexts],
    machine: Machine,
) -> None:
    """Load the features into memory as --cache-in says, and print where they are.

    auto: on the GPU if they fit into half of its free memory, else in RAM if they fit into half of
    the free memory, else on disk. Without a GPU: on disk, because the operating system caches the
    files in RAM.
    """
    gpu = machine.device.type == "cuda"
    views = len(cache.views) if config.views else 0
    size = (1 + views) * sum(len(part) for part in parts) * cache.shape[0] * cache.shape[1] * 2
    location = config.cache_in
    if location == "auto":
        location = "disk"
        if gpu and size < torch.cuda.mem_get_info(machine.device)[0] / 2:
            location = "device"
        elif gpu and cache.feature_bytes < free_memory() / 2:
            location = "ram"
        location = distributed.broadcast(location)
    shared = ""
    if location == "ram":
        memory = distributed.shared_memory(cache.feature_bytes) if machine.world > 1 else None
        if memory:
            buffer, is_owner = memory
            cache.keep_in_memory(buffer, not is_owner)
            shared = ", once for all processes of a machine"
        else:
            cache.keep_in_memory()
        distributed.barrier()
    elif location == "device":
        for part in parts:
            part.keep_on(machine.device, views if part is parts[0] else 0)
    names = {"disk": "on disk", "ram": "in RAM", "device": f"on {machine.device}"}
    say(
        f"features are {names[location]} during training ({human_bytes(size)}{shared}; --cache-in "
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
    init: InitRun | None,
) -> Run:
    """Create the model and its run folder, or resume the run in the folder.

    Raises UserError if the run in the folder does not fit the settings (`resume`).
    """
    if init and init.vocabulary:
        vocabulary = init.vocabulary
    else:
        vocabulary = distributed.broadcast(
            make_vocabulary(config, folder, train) if machine.rank == 0 else None
        )
    if config.max_length is None:
        config = replace(config, max_length=choose_max_length(config, vocabulary, train))
        assert config.max_length is not None
    max_prompt = init.sizes.get("max_prompt") if init else None
    if max_prompt is None:
        max_prompt = config.max_prompt or max(prompt_lengths(vocabulary, train))
    captioner = create_decoder(
        config.decoder,
        DECODERS[config.decoder].Config(
            len(vocabulary),
            cache.kinds[0][2],
            **config.decoder_options,
            max_length=config.max_length,
            max_prompt=max_prompt,
            classes=len(task.answers),
            more_channels=cache.kinds[1][2] if len(cache.kinds) > 1 else 0,
        ),
    )
    if init and init.checkpoint:
        other = init.checkpoint
        common = copy_common_weights(
            captioner,
            vocabulary.words,
            task.answers,
            other.captioner,
            other.vocabulary.words,
            other.answers,
        )
        if init.vocabulary is None:
            say(f"{common:,} of {len(vocabulary):,} words are also words of {config.init}")
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
    distributed.barrier()  # all processes must have read the folder before rank 0 writes to it
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
    """Build the vocabulary of the training prompts and captions.

    A resumed run keeps its tokenizer.json, because another version of the tokenizers package would
    learn other subwords.
    """
    texts = [words for group in (*train.prompts, *train.tokens) for words in group]
    if train.classes and not any(texts):
        return Vocabulary(SPECIALS)  # the decoder reads no texts
    if config.vocabulary == "word":
        assert config.min_count is not None  # set by `resolve`
        return Vocabulary.build(texts, config.min_count, config.segment or "words")
    if config.resume and (folder / "tokenizer.json").exists():
        return load_vocabulary(folder)
    return Subwords.build(texts, config.vocab_size, config.segment or "words")


def choose_max_length(config: TrainConfig, vocabulary: Vocabulary, train: ImageTexts) -> int:
    """The 99th percentile of the caption lengths: at least 20 words, or 30 subwords."""
    minimum = 30 if config.vocabulary == "bpe" else 20
    lengths = caption_lengths(vocabulary, train)
    return max(minimum, int(np.percentile(lengths, 99, method="higher")))


def prompt_lengths(vocabulary: Vocabulary, part: ImageTexts) -> list[int]:
    """The length of each prompt in words or subwords."""
    return [len(vocabulary.encode(prompt)) for group in part.prompts for prompt in group]


def caption_lengths(vocabulary: Vocabulary, part: ImageTexts) -> list[int]:
    """The length of each caption in words or subwords."""
    captions = (words for group in part.tokens for words in group)
    return [
        len(vocabulary.encode(words) if isinstance(vocabulary, Subwords) else words)
        for words in captions
    ]
