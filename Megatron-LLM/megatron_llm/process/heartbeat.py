"""The heartbeat: a rank's progress in a file that the launcher names. To its watchdog every change is a sign of life.

The training loop itself writes it, between steps, between the batches of an evaluation, and around checkpoints, so that
a hanging loop has no heartbeat. This module imports little, so that it loads fast.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

VARIABLE = "SNAKMODEL_HEARTBEAT"
SECONDS = 5.0
"""Shortest time between two writes within a phase: the folder may be on a shared disk."""


def _named_file() -> Path | None:
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


@dataclass
class Heartbeat:
    """The heartbeat file of this rank: last phase and iteration."""

    path: Path | None = field(default_factory=_named_file)
    phase: str = ""
    iteration: int = 0
    written: float = 0.0

    def beat(self, phase: str, iteration: int) -> None:
        """Write which phase and iteration begin now. A disk that refuses the write is no reason to stop."""
        changed, self.phase, self.iteration = phase != self.phase, phase, iteration
        now = time.monotonic()
        if self.path and (changed or now - self.written >= SECONDS):
            self.written = now
            with suppress(OSError):
                self.path.write_text(json.dumps({"phase": phase, "iteration": iteration}) + "\n")

    def __str__(self) -> str:
        return f"iteration {self.iteration} ({self.phase})"
