"""Where a rank is, in a file that the launcher names: its watchdog takes a new one for a sign of life.

Written by the training loop itself, between steps, batches of an evaluation and checkpoints, so that a loop that hangs
has no heartbeat. Light on imports.
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
"""Within a phase the file is not written more often: the folder may be on a shared disk."""


def _named_file() -> Path | None:
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


@dataclass
class Heartbeat:
    """This rank's."""

    path: Path | None = field(default_factory=_named_file)
    phase: str = ""
    iteration: int = 0
    written: float = 0.0

    def beat(self, phase: str, iteration: int) -> None:
        """Say what begins now. A disk that cannot take it is no reason to stop."""
        changed, self.phase, self.iteration = phase != self.phase, phase, iteration
        now = time.monotonic()
        if self.path and (changed or now - self.written >= SECONDS):
            self.written = now
            with suppress(OSError):
                self.path.write_text(json.dumps({"phase": phase, "iteration": iteration}) + "\n")

    def __str__(self) -> str:
        return f"iteration {self.iteration} ({self.phase})"
