"""From nothing to tokens through a real Slurm: collected, then planned and submitted by a continuation job."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.diet import DIET_STAGES, outputs, serving, write_corpora, write_recipe

from .conftest import PATIENCE, REPOSITORY, Cluster


def test_the_diet(cluster: Cluster, demo_base: Path, tmp_path: Path) -> None:
    """One command ends in the same bytes as on this machine, although a task of `filter` is requeued while
    it runs. A partition that a later stage names wrongly is refused before anything is collected."""
    corpora = cluster.workdir("www")
    sources = write_corpora(corpora)
    with serving(corpora) as address:
        expected = locally(corpora, sources, address, demo_base, tmp_path)
        folder = cluster.workdir("diet")
        base = folder / "base"
        shutil.copytree(demo_base, base)
        write_recipe(folder, corpora, sources, address, base)
        where = {"runs": str(folder), "logs": str(folder / "logs")}
        wrong = {**where, "stages": {"tokenize": {"partition": "nowhere"}}}
        (folder / "cluster.yaml").write_text(yaml.safe_dump(wrong))
        open_to_all(folder, corpora)
        shutil.chown(folder, cluster.user)
        run = folder / "run"
        refused = cluster.run(command(folder, "slurm"), cwd=folder, timeout=120, check=False)
        assert refused.returncode == 2
        assert "stage tokenize: Slurm says" in refused.stderr
        assert not (run / "submissions.jsonl").exists()
        (folder / "cluster.yaml").write_text(yaml.safe_dump(where))
        done = cluster.run(command(folder, "slurm"), cwd=folder, timeout=120)
        assert "A continuation job plans and submits the other stages" in done.stdout
        assert {one["stage"] for one in submissions(run)} == {"collect", "continuation"}
        requeue_one(cluster, run, "filter")
        wait_for_markers(cluster, run, "index")
    stages = [one["stage"] for one in submissions(run)]
    assert [name for name in DIET_STAGES if name not in stages] == []
    assert_same(outputs(run), expected, folder, tmp_path)


def locally(corpora: Path, sources: dict[str, object], address: str, base: Path, folder: Path) -> dict[str, bytes]:
    """The outputs of the same diet on this machine."""
    write_recipe(folder, corpora, sources, address, base)
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"runs": str(folder), "logs": str(folder / "logs")}))
    done = subprocess.run(command(folder, "local"), cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return outputs(folder / "run")


def command(folder: Path, scheduler: str) -> list[str]:
    """The launcher's command line."""
    files = ["--recipe", str(folder / "recipe.yaml"), "--cluster", str(folder / "cluster.yaml")]
    where = ["--run-dir", str(folder / "run"), "--scheduler", scheduler, "--until", "index"]
    return [sys.executable, str(REPOSITORY / "jobs" / "submit_all.py"), *files, *where]


def open_to_all(*folders: Path) -> None:
    """Let the cluster's user read what lies in these folders."""
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def submissions(run: Path) -> list[dict[str, str]]:
    """The run's submissions."""
    return [json.loads(line) for line in (run / "submissions.jsonl").read_text().splitlines()]


def requeue_one(cluster: Cluster, run: Path, stage: str) -> None:
    """Requeue a job of a stage as soon as one has begun; it may have ended meanwhile."""
    end = time.monotonic() + 240 * PATIENCE
    while not (started := list((run / "attempts" / stage).glob("*/*/start.json"))):
        assert time.monotonic() < end, f"no job of {stage} has begun"
        time.sleep(0.05)
    job = started[0].parent.name.rsplit(".", 1)[0]
    cluster.run(["scontrol", "requeue", job], check=False)


def wait_for_markers(cluster: Cluster, run: Path, stage: str) -> None:
    """Wait until a stage of one task is done, and fail early if nothing is queued any more."""
    end = time.monotonic() + 600 * PATIENCE
    while not (run / "markers" / stage / "00000.json").exists():
        logs = "\n".join(path.read_text(errors="replace")[-800:] for path in sorted(run.parent.glob("logs/*/*/*.out")))
        assert time.monotonic() < end, logs
        queued = cluster.run(["squeue", "--noheader", f"--user={cluster.user}"]).stdout
        assert queued or (run / "markers" / stage / "00000.json").exists(), f"nothing is queued any more\n{logs}"
        time.sleep(0.5)


def assert_same(found: dict[str, bytes], expected: dict[str, bytes], folder: Path, other: Path) -> None:
    """Both runs have the same files with the same content, but for the names of their folders."""
    assert set(found) == set(expected)
    mine, theirs = str(folder).encode(), str(other).encode()
    assert not [name for name in found if found[name].replace(mine, b"") != expected[name].replace(theirs, b"")]
