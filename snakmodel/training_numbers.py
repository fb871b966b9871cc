"""The newest numbers of a run's training, as the engine leaves them in checkpoints/metrics.jsonl: for status."""

from __future__ import annotations

import json
from pathlib import Path

from snakmodel.runfiles import tail

_METRICS = "checkpoints/metrics.jsonl"
_LINES = 500
"""Looked at from the end, where the last evaluation is not the last line."""
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
    """The last log line's numbers and the last validation, at `validation_iteration`; empty without any."""
    found: dict[str, float] = {}
    for line in tail(root / _METRICS, _LINES):
        try:
            record = json.loads(line)
        except ValueError:  # cut off by the limit of what is read, or just being written
            continue
        if "validation_loss" in record:
            record["validation_iteration"] = record.pop("iteration")
        elif "lm_loss" in record:
            found = {name: value for name, value in found.items() if name.startswith("validation")}
        found |= record
    return found


def sentence(numbers: dict[str, float]) -> str:
    """The same in one line; empty without any."""
    shown = [form.format(numbers[name]) for name, form in _SHOWN.items() if name in numbers]
    parts = [f"training: iteration {numbers['iteration']:.0f}, {', '.join(shown)}"] if "iteration" in numbers else []
    if "validation_loss" in numbers:
        at = f"at iteration {numbers['validation_iteration']:.0f}"
        parts.append(f"validation loss {numbers['validation_loss']:.4f} {at}")
    return "; ".join(parts)
