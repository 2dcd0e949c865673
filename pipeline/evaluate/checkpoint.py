"""Evaluation of a checkpoint, or of an ensemble, over cached features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from data import DataError
from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache
from data.examples import Example, with_rows
from data.files import atomic_write_text
from data.results import choose, read_ids, server_split, write_results
from data.sources import Source, check_captioned
from pipeline.cli import UserError, flag_of
from pipeline.decoding.options import by_option
from pipeline.evaluate.config import EvaluateConfig, Job, frequencies, make_scorer, train_tokens
from pipeline.scoring.ngrams import References
from pipeline.tasks.base import Task
from pipeline.tasks.captioning import caption_examples
from pipeline.tasks.registry import task_of
from pipeline.terminal import progress, say

if TYPE_CHECKING:  # importing torch takes seconds, and scoring a file does not need it
    from pipeline.checkpoints.checkpoint import Checkpoint
    from pipeline.decoding.captioner import Caption


class Opened(NamedTuple):
    """What is evaluated: checkpoints of one task (several form an ensemble), their cache, and the
    output file.
    """

    checkpoints: list[Checkpoint]
    task: Task
    cache: FeatureCache | NoFeatures
    folder: Path


def open_checkpoints(config: EvaluateConfig) -> Opened:
    """Open the checkpoints and the cache; UserError if they do not fit together."""
    from pipeline.checkpoints.checkpoint import check_features, load_checkpoint
    from pipeline.checkpoints.hub import SCHEME, checkpoint_folder

    folders = config.checkpoint or (Path("runs") / config.dataset,)
    if config.out is None and any(str(folder).startswith(SCHEME) for folder in folders):
        raise UserError(
            "a checkpoint of the hub has no folder here to write scores into; pass --out "
            "scores.json"
        )
    checkpoints = [load_checkpoint(checkpoint_folder(folder)) for folder in folders]
    checkpoint = checkpoints[0]
    features = config.features
    if features is None and checkpoint.identity == NoFeatures.identity:
        features = NoFeatures.path
    cache = config.open_cache(features)
    task = task_of(checkpoint.training, checkpoint.vocabulary.segment)
    for place, each in zip(folders, checkpoints, strict=True):
        check_features(each, cache)
        if each.vocabulary.words != checkpoint.vocabulary.words:
            raise UserError(
                f"{place} and {folders[0]} have different vocabularies; an ensemble needs runs "
                f"with the same captions"
            )
        if task_of(each.training, each.vocabulary.segment).name != task.name:
            raise UserError(
                f"{place} and {folders[0]} were trained for different tasks; an ensemble needs one "
                f"task"
            )
    return Opened(
        checkpoints, task, cache, folders[0].parent / "+".join(folder.name for folder in folders)
    )


def open_split(config: EvaluateConfig, checkpoints: Sequence[Checkpoint]) -> tuple[Source, str]:
    """Open the dataset and choose the split to score."""
    source = config.open_source()
    split = config.split or choose_split(source, checkpoints[0])
    if split == "dev" and any(each.training.get("train_on_dev") for each in checkpoints):
        say(
            "warning: this checkpoint was trained on dev too; its dev scores do not measure new "
            "photographs"
        )
    return source, split


def score_task(config: EvaluateConfig, opened: Opened) -> None:
    """Generate the answers of a split, write them and their scores, and print the scores."""
    checkpoints, task, cache, folder = opened
    captions_only = {
        "ids": config.ids,
        "server": config.server,
        "against": config.against,
        "df": config.df,
        "meteor": config.meteor,
        "spice": config.spice,
        "train_captions": config.train_captions,
    }
    if wrong := [name for name, value in captions_only.items() if value]:
        raise UserError(
            f"{flag_of(wrong[0])} is an option of captioning; {folder} was trained for --task "
            f"{task.name}"
        )
    source, split = open_split(config, checkpoints)
    examples = task.examples(source, split, config.limit)
    examples, _, left_out = with_rows(examples, source.by_id, cache, split)
    say(
        f"{folder} on {split} of {source.dataset} {source.root}: {len(examples):,} "
        f"{task.unit}, {left_out} photographs left out"
    )
    found, decoding = decode(config, checkpoints, cache, examples)
    outputs = {id_: texts[0].text for id_, texts in found.items()}
    task.answers = checkpoints[0].answers
    scores = task.score(outputs, examples)
    out = config.out or folder / f"scores-{split}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {"id": e.id, "image_id": e.image_id, "prompt": e.prompt, "output": outputs[e.id]},
            ensure_ascii=False,
        )
        + "\n"
        for e in examples
    ]
    atomic_write_text(out.with_name(f"outputs-{split}.jsonl"), "".join(lines))
    record = {
        "task": task.name,
        "split": split,
        "examples": len(examples),
        "left_out_unreadable": left_out,
        "decoding": decoding,
        "scores": scores,
    }
    atomic_write_text(out, json.dumps(record, indent=2) + "\n")
    for name, value in scores.items():
        if isinstance(value, float):
            click.echo(f"{name:<12} {value:.4f}")
    say(f"scores: {out}\noutputs: {out.with_name(f'outputs-{split}.jsonl')}")


def job_of_checkpoint(config: EvaluateConfig, opened: Opened) -> Job:
    """Caption the split over the cache. The captions are written before they are scored."""
    checkpoints, _, cache, folder = opened
    checkpoint = checkpoints[0]
    source, split = open_split(config, checkpoints)
    wanted = source.select(split)
    if config.ids:
        wanted = choose(wanted, read_ids(config.ids), source.annotations or source.root, config.ids)
    if config.server:
        server_split(wanted)  # checked before decoding, which may take hours
    examples = caption_examples(wanted[: config.limit])
    examples, images, left_out = with_rows(examples, source.by_id, cache, split)
    scored = not config.server or any(image.captions for image in images)
    if scored:
        check_captioned(images, split)
    say(
        f"{folder} on {split} of {source.dataset} {source.root}: {len(images):,} images, "
        f"{left_out} left out"
    )
    written, decoding = decode(config, checkpoints, cache, examples)
    out = config.out or folder / f"scores-{split}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    captions = {image_id: found[0].text for image_id, found in written.items()}
    write_results(out.with_name(f"captions-{split}.json"), captions)
    if config.nbest is not None:
        atomic_write_text(out.with_name(f"nbest-{split}.json"), nbest_lines(written))
        say(f"all captions, with log-probabilities: {out.with_name(f'nbest-{split}.json')}")
    scorer = None
    if scored:
        segment = config.segment or checkpoint.vocabulary.segment
        captions_by_image = {image.id: image.captions for image in images}
        references = References(captions_by_image, frequencies=frequencies(config), segment=segment)
        train = train_tokens(
            config, segment, [image for image in source.images if image.split == "train"]
        )
        scorer = make_scorer(config, references, f"{source.dataset}-{split}", train)
    about = {"split": split, "left_out_unreadable": left_out, "decoding": decoding}
    return Job(folder.name, captions, wanted, scorer, out, about)


def choose_split(source: Source, checkpoint: Checkpoint) -> str:
    """The split to score: test, else val, else (for a source without splits) what was not trained
    on.
    """
    split = source.reported()
    if split == "all" and checkpoint.trained_on == source.digest:
        split = "dev"
    if split in ("dev", "all"):
        try:
            source.select(split)
        except DataError as error:  # a single photograph, which is in train
            raise UserError(f"{error}; to score what was trained on, pass --split train") from error
        say(
            f"{source.root} names no test or val: scoring {split}; dev is what pipeline.train "
            "keeps from training"
        )
    return split


def decode(
    config: EvaluateConfig,
    checkpoints: Sequence[Checkpoint],
    cache: FeatureCache | NoFeatures,
    examples: Sequence[Example],
) -> tuple[dict[Any, list[Caption]], dict[str, Any]]:
    """Texts by example id, and the decoding options."""
    from models.generation.ensemble import Ensemble
    from pipeline.decoding.captioner import cast_linears_to_bf16, generate_texts, make_generator
    from pipeline.runtime import open_machine

    machine = open_machine(config.device, config.seed, config.precision)
    decoding = {**checkpoints[0].decoding, **config.given()}
    captioners = [checkpoint.captioner.to(machine.device) for checkpoint in checkpoints]
    captioner = captioners[0] if len(captioners) == 1 else Ensemble(captioners).eval()
    cast_linears_to_bf16(captioner, machine)
    defaults = dict(checkpoints[0].decoding)
    if config.sample:
        del decoding["beam"], defaults["beam"]
    how = "samples" if config.sample else f"beam {decoding['beam']}"
    how += f", consensus with {config.consensus} samples" if config.consensus else ""
    with by_option(), progress(len(examples), "images", how) as bar:
        checkpoint = replace(checkpoints[0], decoding=defaults)
        writer = make_generator(captioner, checkpoint, machine, config.given(), config.seed)
        texts = generate_texts(writer, cache, examples, config.batch, bar.step)
    say(
        f"{len(examples):,} captions in {bar.seconds:.1f} s, {bar.rate:.0f} images/s, {how}, "
        f"on {machine}"
    )
    return texts, decoding


def nbest_lines(written: Mapping[int, Sequence[Caption]]) -> str:
    """All captions of each image as JSON, one image per line."""
    lines = [
        json.dumps(
            {"image_id": image_id, "captions": [caption.record() for caption in captions]},
            ensure_ascii=False,
        )
        for image_id, captions in written.items()
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"
