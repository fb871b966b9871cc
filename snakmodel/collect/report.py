"""What a user sees while a source is collected: a bar on a terminal, and otherwise a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from run_contract.output import say

_LINE_EVERY = 10.0
"""Seconds between two lines of a log."""


class Report:
    """The printer of how far a source is."""

    def __init__(self, name: str) -> None:
        self.name = name
        """The name of the source, with which every line begins."""
        self._last = time.monotonic()

    def note(self, text: str) -> None:
        """Print a line at once."""
        say(f"{self.name}: {text}")

    def now_and_then(self, text: str) -> None:
        """Print a line if the last one was some seconds ago."""
        if time.monotonic() - self._last >= _LINE_EVERY:
            self._last = time.monotonic()
            self.note(text)

    @contextmanager
    def counting(self, file: str, total: int | None, done: int) -> Iterator[Callable[[int], None]]:
        """Yield a function to call with the number of each bytes that arrived; `done` are there already."""
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task(f"{self.name}: {file}", total=total, completed=done)
                yield lambda count: bar.advance(task, count)
            return
        start, begun = time.monotonic(), done

        def advance(count: int) -> None:
            nonlocal done
            done += count
            speed = decimal(int((done - begun) / max(time.monotonic() - start, 1e-9)))
            self.now_and_then(f"{file}: {decimal(done)}{f' of {decimal(total)}' if total else ''}, {speed}/s")

        yield advance
