"""Messages for the terminal: lines, progress bars and sizes.

Results go to stdout. All messages of this module go to stderr.
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
    """Print a message to stderr. Only the process of rank 0 prints."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(text, err=True)


def human_bytes(count: float) -> str:
    """Return a number of bytes as text, such as "1.5 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Progress:
    """A progress bar with the rate and the remaining time.

    If stderr is not a terminal, a line of text is printed every ten seconds instead.
    """

    def __init__(self, total: int, unit: str, title: str, enabled: bool = True) -> None:
        self.total, self.unit, self.title, self.note = total, unit, title, ""
        self.done = self.initial = 0
        self.start = self.last_line = time.monotonic()
        self.enabled = enabled
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=total, unit=f" {unit}", desc=title, dynamic_ncols=True, leave=False
            )

    def begin(self, done: int) -> None:
        """Start from `done` units that an earlier run completed."""
        self.done = self.initial = done
        if self.bar is not None:
            self.bar.initial = self.bar.n = done

    def step(self, count: int, note: str = "") -> None:
        """Add `count` completed units, and show `note` beside the bar."""
        self.done, self.note = self.done + count, note
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif self.enabled and time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            seconds_left = (self.total - self.done) / max(self.rate, 1e-9)
            text = (
                f"{self.title}: {self.done:,}/{self.total:,} {self.unit}, "
                f"{self.rate:,.0f}/s, {seconds_left:.0f} s left"
            )
            click.echo(f"{text}{'  ' + note if note else ''}", err=True)

    @property
    def rate(self) -> float:
        """Units per second since the start of this run."""
        return (self.done - self.initial) / max(time.monotonic() - self.start, 1e-9)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def progress(total: int, unit: str, title: str, enabled: bool = True) -> Iterator[Progress]:
    """Return a context with a progress bar, which is closed at the end.

    Args:
        total: number of units.
        unit: name of the units, such as "images".
        title: text before the bar.
        enabled: whether to show the bar.
    """
    bar = Progress(total, unit, title, enabled)
    try:
        yield bar
    finally:
        bar.close()
