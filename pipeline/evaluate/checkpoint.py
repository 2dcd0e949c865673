"""Captions of a checkpoint, or of several, over cached features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DataError
from data.cache.reader import FeatureCache
from data.datasets.registry import open_source
from data.files import atomic_write_text
from data.results import choose, read_ids, server_split, write_results
from data.sources import Source, check_captioned
from pipeline.cli import UserError
from pipeline.decoding.options import by_option
from pipeline.evaluate.config import EvaluateConfig, Job, frequencies, make_scorer, train_tokens
from pipeline.scoring.ngrams import References
from pipeline.terminal import progress, say

if TYPE_CHECKING:  # torch takes seconds to import, and scoring a file needs none of it
    from pipeline.checkpoints.checkpoint import Checkpoint
    from pipeline.decoding.captioner import Caption


def job_of_checkpoint(config: EvaluateConfig) -> Job:
    """Caption the split over the cache; the captions are written at once, before any score."""
    from pipeline.checkpoints.checkpoint import load_checkpoint, refuse_other_features
    from pipeline.checkpoints.hub import SCHEME, checkpoint_folder

    folders = config.checkpoint or (Path("runs") / config.dataset,)
    if config.out is None and any(str(folder).startswith(SCHEME) for folder in folders):
        raise UserError("a checkpoint of the hub has no folder here to write scores into; pass --out scores.json")
    checkpoints = [load_checkpoint(checkpoint_folder(folder)) for folder in folders]
    checkpoint = checkpoints[0]
    folder = folders[0].parent / "+".join(folder.name for folder in folders)
    cache = FeatureCache(config.features or Path("cache") / config.dataset)
    for place, each in zip(folders, checkpoints, strict=True):
        refuse_other_features(each, cache)
        if each.vocabulary.words != checkpoint.vocabulary.words:
            raise UserError(f"{place} and {folders[0]} have other vocabularies; an ensemble needs runs on the same captions")
    root = Path("datasets/sample") if config.dataset == "sample" and config.root is None else config.root
    source = open_source(config.dataset, root, config.annotations, config.images, config.captions_from)
    for note in source.notes:
        say(note)
    split = config.split or choose_split(source, checkpoint)
    if split == "dev" and any(each.training.get("train_on_dev") for each in checkpoints):
        say("warning: this checkpoint was trained on dev too; its scores there say nothing of other photographs")
    wanted = source.select(split)
    if config.ids:
        wanted = choose(wanted, read_ids(config.ids), source.annotations or source.root, config.ids)
    if config.server:
        server_split(wanted)  # refused before hours of decoding, not after
    images, left_out = cache.select(wanted[: config.limit])
    if not images:
        raise DataError(f"split {split!r} has no image with features in {cache.path}: all are unreadable")
    scored = not config.server or any(image.captions for image in images)
    if scored:
        check_captioned(images, split)
    say(f"{folder} on {split} of {source.dataset} {source.root}: {len(images):,} images, {left_out} left out")
    written, decoding = decode(config, checkpoints, cache, [image.id for image in images])
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
        train = train_tokens(config, segment, [image for image in source.images if image.split == "train"])
        scorer = make_scorer(config, references, f"{source.dataset}-{split}", train)
    about = {"split": split, "left_out_unreadable": left_out, "decoding": decoding}
    return Job(folder.name, captions, wanted, scorer, out, about)


def choose_split(source: Source, checkpoint: Checkpoint) -> str:
    """The split to report, said: test, else val, else what was not trained on of a source that names no splits."""
    split = source.reported()
    if split == "all" and checkpoint.trained_on == source.digest:
        split = "dev"
    if split in ("dev", "all"):
        try:
            source.select(split)
        except DataError as error:  # one photograph, which is train
            raise UserError(f"{error}; to score what was trained on, pass --split train") from error
        say(f"{source.root} names no test or val: scoring {split}; dev is what pipeline.train keeps from training")
    return split


def decode(
    config: EvaluateConfig, checkpoints: Sequence[Checkpoint], cache: FeatureCache, ids: Sequence[int]
) -> tuple[dict[int, list[Caption]], dict[str, Any]]:
    """Captions by image id, and the options that they were found with."""
    from models.generation.ensemble import Ensemble
    from pipeline.decoding.captioner import caption_rows, cast_linears_to_bf16, make_writer
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
    with by_option(), progress(len(ids), "images", how) as bar:
        checkpoint = replace(checkpoints[0], decoding=defaults)
        writer = make_writer(captioner, checkpoint, machine, config.given(), config.seed)
        captions = caption_rows(writer, cache, ids, config.batch, bar.step)
    say(f"{len(ids):,} captions in {bar.seconds:.1f} s, {bar.rate:.0f} images/s, {how}, on {machine}")
    return captions, decoding


def nbest_lines(written: Mapping[int, Sequence[Caption]]) -> str:
    """All captions of each image as JSON, an image a line."""
    lines = [
        json.dumps({"image_id": image_id, "captions": [caption.record() for caption in captions]}, ensure_ascii=False)
        for image_id, captions in written.items()
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"
