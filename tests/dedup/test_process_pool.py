import os

import pytest

from run_contract.errors import UserError
from snakmodel.dedup.process_pool import pool


def test_tasks_run_and_their_errors_come_back() -> None:
    """A task's error is raised where the tasks were started."""
    with pool(2) as run:
        run("adding", int, [("1",), ("2",), ("3",)])
        with pytest.raises(ValueError, match="invalid literal"):
            run("adding", int, [("1",), ("x",)])


def test_a_killed_process_is_explained() -> None:
    """A process that ends without a word, as by the kernel's want of memory, is one line that says what to do."""
    with pytest.raises(UserError, match=r"was killed, .* memory; nothing was published. Give fewer processes than 1"):
        die()


def die() -> None:
    with pool(1) as run:
        run("dying", os._exit, [(9,)])


def test_an_interrupt_is_one_line() -> None:
    """Ctrl-C ends the pool and publishes nothing."""
    with pytest.raises(UserError, match="interrupted; nothing was published"), pool(1):
        raise KeyboardInterrupt
