"""The claim on a task: which attempt may publish its outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path

from run_contract.errors import Superseded

CLAIM_VARIABLE = "SNAKMODEL_CLAIM"
"""Environment variable that names the claim file. The driver sets it; it is not set by hand."""
ATTEMPT_VARIABLE = "SNAKMODEL_ATTEMPT"
"""Environment variable that names this attempt."""


def attempt_name() -> str:
    """The name that temporary files carry: that of the attempt, as the driver sets it, or this process's number."""
    return os.environ.get(ATTEMPT_VARIABLE) or f"pid{os.getpid()}"


def check_claim() -> None:
    """Raise Superseded if the claim file that the environment names belongs to another attempt."""
    claim = os.environ.get(CLAIM_VARIABLE)
    if not claim:
        return
    holder = json.loads(Path(claim).read_text())["attempt"]
    if holder != attempt_name():
        raise Superseded(f"attempt {attempt_name()} was replaced by {holder}; nothing published")
