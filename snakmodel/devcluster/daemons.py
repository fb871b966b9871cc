"""The daemons of one folder, which run in the foreground: starts, recognises, awaits and stops them.

A daemon is recognised by its pid and its start time. FOLDER/pids/NAME holds its own /proc/PID/stat line, which the
process writes itself before it becomes the daemon, so that it never runs unrecorded; FOLDER/log/NAME.log holds its
messages. The module needs only the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

RECORD_AND_BECOME = 'read -r stat </proc/$$/stat; echo "$stat" >"$0"; exec "$@"'
POLL_SECONDS = 0.1

Process = tuple[int, str]
"""A pid and its start time in clock ticks; together they are never used again while the machine is up."""


class ClusterError(Exception):
    """Says what went wrong with the development cluster and what to do; it is printed without a traceback."""


def _fields(stat: str) -> tuple[Process, str, int]:
    """((pid, start time), state, parent's pid) of a /proc/PID/stat line, whose name may hold spaces and brackets."""
    head, _, tail = stat.rpartition(")")
    values = tail.split()
    return (int(head.split()[0]), values[19]), values[0], int(values[1])


def processes() -> Iterator[tuple[Process, int]]:
    """Every running process of the machine, with the pid of its parent."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                process, state, parent = _fields((entry / "stat").read_text(errors="replace"))
            except OSError:
                continue
            if state not in "ZX":
                yield process, parent


def is_running(process: Process) -> bool:
    """Whether exactly this process, and not a later one with the same pid, still runs."""
    try:
        found, state, _ = _fields(Path(f"/proc/{process[0]}/stat").read_text(errors="replace"))
    except OSError:
        return False
    return found == process and state not in "ZX"


def recorded(folder: Path, name: str) -> Process | None:
    """The running process that a daemon's pid file names, or None."""
    try:
        process = _fields((folder / "pids" / name).read_text())[0]
    except (OSError, ValueError, IndexError):
        return None
    return process if is_running(process) else None


def log_of(folder: Path, name: str) -> Path:
    """The path of the log that holds a daemon's messages."""
    return folder / "log" / f"{name}.log"


def last_lines(path: Path, count: int = 15) -> str:
    """The end of a log, with its path, for an error message."""
    lines = path.read_text(errors="replace").splitlines()[-count:] if path.exists() else []
    return "\n".join([f"last lines of {path}:", *(f"  {line}" for line in lines or ["(nothing was written)"])])


def start(folder: Path, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Start a daemon in its own session, unless it runs already."""
    if recorded(folder, name):
        return
    pid_file = folder / "pids" / name
    pid_file.unlink(missing_ok=True)
    with log_of(folder, name).open("ab") as log:
        subprocess.Popen(
            ["/bin/sh", "-c", RECORD_AND_BECOME, str(pid_file), *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
        )
    # For a moment the file exists but is empty: if it were read then, the daemon would be taken for ended.
    wait_for(lambda: _is_written(pid_file), f"{name} to start", log_of(folder, name), seconds=60)


def _is_written(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def wait_for(
    check: Callable[[], bool], what: str, log: Path, *, seconds: float, alive: Callable[[], object] = lambda: True
) -> None:
    """Poll until `check` holds. Raises ClusterError with the log's end after `seconds`, or as soon as `alive` fails."""
    limit = time.monotonic() + seconds
    while not check():
        died = not alive()
        if died or time.monotonic() > limit:
            reason = "the daemon ended" if died else f"not within {seconds:.0f} s"
            raise ClusterError(f"waited for {what}: {reason}\n{last_lines(log)}")
        time.sleep(POLL_SECONDS)


def stop(chosen: Iterable[Process], *, seconds: float, first: signal.Signals = signal.SIGTERM) -> None:
    """Ask processes to end and wait for them, then kill those that remain and wait for those. Raises ClusterError."""
    remaining = list(chosen)
    for number, patience in ((first, seconds), (signal.SIGKILL, 5.0)):
        for process in remaining:
            if is_running(process):
                os.kill(process[0], number)
        limit = time.monotonic() + patience
        while (remaining := [process for process in remaining if is_running(process)]) and time.monotonic() < limit:
            time.sleep(POLL_SECONDS / 2)
    if remaining:
        pids = ", ".join(str(pid) for pid, _ in remaining)
        raise ClusterError(f"these processes survived SIGKILL for 5 s: {pids}; look at them with `ps -fp {pids}`")


def descendants(roots: Iterable[Process]) -> list[Process]:
    """The roots that still run and all processes below them, roots first."""
    table = dict(processes())
    found = [root for root in roots if root in table]
    for ancestor in found:  # grows while it is read
        found += [process for process, parent in table.items() if parent == ancestor[0] and process not in found]
    return found
