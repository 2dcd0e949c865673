"""Random and spoilt files and options: a command ends with 0, 1 or 2, with no traceback, no hang
and no changed input.

One test a kind of input. The default run takes some 10 seconds with a fixed seed; `make fuzz` takes
ten minutes with a new one: ONCEOVER_FUZZ_SECONDS is how long, ONCEOVER_FUZZ_SEED the seed, which a
failure names, ONCEOVER_FUZZ_KEEP a folder for the files of cases that failed. Each case has a
folder of its own with `in` (what the user hands over) and `out` (where the command runs and
writes).
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import pickle
import re
import resource
import secrets
import shutil
import signal
import threading
import time
import traceback
import typing
import unittest
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from pathlib import Path

import click
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image as PillowImage
from safetensors.torch import load_file

from data.sources import image_id
from pipeline import caption, evaluate, extract, train
from pipeline.caption import CaptionConfig
from pipeline.cli import extension_options, flag_of
from pipeline.evaluate import EvaluateConfig
from pipeline.extract import ExtractConfig
from pipeline.training.config import TrainConfig
from tests.mutations import (
    TEXTS,
    VALUES,
    Draw,
    draw_photograph,
    json_bytes,
    one_of,
    spoil_bytes,
    spoil_hdf5,
    spoil_json,
    spoil_lines,
    spoil_safetensors,
    spoil_tensor,
)
from tests.test_commands import LOOK

LONG = "ONCEOVER_FUZZ_SECONDS" in os.environ
SECONDS = float(os.environ.get("ONCEOVER_FUZZ_SECONDS", 10))
SEED = int(os.environ.get("ONCEOVER_FUZZ_SEED", secrets.randbits(32) if LONG else 0))
CPU_SECONDS, WALL_SECONDS, MEMORY = (
    10,
    600,
    4 << 30,
)  # of a case; others may be busy, so CPU time tells of a hang

Command = tuple[click.Command, list[object]]
SMALL = [
    "--width",
    16,
    "--heads",
    1,
    "--encoder-layers",
    1,
    "--decoder-layers",
    1,
    "--feedforward",
    16,
    "--epochs",
    1,
    "--batch",
    20,
    "--beam",
    2,
    "--min-count",
    1,
]


# ---------------------------------------------------------------------------------------- the world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten drawn photographs with captions in every layout, a cache, a packed cache and a run of
    words and one of pieces.
    """
    world = tmp_path_factory.mktemp("fuzz")
    photos = world / "photos"
    photos.mkdir()
    rng, images = np.random.default_rng(0), []
    for number in range(10):
        name = f"{number}.png"
        PillowImage.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(photos / name)
        words = [
            f"A dog of {number} runs left.",
            f"The {'red' if number % 2 else 'blue'} dog number {number} runs",
        ]
        split = "train" if number < 6 else "val" if number < 8 else "test"
        images.append({"id": image_id(name), "name": name, "captions": words, "split": split})
    annotations = [
        {"id": 10 * n + k, "image_id": i["id"], "caption": text}
        for n, i in enumerate(images)
        for k, text in enumerate(i["captions"])
    ]
    files = {
        "coco.json": {
            "images": [
                {"id": i["id"], "file_name": i["name"], "split": i["split"]} for i in images
            ],
            "annotations": annotations,
        },
        "karpathy.json": {
            "images": [
                {
                    "filename": i["name"],
                    "filepath": "",
                    "imgid": n,
                    "cocoid": i["id"],
                    "split": i["split"],
                    "sentences": [
                        {"raw": text, "tokens": text.lower().split()} for text in i["captions"]
                    ],
                }
                for n, i in enumerate(images)
            ]
        },
        "results.json": [
            {"image_id": i["id"], "caption": i["captions"][0]}
            for i in images
            if i["split"] == "test"
        ],
        "ids.json": [i["id"] for i in images if i["split"] == "test"],
    }
    for name, content in files.items():
        (world / name).write_text(json.dumps(content))
    rows = [(i["name"], i["split"], text) for i in images for text in i["captions"]]
    texts = {
        "metadata.jsonl": [json.dumps({"file_name": n, "split": s, "text": t}) for n, s, t in rows],
        "metadata.csv": ["file_name,split,caption", *(f"{n},{s},{t}" for n, s, t in rows)],
        "captions.txt": ["image,caption", *(f"{n},{t}" for n, _, t in rows)],
        "Flickr8k.token.txt": [f"{n}#0\t{t}" for n, _, t in rows],
    }
    for name, lines in texts.items():
        (world / name).write_text("\n".join(lines) + "\n")
    coco = ["--dataset", "coco", "--annotations", world / "coco.json", "--images", photos]
    for stage, options in (
        (extract.main, [*coco, *LOOK, "--size", 64, "--out", world / "cache"]),
        (extract.main, ["--out", world / "cache", "--pack", world / "packed.h5"]),
        (train.main, [*coco, "--features", world / "cache", "--out", world / "run", *SMALL]),
        (
            train.main,
            [
                *coco,
                "--features",
                world / "cache",
                "--out",
                world / "pieces",
                *SMALL,
                "--vocabulary",
                "bpe",
            ],
        ),
    ):
        result = CliRunner().invoke(stage, list(map(str, options)))
        assert result.exit_code == 0, result.output
    return world


def captions_of(case: Path) -> list[object]:
    return [
        "--dataset",
        "coco",
        "--annotations",
        case / "in" / "coco.json",
        "--images",
        case / "in" / "photos",
    ]


def give(case: Path, *names: str) -> list[Path]:
    """Copies of the world's files, as a user has them in a folder of his own."""
    for name in names:
        source, target = case.parent / name, case / "in" / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    return [case / "in" / name for name in names]


# ------------------------------------------------------------ kinds of input: what is done with one


def photographs(draw: Draw, case: Path) -> list[Command]:
    folder = case / "in" / "mine"
    folder.mkdir()
    for number in range(4):
        suffix, content = draw_photograph(draw)
        (folder / f"{number}{suffix}").write_bytes(content)
    if draw(st.booleans()):
        return [
            (
                caption.main,
                [
                    folder,
                    "--checkpoint",
                    case.parent / "run",
                    "--out",
                    case / "out" / "captions.json",
                ],
            )
        ]
    resize = one_of(draw, ("stretch", "crop", "letterbox"))
    return [
        (
            extract.main,
            [
                "--dataset",
                "folder",
                "--root",
                folder,
                *LOOK,
                "--size",
                64,
                "--resize",
                resize,
                "--out",
                case / "out",
            ],
        )
    ]


def reading(draw: Draw, case: Path, layout: list[object], references: Path | None) -> list[Command]:
    """One of the commands that read a caption file; the cheap one more often."""
    which = draw(st.integers(0, 9))
    if which < 6 and references is not None:
        part = one_of(draw, ("--references", "--df", "--train-captions"))
        files = {"--references": case.parent / "coco.json", part: references}
        options = [each for pair in files.items() for each in pair]
        return [
            (
                evaluate.main,
                [
                    "--captions",
                    case.parent / "results.json",
                    *options,
                    "--out",
                    case / "out" / "scores.json",
                ],
            )
        ]
    if which < 8:
        return [
            (extract.main, [*layout, *LOOK, "--size", 64, "--allow-missing", "--out", case / "out"])
        ]
    return [
        (
            train.main,
            [*layout, "--features", case.parent / "cache", "--out", case / "out" / "run", *SMALL],
        )
    ]


def coco_json(draw: Draw, case: Path) -> list[Command]:
    give(case, "photos")
    file = case / "in" / "coco.json"
    file.write_bytes(json_bytes(draw, json.loads((case.parent / "coco.json").read_bytes())))
    return reading(draw, case, captions_of(case), file)


def karpathy_json(draw: Draw, case: Path) -> list[Command]:
    (photos,) = give(case, "photos")
    file = photos / "dataset_mine.json"
    file.write_bytes(json_bytes(draw, json.loads((case.parent / "karpathy.json").read_bytes())))
    return reading(draw, case, ["--dataset", "karpathy", "--root", photos], file)


def folder_texts(draw: Draw, case: Path) -> list[Command]:
    """metadata.jsonl and .csv, captions.txt, Flickr8k's files and .txt beside photographs."""
    (photos,) = give(case, "photos")
    name = one_of(
        draw, ("metadata.jsonl", "metadata.csv", "captions.txt", "Flickr8k.token.txt", "sidecar")
    )
    layout = ["--dataset", "folder", "--root", photos]
    if name == "sidecar":
        for number in range(10):
            text = f"a dog of {number}\nthe dog runs\n"
            (photos / f"{number}.txt").write_bytes(
                spoil_lines(draw, text, " ") if number < 3 else text.encode()
            )
        return [
            (
                train.main,
                [
                    *layout,
                    "--captions-from",
                    "txt",
                    "--features",
                    case.parent / "cache",
                    "--out",
                    case / "out" / "run",
                    *SMALL,
                ],
            )
        ]
    text = (case.parent / name).read_text()
    if name == "metadata.jsonl" and draw(st.booleans()):
        rows = spoil_json(draw, [json.loads(line) for line in text.splitlines()])
        (photos / name).write_text(
            "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows]))
        )
    else:
        (photos / name).write_bytes(spoil_lines(draw, text, "\t#" if "token" in name else ","))
    if name == "Flickr8k.token.txt" and draw(st.booleans()):
        (photos / "Flickr_8k.trainImages.txt").write_bytes(
            spoil_lines(draw, "0.png\n1.png\n2.png", " ")
        )
    return reading(draw, case, layout, None)


def results_files(draw: Draw, case: Path) -> list[Command]:
    """--captions, --against, --ids, and the counted references that a cache folder keeps."""
    results, ids = (
        json.loads((case.parent / "results.json").read_bytes()),
        json.loads((case.parent / "ids.json").read_bytes()),
    )
    which = one_of(draw, ("--captions", "--captions", "--against", "--ids", "--ids txt", "kept"))
    out, file = case / "out", case / "in" / "file"
    options = {
        "--captions": case.parent / "results.json",
        "--references": case.parent / "coco.json",
        "--cache-dir": out / "kept",
        "--bootstrap": 20,
        "--out": out / "scores.json",
    }
    first = [each for pair in options.items() for each in pair]
    if which == "kept":
        assert CliRunner().invoke(evaluate.main, list(map(str, first))).exit_code == 0
        (kept,) = (out / "kept").glob("*.npz")
        kept.write_bytes(spoil_bytes(draw, kept.read_bytes()))
    elif which == "--ids txt":
        file.write_bytes(spoil_lines(draw, "\n".join(map(str, ids)), " "))
        options["--ids"] = file
    else:
        file.write_bytes(json_bytes(draw, ids if which == "--ids" else results))
        options[which] = file
    return [(evaluate.main, [each for pair in options.items() for each in pair])]


def reading_cache(draw: Draw, case: Path, cache: Path) -> list[Command]:
    out, run = case / "out", case.parent / "run"
    commands: dict[str, list[Command]] = {
        "verify": [(extract.main, ["--verify", cache])],
        "inspect": [(extract.main, ["--inspect", cache])],
        "pack": [(extract.main, ["--out", cache, "--pack", out / "packed.h5"])],
        "train": [
            (train.main, [*captions_of(case), "--features", cache, "--out", out / "run", *SMALL])
        ],
        "evaluate": [
            (
                evaluate.main,
                [
                    *captions_of(case),
                    "--features",
                    cache,
                    "--checkpoint",
                    run,
                    "--split",
                    "all",
                    "--out",
                    out / "scores.json",
                    "--bootstrap",
                    0,
                ],
            )
        ],
    }
    return commands[one_of(draw, sorted(commands))]


def caches(draw: Draw, case: Path) -> list[Command]:
    give(case, "coco.json", "photos")
    # the cache is where extraction writes, but its shards stay
    if going_on := draw(st.integers(0, 3)) == 0:
        shutil.copytree(case.parent / "cache", case / "out" / "cache")
    cache = case / "out" / "cache" if going_on else give(case, "cache")[0]
    spoil_hdf5(draw, cache / one_of(draw, ("shard-00000.h5",) * 6 + ("features.h5",)))
    if going_on:
        more = one_of(draw, ([], ["--repair"], ["--retry-unreadable"], ["--limit", 3]))
        return [(extract.main, [*captions_of(case), *LOOK, "--size", 64, "--out", cache, *more])]
    return reading_cache(draw, case, cache)


def packed_files(draw: Draw, case: Path) -> list[Command]:
    cache = give(case, "packed.h5", "coco.json", "photos")[0]
    spoil_hdf5(draw, cache)
    return reading_cache(draw, case, cache)


def checkpoints(draw: Draw, case: Path) -> list[Command]:
    name, out = one_of(draw, ("run", "run", "pieces")), case / "out"
    training = draw(st.integers(0, 3)) == 0  # where the run is what is written
    give(case, "coco.json", "photos")
    folder = out / "run" if training else case / "in" / name
    shutil.copytree(case.parent / name, folder)
    files = [
        "model.safetensors",
        "config.json",
        "vocab.json",
        "backbone.safetensors",
        "frequencies.safetensors",
    ]
    files += ["last.safetensors", "last.safetensors", "metrics.jsonl"] if training else []
    file = folder / one_of(draw, [*files, *(["tokenizer.json"] if name == "pieces" else [])])
    if file.suffix == ".safetensors":
        spoil_safetensors(draw, file)
    elif file.suffix == ".jsonl":
        file.write_bytes(spoil_lines(draw, file.read_text(), ","))
    else:
        file.write_bytes(json_bytes(draw, json.loads(file.read_bytes())))
    cached = [*captions_of(case), "--features", case.parent / "cache"]
    if training:
        more = [
            *SMALL,
            *(["--vocabulary", "bpe"] if name == "pieces" else []),
            "--epochs",
            one_of(draw, (1, 2)),
        ]
        return [(train.main, [*cached, "--out", folder, "--resume", *more])]
    consensus = ["--consensus", 4] if file.name.startswith("freq") else []
    return {
        0: [(caption.main, [case / "in" / "photos" / "0.png", "--checkpoint", folder, *consensus])],
        1: [
            (
                evaluate.main,
                [
                    *cached,
                    "--checkpoint",
                    folder,
                    "--out",
                    out / "scores.json",
                    "--bootstrap",
                    0,
                    *consensus,
                ],
            )
        ],
        2: [(train.main, [*cached, "--init", folder, "--out", out / "run", "--epochs", 1])],
    }[draw(st.integers(0, 2))]


class Hostile:
    """What a pickle may hold to have code run when it is opened."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def weights_files(draw: Draw, case: Path) -> list[Command]:
    """--weights: .safetensors and .pth, hostile pickles among them; `escaped` appears where one has
    its way.
    """
    from pipeline.extraction.grid import SCENES_WEIGHTS, scenes_weights

    path, tensors = case / "in" / "weights.safetensors", load_file(scenes_weights(SCENES_WEIGHTS))
    shutil.copyfile(scenes_weights(SCENES_WEIGHTS), path)
    if draw(st.booleans()):
        spoil_safetensors(draw, path)
    else:
        path = case / "in" / one_of(draw, ("weights.pth", "weights.pt", "weights", "weights.bin"))
        how = one_of(draw, ("bytes", "tensors", "pickle", "inside", "values"))
        mark = str(case / "in" / "escaped")
        attack = one_of(
            draw,
            (
                Hostile(os.system, f"touch {mark}"),
                Hostile(open, mark, "w"),
                Hostile(exec, f"open({mark!r}, 'w')"),
                Hostile(eval, "__import__('sys').exit(7)"),
            ),
        )
        if how == "pickle":
            path.write_bytes(pickle.dumps(attack))
        elif how == "tensors":
            spoil_tensor(draw, tensors, one_of(draw, sorted(tensors)))
            torch.save(
                one_of(
                    draw,
                    (
                        tensors,
                        {"state_dict": tensors},
                        {"a": {"b": tensors}},
                        list(tensors),
                        [tensors],
                    ),
                ),
                path,
            )
        elif how == "values":
            odd = one_of(
                draw,
                (
                    1,
                    "a",
                    None,
                    [1],
                    torch.zeros(2).to_sparse(),
                    torch.zeros(2, dtype=torch.complex64),
                    torch.zeros(1 << 10, device="meta"),
                    torch.nn.Parameter(torch.zeros(3)),
                    {},
                ),
            )
            torch.save(tensors | {one_of(draw, (sorted(tensors)[0], "odd", 7)): odd}, path)
        else:
            torch.save(tensors | ({"odd": attack} if how == "inside" else {}), path)
            if how == "bytes":
                path.write_bytes(spoil_bytes(draw, path.read_bytes()))
    give(case, "photos")
    return [
        (
            extract.main,
            [
                "--dataset",
                "folder",
                "--root",
                case / "in" / "photos",
                "--limit",
                1,
                "--backbone",
                "test_resnet",
                "--weights",
                path,
                "--size",
                64,
                "--out",
                case / "out",
            ],
        )
    ]


# What is left alone: options that ask for hours of work, for the network, or for a program that is
# not here.
UNTRIED = {
    "epochs",
    "minutes",
    "patience",
    "compile",
    "wandb",
    "meteor",
    "spice",
    "photographs",
    "bootstrap",
    "examples",
    "init",
    "checkpoint",
    "preset",
    "write_txt",
    "scst",
    "eval_steps",
    "save_every",
    "num_samples",
    "consensus",
}
ODD_NUMBERS = (
    "0",
    "1",
    "2",
    "3",
    "7",
    "-1",
    "0.5",
    "1e300",
    "1e-300",
    "inf",
    "nan",
    "9" * 30,
    "1000000000",
    "2147483648",
    "9223372036854775807",
    "1e3",
)
# No system passes on a NUL or half a character; \udcff stands for a byte that is not UTF-8.
UNPASSABLE = ("\0", "\ud800", "..")
ODD = (
    *(text for text in TEXTS if not any(part in text for part in UNPASSABLE)),
    "\udcff",
    *ODD_NUMBERS,
    "7x7",
    "1x9999",
    "0x10",
    "a=b",
    "in_chans=1",
    "block_args=None",
    "CIDEr:0",
    "no.such:thing",
)


def stages_of(draw: Draw, case: Path) -> tuple[type, click.Command, list[object]]:
    """A stage with options that work, and the dataclass of its options."""
    cached, out, run = (
        [*captions_of(case), "--features", case.parent / "cache"],
        case / "out",
        case.parent / "run",
    )
    return one_of(
        draw,
        [
            (ExtractConfig, extract.main, [*captions_of(case), *LOOK, "--size", 64, "--out", out]),
            (TrainConfig, train.main, [*cached, *SMALL, "--out", out / "run"]),
            (
                EvaluateConfig,
                evaluate.main,
                [*cached, "--checkpoint", run, "--bootstrap", 10, "--out", out / "scores.json"],
            ),
            (
                CaptionConfig,
                caption.main,
                [
                    case / "in" / "photos" / "0.png",
                    "--checkpoint",
                    run,
                    "--out",
                    out / "captions.json",
                ],
            ),
        ],
    )


def settings_of(config: type) -> list[Field]:
    """The settings of a command, and the options of all extensions that it can choose."""
    found = [item for item in fields(config) if item.name not in {*UNTRIED, "extensions"}]
    return found + [option for _, _, option in extension_options(found)]


def options(draw: Draw, case: Path) -> list[Command]:
    give(case, "coco.json", "photos")
    config, stage, works = stages_of(draw, case)
    odd: list[object] = []
    for _ in range(draw(st.integers(1, 2))):
        item = one_of(draw, [item for item in settings_of(config) if item.default is not True])
        flag = flag_of(item.name)
        choices = item.metadata.get("choices") or item.metadata.get("registry") or ()
        choices = [each for each in choices if each != "sample"]  # which is drawn, for long
        value = one_of(draw, one_of(draw, [ODD_NUMBERS, ODD, choices or ODD_NUMBERS]))
        odd += [flag] if item.default is False else [flag, value]
    return [(stage, [*works, *odd])]


def configs(draw: Draw, case: Path) -> list[Command]:
    """--config: TOML, and the config.json of a run; flags over it keep the work short."""
    give(case, "coco.json", "photos")
    config, stage, works = stages_of(draw, case)
    file = case / "in" / one_of(draw, ("c.toml", "c.json", "c", "c.TOML"))
    if file.suffix == ".json":
        record = json.loads((case.parent / "run" / "config.json").read_bytes())
        file.write_bytes(json_bytes(draw, one_of(draw, (record, record["training"]))))
    else:
        names = [item.name for item in settings_of(config)]
        lines = [
            f"{one_of(draw, names)} = "
            f"{json.dumps(value) if isinstance(value, int | str) else str(value).lower()}"
            for value in draw(st.lists(VALUES, min_size=1, max_size=4))
        ]
        file.write_bytes(
            spoil_lines(draw, "\n".join(lines), "=")
            if draw(st.booleans())
            else "\n".join(lines).encode("utf-8", "surrogatepass")
        )
    return [(stage, [*works, "--config", file])]


KINDS = {
    each.__name__: each
    for each in (
        photographs,
        coco_json,
        karpathy_json,
        folder_texts,
        results_files,
        caches,
        packed_files,
        checkpoints,
        weights_files,
        options,
        configs,
    )
}


# ---------------------------------------------------------------------------------- what is checked


class Hang(BaseException):
    """A case that takes too long; no `except Exception` keeps it."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raise Hang in a case that takes too much time, MemoryError in one that takes too much memory;
    where neither gets through to Python, end the process with a traceback."""

    def stop(signum: int, frame: object) -> typing.NoReturn:
        raise Hang(
            f"over {CPU_SECONDS} s of CPU time"
            if signum == signal.SIGPROF
            else f"over {WALL_SECONDS} s"
        )

    kept = [(number, signal.signal(number, stop)) for number in (signal.SIGPROF, signal.SIGALRM)]
    most, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):  # Linux alone says how much is taken
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    faulthandler.dump_traceback_later(2 * WALL_SECONDS, exit=True)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        for number, before in kept:
            signal.signal(number, before)


def digests(world: Path) -> dict[str, str]:
    """All that is in the world, the case's folder among it, but for its `out`: files with what they
    hold.
    """
    found = {}
    for path in world.rglob("*"):
        if path.relative_to(world).parts[1:2] != ("out",):
            found[str(path)] = hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


def what_is_wrong(stage: click.Command, arguments: list[object], tally: Counter) -> str:
    """What a command did that no command may do; "" where it ended as it should."""
    crashed: list[threading.ExceptHookArgs] = []
    before, threading.excepthook = threading.excepthook, crashed.append
    try:
        with limits():
            result = CliRunner().invoke(stage, [str(each) for each in arguments])
    except Hang as hang:
        return f"a hang, {hang}: {''.join(traceback.format_tb(hang.__traceback__)[-3:])}"
    finally:
        threading.excepthook = before
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "".join(traceback.format_exception(*result.exc_info))
    if crashed:
        return "".join(traceback.format_exception(crashed[0].exc_value))
    tally[result.exit_code] += 1
    if result.exit_code not in (0, 1, 2):
        return f"exit {result.exit_code}"
    if "Traceback" in result.output:
        return f"a traceback in {result.output}"
    errors = len(re.findall(r"^Error: .", result.stderr, re.MULTILINE))
    if errors != (result.exit_code == 2):
        return f"{errors} messages with exit {result.exit_code}: {result.output}"
    return ""


def signature(problem: str) -> str:
    """Where a problem comes from: the last line of ours, and the kind of the exception."""
    places = re.findall(r"/((?:data|models|pipeline)/\w+\.py)\", line (\d+)", problem)
    return f"{places[-1] if places else ''} {problem.strip().splitlines()[-1].split(':')[0][:80]}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoilt_input_ends_with_an_exit_code_and_a_plain_message(kind, world, monkeypatch):
    end, tally, found = time.monotonic() + SECONDS / len(KINDS), Counter(), {}
    case = world / "case"

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=10**6,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def tries(data: st.DataObject) -> None:
        shutil.rmtree(case, ignore_errors=True)
        for name in ("in", "out"):
            (case / name).mkdir(parents=True)
        monkeypatch.chdir(case / "out")
        commands = KINDS[kind](data.draw, case)
        own = digests(world)
        tally["inputs"] += 1
        for stage, arguments in commands:
            problem = what_is_wrong(stage, arguments, tally)
            after = digests(world)
            if after != own:
                changed = sorted(
                    name for name in {*own, *after} if own.get(name) != after.get(name)
                )
                problem = f"{problem}\nchanged or made: {changed}"
            if problem and signature(problem) not in found:
                found[signature(problem)] = (
                    f"{stage.name} {' '.join(map(repr, map(str, arguments)))}\n{problem[-1500:]}"
                )
                if kept := os.environ.get("ONCEOVER_FUZZ_KEEP"):
                    shutil.copytree(
                        case, Path(kept) / f"{kind}-{len(found)}-{time.time_ns()}", symlinks=True
                    )
        if time.monotonic() > end:
            raise unittest.SkipTest  # hypothesis lets it through at once

    with contextlib.suppress(unittest.SkipTest):
        tries()
    monkeypatch.chdir(world)
    shutil.rmtree(case)
    codes = ", ".join(
        f"exit {code}: {count}"
        for code, count in sorted(tally.items(), key=str)
        if code != "inputs"
    )
    print(f"\n{kind}: {tally['inputs']} inputs ({codes}), {len(found)} faults found, seed {SEED}")
    assert tally["inputs"]
    assert not found, f"seed {SEED}, {len(found)} faults:\n" + "\n\n".join(found.values())
