"""Sends a run's numbers to Weights & Biases (--wandb_logger). Rank 0 only; the package is imported only if needed.

The id of the W&B run is stored in the --save folder, so that a resumed run goes on there too: iterations that are
repeated after a crash are logged again under the same numbers. The key comes from WANDB_API_KEY or `wandb login`.
Problems with W&B after the start are reported and never stop the training.
"""

from __future__ import annotations

import importlib
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from megatron_llm.flags.arguments import LoggingFlags
from run_contract.errors import UserError
from run_contract.publish import write_text

ID_FILE = "wandb_run_id.txt"
FINISH_SECONDS = 60
"""Number of seconds that the end of a run waits for the last numbers to arrive."""


class WandbRun:
    """A run at W&B, new or resumed."""

    def __init__(self, flags: LoggingFlags, save: Path, config: Mapping[str, Any]) -> None:
        """Start or resume the run. `config` is shown at W&B.

        Raises UserError when the package is missing or W&B refuses.
        """
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(
                f"--wandb_logger needs the package wandb, which {sys.executable} cannot import ({error}): install it "
                "there (pip install wandb), or leave the flag out"
            ) from error
        name = flags.wandb_id or _stored_id(save) or secrets.token_hex(8)
        try:
            self.run: Any = wandb.init(
                project=flags.wandb_project,
                entity=flags.wandb_entity,
                id=name,
                **({"name": flags.wandb_name} if flags.wandb_name else {}),
                resume="allow",
                dir=str(save),
                config=dict(config),
                allow_val_change=True,
                settings=wandb.Settings(console="off"),
            )
            self.run.define_metric("*", step_metric="iteration")
        except Exception as error:
            raise UserError(
                f"--wandb_logger: W&B refuses the run: {error}; set WANDB_API_KEY or run `wandb login` and check "
                "--wandb_project and --wandb_entity, or set WANDB_MODE=offline"
            ) from error
        write_text(save / ID_FILE, f"{name}\n")

    def log(self, record: dict[str, float]) -> None:
        """Send the numbers of an iteration."""
        try:
            if self.run:
                self.run.log(record)
        except Exception as error:  # for example when its helper process was killed
            print(f"W&B takes no more numbers of this run, but the training goes on: {error}", flush=True)
            self.run = None

    def close(self, *, failed: bool) -> None:
        """Wait, for a limited time, until everything is sent."""
        thread = Thread(target=self._finish, args=(int(failed),), daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            print(f"W&B has not taken the last numbers within {FINISH_SECONDS} s", flush=True)

    def _finish(self, code: int) -> None:
        try:
            if self.run:
                self.run.finish(exit_code=code)
        except Exception as error:
            print(f"W&B has not taken the last numbers: {error}", flush=True)


def _stored_id(save: Path) -> str | None:
    path = save / ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
