"""Waiting for a lock that other commands of the same user hold, on this node or on another one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from run_contract.errors import UserError
from snakmodel.run.lock import holder, run_lock

_TOUCH_EVERY = 30.0
ABANDONED_AFTER = 600.0
"""Seconds without a touch after which the holder of a lock, which may be on a node that was lost, counts as gone."""
_LOOK_EVERY = 2.0


@contextmanager
def waiting_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold FOLDER/lock while the body runs, and wait for as long as another command holds it.

    `what` says in the printed line what is waited for. The lock is touched while it is held, so that one that was left
    by a killed command on another node can be recognised.
    """
    with ExitStack() as stack:
        said = False
        while not _taken(stack, folder):
            if not said:
                who = holder(folder)
                print(
                    f"waiting for {what}, at which process {who.get('pid')} on {who.get('host')} is at work", flush=True
                )
                said = True
            time.sleep(_LOOK_EVERY)
        done = threading.Event()
        toucher = threading.Thread(target=_touch, args=(folder / "lock", done), daemon=True)
        toucher.start()
        try:
            yield
        finally:
            done.set()
            toucher.join()


def _taken(stack: ExitStack, folder: Path) -> bool:
    try:
        stack.enter_context(run_lock(folder, steal=_abandoned(folder / "lock")))
    except UserError:
        return False
    return True


def _abandoned(lock: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - lock.stat().st_mtime > ABANDONED_AFTER
    return False


def _touch(lock: Path, done: threading.Event) -> None:
    while not done.wait(_TOUCH_EVERY):
        with suppress(OSError):
            os.utime(lock)
