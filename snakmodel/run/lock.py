"""The lock of a run's folder, which keeps two launchers from working on a run at the same time.

The lock is a file made with O_EXCL and not flock, because many parallel file systems lack flock. It names the host, the
process and its start time. A lock is taken over if it is from the same host and its process is gone, or if it is from
an earlier start of the same Slurm job; any other lock is broken only on request.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from run_contract.errors import UserError


@contextmanager
def run_lock(root: Path, *, steal: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Hold ROOT/lock while the body runs. `steal`: break the lock of another launcher first.

    If the lock is taken and does not become free within `patience` seconds, raises UserError that names the holder.
    """
    path = root / "lock"
    root.mkdir(parents=True, exist_ok=True)
    me = {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "since": time.strftime("%F %T"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    end = time.monotonic() + patience
    while True:
        if steal or _is_stale(path):
            _take_away(path, f"{me['host']}-{me['pid']}")
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            break
        except FileExistsError:
            if time.monotonic() > end:
                raise _in_use(root) from None
        time.sleep(1)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(me, file)
        yield
    finally:
        if _read(path) == me:
            path.unlink(missing_ok=True)


def _in_use(root: Path) -> UserError:
    holder = _read(root / "lock")
    return UserError(
        f"{root} is in use by process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}. "
        "Wait for it; if it is certain that it no longer runs, add --steal-lock."
    )


def _take_away(path: Path, who: str) -> None:
    """Remove the lock, but not one that another launcher has made in its place since it was judged."""
    seen, aside = _read(path), path.with_name(f".lock.broken-{who}")
    try:
        path.rename(aside)
        if _read(aside) != seen:
            os.link(aside, path)
    except (FileNotFoundError, FileExistsError):
        pass
    aside.unlink(missing_ok=True)


def holder(root: Path) -> dict[str, Any]:
    """The holder of a run's lock; empty if nobody holds it, or if the lock is stale."""
    path = root / "lock"
    return {} if _is_stale(path) else _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_stale(path: Path) -> bool:
    """Whether the lock is stale: from an earlier start of this very job, or from a process of this host that ended."""
    holder = _read(path)
    if holder.get("slurm_job") and holder["slurm_job"] == os.environ.get("SLURM_JOB_ID"):
        return True
    if holder.get("host") != os.uname().nodename:
        return False
    return bool(_process_start(int(holder["pid"])) != holder["process_start"])


def _process_start(pid: int) -> str | None:
    """The kernel's start time of a process, or None if it is gone.

    The start time distinguishes the process from a later one with the same number.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return None
