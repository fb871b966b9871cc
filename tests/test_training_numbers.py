"""status shows what training last reported, from whatever part of metrics.jsonl can be read."""

from __future__ import annotations

import json
from pathlib import Path

from snakmodel.doctor import diagnose
from snakmodel.local import LocalScheduler
from snakmodel.runfiles import RunFiles
from snakmodel.status import as_json, text
from snakmodel.training_numbers import newest, sentence
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
    assert sentence(newest(tmp_path)) == (
        "training: iteration 10, lm loss 2.2500, 12,346 tokens/s, data wait 0.3%, memory 1.20 GB; validation loss "
        "2.7500 at iteration 9"
    )


def test_status_shows_them(tmp_path: Path) -> None:
    """As a line for people and an object for programs; a run that has not trained has neither."""
    root = tmp_path / "run"
    assert LocalScheduler(toy.plan(root, toy.two_stages(root, shards=1))).run() == 0
    assert "training:" not in text(diagnose(RunFiles.read(root)))
    assert as_json(diagnose(RunFiles.read(root)))["training"] is None
    write(root)
    assert "\n\ntraining: iteration 10, lm loss 2.2500, " in text(diagnose(RunFiles.read(root)))
    assert as_json(diagnose(RunFiles.read(root)))["training"]["lm_loss"] == 2.25
