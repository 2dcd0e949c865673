"""Exported graphs in ONNX Runtime, compared with the decoder itself.

    python -m benchmarks.export --checkpoint RUN [--checkpoint RUN ...] --work FOLDER

For each run, with docs/caption_onnx.py as the program around the graphs:

- how many texts at beam 1 and at the run's beam (or how many classes) equal those of the decoder,
  over cached features, and with --photographs also from the photographs
- the score of the fp32 graphs minus that of the int8 graphs (--quantize int8), at the run's beam,
  with the interval of the paired bootstrap
- images per second of processor time, one image at a time, and the size of the files

The decoder runs in fp32. The split, by default val, is that of the run's dataset.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import torch

from benchmarks.measure import header, in_turn
from data.cache.reader import FeatureCache
from data.examples import Example
from models.decoders.registry import DECODERS
from pipeline import export
from pipeline.checkpoints.checkpoint import load_checkpoint
from pipeline.cli import from_record
from pipeline.decoding.captioner import (
    CaptionGenerator,
    generate_texts,
    load_captioner,
    make_generator,
)
from pipeline.runtime import open_machine
from pipeline.scoring.bootstrap import interval, mean_of_groups, resample
from pipeline.scoring.metrics import score
from pipeline.sources import SourceOptions
from pipeline.tasks.base import Task

PROGRAM = Path(__file__).resolve().parents[1] / "docs" / "caption_onnx.py"
RESAMPLES, ROUNDS = 1000, 3
Texts = dict[int | str, str]


@click.command(context_settings={"show_default": True})
@click.option("--checkpoint", "runs", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--features", type=click.Path(path_type=Path), help="cache  [that of the run]")
@click.option("--split", default="val", help="split of the run's dataset")
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="folder for the exports"
)
@click.option("--texts", default=200, help="examples whose texts are compared")
@click.option("--photographs", default=0, help="photographs whose captions are compared")
@click.option("--scored", default=300, help="examples that int8 is scored on")
@click.option("--timed", default=10, help="examples of each round that is timed")
def main(
    runs: tuple[Path, ...], work: Path, features: Path | None, split: str, texts: int,
    photographs: int, scored: int, timed: int,
) -> None:  # fmt: skip
    """Compare exported graphs with the decoder: texts, int8, speed and size."""
    click.echo(json.dumps(header()))
    for run in runs:
        measure(run, work / run.name, features, split, texts, photographs, scored, timed)


def measure(
    run: Path, work: Path, features: Path | None, split: str, texts: int, photographs: int,
    scored: int, timed: int,
) -> None:  # fmt: skip
    """Print the figures of one run, a line each."""
    checkpoint, machine = load_checkpoint(run), open_machine("cpu", precision="fp32")
    name = next(name for name, each in DECODERS.items() if type(checkpoint.captioner) is each)
    export_run(run, work, bool(photographs))
    task, beam = checkpoint.new_task(), checkpoint.decoding["beam"]
    source = from_record(SourceOptions, checkpoint.training).open_source()
    examples = task.examples(source, split)[: max(texts, scored)]
    cache = FeatureCache(features or Path(checkpoint.training["features"]))
    for beams in (beam,) if checkpoint.answers else (1, beam):
        generator = make_generator(checkpoint.captioner, checkpoint, machine, {"num_beams": beams})
        ours = {
            id_: best[0].text
            for id_, best in generate_texts(generator, cache, examples[:texts]).items()
        }
        theirs = generate_onnx(work / "fp32", generator, cache, examples[:texts], beams)
        say_equal(run, name, "classes" if checkpoint.answers else f"beam {beams}", theirs, ours)
    if photographs:
        ids = list(dict.fromkeys(example.image_id for example in examples))[:photographs]
        paths = [str(source.by_id[id_].path) for id_ in ids if id_ is not None]
        captioner = load_captioner(run, "cpu", "fp32")
        ours = dict(zip(paths, captioner.caption(paths), strict=True))
        theirs = {path: caption_onnx(work / "fp32", path, beam) for path in paths}
        say_equal(run, name, f"beam {beam}, from photographs", theirs, ours)
    line = compare_int8(work, task, generator, cache, examples[:scored], beam)
    click.echo(f"{run.name} ({name}): {line}")
    seconds = in_turn(
        {
            "fp32": lambda: generate_onnx(work / "fp32", generator, cache, examples[:timed], beam),
            "int8": lambda: generate_onnx(work / "int8", generator, cache, examples[:timed], beam),
            "ours": lambda: generate_texts(generator, cache, examples[:timed], batch=1),
        },
        ROUNDS,
        clock=time.process_time,
    )
    for kind, each in seconds.items():
        size = ""
        if kind != "ours":
            sizes = {path.stem: path.stat().st_size for path in (work / kind).glob("*.onnx")}
            parts = (f"{part} {count / 1e6:.1f}" for part, count in sorted(sizes.items()))
            size = f"; MB: {', '.join(parts)}"
        rate = timed / statistics.median(each)
        click.echo(f"{run.name} ({name}): {kind}: {rate:.2f} examples per CPU second{size}")


def export_run(run: Path, work: Path, with_backbone: bool) -> None:
    """Write the graphs to work/fp32 and work/int8, unless an earlier call did."""
    if (work / "int8" / export.RECORD).exists():
        return
    given = ["--checkpoint", str(run), "--out", str(work / "fp32")]
    given.append("--backbone" if with_backbone else "--no-backbone")
    export.main.main(given, standalone_mode=False)
    (work / "int8").mkdir(exist_ok=True)
    # as --quantize int8 does, without a second export
    for path in sorted((work / "fp32").iterdir(), key=lambda path: path.name == export.RECORD):
        shutil.copyfile(path, work / "int8" / path.name)
        if path.suffix == ".onnx" and path.stem != "backbone":
            export.quantize(work / "int8" / path.name)


def say_equal(run: Path, name: str, what: str, theirs: Mapping, ours: Mapping) -> None:
    equal = sum(theirs[key] == text for key, text in ours.items())
    different = len({*ours.values()})
    click.echo(
        f"{run.name} ({name}), {what}: {equal} of {len(ours)} equal, {different} different texts"
    )


def program() -> ModuleType:
    """The example program of the documentation as a module."""
    spec = importlib.util.spec_from_file_location("caption_onnx", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ONNX = program()


def generate_onnx(
    folder: Path, generator: CaptionGenerator, cache: FeatureCache, examples: Sequence[Example],
    beams: int,
) -> Texts:  # fmt: skip
    """Generate the text of each example from cached features, with prompts split as ours are."""
    model = json.loads((folder / "model.json").read_text())
    texts: Texts = {}
    for example in examples:
        assert example.image_id is not None
        features, boxes, counts = cache.rows([example.image_id])
        regions = [features.astype(np.float32), boxes.astype(np.float32), counts.astype(np.int64)]
        prompt = generator.encode_prompts([example.prompt])
        ids = [] if prompt is None else prompt[0].tolist()
        memory = ONNX.run(folder, model, "encoder", regions)
        penalty = model["decoding"]["length_penalty"]
        texts[example.id] = ONNX.generate(folder, model, memory, ids, beams, penalty)
    return texts


def caption_onnx(folder: Path, photograph: str, beams: int) -> str:
    """Caption a photograph as the example program does."""
    model = json.loads((folder / "model.json").read_text())
    pixels = ONNX.read_photo(photograph, model["framing"])
    regions = ONNX.run(folder, model, "backbone", pixels)
    memory = ONNX.run(folder, model, "encoder", regions)
    return ONNX.generate(folder, model, memory, [], beams, model["decoding"]["length_penalty"])


def compare_int8(
    work: Path, task: Task, generator: CaptionGenerator, cache: FeatureCache,
    examples: Sequence[Example], beams: int,
) -> str:  # fmt: skip
    """Describe the scores of fp32 and int8, and their difference with its interval."""
    texts = {
        kind: generate_onnx(work / kind, generator, cache, examples, beams)
        for kind in ("fp32", "int8")
    }
    scores = {kind: scores_of(task, each, examples) for kind, each in texts.items()}
    groups = [example.image_id for example in examples]
    differences = mean_of_groups("score", scores["int8"] - scores["fp32"], groups)
    low, high = interval(resample([differences], RESAMPLES, 0)["score"])
    means = {kind: float(each.mean()) for kind, each in scores.items()}
    equal = sum(texts["int8"][key] == text for key, text in texts["fp32"].items())
    return (
        f"{task.metric} of {len(examples)} examples: fp32 {means['fp32']:.4f}, int8 "
        f"{means['int8']:.4f}, difference {means['int8'] - means['fp32']:+.4f} ({low:+.4f} to "
        f"{high:+.4f}); {equal} texts equal"
    )


def scores_of(task: Task, texts: Mapping[Any, str], examples: Sequence[Example]) -> np.ndarray:
    """The score of each example, whose mean is the score of all: CIDEr of captions, or accuracy."""
    if each := task.example_scores(texts, examples):
        return np.array([scores[task.metric] for scores in each])
    targets = {int(example.id): example.targets for example in examples}  # the ids of images
    counted = score(texts, targets)
    row = {id_: number for number, id_ in enumerate(counted.image_ids.tolist())}
    order = [row[example.id] for example in examples]
    return counted.per_image[task.metric][order]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
