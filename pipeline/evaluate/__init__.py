"""Score captions: of one or several checkpoints over cached features, or from a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from data import DataError
from data.files import atomic_write_text
from data.results import read_results, write_server
from pipeline.cli import UserError, command
from pipeline.evaluate.checkpoint import job_of_checkpoint, open_checkpoints, score_task
from pipeline.evaluate.config import EvaluateConfig, Job
from pipeline.evaluate.file import jobs_of_files
from pipeline.scoring.java import Meteor, NotComputed
from pipeline.scoring.report import (
    ON_REQUEST,
    Card,
    compare,
    image_lines,
    make_card,
    print_cards,
    print_examples,
)
from pipeline.terminal import say


@command(EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Caption a split over cached features and score the captions, or score a file of captions.

    Without options it evaluates the run and the cache of the embedded sample. To score a file:
    --captions results.json --references annotations.json [--ids FILE] [--out scores.json].
    """
    if config.captions:
        return score_captions(config, list(jobs_of_files(config)))
    opened = open_checkpoints(config)
    if opened.task.scored_as_captions:
        score_captions(config, [job_of_checkpoint(config, opened)])
    else:
        score_task(config, opened)


def score_captions(config: EvaluateConfig, jobs: Sequence[Job]) -> None:
    """Score the captions of each job, write the scores, and print them."""
    if config.server:
        send_to_server(config, jobs[0])
    with open_meteor(config.meteor) as meteor:
        cards = [
            make_card(job.name, job.captions, job.scorer, meteor, config.spice)
            for job in jobs
            if job.scorer
        ]
        if config.against and cards:
            cards[0].record["against"] = compare(cards[0], other_card(config, jobs[0], meteor))
    scored = [
        (job, card) for job, card in zip([job for job in jobs if job.scorer], cards, strict=True)
    ]
    for job, card in scored:
        write_card(job, card)
    if cards:
        print_cards(cards, config.format)
    for job, card in scored:
        print_examples(card, job.captions, config.examples, to_stderr=config.format != "table")
    refuse_silence(cards)


@contextlib.contextmanager
def open_meteor(wanted: bool) -> Iterator[Meteor | NotComputed | None]:
    """The METEOR program for all captions of this command, or the reason why it cannot run."""
    if not wanted:
        yield None
        return
    try:
        meteor = Meteor()
    except NotComputed as error:
        yield error
        return
    with meteor:
        yield meteor


def other_card(config: EvaluateConfig, job: Job, meteor: Meteor | NotComputed | None) -> Card:
    """The scores of --against, over exactly the images of `job`."""
    assert config.against is not None and job.scorer is not None  # else nothing is compared
    captions = read_results(config.against)
    missing = [image_id for image_id in job.captions if image_id not in captions]
    if missing:
        raise DataError(
            f"image {missing[0]} has no caption in {config.against} "
            f"({len(missing):,} such); "
            "two captioners are compared over the same images"
        )
    captions = {image_id: captions[image_id] for image_id in job.captions}
    return make_card(config.against.name, captions, job.scorer, meteor, config.spice)


def write_card(job: Job, card: Card) -> None:
    """Write scores.json and the scores of each image; nothing for a file of captions without
    --out.
    """
    if job.out is None:
        return
    job.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(job.out, json.dumps(card.record | job.about, indent=2) + "\n")
    images = job.out.with_name(f"{job.out.stem}-images.jsonl")
    atomic_write_text(images, image_lines(card, job.captions))
    say(f"scores: {job.out}\neach image's: {images}")
    if "split" in job.about:
        say(f"captions: {job.out.with_name('captions-' + job.about['split'] + '.json')}")


def send_to_server(config: EvaluateConfig, job: Job) -> None:
    assert config.server is not None
    folder = job.out.parent if job.out else Path()
    for path in write_server(folder, config.server, job.captions, job.images):
        say(f"for the server: {path}")


def refuse_silence(cards: Iterable[Card]) -> None:
    """Raise UserError if a requested score could not be computed, after all others are written."""
    found: Mapping[str, str] = {
        name: why
        for card in cards
        for name, why in card.not_computed.items()
        if name in card.values and name in ON_REQUEST
    }
    if found:
        raise UserError("; ".join(found.values()))
