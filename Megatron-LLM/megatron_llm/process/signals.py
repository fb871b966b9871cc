"""Requests to stop, and how a rank leaves: a request sets a flag, on which the training loop acts between two steps.

A request is either a signal, or a failure to write standard output or standard error because the reader is gone or the
disk is full. This module imports little, so that `install` can run before torch is loaded and no signal during start-up
is lost.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, TextIO

from run_contract.output import drop
from run_contract.process import die_with_parent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Signals that mean: save and exit with 75. USR1 is not among them, because some libraries catch it."""


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and by what."""

    signalled: str = ""
    """Name of the first signal; empty if there was none."""
    lost: tuple[str, OSError] | None = None
    """Name of the first output that could not be written, and the error."""

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler, which only records the signal."""
        self.signalled = self.signalled or signal.Signals(number).name

    def lose(self, output: str, error: OSError) -> None:
        """Record an output that cannot be written."""
        self.lost = self.lost or (output, error)


class Output:
    """Standard output or standard error, whose failure is a request to stop instead of an exception at a print.

    Text printed after the first failure is discarded.
    """

    def __init__(self, stream: TextIO, name: str, request: StopRequest) -> None:
        self.stream, self.name, self.request = stream, name, request

    def write(self, text: str) -> int:
        """See io.TextIOBase."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """See io.TextIOBase."""
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        """Delegate every other attribute to the stream."""
        return getattr(self.stream, name)

    def _lose(self, error: OSError) -> None:
        self.request.lose(self.name, error)
        drop(self.stream)


def install() -> StopRequest:
    """Catch the stop signals and failing outputs from now on, and return the request that they set."""
    request = StopRequest()
    for number in STOP_SIGNALS:
        signal.signal(number, request.handle)
    for name in ("stdout", "stderr"):
        if stream := getattr(sys, name):  # None if the descriptor was closed before the start
            setattr(sys, name, Output(stream, name, request))
    return request


def leave(code: int) -> NoReturn:
    """End this process at once, after flushing what can still be printed.

    The interpreter's own shutdown is skipped, because it would wait for data-loading processes (which leave stop
    signals to this process), for the thread that writes checkpoints, and for ranks that are gone.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
    finally:
        os._exit(code)


def shield_worker(_worker: int = 0) -> None:
    """Set up a data-loading process: it leaves stop signals to its parent, and dies with it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
