"""Check a GPU: the tests that need one, then the benchmarks, in less than nine minutes.

    make gpu-check        or        python -m benchmarks.gpu_check [--out FOLDER] [--only NAME]

Each part is a process of its own with a time limit, because an error of a GPU makes all further
work of its process fail. A part that fails or takes too long is recorded, and the next one runs.
FOLDER/gpu-check.json and FOLDER/gpu-check.md are written after every part: the card, the versions,
and for each part its seconds, its result, its figures and the last line of its error. The
benchmarks are those of this folder, with options for a short run.

The exit status is 0 if all parts passed, 1 if a part did not, and 2 without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.measure import header
from data.files import atomic_write_text
from pipeline.cli import UserError

TOTAL_SECONDS = 510  # for all parts; starting also takes time
TEST_SECONDS = 210  # for the tests alone, so that they leave time for the benchmarks
CPU_FACTOR = 10  # a CPU may take this many times as long, in all parts
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "timm", "h5py", "numpy", "transformers")
TESTS = {
    "extraction in the GPU's precision": "extraction",
    "beam search as a CUDA graph": "as_a_graph",
    "token CIDEr of samples": "token_cider",
    "self-critical step": "self_critical",
    "steps on questions and dialogues": "questions_and_dialogues",
    "scheduled sampling in bf16": "scheduled_sampling",
    "process group and DistributedDataParallel": "process_group",
    "--cache-in device": "features_on_the_device",
    "--compile": "compiled",
    "train, resume, evaluate": "resumed_and_evaluated",
}
BACKBONES = ("resnet50", "resnet101", "resnet50x4_clip")


@dataclass(frozen=True)
class Part:
    """A part of the check.

    command: a program and its arguments. "{json}" is replaced by a file for its figures.
    limit: maximum number of seconds.
    shown: the figures in the table, by their heading: the beginning of the figure's name.
    """

    name: str
    command: Sequence[str]
    limit: float
    shown: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """The result of a part. result: "passed", "failed", "time-out", or "not run"."""

    name: str
    result: str
    seconds: float = 0.0
    error: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)
    command: str = ""


@click.command(context_settings={"show_default": True})
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("gpu-check"),
    help="folder of gpu-check.json and gpu-check.md",
)
@click.option("--only", multiple=True, help="run only the parts whose name contains this text")
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    help="cpu: tiny sizes, which check this script and nothing else",
)
def main(out: Path, only: tuple[str, ...], device: str) -> None:
    """Run all tests and benchmarks of the GPU, and write one JSON file and one table."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "torch finds no CUDA device, so there is nothing to check; install a GPU driver and a "
            "build of torch with CUDA (nvidia-smi and torch.version.cuda show what is installed)"
        )
    parts = [*test_parts(device), *benchmark_parts(device)]
    parts = [part for part in parts if not only or any(text in part.name for text in only)]
    if not parts:
        raise UserError(f"--only: no part contains {' or '.join(map(repr, only))}")
    out.mkdir(parents=True, exist_ok=True)
    results = run_parts(parts, describe(device), out, 1 if device == "cuda" else CPU_FACTOR)
    click.echo((out / "gpu-check.md").read_text())
    sys.exit(any(result.result != "passed" for result in results))


def test_parts(device: str) -> list[Part]:
    """Return one part for each group of tests in tests/test_gpu.py."""
    limits = {"compiled": 120, "as_a_graph": 60}
    return [
        Part(
            f"test: {name}",
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
             "tests/test_gpu.py", "-k", f"{words} and {device}"],
            limits.get(words, 45),
        )
        for name, words in TESTS.items()
    ]  # fmt: skip


def benchmark_parts(device: str) -> list[Part]:
    """Return the benchmarks with options for a short run; on a CPU with tiny sizes."""
    tiny = device == "cpu"
    # without Hugging Face's package our own rates are still measured
    alone = [] if not tiny and importlib.util.find_spec("transformers") else ["--ours-alone"]

    def benchmark(
        name: str, module: str, options: Sequence[object], limit: float, to: str, **shown: str
    ) -> Part:
        command = [sys.executable, "-m", f"benchmarks.{module}", "--device", device]
        headings = {heading.replace("_", " "): key for heading, key in shown.items()}
        return Part(name, [*command, *map(str, options), to, "{json}"], limit, headings)

    # drawn photographs: the same on every machine
    count, backbones = (8, ("test_resnet",)) if tiny else (1000, BACKBONES)
    sizes = ["--count", count, "--passes", 1 if tiny else 3, "--seconds", 0.1 if tiny else 1]
    extraction = [*sizes, "--large", 0, "--real", "none"]
    rounds = 1 if tiny else 3
    training = ["--rounds", rounds, "--dropout", 0, *(["--images", 2] if tiny else [])]
    return [
        *(
            benchmark(
                f"extraction, {name}", "extract", [*extraction, "--backbone", name], 75, "--json",
                images_per_s="stage", share_of_ceiling="of the ceiling", decode="decode",
                forward="forward", write="write", peak_GB="peak GB",
            )
            for name in backbones
        ),
        benchmark(
            "training", "train", [*training, *alone], 60, "--json",
            captions_per_s="ours, captions/s", share_of_matrix_limit="of_limit",
            times_Hugging_Face_bf16="ratio_hf_bf16", peak_GB="ours, peak GB",
        ),
        benchmark(
            "beam 5", "decode", ["--rounds", rounds, *alone], 75, "--json",
            images_per_s="ours, images/s", Hugging_Face_fp32="hf_fp32, images/s",
            Hugging_Face_bf16="hf_bf16, images/s", times_Hugging_Face_fp32="ratio_hf_fp32",
            peak_GB="memory beyond",
        ),
        benchmark(
            "self-critical training", "scst",
            ["--rounds", rounds, "--ours-alone", "--images", 2 if tiny else 64], 60, "--json",
            samples_per_s="ours, samples/s", sampling_s="sampling, s", reward_s="reward, s",
            update_s="update, s", peak_GB="ours, GB beyond",
        ),
        benchmark(
            "VQA step", "vqa",
            ["--rounds", rounds, "--regions", 49, *alone, *(["--questions", 0] if tiny else [])],
            60, "--out", questions_per_s="ours, questions/s", share_of_matrix_limit="of_limit",
            answers_per_s="answers from a cache, questions/s", peak_GB="ours, peak GB",
        ),
        benchmark(
            "ranking of dialogue options", "dialog", ["--rounds", rounds, "--dialogs", 1], 60,
            "--out", rounds_per_s="ours, rounds/s", times_the_twin="ratio_twin",
            peak_GB="ours, peak GB",
        ),
        benchmark(  # last, because to compile takes the most time
            "training, --compile", "train",
            [*training, "--ours-alone", *([] if tiny else ["--compile"])], 120, "--json",
            captions_per_s="ours, captions/s", share_of_matrix_limit="of_limit",
            peak_GB="ours, peak GB",
        ),
    ]  # fmt: skip


def describe(device: str) -> dict[str, object]:
    """Return the card, the driver and the versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    about: dict[str, object] = {
        **header(),
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
        "CUDA of torch": torch.version.cuda,
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        about |= {
            "card": card.name,
            "memory, GB": card.total_memory / 1e9,
            "compute capability": f"{card.major}.{card.minor}",
            "cards": torch.cuda.device_count(),
            "driver": driver_version(),
            "cuDNN": torch.backends.cudnn.version(),
        }
    return about


def driver_version() -> str:
    """Return the version of the GPU driver, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.split("\n")[0].strip()


def run_parts(
    parts: Sequence[Part], about: Mapping[str, object], out: Path, factor: float = 1.0
) -> list[Result]:
    """Run the parts one after the other, and write both files after every part.

    factor: of all limits of time. Parts that TOTAL_SECONDS or TEST_SECONDS leave no time for are
        recorded as not run.
    """
    start = time.monotonic()
    results = [Result(part.name, "not run", command=" ".join(part.command)) for part in parts]
    write(results, about, out)
    for number, part in enumerate(parts):
        seconds = factor * (TEST_SECONDS if part.name.startswith("test: ") else TOTAL_SECONDS)
        remaining = start + seconds - time.monotonic()
        if remaining < 1:
            results[number].error = f"no time left of {seconds:.0f} s"
        else:
            click.echo(f"{part.name} ...", err=True)
            results[number] = run_part(part, min(factor * part.limit, remaining))
            click.echo(f"    {results[number].result}, {results[number].seconds:.0f} s", err=True)
        write(results, about, out)
    return results


def run_part(part: Part, limit: float) -> Result:
    """Run a part in a process group of its own, and stop all of it after `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "figures.json", Path(folder) / "log.txt"
        command = [word.replace("{json}", str(path)) for word in part.command]
        start = time.monotonic()
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:  # also after Ctrl-C, and the decoding processes of a part that ended
                stop_group(process)
        seconds = time.monotonic() - start
        figures = {}
        with contextlib.suppress(OSError, ValueError):  # none, or not written to its end
            figures = json.loads(path.read_text())
        error = "" if status == 0 else last_error(log.read_text(errors="replace"))
        outcome = "passed"
        if status is None:
            outcome, error = "time-out", f"stopped after {limit:.0f} s; last line: {error}"
        elif status:
            outcome, error = "failed", error or f"exit status {status}"
        elif passes_nothing(part, log.read_text(errors="replace")):
            outcome, error = "failed", "all tests were skipped"
        command_line = " ".join(part.command)
        return Result(
            part.name, outcome, seconds, error, figures, pick(part, figures), command_line
        )


def passes_nothing(part: Part, log: str) -> bool:
    """Whether a part is a run of pytest in which no test passed."""
    return "pytest" in part.command and " passed" not in log


def stop_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of the group have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_error(log: str) -> str:
    """Return the last line that names an error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("E  ") or "Error" in line]
    return (named or lines or [""])[-1].removeprefix("E").strip()[:300]


def pick(part: Part, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of the table by heading. Of a list of measurements, use the first."""
    rows = figures.get("figures")
    if isinstance(rows, list) and rows:
        figures = rows[0]
    shown = {}
    for heading, start in part.shown.items():
        # the shortest name: "decode", not "decode, reduced scale"
        names = sorted((name for name in figures if name.startswith(start)), key=len)
        if names:
            shown[heading] = figures[names[0]]
    return shown


def write(results: Sequence[Result], about: Mapping[str, object], out: Path) -> None:
    """Write gpu-check.json and gpu-check.md atomically."""
    record = {"about": dict(about), "parts": [asdict(result) for result in results]}
    atomic_write_text(out / "gpu-check.json", json.dumps(record, indent=2) + "\n")
    atomic_write_text(out / "gpu-check.md", table(results, about))


def table(results: Sequence[Result], about: Mapping[str, object]) -> str:
    """Return the results as a markdown page."""
    counts = {name: sum(r.result == name for r in results) for name in dict.fromkeys(
        ("passed", "failed", "time-out", "not run"))}  # fmt: skip
    summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    seconds = sum(result.seconds for result in results)
    lines = [
        f"# GPU check: {about.get('card', 'CPU, tiny sizes')}",
        "",
        f"`python -m benchmarks.gpu_check`: {summary}; {seconds:.0f} s.",
        "",
        "; ".join(f"{name} {shown(value)}" for name, value in about.items()) + ".",
        "",
        "| Part | Result | Seconds | Figures, or the last line of the error |",
        "|---|---|---|---|",
    ]
    for result in results:
        figures = ", ".join(f"{name} {shown(value)}" for name, value in result.shown.items())
        text = "; ".join(part for part in (figures, result.error) if part).replace("|", "\\|")
        lines.append(f"| {result.name} | {result.result} | {result.seconds:.0f} | {text} |")
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
