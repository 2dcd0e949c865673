"""The time and the memory of visual question answering at the size of VQA v2.

    python -m benchmarks.vqa_size [--json FILE]

Files in the official format are generated: as train 443,757 questions about 82,783 images, as val
214,354 questions about 40,504 images, each with ten answers. The photographs are empty files and
the cache has one region of 8 channels per image, because neither is measured.

train: a new process runs `pipeline.train --task vqa --preset base` until its first batch is ready.
`to the first batch` is the time from the start of the process, `CPU` its processor time, which
depends less on other processes, and `peak` its largest resident memory. Then 200 batches are read.
`one step` is a training step on this cache. Neither a batch nor a step includes the work for 49
regions of 2,048 channels: benchmarks/cache.py measures the time to read such rows.

val: a new process opens the files and scores an answer to each question.
"""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import numpy as np

from benchmarks.measure import header, peak_memory, report

TRAIN, VAL = (443_757, 82_783), (214_354, 40_504)  # questions and images of VQA v2
TYPES = {  # beginnings of questions, by answer type
    "yes/no": ("is the", "is this a", "are there any", "does the", "can you see the", "is that a"),
    "number": ("how many", "what number is on the"),
    "other": ("what color is the", "what kind of", "what is on the", "where is the", "which",
              "who is in the", "what is the man doing with the"),
}  # fmt: skip
SYLLABLES = [a + b for a in "bcdfglmnprst" for b in ("a", "el", "i", "on", "ur")]


@click.command(context_settings={"show_default": True})
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(tempfile.gettempdir()) / "onceover-benchmark-vqa-size",
    help="folder for temporary files",
)
@click.option("--json", "out", type=click.Path(path_type=Path), help="also write the figures here")
def main(work: Path, out: Path | None) -> None:
    """Measure both. All files are removed afterwards."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        report(header() | measure(work), out)
    finally:
        shutil.rmtree(work)


def measure(
    work: Path, train: tuple[int, int] = TRAIN, val: tuple[int, int] = VAL
) -> dict[str, float]:
    """Generate the files in `work` and return the figures.

    train, val: the number of questions and of images.
    """
    figures = {}
    for name, sizes, work_of in (("train", train, train_figures), ("val", val, val_figures)):
        write_files(work / name, *sizes)
        for key, value in in_new_process(work_of, work / name).items():
            figures[f"{name}, {key}"] = value
    return figures


def in_new_process(work: Callable[..., dict], folder: Path) -> dict[str, float]:
    """Return `work(folder, time of the start)` of a new Python process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, folder, time.time()).result()


class _FirstBatch(Exception):
    """Raised in place of the first training step."""


def train_figures(folder: Path, start: float) -> dict[str, float]:
    """Run pipeline.train until the first batch is ready, then read all batches of the epoch."""
    from pipeline import train
    from pipeline.training import loop

    step, calls = loop.train_step, []

    def stop(*call) -> None:
        calls.append(call)
        raise _FirstBatch

    loop.train_step = stop  # type: ignore[assignment]
    try:
        train.main([
            "--task", "vqa", "--dataset", "vqa", "--preset", "base", "--batch", "64",
            "--questions", str(folder / "questions.json"),
            "--annotations", str(folder / "annotations.json"),
            "--images", str(folder / "images"), "--features", str(folder / "cache"),
            "--out", str(folder / "run"),
        ], standalone_mode=False)  # fmt: skip
    except _FirstBatch:
        figures = {
            "to the first batch, s": time.time() - start,
            "CPU to the first batch, s": time.process_time(),
            "peak, GB": peak_memory(),
        }
    [(run, batch, counted, progress)] = calls
    begin = time.perf_counter()
    batches = sum(1 for _ in itertools.islice(loop.train_batches(run), 200))
    per_batch = (time.perf_counter() - begin) / batches
    begin = time.perf_counter()
    step(run, batch, counted, progress)
    per_step = time.perf_counter() - begin
    return figures | {
        "questions": run.train.texts,
        "classes": len(run.task.answers),
        "words": len(run.checkpoint.vocabulary),
        "one batch, ms": per_batch * 1e3,
        "one step, ms": per_step * 1e3,
        "batch of step": per_batch / per_step,
        "peak at the end, GB": peak_memory(),
    }


def val_figures(folder: Path, start: float) -> dict[str, float]:
    """Open the files and score the most frequent answer of each question."""
    from data.datasets.registry import open_source
    from pipeline.tasks.vqa import VisualQuestionAnswering

    begin = time.perf_counter()
    source = open_source(
        "vqa",
        None,
        folder / "annotations.json",
        folder / "images",
        questions=[folder / "questions.json"],
    )
    task = VisualQuestionAnswering()
    examples = task.examples(source, "all")
    opened = time.perf_counter() - begin
    outputs = {example.id: example.targets[0] for example in examples}
    begin, cpu = time.perf_counter(), time.process_time()
    scores = task.score(outputs, examples)
    return {
        "questions": len(examples),
        "to open, s": opened,
        "to score, s": time.perf_counter() - begin,
        "CPU to score, s": time.process_time() - cpu,
        "peak, GB": peak_memory(),
        "accuracy": scores["accuracy"],
    }


# --------------------------------------------------------------------------------------- the files


def write_files(folder: Path, questions: int, images: int) -> None:
    """Write questions.json, annotations.json, images/ and cache/ to a new folder."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(581_929)[:images] + 1
    (folder / "images").mkdir(parents=True)
    for id_ in ids.tolist():
        (folder / "images" / f"COCO_train2014_{id_:012d}.jpg").touch()
    write_cache(folder / "cache", ids)
    about = np.sort(
        np.concatenate([np.arange(images), rng.integers(images, size=questions - images)])
    )
    with (
        open(folder / "questions.json", "w") as asked,
        open(folder / "annotations.json", "w") as answered,
    ):
        asked.write('{"questions": [')
        answered.write('{"annotations": [')
        comma = ""
        for question, annotation in random_entries(rng, ids[about].tolist()):
            asked.write(comma + question)
            answered.write(comma + annotation)
            comma = ", "
        asked.write("]}")
        answered.write("]}")


def random_entries(rng: np.random.Generator, image_ids: list[int]) -> Iterator[tuple[str, str]]:
    """Yield the JSON of a question and of its annotation for each image id."""
    nouns, others = random_words(rng, 12_000), random_phrases(rng, 120_000)
    answers = {"yes/no": ["yes", "no"], "number": [str(n) for n in range(40)], "other": others}
    kinds = rng.choice(list(TYPES), len(image_ids), p=[0.38, 0.12, 0.5]).tolist()
    asked = long_tail(rng, len(nouns), 4 * len(image_ids))
    drawn = {kind: long_tail(rng, len(texts), 3_000_000) for kind, texts in answers.items()}
    agrees = rng.random((len(image_ids), 10)) < 0.7
    sure = rng.choice(["yes", "maybe", "no"], 1000, p=[0.75, 0.2, 0.05]).tolist()
    previous, number = None, 0
    for row, (image, kind) in enumerate(zip(image_ids, kinds, strict=True)):
        number = number + 1 if image == previous else 0
        previous = image
        first = TYPES[kind][next(asked) % len(TYPES[kind])]
        words = [nouns[next(asked)] for _ in range(1 + row % 3)]
        if row % 40 == 0:
            words[0] += "'s" if row % 80 else "-2"
        id_ = image * 1000 + number
        texts = answers[kind]
        best = texts[next(drawn[kind])]
        people = [best if agree else texts[next(drawn[kind])] for agree in agrees[row]]
        entries = ", ".join(
            f'{{"answer": "{answer}", "answer_confidence": "{sure[(row + n) % 1000]}", '
            f'"answer_id": {n}}}'
            for n, answer in enumerate(people, start=1)
        )
        yield (
            f'{{"image_id": {image}, "question": "{first.capitalize()} {" ".join(words)}?", '
            f'"question_id": {id_}}}',
            f'{{"question_type": "{first}", "multiple_choice_answer": "{best}", '
            f'"answers": [{entries}], "image_id": {image}, "answer_type": "{kind}", '
            f'"question_id": {id_}}}',
        )


def long_tail(rng: np.random.Generator, size: int, count: int) -> Iterator[int]:
    """Yield indices below `size` without end; index n has a probability of about 1 / n.

    count: number of different draws, before they repeat.
    """
    return itertools.cycle((size ** rng.random(count)).astype(int).tolist())


def random_words(rng: np.random.Generator, count: int) -> list[str]:
    return ["".join(rng.choice(SYLLABLES, 1 + n % 3 + (n > 60))) for n in range(count)]


def random_phrases(rng: np.random.Generator, count: int) -> list[str]:
    """Phrases of one to three words."""
    words = random_words(rng, 9000)
    rows = np.stack([rng.integers(len(words), size=count) for _ in range(3)], 1).tolist()
    return [" ".join(words[w] for w in row[: 1 + n % 3]) for n, row in enumerate(rows)]


def write_cache(cache: Path, ids: np.ndarray) -> None:
    """Write a cache with one region of 8 channels per image."""
    from data.cache.reader import Rows
    from data.cache.writer import plan_shards, write_shard
    from data.sources import Image

    cache.mkdir()
    names = {id_: f"COCO_train2014_{id_:012d}.jpg" for id_ in ids.tolist()}
    images = [Image(id_, name, cache / name, "all", ()) for id_, name in names.items()]
    identity = {"backbone": "none", "weights": "none", "regions": "grid", "resize": "stretch"}
    for shard in plan_shards(images, cache):
        n = len(shard.images)
        rows = Rows(np.ones((n, 1, 8), np.float16), np.zeros((n, 1, 4)), np.ones(n))
        write_shard(shard, shard.images, [rows], np.ones((n, 2)), [], identity, {})


if __name__ == "__main__":
    main()
