"""A rank that stands still ends the others within the time allowed, and every rank leaves a heartbeat."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_llm.parallel.world import World
from megatron_llm.process.heartbeat import VARIABLE, Heartbeat
from tests.engine import engine_ranks
from tests.engine.engine_ranks import Ranks
from tests.engine.tiny_run import flags


@pytest.mark.parametrize("layout", ["", "--tensor_model_parallel_size 2", "--pipeline_model_parallel_size 2"])
def test_a_rank_that_stands_still_ends_the_others(tmp_path: Path, tiny_data: Path, layout: str) -> None:
    """One rank of two is stopped; the other exits 1 in time and names the iteration, however they share the work."""
    argv = flags(tiny_data, tmp_path / "save", "--train_iters", 4000, "--distributed_timeout_minutes", "0.15")
    ranks = Ranks(tmp_path, [*argv, *layout.split()], 2, {})
    ranks.wait_for(" iteration        2/", rank=0)
    os.kill(ranks.pid(1), signal.SIGSTOP)
    ranks.processes[0].join(engine_ranks.TIMEOUT)
    code = ranks.processes[0].exitcode
    os.kill(ranks.pid(1), signal.SIGKILL)
    ranks.wait()
    assert code == 1, ranks.text()
    last = re.findall(r"^ iteration +(\d+)/", ranks.text(), re.MULTILINE)[-1]
    failed = re.search(r"in iteration (\d+) \((?:step|evaluation)\), perhaps as another rank has ended", ranks.text())
    assert failed, ranks.text()
    assert int(failed[1]) - int(last) in (0, 1, 2)


def test_ranks_write_heartbeats(tmp_path: Path, tiny_data: Path) -> None:
    """The file that the environment names holds the last phase, here the checkpoint at the end."""
    beat = tmp_path / "rank.alive"
    argv = flags(tiny_data, tmp_path / "save", "--exit_interval", 2)
    assert engine_ranks.run(tmp_path, argv, size=1, **{VARIABLE: str(beat)})[0] == [75]
    assert json.loads(beat.read_text()) == {"phase": "checkpoint", "iteration": 2}


def test_heartbeats_are_few(tmp_path: Path) -> None:
    """Within a phase the file is written once in a while; another phase is written at once; no disk, no error."""
    heart = Heartbeat(tmp_path / "alive")
    heart.beat("step", 1)
    heart.beat("step", 2)
    assert '"iteration": 1' in (tmp_path / "alive").read_text()
    assert str(heart) == "iteration 2 (step)"
    heart.beat("evaluation", 2)
    assert '"phase": "evaluation"' in (tmp_path / "alive").read_text()
    Heartbeat(tmp_path / "missing" / "alive").beat("step", 1)


def test_a_group_has_one_thread(world: World) -> None:
    """See parallel._gloo; the mesh's groups too."""
    for group in (dist.group.WORLD, *world.mesh.get_all_groups()):
        assert group is not None
        assert group._get_backend(torch.device("cpu")).options._threads == 1
