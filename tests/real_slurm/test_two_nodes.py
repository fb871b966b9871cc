"""Training on two nodes of a real Slurm, submitted by the launcher: one rank a node, meeting over the network."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from .conftest import REPOSITORY, Cluster
from .test_chain import Run

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
RECIPE = """
name: demo
data: {path: %(folder)s/text, shards: 1}
dedup: {ngram: 2, threshold: 0.7, ranges: 1}
tokenizer: {file: %(folder)s/base/tokenizer.model}
model: {base: %(folder)s/base}
training:
  {train_iters: 12, global_batch_size: 4, micro_batch_size: 2, seq_length: 64, lr: 1.0e-3, lr_warmup_iters: 2,
   save_interval: 6, eval_interval: 6, eval_iters: 1, split: "949,50,1", dtype: fp32}
"""
SETTINGS = """
runs: ${SNAKMODEL_RUNS}
logs: ${SNAKMODEL_LOGS}
stages: {train: {nodes: 2, ranks_per_node: 1, minutes: 20}}
"""


@pytest.fixture(scope="module")
def run(cluster: Cluster, demo_base: Path) -> Run:
    """Everything before training, made on this machine without Slurm by the same user."""
    folder = cluster.workdir("two-nodes")
    shutil.copytree(demo_base, folder / "base")
    source = next((REPOSITORY / "demo" / "text").rglob("*.txt"))
    (folder / "text" / "one").mkdir(parents=True)
    shutil.copy(source, folder / "text" / "one")
    for path in folder.rglob("*"):
        path.chmod(0o755)
    (folder / "recipe.yaml").write_text(RECIPE % {"folder": folder})
    (folder / "cluster.yaml").write_text(SETTINGS)
    made = Run(cluster, folder, folder / "base")
    flags = ["--recipe", folder / "recipe.yaml", "--cluster", folder / "cluster.yaml", "--until", "shard"]
    command = ["env", *made.environment, sys.executable, REPOSITORY / "jobs" / "submit_all.py", "--scheduler", "local"]
    cluster.run([*command, *flags], cwd=folder, timeout=400)
    return made


@pytest.mark.slow
def test_ranks_of_two_nodes_train_together(run: Run) -> None:
    """Two nodes of one rank each meet at rank 0's address and train; the chain after it exports what both made."""
    done = run.submit("--recipe", str(run.folder / "recipe.yaml"), "--cluster", str(run.folder / "cluster.yaml"))
    submitted = {one["stage"]: one["job"] for one in run.submissions()}
    assert list(submitted) == ["train", "merge", "export-hf", "verify-export", "push"], done.stdout
    rows = run.cluster.wait(submitted.values(), *ENDED, timeout=400)
    assert {row["State"] for row in rows} == {"COMPLETED"}, f"{rows}\n{run.logs()}"
    [attempt] = (run.root / "attempts" / "train" / "00000").iterdir()
    records = [json.loads((attempt / f"task-00000.rank-{rank:04d}.json").read_text()) for rank in range(2)]
    assert [(record["rank"], record["code"], record["iteration"]) for record in records] == [(0, 0, 12), (1, 0, 12)]
    assert len({record["node"] for record in records}) == 2, records
    meeting = json.loads((attempt / "task-00000.rendezvous.json").read_text())
    given = run.cluster.run(["srun", "-N2", "printenv", "SLURM_LAUNCH_NODE_IPADDR"], timeout=60).stdout.split()
    assert {meeting["address"]} == set(given), "rank 0 did not publish the address that Slurm gives to steps"
