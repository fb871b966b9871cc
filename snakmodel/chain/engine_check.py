"""Asks the engine, before anything runs, whether it would refuse the run's commands, and how large the training is.

The engine checks its own flags and files: `Megatron-LLM/tools/check_run.py` receives the command lines of the stages
that are still to be done. Therefore no rule of the engine has to be written down a second time here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from run_contract.errors import UserError
from snakmodel.chain.stage import Chain
from snakmodel.config.cluster import Resources
from snakmodel.config.load import Config
from snakmodel.config.sections import PROJECT

_COMMAND = "Megatron-LLM/tools/check_run.py"
_DEVICE = re.compile(r"gpu:([A-Za-z]\w*)")
DEFAULT_DEVICE = "a100"
"""The GPU for which GPU-hours are computed if cluster.yaml does not name one."""


@dataclass(frozen=True)
class Facts:
    """What the engine reports about the model and its training."""

    parameters: int
    training_flops: float
    """Model FLOPs of the whole training; 0 if training is not among the checked stages."""
    peak_tflops: float | None
    """The GPU's peak in half precision, in TFLOP/s; None if the GPU's name is not known."""


def device_of(resources: Resources) -> str:
    """The name of the GPU in a stage's `gres`, such as a100 in gpu:a100:4."""
    found = _DEVICE.match(resources.gres or "")
    return found[1] if found else DEFAULT_DEVICE


def ask_engine(chain: Chain, config: Config, stages: Sequence[str]) -> Facts | None:
    """Let the engine check the commands of these stages; returns None if none of them is a command of the engine.

    Only the first task of each stage is checked. Raises UserError with every problem that the engine finds.
    """
    commands = {}
    for name in stages:
        task = chain[name].tasks[0]
        if len(task.argv) > 1 and task.argv[1].startswith("Megatron-LLM/"):
            commands[name] = [*task.argv[1:], *task.unkeyed]
    if not commands:
        return None
    resources = config.cluster.resources("train")
    looks_at_base = any(stage.name == "convert" for stage in chain.stages)
    request = {
        "commands": commands,
        "base": str(config.recipe.model.base) if looks_at_base else None,
        "ranks": resources.ranks,
        "device": device_of(resources),
    }
    found = _answer(json.dumps(request))
    if found["problems"]:
        raise UserError("the engine would refuse this run:\n  " + "\n  ".join(found["problems"]))
    return Facts(**found["facts"]) if found["facts"] else None


def _answer(request: str) -> dict[str, Any]:
    """The engine's answer to a request in JSON. Raises UserError if its command gives no answer."""
    command = [sys.executable, str(PROJECT / _COMMAND)]
    answer = subprocess.run(command, input=request, check=False, capture_output=True, text=True)
    try:
        found: dict[str, Any] = json.loads(answer.stdout)
    except ValueError as error:
        raise UserError(
            f"{_COMMAND} ended with exit code {answer.returncode} and no answer: {answer.stderr.strip()[-500:]}. "
            "Type `make setup` to repair the environment."
        ) from error
    return found
