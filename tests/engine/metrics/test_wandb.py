"""--wandb_logger, against a stand-in for the package that notes its calls in a file; the real one needs an account."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.engine import engine_ranks
from tests.engine.tiny_run import flags, metrics

STAND_IN = '''
"""Not Weights & Biases: a stand-in that notes every call as a line of JSON."""
import json, os

def note(name, *values):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([os.environ["RANK"], name, *values]) + "\\n")

class Settings:
    def __init__(self, **settings):
        self.settings = settings

class Run:
    def define_metric(self, name, step_metric):
        note("define_metric", name, step_metric)
    def log(self, record):
        note("log", record)
        if os.environ.get("BREAK_AT") == str(record["iteration"]):
            raise OSError("the helper is gone")
    def finish(self, exit_code):
        note("finish", exit_code)

def init(settings, config, **named):
    if os.environ.get("REFUSE"):
        raise ValueError("no such project")
    note("init", {**named, "lr": config["lr"]})
    return Run()
'''


def run(folder: Path, data: Path, *more: object, **environment: str) -> tuple[list[int], str, list[Any]]:
    """Two ranks with the stand-in: exit codes, rank 0's output and the calls so far."""
    (folder / "stand_in").mkdir(exist_ok=True)
    (folder / "stand_in" / "wandb.py").write_text(STAND_IN)
    calls = folder / "calls.jsonl"
    named = {"PYTHONPATH": str(folder / "stand_in"), "CALLS": str(calls), **environment}
    argv = flags(data, folder / "save", "--wandb_logger", "--wandb_project", "danish", "--eval_interval", 3, *more)
    codes, text = engine_ranks.run(folder, argv, **named)
    return codes, text, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def test_a_run_that_is_continued_is_one_run(tmp_path: Path, tiny_data: Path) -> None:
    """Only rank 0 logs; what it logs is metrics.jsonl; the second attempt has the first one's id, and both finish."""
    assert run(tmp_path, tiny_data, "--exit_interval", 4)[0] == [75, 75]
    codes, text, calls = run(tmp_path, tiny_data, "--train_iters", 40, "--exit_interval", 8)
    assert codes == [75, 75], text
    assert {rank for rank, *_ in calls} == {"0"}
    first, second = (call[2] for call in calls if call[1] == "init")
    assert first == second
    assert (first["project"], first["entity"], first["resume"], first["lr"]) == ("danish", None, "allow", 1e-3)
    assert first["id"] == (tmp_path / "save" / "wandb_run_id.txt").read_text().strip()
    logged = [call[2] for call in calls if call[1] == "log"]
    assert [record["iteration"] for record in logged] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8]
    lines = (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()
    assert logged == [json.loads(line) for line in lines]
    assert [call[2] for call in calls if call[1] == "finish"] == [0, 0]
    assert ["0", "define_metric", "*", "iteration"] in calls


def test_a_given_id_and_a_run_that_fails(tmp_path: Path, tiny_data: Path) -> None:
    """--wandb_id is used and noted; a run that diverges is finished as failed."""
    named = ("--wandb_id", "mine", "--wandb_name", "second try")
    codes, text, calls = run(tmp_path, tiny_data, *named, "--lr", "1e30", "--lr_warmup_iters", 0)
    assert codes == [1, 1], text
    assert calls[0][2]["id"] == (tmp_path / "save" / "wandb_run_id.txt").read_text().strip() == "mine"
    assert calls[0][2]["name"] == "second try"
    assert calls[-1] == ["0", "finish", 1]


def test_trouble_on_the_way_does_not_stop_training(tmp_path: Path, tiny_data: Path) -> None:
    """A call that raises is said once, and the run goes on without W&B."""
    codes, text, calls = run(tmp_path, tiny_data, "--exit_interval", 5, BREAK_AT="2")
    assert codes == [75, 75], text
    assert text.count("W&B takes no more numbers of this run, but the training goes on: the helper is gone") == 1
    assert [call[2]["iteration"] for call in calls if call[1] == "log"] == [1, 2]
    assert len([record for record in metrics(tmp_path / "save") if "lm_loss" in record]) == 5


def test_a_missing_package_and_a_refusal(tmp_path: Path, tiny_data: Path) -> None:
    """Before anything is loaded all ranks end with code 2 and one line that says what to do; nothing is noted."""
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "wandb.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\")\n")
    codes, text, _ = run(tmp_path, tiny_data, PYTHONPATH=str(missing))
    assert codes == [2, 2]
    assert "error: --wandb_logger needs the package wandb, which " in text
    assert "cannot import (No module named 'wandb'): install it there (pip install wandb), or leave the flag" in text
    codes, text, calls = run(tmp_path, tiny_data, REFUSE="1")
    assert codes == [2, 2]
    assert "error: --wandb_logger: W&B refuses the run: no such project; set WANDB_API_KEY" in text
    assert not calls
    assert not (tmp_path / "save" / "wandb_run_id.txt").exists()


def test_without_the_flag_the_package_is_not_imported(tmp_path: Path, tiny_data: Path) -> None:
    """A package that cannot be imported disturbs nobody who has not asked for it."""
    (tmp_path / "wandb.py").write_text("raise SystemExit('imported')\n")
    argv = flags(tiny_data, tmp_path / "save", "--exit_interval", 1)
    assert engine_ranks.run(tmp_path, argv, size=1, PYTHONPATH=os.fspath(tmp_path))[0] == [75]
