"""Every path of a run, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """The launcher's own files in a run's folder (the stages' outputs are named in chain.py)."""

    root: Path

    @property
    def name(self) -> str:
        """What the run is called in logs and job names."""
        return self.root.name

    @property
    def frozen(self) -> Path:
        """The resolved recipe and the stage keys, written at the first submission."""
        return self.root / "run.yaml"

    @property
    def shards(self) -> Path:
        """Which bytes of which raw files make up each shard."""
        return self.root / "shards.json"

    @property
    def inputs(self) -> Path:
        """What is remembered of the files from outside the run, and what was not read and why."""
        return self.root / "inputs.json"

    @property
    def training_sum(self) -> Path:
        """What the training was said to cost when it was submitted, for status."""
        return self.root / "training_sum.json"

    @property
    def submissions(self) -> Path:
        """One line a submitted job."""
        return self.root / "submissions.jsonl"

    @property
    def intents(self) -> Path:
        """One line before each sbatch: what submissions.jsonl says nothing about has to be looked for."""
        return self.root / "intents.jsonl"

    @property
    def events(self) -> Path:
        """One line for everything that happens to a job."""
        return self.root / "events.jsonl"

    def task_list(self, stage: str) -> Path:
        """The file that a stage's jobs read their commands from."""
        return self.root / "tasks" / f"{stage}.json"

    def batch_file(self, stage: str) -> Path:
        """Folder of the batch files of a stage."""
        return self.root / "sbatch" / stage


def shard_name(index: int) -> str:
    """The stem of a shard's files."""
    return f"shard-{index:05d}"
