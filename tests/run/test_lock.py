"""The run's lock: who holds it, who waits for it, and that a stale one is taken over once."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from run_contract.errors import UserError
from snakmodel.run import lock
from snakmodel.run.lock import holder, run_lock
from tests.conftest import PATIENCE

ELSEWHERE = {"host": "login7", "pid": 17, "process_start": "1", "since": "2026-01-01 00:00:00"}


def test_held_and_released(tmp_path: Path) -> None:
    """Inside the body nobody else gets it; afterwards it is gone."""
    with run_lock(tmp_path):
        assert holder(tmp_path)["pid"]
        with pytest.raises(UserError, match="in use by process"), run_lock(tmp_path):
            pass
    assert holder(tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_with_patience(tmp_path: Path) -> None:
    """A continuation waits until the launcher before it has ended."""
    (tmp_path / "lock").write_text(json.dumps(ELSEWHERE))
    ended = threading.Event()

    def end() -> None:
        ended.set()
        (tmp_path / "lock").unlink()

    threading.Timer(0.5, end).start()
    with run_lock(tmp_path, patience=PATIENCE):
        assert ended.is_set()


def test_a_lock_that_was_made_meanwhile_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two launchers that find the same stale lock, the slower one does not take the quicker one's away."""
    path = tmp_path / "lock"
    path.write_text(json.dumps({**ELSEWHERE, "pid": 18}))
    seen = iter([ELSEWHERE])
    read = lock._read
    monkeypatch.setattr(lock, "_read", lambda found: next(seen, None) or read(found))
    lock._take_away(path, "me")
    assert json.loads(path.read_text())["pid"] == 18
    lock._take_away(path, "me")
    assert not list(tmp_path.iterdir())
