"""python -m tests.real_slurm.queue_run FOLDER [--wait-for-room] [--continues SERIES] [--confirm]

A launcher of toy.two_stages in FOLDER/run as FOLDER/settings.json says, locked, packed and continued as by
jobs/submit_all.py. `QueueRun` is the tests' side of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING, Any

from run_contract.entry_point import run_main
from snakmodel.config.cluster import Cluster as Settings
from snakmodel.run.lock import run_lock
from snakmodel.slurm.journal import read_lines
from snakmodel.slurm.limits import pack_for_queue
from snakmodel.slurm.submitter import SlurmScheduler
from tests import toy

if TYPE_CHECKING:
    from .conftest import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class QueueRun:
    """A run of the toy chain in a folder of the unprivileged user."""

    cluster: Cluster
    folder: Path
    root: Path

    @classmethod
    def new(
        cls, cluster: Cluster, name: str, shards: int, pack: int = 1, stages: int = 3, script: str = toy.PUBLISH
    ) -> QueueRun:
        """`pack` 0: as many shards an array element as the queue needs; `stages`: the first so many of the three."""
        folder = cluster.workdir(name)
        settings = {"shards": shards, "pack": pack, "script": script, "stages": stages}
        (folder / "settings.json").write_text(json.dumps(settings))
        return cls(cluster, folder, folder / "run")

    def argv(self, *flags: str, environment: Mapping[str, str] | None = None) -> list[str]:
        """The launcher's command line; a folder `bin` in the run's folder comes first on its PATH."""
        path = f"{self.folder / 'bin'}:{self.cluster.environment['PATH']}"
        own = [f"{name}={value}" for name, value in {"PATH": path, **(environment or {})}.items()]
        return ["env", *own, sys.executable, "-m", "tests.real_slurm.queue_run", str(self.folder), *flags]

    def launch(self, *flags: str, check: bool = True, timeout: float = 120) -> CompletedProcess[str]:
        """Run the launcher."""
        return self.cluster.run(self.argv(*flags), cwd=REPOSITORY, check=check, timeout=timeout)

    def wrap(self, tool: str, script: str) -> None:
        """Put a shell script before a Slurm command on the launcher's PATH; the real one is /usr/bin/TOOL."""
        path = self.folder / "bin" / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def unwrap(self, tool: str) -> None:
        """Take the script away."""
        (self.folder / "bin" / tool).unlink()

    def submissions(self) -> list[dict[str, Any]]:
        """The journal."""
        return read_lines(self.root / "submissions.jsonl")

    def status(self) -> str:
        """What jobs/status.py shows."""
        return self.cluster.run([sys.executable, REPOSITORY / "jobs" / "status.py", self.root], timeout=150).stdout

    def accepted(self) -> list[dict[str, str]]:
        """Every element of this run's that Slurm has or had, whether the journal knows it or not."""
        tokens = {line["token"] for line in read_lines(self.root / "intents.jsonl")}
        return [row for row in self.cluster.squeue() if row["Comment"] in tokens]

    def done(self) -> bool:
        """Whether the last stage has left its file, made of every shard."""
        shards = json.loads((self.folder / "settings.json").read_text())["shards"]
        text = self.root / "c.txt"
        wanted = "".join(f"a/{i}.txt"[-5:] for i in range(shards))
        return text.exists() and text.read_text() == wanted

    def markers(self, stage: str) -> int:
        """Number of done tasks."""
        return len(list((self.root / "markers" / stage).glob("*.json")))

    def starts(self) -> list[tuple[str, int]]:
        """(stage, pack) of every attempt."""
        events = read_lines(self.root / "events.jsonl")
        return sorted((one["stage"], one["pack"]) for one in events if one["event"] == "start")

    def everything(self) -> str:
        """Journal, queue and logs, for a failing test's message."""
        logs = [f"{path}:\n{path.read_text(errors='replace')[-2000:]}" for path in self.folder.glob("logs/*/*/*")]
        return "\n".join([*map(str, self.submissions()), *map(str, self.accepted()), *logs])


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wait-for-room", action="store_true")
    parser.add_argument("--continues")
    parser.add_argument("--confirm", action="store_true")
    args = parser.parse_args()
    settings = json.loads((args.folder / "settings.json").read_text())
    root = args.folder / "run"
    stages = toy.two_stages(root, settings["shards"], settings["script"])[: settings["stages"]]
    pack = settings["pack"] or pack_for_queue(Settings(), stages)
    resubmit_command = [sys.executable, "-m", "tests.real_slurm.queue_run", str(args.folder)]
    os.umask(0o022)
    with run_lock(root, patience=300.0 if args.continues else 0.0):
        plan = toy.plan(root, stages, pack=pack)
        scheduler = SlurmScheduler(plan, False, args.wait_for_room, resubmit_command, args.continues)
        for one in scheduler.run().submitted:
            print(one.stage, one.job, one.packs, one.dependency)
        for note in scheduler.resubmit_forgotten() if args.confirm else ():
            print(note)
    return 0


if __name__ == "__main__":
    run_main(main)
