"""sbatch/0 … 9 and the launcher: the same stages, the same resources, the same commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from run_contract.errors import InputsMissing, UserError
from snakmodel.chain.build import STAGES
from snakmodel.chain.plan import RunPlan
from snakmodel.chain.stage import Input, Stage
from snakmodel.config import load as configuration
from snakmodel.launch.by_hand import STEPS, one_element, plan_by_hand, refuse_missing_inputs
from snakmodel.slurm.sbatch_calls import driver_command
from snakmodel.slurm.submitter import SlurmScheduler
from tests import toy
from tests.conftest import PROJECT
from tests.toy import DEMO_STAGES

FILES = sorted((PROJECT / "sbatch").glob("[0-9].*.sbatch"))
SHARED = ("nodes", "ntasks-per-node", "cpus-per-task", "time", "requeue", "signal", "open-mode", "kill-on-invalid-dep")


def options(text: str) -> dict[str, str]:
    """The #SBATCH lines of a batch file: option -> value, empty for a switch."""
    found = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, flags=re.MULTILINE)
    return {name: value.strip() for name, value in found}


def default_stages(text: str) -> list[str]:
    """The stages that a batch file runs when none is named."""
    found = re.search(r"^\[ \$# -gt 0 \] \|\| set -- (.*)$", text, flags=re.MULTILINE)
    return found[1].split() if found else []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, demo_base: Path) -> dict[str, str]:
    """The environment of somebody who runs the demonstration in a folder of their own, by hand."""
    folder = tmp_path_factory.mktemp("run")
    own = {"DEMO_BASE": str(demo_base), "SNAKMODEL_LOGS": str(folder / "logs"), "RUN_DIR": str(folder / "demo")}
    return {**os.environ, **own, "PYTHON": sys.executable}


@pytest.fixture(scope="module")
def plan(run: dict[str, str]) -> RunPlan:
    """What jobs/submit_all.py --dry-run left in the run's folder, and the plan made by hand beside it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DEMO_BASE", "SNAKMODEL_LOGS"):
            patch.setenv(name, run[name])
        config = configuration.load(PROJECT / "recipes" / "demo.yaml", PROJECT / "cluster.yaml", STAGES)
        return plan_by_hand(config, Path(run["RUN_DIR"]), STAGES, None)


@pytest.fixture(scope="module")
def launched(plan: RunPlan, run: dict[str, str]) -> dict[str, str]:
    """Stage -> the batch file that jobs/submit_all.py writes for it."""
    command = [sys.executable, "jobs/submit_all.py", "--scheduler", "slurm", "--dry-run", "--run-dir", run["RUN_DIR"]]
    subprocess.run(command, cwd=PROJECT, env=run, check=True, capture_output=True)
    return {name: next(plan.paths.batch_file(name).glob("dry-run-*.sh")).read_text() for name in DEMO_STAGES}


def bash(step: str, env: dict[str, str], *words: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    """Run a batch file without Slurm."""
    command = ["bash", str(PROJECT / "sbatch" / f"{step}.sbatch"), *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def test_steps_are_the_chain() -> None:
    """The files are those of STEPS, each runs the stages listed there, and together they are the launcher's chain."""
    assert [path.stem for path in FILES] == list(STEPS)
    assert [default_stages(path.read_text()) for path in FILES] == [list(stages) for stages in STEPS.values()]
    assert [stage for stages in STEPS.values() for stage in stages] == STAGES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_says_how_to_use_it(path: Path) -> None:
    """Every file can be executed, is valid bash, and opens with what it reads, writes, and how it is edited and run."""
    text = path.read_text()
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    head = text[: text.index("#SBATCH")]
    for word in ("reads ", "writes ", "edit ", f"submit   sbatch sbatch/{path.name}", f"bash sbatch/{path.name}"):
        assert f"# {word}" in head or f"#          {word}" in head
    assert options(text)["job-name"] == path.stem
    assert options(text)["output"].startswith("logs/%x-")


@pytest.mark.parametrize("step", [step for step, stages in STEPS.items() if stages])
def test_resources_and_signals_agree(step: str, launched: dict[str, str]) -> None:
    """A file of one stage asks Slurm for what the launcher asks; one of several for no less than each needs."""
    mine = options((PROJECT / "sbatch" / f"{step}.sbatch").read_text())
    for stage in set(STEPS[step]) & set(DEMO_STAGES):
        theirs = options(launched[stage])
        for name in SHARED:
            if name in ("cpus-per-task", "time") and len(STEPS[step]) > 1:
                assert int(mine[name]) >= int(theirs[name]), (stage, name)
            else:
                assert mine.get(name) == theirs.get(name), (stage, name)


def test_commands_agree(plan: RunPlan, launched: dict[str, str]) -> None:
    """By hand every stage gets byte for byte the launcher's task list, and the same driver command reads it."""
    for name in DEMO_STAGES:
        path = plan.paths.task_list(name)
        theirs = path.read_bytes()
        path.unlink()
        assert plan.write_task_list(plan.chain[name], sys.executable) == path
        assert path.read_bytes() == theirs, name
        assert shlex.split(launched[name].splitlines()[-1]) == driver_command(sys.executable, path)


def test_missing_inputs_are_exit_code_3(run: dict[str, str], plan: RunPlan) -> None:
    """Training before its inputs exist is refused with 3 and the files to run first; nothing is started."""
    done = bash("6.train", run)
    assert done.returncode == 3
    assert "train waits for merge-tokens (sbatch/2.tokenize.sbatch)" in done.stderr
    assert "shard (sbatch/5.shard.sbatch)" in done.stderr
    assert not (plan.paths.root / "attempts").exists()


def test_a_step_without_slurm(run: dict[str, str], plan: RunPlan) -> None:
    """`bash FILE STAGE` does that stage here, marks it, logs where the launcher does, and has nothing to do again."""
    done = bash("0.preprocess", run, "prepare")
    assert done.returncode == 0, done.stderr
    assert "prepare: done" in done.stdout
    assert [plan.chain.marker_problem("prepare", index) for index in range(4)] == [None] * 4
    assert "prepare task 3" in (plan.logs("prepare") / "00003.out").read_text()
    again = bash("0.preprocess", run, "prepare")
    assert (again.returncode, "Nothing to do" in again.stdout) == (0, True)


def test_another_recipe_is_refused(run: dict[str, str], plan: RunPlan, tmp_path: Path) -> None:
    """A run's folder keeps its recipe by hand as well: another one is refused and the record stays as it was."""
    frozen = plan.paths.frozen.read_text()
    other = tmp_path / "other.yaml"
    other.write_text((PROJECT / "recipes" / "demo.yaml").read_text().replace("ngram: 2", "ngram: 3"))
    done = bash("0.preprocess", {**run, "RECIPE": str(other)})
    assert done.returncode == 2
    assert "dedup.ngram: 2 -> 3" in done.stderr
    assert plan.paths.frozen.read_text() == frozen


def test_a_folder_without_python_is_explained(run: dict[str, str], tmp_path: Path) -> None:
    """Submitted from a folder that is not the project's, every file says so and exits 3."""
    env = {name: value for name, value in run.items() if name != "PYTHON"}
    for path in FILES:
        done = bash(path.stem, {**env, "SLURM_SUBMIT_DIR": str(tmp_path)})
        assert done.returncode == 3
        assert f"no .venv/bin/python in {tmp_path}. Submit from the project's folder" in done.stderr


def test_environment_step_says_what_is_there(run: dict[str, str], tmp_path: Path) -> None:
    """Step 1 prints the versions, and names a package that cannot be imported and exits 1."""
    (tmp_path / "sentencepiece.py").write_text("raise ImportError('libstdc++ is too old')")
    done = bash("1.container", run)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^torch +2\.", done.stdout, flags=re.MULTILINE)
    path = f"{tmp_path}:{run.get('PYTHONPATH', '')}"
    broken = bash("1.container", {**run, "PYTHONPATH": path})
    assert broken.returncode == 1
    assert "sentencepiece    MISSING: libstdc++ is too old" in broken.stdout
    assert "cannot import sentencepiece" in broken.stderr


def test_element_of_an_array(tmp_path: Path) -> None:
    """An array's element takes its own pack of each stage, nothing that is done, and nothing outside the array."""
    plan = toy.plan(tmp_path / "run", toy.two_stages(tmp_path / "run")[:2])
    assert one_element(plan, 2).missing == {"first": [2], "second": [2]}
    plan.missing["first"].remove(1)
    assert one_element(plan, 1).missing == {"first": [], "second": [1]}
    with pytest.raises(UserError, match=r"elements 0 to 2, not 3: --array=0-2"):
        one_element(plan, 3)


def test_stages_that_cannot_share_an_array(tmp_path: Path) -> None:
    """Stages of different sizes, or that wait for all of each other, are refused with the arrays to submit instead."""
    root = tmp_path / "run"
    with pytest.raises(UserError, match=r"first \(--array=0-2\), second \(--array=0-2\), last \(--array=0\)"):
        one_element(toy.plan(root, toy.two_stages(root)), 0)
    first, second, _ = toy.two_stages(root)
    joining = Stage("second", tuple(replace(one, inputs=(Input("first"),)) for one in second.tasks), second.resources)
    with pytest.raises(UserError, match="cannot share a job array"):
        one_element(toy.plan(root, [first, joining]), 0)


def test_an_element_needs_its_own_inputs_only(tmp_path: Path) -> None:
    """Element 1 of a stage chained task by task may run once task 1 of the other is done; element 0 may not."""
    root = tmp_path / "run"
    tasks = [toy.task(root, f"a/{i}.txt") for i in range(2)]
    reads = [toy.task(root, f"b/{i}.txt", f"a/{i}.txt", inputs=[Input("prepare", i)]) for i in range(2)]
    one = toy.two_stages(root)[0].resources
    stages = [
        Stage("prepare", tuple(tasks), one),
        Stage("dedup-signatures", tuple(reads), one),
    ]
    plan = toy.plan(root, stages)
    SlurmScheduler(plan, dry=True).run()
    driver = [*driver_command(sys.executable, plan.paths.task_list("prepare")), "--pack", "1"]
    subprocess.run(driver, check=True, capture_output=True)
    del plan.missing["prepare"]
    refuse_missing_inputs(one_element(plan, 1))
    with pytest.raises(InputsMissing, match=r"prepare \(sbatch/0.preprocess.sbatch\), of which 1 task"):
        refuse_missing_inputs(one_element(plan, 0))
