"""Shows how far a long piece of work has got: with a bar on a terminal, or with a line in a log now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS = 30.0
"""The number of seconds between two lines in a log."""


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of further units, of `total`, that are done."""
    if not sys.stdout.isatty():
        yield _Lines(what, total, unit)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    layout = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*layout, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


class _Lines:
    """Prints a line if the last one is at least half a minute old."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.started = self.printed = time.monotonic()

    def __call__(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.printed >= _SECONDS:
            self.printed = now
            share = f"{100 * self.done // max(1, self.total)} %, {now - self.started:.0f} s"
            print(f"{self.what}: {self.done:,} of {self.total:,} {self.unit} ({share})", flush=True)
