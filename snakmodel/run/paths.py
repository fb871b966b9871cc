"""All paths of the launcher's own files in a run's folder, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """The launcher's own files in a run's folder. The outputs of the stages are named in the package `chain`."""

    root: Path

    @property
    def name(self) -> str:
        """The name of the run in logs and job names."""
        return self.root.name

    @property
    def frozen(self) -> Path:
        """The resolved recipe and the stage keys, written at the first submission."""
        return self.root / "run.yaml"

    @property
    def shards(self) -> Path:
        """The file that says which bytes of which raw files make up each shard."""
        return self.root / "shards.json"

    @property
    def inputs(self) -> Path:
        """What is remembered about the files from outside the run, and what was not read and why."""
        return self.root / "inputs.json"

    @property
    def training_sum(self) -> Path:
        """What the launcher said at submission that the training would cost, for status."""
        return self.root / "training_sum.json"

    @property
    def submissions(self) -> Path:
        """A file with one line per submitted job."""
        return self.root / "submissions.jsonl"

    @property
    def intents(self) -> Path:
        """A file with one line per sbatch call, written before the call.

        A call that submissions.jsonl says nothing about has to be looked for in Slurm.
        """
        return self.root / "intents.jsonl"

    @property
    def events(self) -> Path:
        """A file with one line for every event of a job."""
        return self.root / "events.jsonl"

    def task_list(self, stage: str) -> Path:
        """The file from which a stage's jobs read their commands."""
        return self.root / "tasks" / f"{stage}.json"

    def batch_file(self, stage: str) -> Path:
        """The folder of a stage's batch files."""
        return self.root / "sbatch" / stage


def shard_name(index: int) -> str:
    """The stem of the names of a shard's files."""
    return f"shard-{index:05d}"
