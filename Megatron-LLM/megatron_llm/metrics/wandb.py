"""A run's numbers at Weights & Biases (--wandb_logger). Rank 0 only; the package is imported only when asked for.

The run's id lies in the --save folder, so that a run that is continued goes on there too: what is trained again after a
crash is logged again, at the same iterations. The key comes from WANDB_API_KEY or `wandb login`. Trouble with W&B after
the start is said and never stops the training.
"""

from __future__ import annotations

import importlib
import secrets
import sys
from pathlib import Path
from threading import Thread
from typing import Any

from megatron_llm.flags.arguments import Arguments
from run_contract.errors import UserError
from run_contract.publish import write_text

ID_FILE = "wandb_run_id.txt"
FINISH_SECONDS = 60
"""How long the end of a run waits for the last numbers to arrive."""


class WandbRun:
    """A run that has begun, or goes on."""

    def __init__(self, args: Arguments) -> None:
        """Raises UserError when the package is missing or W&B refuses."""
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(
                f"--wandb_logger needs the package wandb, which {sys.executable} cannot import ({error}): install it "
                "there (pip install wandb), or leave the flag out"
            ) from error
        name = args.wandb_id or _stored_id(args.save) or secrets.token_hex(8)
        try:
            self.run: Any = wandb.init(
                project=args.wandb_project,
                entity=args.wandb_entity,
                id=name,
                **({"name": args.wandb_name} if args.wandb_name else {}),
                resume="allow",
                dir=str(args.save),
                config=args.as_json(),
                allow_val_change=True,
                settings=wandb.Settings(console="off"),
            )
            self.run.define_metric("*", step_metric="iteration")
        except Exception as error:
            raise UserError(
                f"--wandb_logger: W&B refuses: {error}; set WANDB_API_KEY or run `wandb login` and check "
                "--wandb_project and --wandb_entity, or set WANDB_MODE=offline"
            ) from error
        write_text(args.save / ID_FILE, f"{name}\n")

    def log(self, record: dict[str, float]) -> None:
        """Send the numbers of an iteration."""
        try:
            if self.run:
                self.run.log(record)
        except Exception as error:  # as when its helper process was killed
            print(f"W&B takes no more numbers of this run, training goes on: {error}", flush=True)
            self.run = None

    def close(self, *, failed: bool) -> None:
        """Wait for a while until everything is sent."""
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
