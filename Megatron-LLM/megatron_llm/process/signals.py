"""What asks a rank to stop, and how it leaves: requests set a flag, the training loop acts on it at a step boundary.

A request is a signal, or standard output or error that can no longer be written: its reader is gone, or its disk full.
Light on imports, so that `install` can run before torch is loaded: a signal during start-up is not lost.
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
"""Save and exit 75. Not USR1, which some libraries catch for themselves."""


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and by what."""

    received: str = ""
    """Name of the first signal, empty when there was none."""
    lost: tuple[str, OSError] | None = None
    """Name of the first output that could not be written, and why."""

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: only takes a note."""
        self.received = self.received or signal.Signals(number).name

    def lose(self, output: str, error: OSError) -> None:
        """Take a note of an output that cannot be written."""
        self.lost = self.lost or (output, error)


class Output:
    """Standard output or error whose failure is a request to stop, not an exception wherever something is printed.

    What is printed after the first failure goes nowhere.
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
        """Everything else is the stream's."""
        return getattr(self.stream, name)

    def _lose(self, error: OSError) -> None:
        self.request.lose(self.name, error)
        drop(self.stream)


def install() -> StopRequest:
    """Catch the stop signals and failing outputs from now on."""
    request = StopRequest()
    for number in STOP_SIGNALS:
        signal.signal(number, request.handle)
    for name in ("stdout", "stderr"):
        if stream := getattr(sys, name):  # None where the descriptor was closed before the start
            setattr(sys, name, Output(stream, name, request))
    return request


def leave(code: int) -> NoReturn:
    """End this process at once, whatever can still be printed.

    Without the interpreter's own teardown: that would wait for data-loading processes, which leave stop signals to this
    one, for the thread that writes checkpoints, and for ranks that are gone.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
    finally:
        os._exit(code)


def shield_worker(_worker: int = 0) -> None:
    """In a data-loading process: leave stop signals to the parent, and die with it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
