"""Score the captions of a checkpoint, of an ensemble of checkpoints, or of a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data.files import atomic_write_text
from data.results import write_server
from pipeline.cli import UserError, command
from pipeline.evaluate.checkpoint import job_of_checkpoint, open_checkpoints
from pipeline.evaluate.config import EvaluateConfig, Job, caption_files
from pipeline.evaluate.file import jobs_of_files
from pipeline.evaluate.task import refuse_options, score_file, score_task
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
from pipeline.tasks.captioning import Captioning
from pipeline.terminal import say


@command(
    EvaluateConfig,
    implied={"--answers": ("--dataset", "vqa"), "--ranks": ("--dataset", "visdial")},
)
def main(config: EvaluateConfig) -> None:
    """Score a checkpoint on a split of a dataset, or score a file of captions or answers.

    The command decodes from the cached features. Without options, it evaluates the run and the
    cache of the embedded sample. To score a file of captions: --captions results.json --references
    annotations.json [--ids FILE] [--out scores.json]. To score a file of answers: --answers
    results.json --questions questions.json --annotations annotations.json [--out scores.json]. To
    score ranks of dialogue options: --ranks ranks.json --dialogs dialogs.json [--out scores.json].
    """
    if config.answers or config.ranks:
        return score_file(config)
    if config.captions:
        refuse_options(config, Captioning(), "--captions are scored as captions")
        return score_captions(config, list(jobs_of_files(config)))
    evaluation = open_checkpoints(config)
    if evaluation.task.scored_as_captions:
        refuse_options(config, evaluation.task, "the checkpoint generates captions")
        score_captions(config, [job_of_checkpoint(config, evaluation)])
    else:
        score_task(config, evaluation)


def score_captions(config: EvaluateConfig, jobs: Sequence[Job]) -> None:
    """Score the captions of each job, write the scores to files, and print them.

    Raises:
        UserError: a score that an option requested cannot be computed. All other scores are
            written first.
    """
    if config.captions:
        outputs = [file for job in jobs for file in caption_files(config, job.out, job.images)]
        config.check_outputs(outputs)
    if config.server:
        write_server_files(config, jobs[0])
    with open_meteor(config.meteor) as meteor:
        scored = [
            (job, make_card(job.name, job.captions, job.scorer, meteor, config.spice))
            for job in jobs
            if job.scorer
        ]
        cards = [card for _, card in scored]
        if config.against and cards:
            scorer, others = jobs[0].scorer, jobs[0].others
            assert scorer is not None and others is not None  # read_against verified it
            other = make_card(config.against.name, others, scorer, meteor, config.spice)
            cards[0].record["against"] = compare(cards[0], other)
    for job, card in scored:
        write_card(job, card)
    if cards:
        print_cards(cards, config.format)
    for job, card in scored:
        print_examples(card, job.captions, config.examples, to_stderr=config.format != "table")
    refuse_missing_scores(cards)


@contextlib.contextmanager
def open_meteor(requested: bool) -> Iterator[Meteor | NotComputed | None]:
    """Start the METEOR program once for all captions of this command.

    Yields the program, the error if it cannot start, or None if METEOR is not requested.
    """
    if not requested:
        yield None
        return
    try:
        meteor = Meteor()
    except NotComputed as error:
        yield error
        return
    with meteor:
        yield meteor


def write_card(job: Job, card: Card) -> None:
    """Write scores.json and the scores of each image, if the job has an output file."""
    if job.out is None:
        return
    job.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(job.out, json.dumps(card.record | job.about, indent=2) + "\n")
    images = job.out.with_name(f"{job.out.stem}-images.jsonl")
    atomic_write_text(images, image_lines(card, job.captions))
    say(f"scores: {job.out}\nscores of each image: {images}")
    if "split" in job.about:
        say(f"captions: {job.out.with_name('captions-' + job.about['split'] + '.json')}")


def write_server_files(config: EvaluateConfig, job: Job) -> None:
    """Write the files for the COCO evaluation server."""
    assert config.server is not None
    folder = job.out.parent if job.out else Path()
    for path in write_server(folder, config.server, job.captions, job.images):
        say(f"for the evaluation server: {path}")


def refuse_missing_scores(cards: Iterable[Card]) -> None:
    """Raise UserError if a requested score (METEOR or SPICE) could not be computed."""
    reasons = {
        name: reason
        for card in cards
        for name, reason in card.not_computed.items()
        if name in card.values and name in ON_REQUEST
    }
    if reasons:
        raise UserError("; ".join(reasons.values()))
