"""Stop requests: handlers set a flag, the training loop acts on it at a step boundary.

Light on imports, so that `install` can run before torch is loaded: a signal during start-up is not lost.
"""

from __future__ import annotations

import ctypes
import signal
from dataclasses import dataclass
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Save and exit 75. Not USR1, which some libraries catch for themselves."""
PR_SET_PDEATHSIG = 1


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    received: str = ""
    """Name of the first signal, empty when there was none."""

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: only takes a note."""
        self.received = self.received or signal.Signals(number).name


def install() -> StopRequest:
    """Catch the stop signals from now on."""
    request = StopRequest()
    for number in STOP_SIGNALS:
        signal.signal(number, request.handle)
    return request


def shield_worker(_worker: int = 0) -> None:
    """In a data-loading process: leave stop signals to the parent, and die with it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
