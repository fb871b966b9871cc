"""python benchmarks/submit.py [--shards 10000] [--sample 50] [--output benchmarks/results/submit.json]

Planning and submitting the whole chain: seconds to plan, sbatch calls and seconds to submit it to a development cluster
(its nodes drained, so that nothing starts), seconds to plan again over done markers, and what one sbatch a task would
cost, from a sample. Writes the numbers with the machine they were measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sentencepiece import SentencePieceTrainer

from run_contract.entry_point import run_main
from snakmodel.chain.build import STAGES
from snakmodel.chain.plan import RunPlan, make_plan
from snakmodel.config.cluster import Cluster
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.config.sections import PROJECT
from snakmodel.run.task_list import marker_path
from snakmodel.slurm.batch_file import make_executor
from snakmodel.slurm.limits import pack_for_queue
from snakmodel.slurm.submitter import SlurmScheduler

_SHARD_BYTES = 1000
Result = TypeVar("Result")


def timed(what: Callable[[], Result]) -> tuple[float, Result]:
    """Wall-clock seconds and the result; the seconds of CPU go to stderr, which tell a busy machine from slow code."""
    started, cpu = time.perf_counter(), time.process_time()
    result = what()
    seconds = round(time.perf_counter() - started, 2)
    print(f"{seconds} s, of them {time.process_time() - cpu:.2f} s of CPU", file=sys.stderr, flush=True)
    return seconds, result


def configuration(folder: Path, shards: int) -> Config:
    """A recipe over small fake inputs: planning reads sizes and fingerprints, nothing of the model."""
    (folder / "text").mkdir()
    (folder / "text" / "all.txt").write_bytes(b"x" * (_SHARD_BYTES - 1) + b"\n" * (_SHARD_BYTES * (shards - 1) + 1))
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text('{"vocab_size": 32000}')
    with (folder / "base" / "tokenizer.model").open("wb") as model:
        words = ["en lille model, den mindste, som planen vil læse"] * 10
        SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )
    recipe = {
        "name": "bench",
        "data": {"path": str(folder / "text"), "shards": shards},
        "tokenizer": {"file": str(folder / "base" / "tokenizer.model")},
        "model": {"base": str(folder / "base")},
        "training": {"train_iters": 4, "global_batch_size": 2, "seq_length": 8, "lr": 0.1, "save_interval": 2},
    }
    cluster = {"runs": str(folder / "runs"), "logs": str(folder / "logs")}
    return Config(recipe=Recipe.model_validate(recipe), cluster=Cluster.model_validate(cluster))


def mark_done(plan: RunPlan, stages: list[str]) -> int:
    """Make the outputs of some stages and their markers; return how many markers."""
    made = 0
    for name in stages:
        marker_path(plan.paths.root, name, 0).parent.mkdir(parents=True)
        for index, (task, key) in enumerate(zip(plan.chain[name].tasks, plan.chain.keys[name], strict=True)):
            for output in task.outputs:
                path = plan.paths.root / output
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("x")
            marker = {"key": key, "outputs": {output: [1, "0" * 32] for output in task.outputs}, "counts": {}}
            marker_path(plan.paths.root, name, index).write_text(json.dumps(marker))
            made += 1
    return made


def one_by_one(plan: RunPlan, tasks: int) -> float:
    """Seconds for one sbatch call a task."""
    stage, folder = plan.chain["prepare"], plan.paths.root / "one-by-one"
    started = time.perf_counter()
    for pack in range(tasks):
        make_executor(plan, stage, folder, [pack], "", f"sample{pack}").send("true")
    return time.perf_counter() - started


def measure(folder: Path, shards: int, sample: int) -> dict[str, Any]:
    """Everything, on the cluster that SLURM_CONF names."""
    config, root = configuration(folder, shards), folder / "runs" / "bench"

    def plan() -> RunPlan:
        return make_plan(config, root, STAGES, [], dry=False, fit=lambda stages: pack_for_queue(config.cluster, stages))

    planning, made = timed(plan)
    submitting, submitted = timed(lambda: SlurmScheduler(made, resubmit_command=["true"]).run().submitted)
    tasks = sum(len(one.packs) for one in submitted)
    alone = one_by_one(made, sample)
    first = mark_done(made, ["prepare"])
    again, partly = timed(plan)
    rest = mark_done(made, [name for name in STAGES if name != "prepare"])
    whole, full = timed(plan)
    assert not partly.missing["prepare"]
    assert not any(full.missing.values())
    return {
        "shards": shards,
        "tasks": tasks,
        "plan_seconds": planning,
        "sbatch_calls": len(submitted),
        "submit_seconds": submitting,
        f"replan_seconds_{first}_markers": again,
        f"replan_seconds_{first + rest}_markers": whole,
        "one_sbatch_a_task_ms": round(1000 * alone / sample, 1),
        "ratio_to_one_sbatch_a_task": round(alone / sample * tasks / submitting, 1),
    }


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    slurm = subprocess.run(["sbatch", "--version"], capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    load = round(os.getloadavg()[0], 1)
    return {"load": load, "cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "slurm": slurm}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10000)
    parser.add_argument("--sample", type=int, default=50, help="tasks submitted one by one for comparison")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "submit.json")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="snak-bench-", dir="/tmp"))
    folder.chmod(0o755)  # munged refuses a socket that others cannot reach
    devcluster = [sys.executable, str(PROJECT / "sbatch" / "devcluster")]
    try:
        subprocess.run([*devcluster, "up", "--dir", str(folder / "c"), "--nodes", "1"], check=True, stdout=sys.stderr)
        os.environ["SLURM_CONF"] = str(folder / "c" / "slurm.conf")
        drain = ["scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=benchmark"]
        subprocess.run(drain, check=True)
        found = {**measure(folder, args.shards, args.sample), "machine": machine(), "date": time.strftime("%F")}
    finally:
        subprocess.run([*devcluster, "down", "--dir", str(folder / "c")], check=True, stdout=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_main(main)
