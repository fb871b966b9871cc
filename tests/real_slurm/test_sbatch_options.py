"""Every option of sbatch that cluster.yaml can say, in the words of the controller that got it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from .conftest import Cluster, drained
from .toy_run import ToyRun


def submitted(cluster: Cluster, name: str, settings: dict[str, Any], resources: dict[str, Any]) -> dict[str, str]:
    """What the controller says of a job that was submitted with these settings, and cancelled before it began."""
    run = ToyRun.new(cluster, name, slurm=settings)
    with drained(cluster):
        run.submit([run.stage("one", "raise SystemExit('never run')", resources=resources)])
        [job] = run.jobs()
        shown = cluster.run(["scontrol", "show", "job", "--oneliner", job]).stdout
        cluster.run(["scancel", job])
    return dict(re.findall(r"(\S+?)=(\S*)", shown))


def test_options_of_the_run_and_of_a_stage(cluster: Cluster) -> None:
    """Typed keys and sbatch_args reach the controller; a stage's own go before those of the run."""
    found = submitted(
        cluster,
        "options",
        {"nice": 77, "switches": "1@00:05:00", "sbatch_args": ["--tmp=3"]},
        {"nice": 88, "mem_per_cpu": "11M", "exclusive": True},
    )
    assert found["Nice"] == "88"
    assert found["Switches"] == "1@00:05:00"
    assert found["MinTmpDiskNode"] == "3M"
    assert found["MinMemoryCPU"] == "11M"
    assert found["OverSubscribe"] == "NO"


def test_a_reservation(cluster: Cluster) -> None:
    """A job asks for the reservation that the recipe's group was given."""
    make = ["scontrol", "create", "reservation=danish", f"users={cluster.user}", "starttime=now", "duration=10"]
    cluster.run([*make, "nodes=node4", "flags=ignore_jobs"], as_root=True)
    try:
        run = ToyRun.new(cluster, "reservation", slurm={"reservation": "danish"})
        run.submit([run.stage("one", "from pathlib import Path; import sys; p = Path(sys.argv[1]); "
                              "p.parent.mkdir(); p.touch()")])  # fmt: skip
        assert set(run.finish().values()) == {"COMPLETED"}, run.everything()
        [row] = cluster.sacct(run.jobs(), ("JobID", "Reservation", "NodeList"))
        assert (row["Reservation"], row["NodeList"]) == ("danish", "node4")
    finally:
        cluster.run(["scontrol", "delete", "reservation=danish"], as_root=True)


@pytest.mark.parametrize(
    "option",
    ["--array=0-3", "--arr=0", "--dependency=singleton", "--no-requeue", "--output=x", "--signal=USR1@9", "--wrap=id"],
)
def test_what_would_break_the_chain_is_refused(cluster: Cluster, option: str) -> None:
    """Options that the launcher chains, finds, logs and requeues its jobs by, also when they are shortened."""
    run = ToyRun.new(cluster, f"refused-{option.strip('-').split('=')[0]}", slurm={"sbatch_args": [option]})
    with pytest.raises(AssertionError, match="is how the launcher chains, logs and requeues its jobs"):
        run.submit([run.stage("one", "")])
    assert run.submissions() == []
