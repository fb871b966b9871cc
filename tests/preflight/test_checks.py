"""Preflight without a cluster: the forecast, the words of Slurm's refusals, what a drill's notes are judged to be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from snakmodel.chain.disk_forecast import forecast
from snakmodel.chain.stage import Stage
from snakmodel.config.cluster import Cluster, Resources
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.preflight.drill import Drill, findings, small
from snakmodel.preflight.drill_rank import Note
from snakmodel.slurm.admission import Partition, alike, minutes, partition_of
from snakmodel.slurm.ask import run_tool
from snakmodel.slurm.batch_file import make_executor
from tests import toy
from tests.conftest import PROJECT
from tests.toy import DEMO_STAGES


def test_forecast(tmp_path: Path) -> None:
    """The formula in the module's docstring, on round numbers."""
    text = tmp_path / "a.txt"
    text.write_bytes((b"x" * 99 + b"\n") * 10_000)
    training = {**toy.recipe()["training"], "train_iters": 100, "save_interval": 30, "dtype": "bf16"}
    training |= {"global_batch_size": 1000, "seq_length": 8}
    recipe = Recipe.model_validate(toy.recipe(training=training, export={"iterations": [30, 100]}))
    found = forecast(Config(recipe=recipe, cluster=Cluster()), {text: 10**6}, 10**9, vocabulary=32_000, bands=4)
    assert found.parts == {
        "arrow": 1_100_000,
        "filter": 0,
        "lines": 0,
        "dedup": 1_100_000 + 24 * 10_000 * 4,
        "text": 4_000_000,
        "tokens": 2 * 2 * 10**6 // 3,
        "index": 5 * (4 * 10_000 + 7 * 10**6 // 8),
        "weights": 4 * 10**9,
        "checkpoints": 12 * 10**9 * 5,
        "exports": 3 * 2 * 2 * 10**9,
    }
    assert found.total == sum(found.parts.values())


def test_forecast_of_the_stages_on_text(tmp_path: Path) -> None:
    """A copy for `filter`, one per own command and one for the last filter; a count per line, also of JSON strings."""
    text = tmp_path / "a.jsonl"
    text.write_bytes((b'{"text": "' + b"x" * 36 + b"\\n" + b"x" * 49 + b'"}\n') * 10_000)
    commands = [{"name": name, "command": "classify {input} {output}"} for name in ("a", "b")]
    filters = {"language": {"keep": "da", "rejected": True}}
    data = {"path": "text", "custom": commands}
    changes: dict[str, Any] = {"data": data, "filter": filters, "dedup": {"lines": 10}}
    recipe = Recipe.model_validate(toy.recipe(**changes))
    found = forecast(Config(recipe=recipe, cluster=Cluster()), {text: 10**6}, 10**9, vocabulary=32_000, bands=4)
    assert found.parts["filter"] == 4 * 1_100_000
    assert found.parts["lines"] == 24 * 20_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30:00", 30), ("1:00:00", 60), ("2-00:00:00", 2880), ("1:30", 1.5), ("infinite", float("inf"))],
)
def test_time_limits(text: str, expected: float) -> None:
    """Slurm's spellings of a partition's time limit."""
    assert minutes(text) == expected


def test_partition_of_a_job() -> None:
    """A job runs in the partition it names, the first of several, else in the default one."""
    known = {"a": Partition("a", False, 1, 1, ""), "b": Partition("b", True, 1, 1, "")}
    assert [partition_of(Resources(partition=name), known) for name in ("a", "a,b", None, "c")] == [
        known["a"],
        known["a"],
        known["b"],
        None,
    ]


def test_questions_hide_a_surrounding_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's tools see nothing of a job around the launcher but SLURM_CONF; the launcher itself goes on seeing it."""
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "PMI_RANK", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    seen = {line.partition("=")[0] for line in run_tool(["env"]).stdout.splitlines()}
    assert "SLURM_CONF" in seen
    assert not seen & {"SLURM_JOB_ID", "SBATCH_PARTITION", "PMI_RANK"}
    assert os.environ["SLURM_JOB_ID"] == "x"


def test_a_missing_tool_is_a_failed_question() -> None:
    """A tool that is not installed is an answer, not a traceback."""
    assert run_tool(["no-such-tool"]).returncode == 127


def test_stages_that_ask_for_the_same_are_asked_about_once(tmp_path: Path) -> None:
    """Set-up lines make no other question to Slurm; cores do."""
    first, second, last = toy.two_stages(tmp_path / "run")
    same = first.resources.model_copy(update={"setup": ["true"]})
    other = first.resources.model_copy(update={"cpus": 2})
    plan = toy.plan(tmp_path / "run", [first, second, last])
    groups = alike(plan, [first, _with(second, same), _with(last, other)])
    assert [[stage.name for stage in group] for group in groups] == [["first", "second"], ["last"]]


def _with(stage: Stage, resources: Resources) -> Stage:
    return Stage(stage.name, stage.tasks, resources, stage.per_shard)


def test_batch_file(tmp_path: Path) -> None:
    """Every setting of `slurm:` is in the batch file; a stage's own value wins."""
    slurm = {
        **{
            "account": "acc",
            "partition": "p",
            "qos": "q",
            "constraint": "c",
            "exclude": "n1",
            "setup": ["module load x"],
        },
        **{"mail_type": "END,FAIL", "mail_user": "me@example.org"},
    }
    stages = toy.two_stages(tmp_path / "run")
    own = {"qos": "long", "gres": "gpu:a100:4", "setup": ["module load y"]}
    stages[1] = _with(stages[1], Resources.model_validate(own))
    plan = toy.plan(tmp_path / "run", stages, {"slurm": slurm})
    text = [
        make_executor(plan, stage, tmp_path / "s", [0], "", "t")._make_submission_file_text("true", "t")
        for stage in stages[:2]
    ]
    for option in ("account=acc", "partition=p", "constraint=c", "exclude=n1", "mail-type=END,FAIL"):
        assert all(f"#SBATCH --{option}\n" in one for one in text), option
    assert "#SBATCH --mail-user=me@example.org\n" in text[0]
    assert "#SBATCH --qos=q\n" in text[0]
    assert "\nmodule load x\n" in text[0]
    assert "--gres" not in text[0]
    assert "#SBATCH --qos=long\n" in text[1]
    assert "#SBATCH --gres=gpu:a100:4\n" in text[1]
    assert "\nmodule load y\n" in text[1]
    assert "module load x" not in text[1]


def test_mistakes_in_settings() -> None:
    """GPUs asked for twice and an unknown mail type are refused."""
    with pytest.raises(ValueError, match="ask for GPUs in one way"):
        Resources(gpus_per_node=1, gres="gpu:1")
    with pytest.raises(ValueError, match=r"found 'FAILS'\. Did you mean FAIL"):
        Cluster.model_validate({"slurm": {"mail_type": "END,FAILS"}})


def drill(folder: Path, **changes: object) -> Drill:
    """A drill of two ranks with four cores that went well, its second attempt 8 s after the signal."""
    asked = small(Resources(nodes=4, ranks_per_node=8, cpus=4, mem_gb=400), Partition("gpu", True, 60, 9, ""))
    found = Drill(
        "gpu", asked, folder, "token", folder / "log", job="7", submitted=90.0, limit=220.0, state="COMPLETED"
    )
    for rank in (0, 1):
        seen = {"hello": "token", "network": "ok", "imports_seconds": 5.0, "signal": "SIGUSR2", "signalled": 190.0}
        found.notes.append(Note("7_0.r0", rank, f"n{rank}", 100.0, 4, **{**seen, **(changes if rank else {})}))  # type: ignore[arg-type]
        found.notes.append(Note("7_0.r1", rank, f"n{rank}", 198.0, 4, hello="token"))
    return found


def test_a_good_drill(tmp_path: Path) -> None:
    """A drill that went well passes everything, with the measured notice and requeue times."""
    found = {one.name: one for one in findings(drill(tmp_path))}
    assert {one.result for one in found.values()} == {"pass"}
    assert "30 s before the time limit" in found["gpu: signal"].found
    assert "again 8 s after" in found["gpu: requeue"].found
    assert "10 s after sbatch" in found["gpu: start"].found


@pytest.mark.parametrize(
    ("changes", "failed", "words"),
    [
        ({"hello": ""}, "shared disk", "n1 did not see"),
        ({"network_problem": "n1: no route to host"}, "network", "no route to host"),
        ({"imports_problem": "No module named 'torch'"}, "packages", "No module named 'torch'"),
        ({"signal": "SIGTERM"}, "signal", "n1 got SIGTERM"),
        ({"signal": ""}, "signal", "n1 got none"),
    ],
)
def test_a_bad_drill(tmp_path: Path, changes: dict[str, str], failed: str, words: str) -> None:
    """What went wrong on one of two nodes fails exactly its own check, names it and has a remedy."""
    bad = [one for one in findings(drill(tmp_path, **changes)) if one.result == "fail"]
    assert [one.name for one in bad] == [f"gpu: {failed}"]
    assert words in bad[0].found
    assert bad[0].remedy


def test_a_drill_with_too_few_cores_or_no_second_start(tmp_path: Path) -> None:
    """Fewer cores than asked for, a job that was not requeued, and one that never started each fail."""
    one = drill(tmp_path)
    one.notes = [note for note in one.notes if note.attempt.endswith("r0")]
    one.notes[0].cores = 1
    assert {found.name for found in findings(one) if found.result == "fail"} == {"gpu: cores", "gpu: requeue"}
    one.notes, one.state = [], "PENDING Priority"
    (found,) = findings(one)
    assert found.result == "fail"
    assert "did not start within 5 minutes (PENDING Priority)" in found.found
    one.state = "FAILED"
    (found,) = findings(one)
    assert "it does not exist, so no node saw `logs`" in found.remedy


def preflight(folder: Path, base: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run jobs/preflight.py for the demonstration on this machine."""
    settings = folder / "cluster.yaml"
    if not settings.exists():
        settings.write_text(f"scheduler: local\nruns: {folder}/runs\nlogs: {folder}/logs\n")
    command = ["env", f"DEMO_BASE={base}", sys.executable, "jobs/preflight.py", "--cluster", str(settings), *flags]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)


def test_local_preflight(tmp_path: Path, demo_base: Path) -> None:
    """Where there is no Slurm, configuration, folders, plan and disk are checked, and nothing of a run is left."""
    done = preflight(tmp_path, demo_base)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing failed." in done.stdout
    assert f"{len(DEMO_STAGES)} stages" in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "cluster.yaml"]


def test_preflight_names_the_first_obstacle(tmp_path: Path, demo_base: Path) -> None:
    """A run folder that cannot be written fails with the reason and a remedy, exit code 1 and no traceback."""
    (tmp_path / "runs").write_text("a file")
    done = preflight(tmp_path, demo_base)
    assert done.returncode == 1
    assert "cannot be written" in done.stdout
    assert "--run-dir" in done.stdout
    assert "Traceback" not in done.stderr


def test_preflight_asks_the_engine(tmp_path: Path, demo_base: Path) -> None:
    """What the engine would refuse when training begins fails here, in the engine's words."""
    wrong = (PROJECT / "recipes" / "demo.yaml").read_text().replace("micro_batch_size: 4", "micro_batch_size: 3")
    assert "micro_batch_size: 3" in wrong
    (tmp_path / "recipe.yaml").write_text(wrong)
    done = preflight(tmp_path, demo_base, "--recipe", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 1
    assert "the engine would refuse this run" in done.stdout
    assert "--micro_batch_size 3" in done.stdout


def test_disk_space(tmp_path: Path, demo_base: Path) -> None:
    """A run that would not fit on the disk fails, with what it needs."""
    base = tmp_path / "base"
    shutil.copytree(demo_base, base)
    with (base / "huge.safetensors").open("wb") as file:
        file.truncate(1 << 42)  # sparse: four terabytes of parameters
    done = preflight(tmp_path, base)
    assert done.returncode == 1
    assert "fail: disk space" in done.stdout
    assert "training.save_interval" in done.stdout
