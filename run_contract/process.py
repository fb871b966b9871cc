"""Child processes that must not outlive the process that started them."""

from __future__ import annotations

import ctypes
import signal

PR_SET_PDEATHSIG = 1
"""The constant from Linux's prctl.h."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies; for use as `preexec_fn`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
