"""status shows what training last reported, from whatever part of metrics.jsonl can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from snakmodel.launch.local_scheduler import LocalScheduler
from snakmodel.monitor.diagnosis import diagnose
from snakmodel.monitor.run_files import RunFiles
from snakmodel.monitor.status import as_json, text
from snakmodel.run.training_numbers import duration, newest, planned, sentence
from tests import toy

RECORDS = (
    {"iteration": 9, "lm_loss": 2.5, "tokens_per_second": 1000.0, "mfu": 0.5},
    {"iteration": 9, "validation_loss": 2.75, "validation_perplexity": 15.6},
    {"iteration": 10, "lm_loss": 2.25, "tokens_per_second": 12345.6, "data_wait": 0.0031, "memory_gb": 1.2},
)


def write(root: Path) -> None:
    """A file of metrics whose last line is being written."""
    (root / "checkpoints").mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (root / "checkpoints" / "metrics.jsonl").write_text(lines + '{"iteration": 11, "lm_')


def test_the_newest_of_each_kind(tmp_path: Path) -> None:
    """The last log line's numbers without those of earlier ones, and the last validation with its own iteration."""
    write(tmp_path)
    assert newest(tmp_path) == {
        **RECORDS[2],
        **{"validation_loss": 2.75, "validation_perplexity": 15.6, "validation_iteration": 9},
    }
    assert sentence(newest(tmp_path), {}) == (
        "training: iteration 10, lm loss 2.2500, 12,346 tokens/s, data wait 0.3%, memory 1.20 GB; validation loss "
        "2.7500 at iteration 9"
    )


def test_how_much_is_left(tmp_path: Path) -> None:
    """With the recipe of run.yaml the line says of how many iterations, and how long the rest will take."""
    write(tmp_path)
    training = {"train_iters": 1000, "global_batch_size": 512, "seq_length": 4096}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"recipe": {"training": training}}))
    assert planned(tmp_path) == training
    line = sentence(newest(tmp_path), training)
    assert line.startswith("training: iteration 10 of 1000, lm loss 2.2500, ")
    assert "memory 1.20 GB, about 46 h 43 min left; validation loss" in line  # 990 x 2,097,152 / 12,345.6 s
    assert "left" not in sentence(newest(tmp_path), training | {"train_iters": 10})
    (tmp_path / "run.yaml").write_text("recipe: [")
    assert planned(tmp_path) == {}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (47.5 * 3600, "47 h 30 min"), (10**6, "11 d 13 h")],
)
def test_lengths_of_time(seconds: float, shown: str) -> None:
    """No unit is smaller than a reader needs."""
    assert duration(seconds) == shown


def test_status_shows_them(tmp_path: Path) -> None:
    """As a line for people and an object for programs; a run that has not trained has neither."""
    root = tmp_path / "run"
    assert LocalScheduler(toy.plan(root, toy.two_stages(root, shards=1))).run() == 0
    assert "training:" not in text(diagnose(RunFiles.read(root)))
    assert as_json(diagnose(RunFiles.read(root)))["training"] is None
    write(root)
    assert "\n\ntraining: iteration 10, lm loss 2.2500, " in text(diagnose(RunFiles.read(root)))
    assert as_json(diagnose(RunFiles.read(root)))["training"]["lm_loss"] == 2.25
