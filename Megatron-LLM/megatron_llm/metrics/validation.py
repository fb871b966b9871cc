"""The result of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """The values that an evaluation measures: mean loss and accuracy."""

    loss: float
    accuracy: float | None = None
    """Share of correctly predicted tokens; only with --metrics accuracy."""
