"""Keys of tasks, and when a marker still speaks of a task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from run_contract.errors import UserError
from snakmodel.chain.stage import Chain, Input, Stage, fingerprint
from snakmodel.run.markers import Marker, marker_path
from tests import toy


def test_key_follows_the_command_and_everything_before_it(tmp_path: Path) -> None:
    """Changing one first task changes its own key, its follower's and the last stage's, and no other."""
    stages = toy.two_stages(tmp_path)
    before = Chain.of(tmp_path, stages).keys
    changed = replace(stages[0].tasks[1], outside="another input")
    first = replace(stages[0], tasks=(stages[0].tasks[0], changed, stages[0].tasks[2]))
    after = Chain.of(tmp_path, [first, *stages[1:]]).keys
    assert [a == b for a, b in zip(before["first"], after["first"], strict=True)] == [True, False, True]
    assert [a == b for a, b in zip(before["second"], after["second"], strict=True)] == [True, False, True]
    assert before["last"] != after["last"]


def test_key_does_not_depend_on_the_folder_or_on_workers(tmp_path: Path) -> None:
    """A moved run keeps its keys, and arguments that do not change the outputs are not in them."""
    here = toy.two_stages(tmp_path / "here")
    there = toy.two_stages(tmp_path / "there")
    more = replace(there[0], tasks=tuple(replace(task, unkeyed=("--workers", "8")) for task in there[0].tasks))
    assert Chain.of(tmp_path / "here", here).keys == Chain.of(tmp_path / "there", [more, *there[1:]]).keys


def test_what_a_stage_waits_for_follows_from_what_it_reads(tmp_path: Path) -> None:
    """Task by task where each reads from the task of its own number, else for the whole; never for a later stage."""
    first, second, last = toy.two_stages(tmp_path)
    chain = Chain.of(tmp_path, [first, second, last])
    assert [dict(stage.waits) for stage in chain.stages] == [{}, {"first": "same"}, {"second": "all"}]
    with pytest.raises(ValueError, match="waits for first, which does not come before it"):
        Chain.of(tmp_path, [second, first, last])
    larger = Stage("first", (*first.tasks, toy.task(tmp_path, "a/3.txt")), first.resources)
    assert Chain.of(tmp_path, [larger, second])["second"].waits == {"first": "all"}
    two = replace(second.tasks[1], inputs=(Input("first", 0), Input("first", 1)))
    both = Stage("second", (second.tasks[0], two, second.tasks[2]), second.resources)
    assert Chain.of(tmp_path, [first, both])["second"].waits == {"first": "all"}


def test_marker_problems(tmp_path: Path) -> None:
    """Only a readable marker with this task's key and the right sizes on disk counts."""
    chain = Chain.of(tmp_path, toy.two_stages(tmp_path))
    path = marker_path(tmp_path, "first", 0)
    assert chain.marker_problem("first", 0) == "no marker"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.txt").write_text("x")
    Marker.of(tmp_path, chain.keys["first"][0], ["a/0.txt"]).write(path)
    assert chain.marker_problem("first", 0) is None
    (tmp_path / "a" / "0.txt").write_text("xy")
    assert "has 2 bytes" in str(chain.marker_problem("first", 0))
    Marker.of(tmp_path, "another key", ["a/0.txt"]).write(path)
    assert "another command" in str(chain.marker_problem("first", 0))
    path.write_text("garbage")
    assert "cannot be read" in str(chain.marker_problem("first", 0))


def test_fingerprint(tmp_path: Path) -> None:
    """It notices other content at the ends and in the middle and another size, not a touch."""
    path = tmp_path / "big"
    path.write_bytes(bytes(1_000_000))
    before = fingerprint(path)
    path.touch()
    assert fingerprint(path) == before
    for offset in (0, 500_000, 999_999):
        data = bytearray(1_000_000)
        data[offset] = 1
        path.write_bytes(data)
        assert fingerprint(path) != before
    with pytest.raises(UserError, match="cannot be read"):
        fingerprint(tmp_path / "none")
