"""Evaluation of a checkpoint, or of an ensemble of checkpoints, on cached features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data import DataError
from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache
from data.examples import Example, with_rows
from data.files import atomic_write_text
from data.results import choose, read_ids, server_split, write_results
from data.sources import Source, check_captioned
from pipeline.cli import UserError
from pipeline.decoding.options import by_option
from pipeline.evaluate.config import (
    EvaluateConfig,
    Job,
    caption_files,
    frequencies,
    make_scorer,
    read_against,
    train_tokens,
)
from pipeline.scoring.ngrams import References
from pipeline.tasks.base import Task
from pipeline.tasks.captioning import caption_examples
from pipeline.terminal import progress, say

if TYPE_CHECKING:  # importing torch takes seconds, and scoring a file does not need it
    from pipeline.checkpoints.checkpoint import Checkpoint
    from pipeline.decoding.captioner import Caption, CaptionGenerator


class Evaluation(NamedTuple):
    """Checkpoints of one task, and their feature cache.

    Several checkpoints form an ensemble. `folder` is the default folder for the scores.
    """

    checkpoints: list[Checkpoint]
    task: Task
    cache: FeatureCache | NoFeatures
    folder: Path


def open_checkpoints(config: EvaluateConfig) -> Evaluation:
    """Open the checkpoints and the feature cache.

    Raises:
        UserError: the cache has other features than the checkpoints were trained on, or the
            checkpoints have different vocabularies or tasks.
    """
    from pipeline.checkpoints.checkpoint import check_features, load_checkpoint
    from pipeline.checkpoints.hub import SCHEME, checkpoint_folder

    folders = config.checkpoint or (Path("runs") / config.dataset,)
    if config.out is None and any(str(folder).startswith(SCHEME) for folder in folders):
        raise UserError(
            "a checkpoint from the hub has no local folder for the scores; pass --out scores.json"
        )
    checkpoints = [load_checkpoint(checkpoint_folder(folder)) for folder in folders]
    first = checkpoints[0]
    task = first.new_task()
    without_images = first.identity == NoFeatures.identity
    no_features = without_images and (config.features is None or not task.uses_images)
    cache = config.open_cache(NoFeatures.path if no_features else config.features)
    for folder, checkpoint in zip(folders, checkpoints, strict=True):
        check_features(checkpoint, cache)
        if checkpoint.vocabulary.words != first.vocabulary.words:
            raise UserError(
                f"{folder} and {folders[0]} have different vocabularies; an ensemble needs runs "
                "that were trained on the same captions"
            )
        if checkpoint.answers != first.answers:
            raise UserError(
                f"{folder} and {folders[0]} have different answers; an ensemble needs runs that "
                "were trained on the same questions"
            )
        if checkpoint.new_task().name != task.name:
            raise UserError(
                f"{folder} and {folders[0]} were trained for different tasks; an ensemble needs "
                "runs of one task"
            )
    name = "+".join(folder.name for folder in folders)
    return Evaluation(checkpoints, task, cache, folders[0].parent / name)


def open_split(config: EvaluateConfig, checkpoints: Sequence[Checkpoint]) -> tuple[Source, str]:
    """Open the dataset and choose the split to score.

    Raises:
        UserError: the options choose the embedded sample, but the checkpoint was trained on another
            dataset.
    """
    trained_on = checkpoints[0].training.get("dataset", config.dataset)
    if config.dataset == "sample" != trained_on and config.root is None:
        raise UserError(
            f"the checkpoint was trained on --dataset {trained_on}; pass the dataset to score, "
            "with its options (for the embedded sample --root datasets/sample)"
        )
    source = config.open_source()
    split = config.split or choose_split(source, checkpoints[0])
    if split == "dev" and any(
        checkpoint.training.get("train_on_dev") for checkpoint in checkpoints
    ):
        say(
            "warning: dev was part of the training data of this checkpoint, so its dev scores do "
            "not measure the quality on new photographs"
        )
    return source, split


def job_of_checkpoint(config: EvaluateConfig, evaluation: Evaluation) -> Job:
    """Caption a split and write the captions to a file. Return a job to score them."""
    checkpoints, _, cache, folder = evaluation
    checkpoint = checkpoints[0]
    source, split = open_split(config, checkpoints)
    selected = source.select(split)
    if config.ids:
        image_ids = read_ids(config.ids)
        selected = choose(selected, image_ids, source.annotations or source.root, config.ids)
    if config.server:
        server_split(selected)  # checked before decoding, because decoding may take hours
    examples = caption_examples(selected[: config.limit])
    examples, images, left_out = with_rows(examples, source.by_id, cache, split)
    has_references = any(image.captions for image in images)
    if has_references or not config.server:
        check_captioned(images, split)
    say(
        f"{folder} on {split} of {source.dataset} {source.root}: {len(images):,} images, "
        f"{left_out} left out"
    )
    out = config.out or folder / f"scores-{split}.json"
    captions_path = out.with_name(f"captions-{split}.json")
    nbest_path = out.with_name(f"nbest-{split}.json")
    outputs = [*caption_files(config, out, selected), ("--out", captions_path)]
    outputs += [("--nbest", nbest_path)] if config.nbest else []
    config.check_outputs(outputs, source)
    others = read_against(config, [image.id for image in images], has_references)
    generator, decoding = open_generator(config, checkpoints)
    captions_by_id, rate = decode(config, generator, cache, examples)
    out.parent.mkdir(parents=True, exist_ok=True)
    best_captions = {image_id: captions[0].text for image_id, captions in captions_by_id.items()}
    write_results(captions_path, best_captions)
    if config.nbest is not None:
        atomic_write_text(nbest_path, nbest_json(captions_by_id))
        say(f"all captions with their log-probabilities: {nbest_path}")
    scorer = None
    if has_references:
        segment = config.segment or checkpoint.vocabulary.segment
        references = References(
            {image.id: image.captions for image in images},
            frequencies=frequencies(config),
            segment=segment,
        )
        chosen = config.ids or config.exclude_ids
        all_images = (config.open_whole_source() if chosen else source).images
        train = train_tokens(
            config, segment, [image for image in all_images if image.split == "train"]
        )
        scorer = make_scorer(config, references, f"{source.dataset}-{split}", train)
    about = {
        "split": split,
        "left_out_unreadable": left_out,
        "decoding": decoding,
        "decoded_per_s": rate,
    }
    return Job(folder.name, best_captions, selected, scorer, out, others, about)


def choose_split(source: Source, checkpoint: Checkpoint) -> str:
    """Return the split to score: test, else val.

    Without test and val it is dev or all images. It is dev if the checkpoint was trained on this
    source.

    Raises:
        UserError: the split has no images.
    """
    split = source.reported()
    if split == "all" and checkpoint.trained_on == source.digest:
        split = "dev"
    if split in ("dev", "all"):
        try:
            source.select(split)
        except DataError as error:  # the only photograph is in train
            raise UserError(f"{error}; to score the training data, pass --split train") from error
        say(
            f"{source.root} has no test or val split, so {split} is scored; dev contains the "
            "images that pipeline.train does not train on"
        )
    return split


def open_generator(
    config: EvaluateConfig, checkpoints: Sequence[Checkpoint]
) -> tuple[CaptionGenerator, dict[str, Any]]:
    """Open the machine, and create a generator with the checkpoint or the ensemble of several.

    Returns:
        The generator, and all decoding options.
    """
    from models.generation.ensemble import Ensemble
    from pipeline.decoding.captioner import cast_linears_to_bf16, make_generator
    from pipeline.runtime import open_machine

    machine = open_machine(config.device, config.seed, config.precision)
    decoding = {**checkpoints[0].decoding, **config.given()}
    captioners = [checkpoint.captioner.to(machine.device) for checkpoint in checkpoints]
    captioner = captioners[0] if len(captioners) == 1 else Ensemble(captioners).eval()
    cast_linears_to_bf16(captioner, machine)
    defaults = dict(checkpoints[0].decoding)
    if config.sample:
        del decoding["beam"], defaults["beam"]
    checkpoint = replace(checkpoints[0], decoding=defaults)
    with by_option():
        generator = make_generator(captioner, checkpoint, machine, config.given(), config.seed)
    return generator, decoding


def decode(
    config: EvaluateConfig,
    generator: CaptionGenerator,
    cache: FeatureCache | NoFeatures,
    examples: Sequence[Example],
) -> tuple[dict[Any, list[Caption]], float]:
    """Generate the captions of the examples.

    Returns:
        The captions by example id, best first, and the number of images per second.
    """
    from pipeline.decoding.captioner import generate_texts

    method = "samples" if config.sample else f"beam {generator.options.num_beams}"
    method += f", consensus with {config.consensus} samples" if config.consensus else ""
    with by_option(), progress(len(examples), "images", method) as bar:
        texts = generate_texts(generator, cache, examples, config.batch, bar.step)
    say(
        f"{len(examples):,} captions in {bar.seconds:.1f} s, {bar.rate:.0f} images/s, {method}, "
        f"on {generator.machine}"
    )
    return texts, bar.rate


def nbest_json(captions_by_id: Mapping[int, Sequence[Caption]]) -> str:
    """Return all captions of each image as JSON, with one image per line."""
    lines = [
        json.dumps(
            {"image_id": image_id, "captions": [caption.record() for caption in captions]},
            ensure_ascii=False,
        )
        for image_id, captions in captions_by_id.items()
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"
