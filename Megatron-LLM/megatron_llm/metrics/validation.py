"""What an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What an evaluation found."""

    loss: float
    accuracy: float | None = None
    """Only with --metrics accuracy."""
