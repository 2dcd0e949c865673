"""Minutes of training until CIDEr on dev reaches a target, with the fastest known recipe.

    python -m benchmarks.time_to_score --features cache/f8k [--json FILE] [-- options of
    pipeline.train]

Trains on Flickr8k with RECIPE in a separate process and reads metrics.jsonl meanwhile. The time is
measured from the start of the command to the end of the first validation that reaches the target.
Options after -- are appended to the recipe.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks.measure import header, real_option, report
from pipeline.cli import UserError

RECIPE = [
    "--preset",
    "small",
    "--epochs",
    "4",
    "--dropout",
    "0.1",
    "--lr",
    "0.0006",
    "--ema",
    "0.99",
]


@click.command(context_settings={"show_default": True})
@real_option("folder of Flickr8k")
@click.option(
    "--features",
    type=click.Path(exists=True, path_type=Path),
    default="cache/f8k",
    help="cache of Flickr8k",
)
@click.option("--target", default=0.45, help="CIDEr on dev")
@click.option("--processes", default=1, help="number of processes; torchrun starts more than one")
@click.option("--json", "out", type=click.Path(path_type=Path), help="also write the figures here")
@click.argument("more", nargs=-1)
def main(
    real: Path,
    features: Path,
    target: float,
    processes: int,
    out: Path | None,
    more: tuple[str, ...],
) -> None:
    """Train until CIDEr on dev reaches the target, and report the time."""
    launcher = ["-m", "pipeline.train"]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        launcher = [*torchrun, "--nproc-per-node", str(processes), *launcher]
    options = [*RECIPE, *more]
    with tempfile.TemporaryDirectory() as folder:
        run, start = Path(folder) / "run", time.monotonic()
        command = [sys.executable, *launcher, "--dataset", "karpathy"]
        command += ["--root", str(real / "flickr8k"), "--features", str(features)]
        command += ["--out", str(run), *options]
        process = subprocess.Popen(command)
        try:
            line = wait_for(run / "metrics.jsonl", target, process)
            seconds = time.monotonic() - start
        finally:
            process.terminate()
            process.wait()
    report(
        header()
        | {
            "minutes": seconds / 60,
            "CIDEr on dev": line["dev"]["CIDEr"],
            "target": target,
            "epoch": line["epoch"],
            "step": line["step"],
            "captions/s": line["train"]["captions_per_s"],
            "processes": processes,
            "options": " ".join(options),
        },
        out,
    )


def wait_for(path: Path, target: float, process: subprocess.Popen) -> dict:
    """Wait for a CIDEr of at least `target`, and return its line of metrics.jsonl.

    Raises UserError if the run ends first.
    """
    best = 0.0
    while True:
        ended = process.poll() is not None
        lines = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        for line in lines:
            best = max(best, line.get("dev", {}).get("CIDEr", 0.0))
            if best >= target:
                return line
        if ended:
            raise UserError(
                f"the run ended with exit code {process.returncode} and CIDEr {best:.3f} on "
                f"dev, below {target}"
            )
        time.sleep(0.1)


if __name__ == "__main__":
    main()
