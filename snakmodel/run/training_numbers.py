"""Reads the newest numbers of a run's training from the engine's checkpoints/metrics.jsonl, for status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from snakmodel.run.log_file import tail

_METRICS = "checkpoints/metrics.jsonl"
_LINES = 500
"""The number of lines that are read from the end, because the last evaluation may not be in the last line."""
_SHOWN = {
    "lm_loss": "lm loss {:.4f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "tflops_per_rank": "{:.2f} TFLOP/s per rank",
    "mfu": "MFU {:.1%}",
    "data_wait": "data wait {:.1%}",
    "checkpoint_stall": "checkpoint stall {:.1f} s",
    "memory_gb": "memory {:.2f} GB",
}


def newest(root: Path) -> dict[str, float]:
    """The numbers of the last log line and of the last validation (at `validation_iteration`); empty without any."""
    found: dict[str, float] = {}
    for line in tail(root / _METRICS, _LINES):
        try:
            record = json.loads(line)
        except ValueError:  # cut off at the start of the tail, or still being written
            continue
        if "validation_loss" in record:
            record["validation_iteration"] = record.pop("iteration")
        elif "lm_loss" in record:
            found = {name: value for name, value in found.items() if name.startswith("validation")}
        found |= record
    return found


def planned(root: Path) -> dict[str, Any]:
    """The `training` section of the recipe with which the run was frozen; empty if it cannot be read."""
    try:
        found: dict[str, Any] = yaml.safe_load((root / "run.yaml").read_text(encoding="utf-8"))["recipe"]["training"]
        return dict(found)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return {}


def sentence(numbers: dict[str, float], training: dict[str, Any]) -> str:
    """The numbers in one line, with how much is left of the planned `training`; empty if there are no numbers."""
    shown = [form.format(numbers[name]) for name, form in _SHOWN.items() if name in numbers]
    parts = []
    if "iteration" in numbers:
        last = training.get("train_iters")
        shown = [f"iteration {numbers['iteration']:.0f}" + (f" of {last}" if last else ""), *shown]
        parts = ["training: " + ", ".join([*shown, *_left(numbers, training)])]
    if "validation_loss" in numbers:
        at = f"at iteration {numbers['validation_iteration']:.0f}"
        parts.append(f"validation loss {numbers['validation_loss']:.4f} {at}")
    return "; ".join(parts)


def _left(numbers: dict[str, float], training: dict[str, Any]) -> list[str]:
    """How long the rest will take at the last rate, as a list with one phrase; empty if that is not known."""
    rate = numbers.get("tokens_per_second", 0.0)
    try:
        iterations = training["train_iters"] - numbers["iteration"]
        seconds = iterations * training["global_batch_size"] * training["seq_length"] / rate
    except (KeyError, ZeroDivisionError):
        return []
    return [f"about {duration(seconds)} left"] if iterations > 0 else []


def duration(seconds: float) -> str:
    """A length of time in a form for users: `40 s`, `12 min`, `3 h 5 min` or `2 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes < 48 * 60
        else f"{minutes // 1440} d {minutes % 1440 // 60} h"
    )
