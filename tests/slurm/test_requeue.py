"""Jobs that are stopped, preempted or crash on a real cluster, and what their chain makes of it."""

from __future__ import annotations

from tests import toy

from .conftest import Cluster
from .toy_run import ToyRun


def test_toy_chain(cluster: Cluster) -> None:
    """A chain without trouble ends with its files, one start and one end a task."""
    run = ToyRun.new(cluster, "calm")
    run.submit(toy.two_stages(run.root, shards=2))
    assert set(run.finish().values()) == {"COMPLETED"}
    assert (run.root / "c.txt").read_text() == "0.txt1.txt"
    assert run.story("second", 1) == ["start", "done"]
    assert run.submit(toy.two_stages(run.root, shards=2)) == []
