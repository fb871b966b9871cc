"""A chain of small commands on the real cluster, submitted as the unprivileged user by the real SlurmScheduler.

    run = ToyRun.new(cluster, "preemption", slurm={"signal_seconds": 5})
    run.submit([run.stage("save", SCRIPT, resumable=True, progress="progress")])
    run.finish()
    assert [event["event"] for event in run.events()] == [...]

`submit` pickles the stages and starts `python -m tests.real_slurm.toy_run FOLDER`, which is the launcher.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snakmodel.chain.stage import Input, Stage, Task
from snakmodel.config.cluster import Resources
from snakmodel.slurm.submitter import SlurmScheduler
from tests import toy
from tests.toy import row

from .conftest import PATIENCE, Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE")


@dataclass(frozen=True)
class ToyRun:
    """One run of a toy chain: `root` is its folder, `folder` (the user's) holds it and its logs."""

    cluster: Cluster
    folder: Path
    settings: Mapping[str, Any]
    """What cluster.yaml would say."""

    @classmethod
    def new(cls, cluster: Cluster, name: str, **settings: Any) -> ToyRun:
        """A run in a new folder of the user's home."""
        return cls(cluster, cluster.workdir(name), settings)

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def stage(
        self, name: str, script: str, tasks: int = 1, resources: Mapping[str, Any] | None = None, **more: Any
    ) -> Stage:
        """A stage whose task i runs `python -c SCRIPT ROOT/NAME/i.txt` and has to write that file."""
        waits = more.pop("waits", {})
        made = tuple(
            toy.task(
                self.root, f"{name}/{i}.txt", script=script,
                inputs=[Input(other, i if kind == "same" else None) for other, kind in waits.items()],
            )
            for i in range(tasks)
        )  # fmt: skip
        more = {"per_shard": tasks > 1, **more}
        return Stage(name, made, resources=Resources.model_validate(resources or {}), **more)

    def command(self, name: str, *argv: str, output: str, **more: Any) -> Stage:
        """A stage of one task with a command line of its own that writes `output` (relative to the root)."""
        return Stage(name, (Task(argv, (output,)),), resources=more.pop("resources", Resources()), **more)

    def submit(self, stages: Sequence[Stage], pack: int = 1) -> list[dict[str, Any]]:
        """Submit what is missing of these stages; returns the new lines of the journal."""
        before = self.submissions()
        (self.folder / "stages.pickle").write_bytes(pickle.dumps((list(stages), dict(self.settings), pack)))
        command = [sys.executable, "-m", "tests.real_slurm.toy_run", str(self.folder)]
        self.cluster.run(command, cwd=REPOSITORY, timeout=120)
        return self.submissions()[len(before) :]

    def submissions(self) -> list[dict[str, Any]]:
        """The journal of sbatch calls."""
        return _json_lines(self.root / "submissions.jsonl")

    def jobs(self) -> list[str]:
        """Ids of all jobs submitted so far."""
        return [str(one["job"]) for one in self.submissions()]

    def events(self, stage: str | None = None, pack: int | None = None) -> list[dict[str, Any]]:
        """The run's events, of one stage or pack if given, in the order they were written."""
        found = _json_lines(self.root / "events.jsonl")
        return [one for one in found if stage in (None, one["stage"]) and (pack is None or one.get("pack") == pack)]

    def story(self, stage: str, pack: int = 0) -> list[str]:
        """The names of a pack's events, in order."""
        return [one["event"] for one in self.events(stage, pack) if "pack" in one]

    def markers(self, stage: str) -> list[int]:
        """Tasks of a stage that have a done marker."""
        return sorted(int(path.stem) for path in (self.root / "markers" / stage).glob("*.json"))

    def status(self, *hidden: str) -> str:
        """What jobs/status.py shows the user; `hidden` Slurm commands answer nothing, as when jobs have aged out."""
        tools = self.folder / "hidden"
        tools.mkdir(exist_ok=True)
        for name in ("squeue", "sacct"):
            (tools / name).unlink(missing_ok=True)
            if name in hidden:
                (tools / name).write_text("#!/bin/sh\nexit 0\n")
                (tools / name).chmod(0o755)
        path = f"{tools}:{self.cluster.environment['PATH']}"
        argv = ["env", f"PATH={path}", sys.executable, str(REPOSITORY / "jobs" / "status.py"), str(self.root)]
        return self.cluster.run(argv, timeout=150).stdout

    def told(self, stage: str, **counts: str) -> str:
        """The stage's line in the table of jobs/status.py, of which these columns must say so."""
        output = self.status()
        found = row(output, stage)
        assert found | counts == found, output
        return next(line for line in output.splitlines() if line.startswith(f"{stage} "))

    def log(self, stage: str, pack: int = 0) -> str:
        """A pack's log so far."""
        path = self.folder / "logs" / "run" / stage / f"{pack:05d}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def finish(self, timeout: float = 120) -> dict[str, str]:
        """Wait until every job has ended; returns the state of each array element."""
        try:
            rows = self.cluster.wait(self.jobs(), *ENDED, timeout=timeout)
        except BaseException:
            print(self.everything())
            raise
        return {row["JobID"]: row["State"].split(" ")[0] for row in rows}

    def until(self, condition: Callable[[], object], what: str, timeout: float = 90) -> None:
        """Wait until a condition holds; else fail with all events and logs."""
        limit = time.monotonic() + timeout * PATIENCE
        while not condition():
            if time.monotonic() > limit:
                pytest.fail(f"not within {timeout} s: {what}\n{self.everything()}")
            time.sleep(0.1)

    def everything(self) -> str:
        """Events, logs and queue, for a failing test's message."""
        logs = [
            f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.folder.glob("logs/*/*/*"))
        ]
        events = [json.dumps(one) for one in self.events()]
        return "\n".join([*events, *logs, str(self.cluster.squeue())])


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """The launcher: what jobs/submit_all.py does after it has made a plan."""
    folder = Path(sys.argv[1])
    stages, settings, pack = pickle.loads((folder / "stages.pickle").read_bytes())
    for one in SlurmScheduler(toy.plan(folder / "run", stages, settings, pack)).run().submitted:
        print(one.stage, one.job, one.packs, one.dependency)


if __name__ == "__main__":
    main()
