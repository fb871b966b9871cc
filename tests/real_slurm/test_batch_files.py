"""The recipe's steps by hand on a real Slurm: sbatch sbatch/N.….sbatch one after another, and mixed with the launcher.

One run goes through the module: its tests continue what the ones before them did.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snakmodel.launch.by_hand import STEPS
from tests.toy import DEMO_STAGES

from .conftest import PATIENCE, REPOSITORY, Cluster

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
RECIPE = """
name: small
data: {path: %(folder)s/text, shards: 2}
dedup: {ngram: 2, threshold: 0.7, ranges: 2}
tokenizer: {file: %(folder)s/base/tokenizer.model}
model: {base: %(folder)s/base}
training:
  {train_iters: 40, global_batch_size: 4, micro_batch_size: 2, seq_length: 64, lr: 1.0e-3, lr_warmup_iters: 2,
   save_interval: 20, eval_interval: 20, eval_iters: 1, split: "949,50,1", dtype: fp32}
export: {iterations: [20, 40]}
"""


class ByHand:
    """A small run in a folder of the unprivileged user, who submits the batch files of this checkout."""

    def __init__(self, cluster: Cluster, base: Path) -> None:
        self.cluster = cluster
        self.folder = cluster.workdir("by-hand")
        self.root = self.folder / "runs" / "small"
        shutil.copytree(base, self.folder / "base")
        source = REPOSITORY / "demo" / "text"
        for name in sorted(path.relative_to(source) for path in source.rglob("*.txt"))[:3]:
            (self.folder / "text" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, self.folder / "text" / name)
        for path in self.folder.rglob("*"):
            path.chmod(0o755)
        (self.folder / "small.yaml").write_text(RECIPE % {"folder": self.folder})
        own = {"RECIPE": self.folder / "small.yaml", "RUN_DIR": self.root, "PYTHON": sys.executable}
        own["SNAKMODEL_LOGS"] = self.folder / "logs"
        self.environment = [f"{name}={value}" for name, value in own.items()]

    def submit(self, step: str, *stages: str, flags: tuple[str, ...] = ()) -> str:
        """Run sbatch with a batch file from the project's folder; returns the job's id."""
        command = ["env", *self.environment, "sbatch", "--parsable", f"--output={self.folder}/%x-%A.out", *flags]
        done = self.cluster.run([*command, f"sbatch/{step}.sbatch", *stages], cwd=REPOSITORY)
        return done.stdout.strip().split(";")[0]

    def launch(self) -> subprocess.CompletedProcess[str]:
        """Run jobs/submit_all.py on the same run."""
        command = ["env", *self.environment, sys.executable, REPOSITORY / "jobs" / "submit_all.py"]
        flags = ["--scheduler", "slurm", "--recipe", self.folder / "small.yaml", "--run-dir", self.root]
        return self.cluster.run([*command, *flags], cwd=self.folder, timeout=120)

    def finish(self, *jobs: str, timeout: float = 120) -> list[dict[str, str]]:
        """Wait until jobs have ended; their sacct records."""
        return self.cluster.wait(jobs, *ENDED, timeout=timeout)

    def until(self, condition: Callable[[], object], what: str, timeout: float = 120) -> None:
        """Wait until something has happened."""
        limit = time.monotonic() + timeout * PATIENCE
        while not condition():
            assert time.monotonic() < limit, f"not within {timeout} s: {what}\n{self.logs()}"
            time.sleep(0.1)

    def restarts(self, job: str) -> int:
        """How often Slurm has started a job again."""
        words = self.cluster.run(["scontrol", "show", "job", job]).stdout.split()
        return int(next(word for word in words if word.startswith("Restarts=")).partition("=")[2])

    def markers(self, stage: str) -> list[int]:
        """Tasks of a stage that are marked done."""
        return sorted(int(path.stem) for path in (self.root / "markers" / stage).glob("*.json"))

    def submissions(self) -> list[dict[str, Any]]:
        """The run's journal."""
        path = self.root / "submissions.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def output(self, step: str, job: str) -> str:
        """What the batch file itself said."""
        return (self.folder / f"{step}-{job}.out").read_text()

    def log(self, stage: str, pack: int = 0) -> str:
        """A task's log, where the launcher's jobs have it too."""
        path = self.folder / "logs" / "small" / stage / f"{pack:05d}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        """The end of every log, for a failing test's message."""
        paths = sorted([*self.folder.glob("*.out"), *self.folder.glob("logs/*/*/*")])
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in paths)


@pytest.fixture(scope="module")
def run(cluster: Cluster, demo_base: Path) -> ByHand:
    return ByHand(cluster, demo_base)


def test_array_of_one_stage(run: ByHand) -> None:
    """`sbatch --array=0-1 0.preprocess.sbatch prepare` makes a job a shard, marked, logged and claimed as any other."""
    job = run.submit("0.preprocess", "prepare", flags=("--array=0-1",))
    rows = run.finish(job)
    assert {row["JobID"]: row["State"] for row in rows} == {f"{job}_{i}": "COMPLETED" for i in range(2)}, run.logs()
    assert run.markers("prepare") == [0, 1]
    claims = [json.loads((run.root / "claims" / "prepare" / f"{i:05d}.json").read_text()) for i in range(2)]
    assert [claim["attempt"] for claim in claims] == [f"{job}_{i}.r0" for i in range(2)]
    assert [f"prepare task {i}: done" in run.log("prepare", i) for i in range(2)] == [True, True]


def test_missing_inputs_end_with_3(run: ByHand) -> None:
    """A step submitted too early fails with exit code 3, says which file comes first, and marks nothing."""
    job = run.submit("6.train")
    [row] = run.finish(job)
    assert (row["State"], row["ExitCode"]) == ("FAILED", "3:0")
    assert "train waits for merge-tokens (sbatch/2.tokenize.sbatch)" in run.output("6.train", job)
    assert run.markers("train") == []


@pytest.mark.slow
def test_step_of_several_stages_goes_on_after_a_signal(run: ByHand) -> None:
    """Step 0, signalled to end as at its time limit, is requeued at once, keeps what is marked, and completes."""
    job = run.submit("0.preprocess")
    run.until(lambda: run.markers("dedup-signatures"), "a first marker")
    run.cluster.run(["scancel", "--signal=TERM", "--full", job])
    run.until(lambda: run.restarts(job) == 1, "the requeue")
    kept = run.markers("dedup-signatures")
    assert [row["State"] for row in run.finish(job)] == ["COMPLETED"], run.logs()
    assert "Nothing to do" not in run.output("0.preprocess", job)
    assert [len(run.markers(stage)) for stage in STEPS["0.preprocess"] if stage in DEMO_STAGES] == [
        2,
        2,
        2,
        1,
        2,
        1,
        2,
        1,
    ]
    assert all((run.root / "markers" / "dedup-signatures" / f"{index:05d}.json").exists() for index in kept)
    assert "requeued" in run.output("0.preprocess", job)


@pytest.mark.slow
def test_chain_of_the_steps(run: ByHand) -> None:
    """Steps 1 … 9 in order by --dependency=afterok complete; training, signalled half-way, saves and requeues itself.

    Steps 7 to 9 are submitted as arrays, an exported iteration each, and as one job for all.
    """
    jobs: dict[str, str] = {}
    for step in list(STEPS)[1:]:
        flags = (f"--dependency=afterok:{':'.join(jobs.values())}",) if jobs else ()
        each = ("--array=0-1",) if step in ("7.merge", "8.export-hf") else ()
        jobs[step] = run.submit(step, flags=(*flags, *each))
    run.until(lambda: "iteration        2/" in run.log("train"), "training's second step", timeout=400)
    run.cluster.run(["scancel", "--signal=USR2", jobs["6.train"]])
    rows = run.finish(*jobs.values(), timeout=400)
    assert {row["State"] for row in rows} == {"COMPLETED"}, f"{rows}\n{run.logs()}"
    assert {stage: len(run.markers(stage)) for stage in DEMO_STAGES[DEMO_STAGES.index("tokenize") :]} == {
        **dict.fromkeys(["tokenize", "merge", "export-hf", "verify-export", "push"], 2),
        **dict.fromkeys(["merge-tokens", "index", "convert", "verify", "shard", "train"], 1),
    }
    attempts = {path.name for path in (run.root / "attempts" / "train" / "00000").iterdir()}
    assert attempts == {f"{jobs['6.train']}_0.r0", f"{jobs['6.train']}_0.r1"}, run.logs()
    first = json.loads((run.root / f"attempts/train/00000/{jobs['6.train']}_0.r0/summary.json").read_text())
    assert (first["outcome"], first["progressed"]) == ("again", True), run.log("train")
    assert "2 rank(s)" in run.log("train")
    assert "torch " in run.output("1.container", jobs["1.container"])


@pytest.mark.slow
def test_launcher_sees_what_was_done_by_hand(run: ByHand) -> None:
    """Afterwards jobs/submit_all.py has nothing to submit: every key, argv and size is the one that it plans."""
    before = run.submissions()
    assert "Nothing was submitted" in run.launch().stdout
    assert run.submissions() == before


@pytest.mark.slow
def test_by_hand_sees_what_the_launcher_did(run: ByHand) -> None:
    """The launcher redoes one lost task; the step by hand then finds nothing to do, in a job and without one."""
    before = run.submissions()
    (run.root / "markers" / "tokenize" / "00001.json").unlink()
    run.launch()
    [new] = run.submissions()[len(before) :]
    assert (new["stage"], new["packs"]) == ("tokenize", [1])
    run.finish(new["job"])
    job = run.submit("2.tokenize")
    assert [row["State"] for row in run.finish(job)] == ["COMPLETED"], run.logs()
    assert "Nothing to do: tokenize, merge-tokens, index" in run.output("2.tokenize", job)


@pytest.mark.slow
def test_a_task_is_not_taken_from_the_launcher(run: ByHand) -> None:
    """A task that the launcher has queued is refused by hand, with that job's id."""
    (run.root / "markers" / "convert" / "00000.json").unlink()
    nodes = "node[1-4]"
    run.cluster.run(["scontrol", "update", f"NodeName={nodes}", "State=DRAIN", "Reason=test"], as_root=True)
    try:
        run.launch()
        queued = run.submissions()[-1]
        assert queued["stage"] == "convert"
        refused = run.cluster.run(["env", *run.environment, "bash", "sbatch/3.convert.sbatch"], REPOSITORY, check=False)
        assert refused.returncode == 2
        assert f"convert task 0 is queued or running in job {queued['job']}_0" in refused.stderr
    finally:
        run.cluster.run(["scontrol", "update", f"NodeName={nodes}", "State=RESUME"], as_root=True)
    assert [row["State"] for row in run.finish(queued["job"])] == ["COMPLETED"], run.logs()


@pytest.mark.slow
def test_the_launcher_does_not_double_what_runs_by_hand(run: ByHand) -> None:
    """While a step by hand runs its task (suspended here, so that it surely does), the launcher does not submit it."""
    (run.root / "markers" / "convert" / "00000.json").unlink()
    job = run.submit("3.convert")
    run.until(lambda: run.submissions()[-1]["job"] == job, "the entry in the journal")
    run.cluster.run(["scontrol", "suspend", f"{job}_0"], as_root=True)
    before = run.submissions()
    assert "Nothing was submitted" in run.launch().stdout
    run.cluster.run(["scontrol", "resume", f"{job}_0"], as_root=True)
    assert run.submissions() == before
    assert [row["State"] for row in run.finish(job)] == ["COMPLETED"], run.logs()
