"""What a person at the terminal sees: lines, a progress bar, sizes.

Results go to stdout, all of this to stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import click
from tqdm import tqdm


def say(text: str) -> None:
    """One line for the person at the terminal, by rank 0, on stderr: stdout is for results."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(text, err=True)


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Progress:
    """A bar with rate and time left on a terminal; a plain line every ten seconds where stderr is a
    file or a pipe.
    """

    def __init__(self, total: int, unit: str, what: str, enabled: bool = True) -> None:
        self.total, self.unit, self.what, self.done, self.begun, self.note = (
            total,
            unit,
            what,
            0,
            0,
            "",
        )
        self.start = self.last_line = time.monotonic()
        self.enabled = enabled
        tty = enabled and sys.stderr.isatty()
        self.bar = (
            tqdm(total=total, unit=f" {unit}", desc=what, dynamic_ncols=True, leave=False)
            if tty
            else None
        )

    def begin(self, done: int) -> None:
        """So much was done before, by an earlier start."""
        self.done = self.begun = done
        if self.bar is not None:
            self.bar.initial = self.bar.n = done

    def step(self, count: int, note: str = "") -> None:
        self.done, self.note = self.done + count, note
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif self.enabled and time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            left = (self.total - self.done) / max(self.rate, 1e-9)
            text = (
                f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, "
                f"{self.rate:,.0f}/s, {left:.0f} s left"
            )
            click.echo(f"{text}{'  ' + note if note else ''}", err=True)

    @property
    def rate(self) -> float:
        return (self.done - self.begun) / max(time.monotonic() - self.start, 1e-9)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def progress(total: int, unit: str, what: str, enabled: bool = True) -> Iterator[Progress]:
    bar = Progress(total, unit, what, enabled)
    try:
        yield bar
    finally:
        bar.close()
