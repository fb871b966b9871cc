"""What people and programs see of a run: the log lines, SAVE/metrics.jsonl, TensorBoard and W&B. Rank 0 only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llm.flags.arguments import Arguments
from megatron_llm.metrics.wandb import WandbRun
from run_contract.publish import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from megatron_llm.metrics.validation import Result

METRICS = "metrics.jsonl"
BOARD = {
    "lm_loss": "lm-loss-training/lm loss",
    "learning_rate": "learning-rate/learning-rate",
    "grad_norm": "grad-norm/grad-norm",
    "loss_scale": "loss-scale/loss-scale",
    "params_norm": "params-norm/params-norm",
}
"""Upstream's names in TensorBoard; others are `numbers/NAME`."""
ON_REQUEST: dict[str, dict[str, Callable[[Interval], float]]] = {
    "log_timers_to_tensorboard": {
        "iteration-time/iteration-time": lambda one: one.seconds_per_iteration,
        "batch-generator-time/batch-generator-time": lambda one: one.data_wait * one.seconds_per_iteration,
        "save-checkpoint-time/save-checkpoint-time": lambda one: one.checkpoint_stall,
    },
    "log_batch_size_to_tensorboard": {"batch-size/batch-size": lambda one: one.batch_size},
    "log_memory_to_tensorboard": {
        "mem-allocated-bytes/mem-allocated-bytes": lambda one: one.memory,
        "mem-reserved-bytes/mem-reserved-bytes": lambda one: one.reserved,
    },
    "log_world_size_to_tensorboard": {"world-size/world-size": lambda one: one.ranks},
}
"""Flags that add numbers to TensorBoard, under upstream's names."""
MAX_EXPONENT = 20
"""Perplexities are capped at e^20, as upstream does."""


@dataclass(frozen=True)
class Interval:
    """What one log line reports: the last iteration of an interval and means over it."""

    iteration: int
    consumed_samples: int
    seconds_per_iteration: float
    tokens_per_second: float
    learning_rate: float
    """After this iteration's step, as upstream prints it: the next update uses it."""
    lm_loss: float
    grad_norm: float
    """Of the last update."""
    loss_scale: float
    """Of the next iteration with fp16; else 1."""
    skipped: int
    """Iterations since the last line that made no update."""
    tflops: float
    """TFLOP/s of each rank, of model FLOPs: see flops.py."""
    utilisation: float | None
    """Model FLOPs utilisation (MFU): the part of the device's peak, None when that is unknown."""
    data_wait: float
    """Part of the step's time in which it waited for its batch; of the rank that waited longest."""
    checkpoint_stall: float
    """Seconds for which training stood still for checkpoints since the last line."""
    memory: int
    """Bytes that a rank has taken at most so far: of the GPU, or of the process when there is none."""
    reserved: int
    """Bytes that PyTorch has reserved at most on a GPU; else the same."""

    batch_size: int
    """Samples of the last iteration."""
    ranks: int
    params_norm: float | None = None
    """Of all weights, with --log_params_norm."""

    def line(self, train_iters: int) -> str:
        """The log line that people's scripts parse. A non-finite step stops the run, so there is no nan iteration."""
        weights = "" if self.params_norm is None else f"params norm: {self.params_norm:.3f} | "
        return (
            f" iteration {self.iteration:8d}/{train_iters:8d} | consumed samples: {self.consumed_samples:12d} | "
            f"elapsed time per iteration (ms): {1000 * self.seconds_per_iteration:.1f} | "
            f"rate (tokens/sec): {self.tokens_per_second:.2f} | learning rate: {self.learning_rate:.3E} | "
            f"global batch size: {self.batch_size:5d} | lm loss: {self.lm_loss:.6E} | "
            f"loss scale: {self.loss_scale:.1f} | grad norm: {self.grad_norm:.3f} | {weights}"
            f"number of skipped iterations: {self.skipped:3d} | number of nan iterations: {0:3d} |"
        )

    def second_line(self) -> str:
        """What upstream's line does not hold."""
        used = "" if self.utilisation is None else f" | MFU: {self.utilisation:.1%}"
        return (
            f" data wait: {self.data_wait:.1%} of the step | checkpoint stall: {self.checkpoint_stall:.1f} s | "
            f"memory: {self.memory / 1e9:.2f} GB | {self.tflops:.2f} TFLOP/s per rank{used} |"
        )

    def record(self) -> dict[str, float]:
        """What metrics.jsonl holds of it."""
        record = {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "lm_loss": self.lm_loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "loss_scale": self.loss_scale,
            "skipped_iterations": self.skipped,
        }
        if self.params_norm is not None:
            record["params_norm"] = self.params_norm
        speeds = {
            "tokens_per_second": round(self.tokens_per_second, 2),
            "tflops_per_rank": round(self.tflops, 5),
            "data_wait": round(self.data_wait, 5),
            "checkpoint_stall": round(self.checkpoint_stall, 3),
            "memory_gb": round(self.memory / 1e9, 3),
            "memory_reserved_gb": round(self.reserved / 1e9, 3),
        }
        return record | speeds | ({} if self.utilisation is None else {"mfu": round(self.utilisation, 5)})


class Metrics:
    """Appends to metrics.jsonl, TensorBoard and W&B; what a killed attempt wrote past the resumed iteration is cut off.

    Raises UserError when W&B is asked for and cannot be had.
    """

    def __init__(self, args: Arguments, iteration: int, evaluation_due: bool) -> None:
        args.save.mkdir(parents=True, exist_ok=True)
        self.args, self.path = args, args.save / METRICS
        self.more = {
            name: get for flag, found in ON_REQUEST.items() if getattr(args, flag) for name, get in found.items()
        }
        cut_off(self.path, iteration, keep_last_validation=not evaluation_due)
        self.board: SummaryWriter | None = None
        if args.tensorboard_dir:
            from torch.utils.tensorboard.writer import SummaryWriter  # a second of imports, for those who ask

            self.board = SummaryWriter(str(args.tensorboard_dir), purge_step=iteration + 1)
        self.wandb = WandbRun(args) if args.wandb_logger else None

    def log_interval(self, interval: Interval) -> None:
        """Record a log line's numbers."""
        record = interval.record()
        self._append(record)
        scalars = {BOARD.get(name, f"numbers/{name}"): value for name, value in record.items()}
        self._scalars(scalars | {name: get(interval) for name, get in self.more.items()}, interval.iteration)

    def log_validation(self, iteration: int, result: Result) -> str:
        """Record an evaluation and give the line to print."""
        found = {"validation_loss": result.loss, "validation_perplexity": perplexity(result.loss)}
        scalars = {"lm-loss-validation/lm loss validation": result.loss, "ppl/validation": perplexity(result.loss)}
        if result.accuracy is not None:
            found["validation_accuracy"] = scalars["lm accuracy validation/lm accuracy validation"] = result.accuracy
        self._append({"iteration": iteration, **found})
        self._scalars(scalars, iteration)
        return validation_line(iteration, result, self.args)

    def close(self, *, failed: bool) -> None:
        """Flush what has not been written or sent."""
        try:
            if self.board:
                self.board.close()
        except OSError as error:
            print(f"the last numbers could not be written for TensorBoard: {error}", flush=True)
        if self.wandb:
            self.wandb.close(failed=failed)

    def _append(self, record: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record)

    def _scalars(self, values: dict[str, float], iteration: int) -> None:
        for name, value in values.items():
            if self.board:
                self.board.add_scalar(name, value, iteration)


def perplexity(loss: float) -> float:
    """e to the power of a loss."""
    return math.exp(min(MAX_EXPONENT, loss))


def validation_line(iteration: int, result: Result, args: Arguments) -> str:
    """The line that an evaluation prints, with what --metrics asks for."""
    line = (
        f" validation loss at iteration {iteration} | lm loss value: {result.loss:.6E} | "
        f"lm loss PPL: {perplexity(result.loss):.6E} |"
    )
    if "perplexity" in (args.metrics or ()):
        line += f" ppl value: {perplexity(result.loss):.6E} |"
    return line + ("" if result.accuracy is None else f" lm accuracy value: {result.accuracy:.6E} |")


def cut_off(path: Path, iteration: int, *, keep_last_validation: bool) -> None:
    """Drop lines of metrics.jsonl past an iteration, half lines, and its validation if that is to be repeated."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        write_text(path, "".join(f"{line}\n" for line in lines if _is_kept(line, iteration, keep_last_validation)))


def _is_kept(line: str, iteration: int, keep_last_validation: bool) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    at = int(record["iteration"])
    return at < iteration or (at == iteration and (keep_last_validation or "validation_loss" not in record))
