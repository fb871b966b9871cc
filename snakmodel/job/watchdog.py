"""Hung tasks: a task of which nothing was seen for too long has its processes' stacks printed, and is killed.

The driver watches (Watchdog), and the supervisor of each rank acts (dump_and_kill), since the processes may be on other
nodes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from run_contract.output import say

_DUMP_SECONDS = 10


class Watchdog:
    """Watches the signs of life of a task, and remembers when they last changed."""

    def __init__(self, seconds: float, signs: Callable[[], object]) -> None:
        self.seconds = seconds
        self.signs = signs
        self.seen = signs()
        self.since = self.looked = time.monotonic()

    def silent_seconds(self) -> float:
        """Seconds without any sign of life.

        The signs may lie in remote files, so they are looked at only every 30 s, or every tenth of `seconds` if that is
        shorter.
        """
        now = time.monotonic()
        if now - self.looked >= min(30.0, self.seconds / 10):
            self.looked = now
            found = self.signs()
            if found != self.seen:
                self.seen, self.since = found, now
        return now - self.since

    def expired(self) -> bool:
        """Whether no sign of life has been seen for too long."""
        return self.silent_seconds() > self.seconds


def log_size(descriptor: int) -> int | None:
    """Size in bytes of the file that a descriptor writes to; None if it is no file, or closed."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def newest(folder: Path, task: int) -> int | None:
    """When any rank of a task last showed life in the attempt's folder, in ns since 1970; None if none has."""
    return max((written for _, written, _ in _heartbeats(folder, task)), default=None)


def furthest_behind(folder: Path, task: int) -> str:
    """A sentence on the rank that was in the earliest iteration when last heard of; empty if none has reported any."""
    known = [
        (beat["iteration"], written, rank, beat["phase"]) for rank, written, beat in _heartbeats(folder, task) if beat
    ]
    if not known:
        return ""
    iteration, written, rank, phase = min(known)
    return f"rank {rank} was last heard of {time.time() - written / 1e9:.0f} s ago in iteration {iteration} ({phase})"


def _heartbeats(folder: Path, task: int) -> list[tuple[int, int, dict[str, Any]]]:
    """(Rank, ns of its last writing, content) of every rank's heartbeat file; a file that was only touched is empty."""
    found = []
    for path in folder.glob(f"task-{task:05d}.rank-*.alive"):
        with suppress(OSError, ValueError):
            text = path.read_text(encoding="utf-8")
            found.append((int(path.stem.rsplit("-", 1)[1]), path.stat().st_mtime_ns, json.loads(text or "{}")))
    return found


def descendants(pid: int) -> list[int]:
    """A process and all processes below it, parents first."""
    children: dict[int, list[int]] = {}
    for one in Path("/proc").iterdir():
        if one.name.isdigit() and (fields := _fields(int(one.name))):
            children.setdefault(int(fields[1]), []).append(int(one.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def cpu_seconds(pid: int) -> float:
    """Seconds of processor time that a process and all processes below it have used."""
    used = [fields for one in descendants(pid) if (fields := _fields(one))]
    return sum(int(fields[11]) + int(fields[12]) for fields in used) / os.sysconf("SC_CLK_TCK")


def _fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on (state, parent, …), or None if the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and to all processes below it."""
    for one in descendants(pid):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(one, signal.SIGKILL)


def dump_and_kill(pid: int, rank: int) -> None:
    """Make a process and all below it print the stacks of their threads, then kill them.

    Python prints the stacks at SIGABRT if PYTHONFAULTHANDLER is set, which the supervisor sees to; other programs just
    end.
    """
    say(f"=== rank {rank} hangs; stacks of its threads:", error=True)
    family = descendants(pid)
    for one in family:
        with suppress(ProcessLookupError, PermissionError, ValueError):
            resource.prlimit(one, resource.RLIMIT_CORE, (0, resource.prlimit(one, resource.RLIMIT_CORE)[1]))
    for one in family:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(one, signal.SIGABRT)
    end = time.monotonic() + _DUMP_SECONDS
    while time.monotonic() < end and any((fields := _fields(one)) and fields[0] != "Z" for one in family):
        time.sleep(0.1)
    for one in family:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(one, signal.SIGKILL)
