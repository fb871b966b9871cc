import sys

import pytest

from snakmodel.shards import progress as module
from snakmodel.shards.progress import progress


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines are printed when the last one is old enough, and count everything done before."""
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with progress("signatures", 2000, "documents") as advance:
        for _ in range(10):
            advance(200)
            now += 10.0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "signatures: 800 of 2,000 documents (40 %, 30 s)",
        "signatures: 1,400 of 2,000 documents (70 %, 60 s)",
        "signatures: 2,000 of 2,000 documents (100 %, 90 s)",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal the work and its units are shown as a bar."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with progress("joining", 3, "ranges") as advance:
        advance(1)
        advance(2)
    out = capsys.readouterr().out
    assert "joining" in out
    assert "3/3" in out
    assert "ranges" in out
