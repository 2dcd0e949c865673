"""Extraction from a folder, tars, a web server and S3, and by Ray, at the same work.

    pip install -e ".[test-remote]"
    python -m benchmarks.inputs --work FOLDER [--count 500] [--rounds 3] [--json FILE]

Extracts the same JPEGs of 640x480 (benchmarks/photographs.py) once from each kind of input in each
round: a folder, tars of 100 photographs, the folder behind a web server, and a bucket of S3, whose
--out is remote too. The servers run on this machine and share its cores with the extraction: what
is measured is the work of the transfer, not the delay of a network. The same folder is also
extracted by --engine ray with one actor per core.

The table has images/s as `extract` prints it (without the start of the program, and for Ray without
that of the cluster), the seconds of the whole command, and the ratio to the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks.commands import command
from benchmarks.measure import header, real_option
from benchmarks.photographs import make_photographs
from pipeline.extraction.stream import decoding_workers

TAR_IMAGES = 100
RATE = re.compile(r"([\d,]+) images in [\d.,]+ s, ([\d.,]+) images/s")


@click.command(context_settings={"show_default": True})
@real_option("folder of real photographs; without it images are drawn")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="folder for the photographs, which are kept, and the caches",
)
@click.option("--count", default=500, help="photographs")
@click.option("--rounds", default=3, help="extractions from each kind of input")
@click.option("--backbone", default="mobilenetv2_100", help="timm model, with random weights")
@click.option("--json", "out", type=click.Path(path_type=Path), help="also write the figures here")
def main(real: Path, work: Path, count: int, rounds: int, backbone: str, out: Path | None) -> None:
    """Measure extraction from each kind of input, and by Ray."""
    photographs = work / f"photographs-{count}"
    paths, described = make_photographs(photographs, count, real)
    tars = write_tars(paths, work / f"tars-{count}")
    cores = decoding_workers(None)  # one per usable core
    options = ["--backbone", backbone, "--weights", "random", "--size", "224"]
    folder = ["--dataset", "folder", "--root"]
    figures: dict[str, list[tuple[float, float]]] = {}
    with web_server(photographs) as web, s3_server() as bucket:
        upload(photographs, f"{bucket}/photographs")
        works = {
            "folder": [*folder, photographs],
            "tars": ["--dataset", "webdataset", "--root", tars],
            "web server": [*folder, web],
            "S3, also --out": [*folder, f"{bucket}/photographs"],
            f"folder, Ray, {cores} actors": [
                *folder, photographs, "--engine", "ray", "--workers", cores,
            ],
        }  # fmt: skip
        for number in range(rounds):
            for name, source in works.items():
                cache = work / "cache"
                shutil.rmtree(cache, ignore_errors=True)
                place = f"{bucket}/cache-{number}" if name.startswith("S3") else cache
                figures.setdefault(name, []).append(extract([*source, *options, "--out", place]))
                click.echo(f"round {number + 1}: {name}: {figures[name][-1][0]:.1f} images/s")
    report = header() | {"photographs": described, "backbone": backbone, "images/s": figures}
    click.echo(json.dumps({key: report[key] for key in report if key != "images/s"}))
    click.echo("| input | images/s | of the folder | whole command, s |")
    click.echo("|---|---|---|---|")
    for name, values in figures.items():
        rates, seconds = (statistics.median(each) for each in zip(*values, strict=True))
        share = statistics.median(
            a / b for (a, _), (b, _) in zip(values, figures["folder"], strict=True)
        )
        click.echo(f"| {name} | {rates:.1f} | {share:.2f} | {seconds:.1f} |")
    if out:
        out.write_text(json.dumps(report, indent=2) + "\n")


def extract(options: list[object]) -> tuple[float, float]:
    """Run pipeline.extract. Returns the images/s that it prints and the seconds of the command."""
    start = time.perf_counter()
    printed = command("extract", *options)
    seconds = time.perf_counter() - start
    found = RATE.search(printed)
    if not found:
        raise click.ClickException(f"pipeline.extract printed no rate:\n{printed[-2000:]}")
    return float(found[2].replace(",", "")), seconds


def write_tars(paths: list[Path], folder: Path) -> Path:
    """Write tars of TAR_IMAGES photographs each to a new folder. An existing folder is kept."""
    if folder.exists():
        return folder
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for start in range(0, len(paths), TAR_IMAGES):
        with tarfile.open(aside / f"{start // TAR_IMAGES:03d}.tar", "w") as tar:
            for path in paths[start : start + TAR_IMAGES]:
                tar.add(path, path.name)
    return aside.rename(folder)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[None]:
    """Context manager: a server in a process of its own."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=quiet, stderr=quiet)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Context manager: serves a folder on this machine. Gives its address."""
    port = free_port()
    with server("http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Context manager: an S3 server of moto on this machine. Gives the address of its bucket."""
    from fsspec import config

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": "local",
        "AWS_DEFAULT_REGION": "us-east-1",
        "FSSPEC_S3_ENDPOINT_URL": url,
    }
    config.set_conf_env(config.conf)
    with server("moto.server", "-H", "127.0.0.1", "-p", str(port)):
        yield "s3://bucket"


def upload(folder: Path, address: str) -> None:
    """Copy the files of a folder to a new bucket, as soon as its server answers."""
    import s3fs

    store = s3fs.S3FileSystem()
    for attempt in range(60):
        try:
            store.mkdir("bucket")
            break
        except Exception:
            if attempt == 59:
                raise
            time.sleep(0.5)
    store.put(f"{folder}/", f"{address}/", recursive=True)


if __name__ == "__main__":
    main()
