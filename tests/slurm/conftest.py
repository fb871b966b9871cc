"""The Slurm in memory that the tests of this folder talk to."""

from __future__ import annotations

import pytest

from .fake_slurm import FakeSlurm


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """An empty cluster that accepts everything."""
    return FakeSlurm(monkeypatch)
