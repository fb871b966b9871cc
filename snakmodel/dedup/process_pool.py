"""A pool of processes for the steps of the command on one machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.forkserver import ensure_running
from typing import Any

from run_contract.errors import UserError
from run_contract.process import die_with_parent
from snakmodel.shards.progress import progress


class TaskPool:
    """Runs a function in the pool, once for each task (a tuple of arguments)."""

    def __init__(self, executor: ProcessPoolExecutor, processes: int) -> None:
        self.executor = executor
        self.processes = processes

    def __call__(self, what: str, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> None:
        """Run `function` for all tasks, with `what` as the words of the progress bar. Raises what a task raises."""
        with progress(what, len(tasks), "tasks") as advance:
            for done in as_completed([self.executor.submit(function, *task) for task in tasks]):
                done.result()
                advance(1)


@contextmanager
def pool(processes: int) -> Iterator[TaskPool]:
    """Yield a `TaskPool`.

    Its processes are forked from a server that has loaded the steps, and they share the server's memory. The server
    starts at once, so that it loads while the caller does other work. Raises UserError if a process is
    killed or the user interrupts.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["snakmodel.dedup.process_pool_preload"])
    ensure_running()
    try:
        with workers(processes, context) as executor:
            yield TaskPool(executor, processes)
    except BrokenProcessPool as error:
        raise UserError(
            "a process of the pool was killed, most likely for lack of memory; nothing was published. "
            f"Give fewer processes than {processes} (--num_proc), or more memory."
        ) from error
    except KeyboardInterrupt:
        raise UserError("interrupted; nothing was published") from None


@contextmanager
def workers(processes: int, context: BaseContext) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes. If the body raises, they are killed, whatever they are doing."""
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_start)
    try:
        yield executor
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _start() -> None:
    """Prepare a new process: the parent shows the progress and answers Ctrl-C, and the process ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
