"""The whole demonstration through a real Slurm: one command, dependencies, and only what is missing the second time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.toy import DEMO_STAGES

from .conftest import REPOSITORY, Cluster

SWAP = """
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from snakmodel.run.markers import Marker

root, stage, outputs = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
if stage == "convert":
    path = root / "megatron/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    layers = content["model"]["language_model"]["transformer"]
    name = "layers.0.mlp.dense_h_to_4h.weight"
    layers[name] = torch.cat(layers[name].chunk(2)[::-1])
    torch.save(content, path)
else:
    path = root / "hf/iter_0000160/model.safetensors"
    tensors = load_file(path)
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    swapped = {up: tensors[gate].clone(), gate: tensors[up].clone()}
    save_file(tensors | swapped, path, metadata={"format": "pt"})
marker = root / f"markers/{stage}/00000.json"
Marker.of(root, Marker.read(marker).key, outputs).write(marker)
"""
"""Up and gate of the first layer change places in what a stage wrote, and the stage's marker is made to agree."""


class Run:
    """A run of the demonstration, submitted as the unprivileged user."""

    def __init__(self, cluster: Cluster, folder: Path, base: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.root = folder / "runs" / "demo"
        self.environment = [
            f"SNAKMODEL_RUNS={folder / 'runs'}",
            f"SNAKMODEL_LOGS={folder / 'logs'}",
            f"DEMO_BASE={base}",
        ]

    def submit(self, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["env", *self.environment, sys.executable, str(REPOSITORY / "jobs" / "submit_all.py")]
        return self.cluster.run([*command, "--scheduler", "slurm", *flags], cwd=self.folder, check=check, timeout=120)

    def submissions(self) -> list[dict[str, Any]]:
        path = self.root / "submissions.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def logs(self) -> str:
        """The end of every log, for a failing test's message."""
        tails = [
            f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(self.folder.glob("logs/*/*/*"))
        ]
        return "\n".join(tails)


@pytest.fixture(scope="module")
def run(cluster: Cluster, demo_base: Path) -> Run:
    folder = cluster.workdir("chain")
    base = folder / "base"
    shutil.copytree(demo_base, base)
    for path in (base, *base.iterdir()):
        path.chmod(0o755)
    return Run(cluster, folder, base)


def test_dry_run_writes_the_batch_files_and_submits_nothing(run: Run) -> None:
    """--dry-run leaves exactly the batch files that would be submitted, says so, and Slurm accepts them as they are."""
    done = run.submit("--dry-run")
    assert "nothing was submitted" in done.stdout
    assert run.submissions() == []
    text = (run.root / "sbatch" / "tokenize" / "dry-run-0.sh").read_text()
    assert "#SBATCH --array=0-3%4\n" in text
    assert "#SBATCH --dependency='aftercorr:<dedup-filter>'\n" in text
    first = run.root / "sbatch" / "prepare" / "dry-run-0.sh"
    run.cluster.run(["sbatch", "--test-only", first])


def test_chain_completes_by_dependencies_alone(run: Run) -> None:
    """One command submits every stage; all end COMPLETED, every stage is marked, and the export passed its gate."""
    done = run.submit()
    submitted = run.submissions()
    assert [one["stage"] for one in submitted] == DEMO_STAGES
    assert "squeue --me" in done.stdout
    assert all(one["dependency"] for one in submitted if one["stage"] not in ("prepare", "convert"))
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
    rows = run.cluster.wait([one["job"] for one in submitted], *ended, timeout=420)
    assert {row["State"] for row in rows} == {"COMPLETED"}, f"{rows}\n{run.logs()}"
    assert len(rows) == sum(len(one["packs"]) for one in submitted)
    markers = {stage: len(list((run.root / "markers" / stage).glob("*.json"))) for stage in DEMO_STAGES}
    assert markers == {one["stage"]: len(one["packs"]) for one in submitted}
    report = json.loads((run.root / "hf" / "reports" / "iter_0000160.json").read_text())
    assert report["max_error"] <= 1e-4
    assert "2 rank(s)" in (run.folder / "logs" / "demo" / "train" / "00000.out").read_text()


def test_nothing_is_submitted_twice(run: Run) -> None:
    """A finished chain has nothing to submit."""
    before = run.submissions()
    assert "Nothing was submitted" in run.submit().stdout
    assert run.submissions() == before


def test_one_lost_marker_is_one_task(run: Run) -> None:
    """With one tokenise task's marker gone, exactly that task is submitted, under its own index, and nothing else."""
    before = run.submissions()
    (run.root / "markers" / "tokenize" / "00002.json").unlink()
    run.submit()
    new = run.submissions()[len(before) :]
    assert [(one["stage"], one["packs"], one["dependency"]) for one in new] == [("tokenize", [2], "")]
    rows = run.cluster.wait([new[0]["job"]], "COMPLETED", "FAILED", timeout=60)
    assert [(row["JobID"], row["State"]) for row in rows] == [(f"{new[0]['job']}_2", "COMPLETED")], run.logs()
    assert "Nothing was submitted" in run.submit().stdout


@pytest.mark.parametrize(
    ("stage", "outputs", "gate", "after", "published"),
    [
        (
            *("convert", ["megatron/release", "megatron/latest_checkpointed_iteration.txt"]),
            *("verify", "shard", "sharded"),
        ),
        ("export-hf", ["hf/iter_0000160"], "verify-export", "push", "pushed"),
    ],
)
def test_a_failing_gate_stops_the_chain(
    run: Run, stage: str, outputs: list[str], gate: str, after: str, published: str
) -> None:
    """Weights that a stage left wrong, with a marker that verifies: its gate fails, and what follows never starts."""
    before = run.submissions()
    root = run.folder / "runs" / f"wrong-{stage}"
    run.cluster.run(["cp", "-r", run.root, root])
    run.cluster.run([sys.executable, "-c", SWAP, root, stage, *outputs], cwd=REPOSITORY)
    for name in (f"markers/{gate}", f"markers/{after}", published, "submissions.jsonl", "intents.jsonl"):
        run.cluster.run(["rm", "-r", root / name])
    run.submit("--run-dir", str(root), "--only", gate, after)
    submitted = [json.loads(line) for line in (root / "submissions.jsonl").read_text().splitlines()]
    assert [one["stage"] for one in submitted] == [gate, after]
    run.cluster.wait([submitted[0]["job"]], "FAILED", timeout=120)
    run.cluster.wait([submitted[1]["job"]], "CANCELLED", timeout=60)
    assert "FAILED: the logits differ" in (run.folder / "logs" / root.name / gate / "00000.out").read_text()
    assert not (root / published).exists()
    assert run.submissions() == before


def test_a_refused_submission_says_what_slurm_said(run: Run) -> None:
    """An unknown partition is answered with Slurm's own words and what to do; nothing of it is queued."""
    settings = run.folder / "cluster.yaml"
    settings.write_text("slurm: {partition: nowhere}\nlogs: ${SNAKMODEL_LOGS}\nstages: {train: {ranks_per_node: 2}}\n")
    done = run.submit("--cluster", str(settings), "--run-dir", str(run.folder / "refused"), check=False)
    assert done.returncode == 2
    assert "invalid partition" in done.stderr
    assert "Correct cluster.yaml" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run.folder / "refused" / "submissions.jsonl").exists()
