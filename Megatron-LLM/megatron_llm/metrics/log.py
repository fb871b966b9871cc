"""The reports of a run for users and programs: log lines, SAVE/metrics.jsonl, TensorBoard and W&B. Rank 0 only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
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
"""Names in TensorBoard that are upstream's; all other numbers are called `numbers/NAME`."""
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
"""Flags that add numbers to TensorBoard, by upstream's names."""
MAX_EXPONENT = 20
"""Largest exponent of a perplexity, as upstream has it."""


@dataclass(frozen=True)
class Interval:
    """The content of one log line: the last iteration of an interval, and means over the interval."""

    iteration: int
    consumed_samples: int
    seconds_per_iteration: float
    tokens_per_second: float
    learning_rate: float
    """Learning rate after this iteration's step, which the next update uses; upstream prints the same."""
    lm_loss: float
    grad_norm: float
    """Gradient norm of the last update."""
    loss_scale: float
    """Loss scale of the next iteration with fp16; otherwise 1."""
    skipped: int
    """Number of iterations since the last line that made no update."""
    tflops: float
    """TFLOP/s of each rank, counted in model FLOPs: see model/flops.py."""
    utilisation: float | None
    """Model FLOPs utilisation (MFU): share of the device's peak; None if the peak is unknown."""
    data_wait: float
    """Share of the step's time spent waiting for the batch, on the rank that waited longest."""
    checkpoint_stall: float
    """Seconds for which training stood still for checkpoints since the last line."""
    memory: int
    """Largest number of bytes that a rank has used so far: on its GPU, or without one in its process."""
    reserved: int
    """Largest number of bytes that PyTorch has reserved on a GPU; without a GPU the same as `memory`."""

    batch_size: int
    """Number of samples of the last iteration."""
    ranks: int
    params_norm: float | None = None
    """Norm of all weights, with --log_params_norm."""

    def line(self, train_iters: int) -> str:
        """The log line that users' scripts parse. A non-finite step stops the run, so there are no nan iterations."""
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
        """The second log line, with the numbers that upstream's line lacks."""
        used = "" if self.utilisation is None else f" | MFU: {self.utilisation:.1%}"
        return (
            f" data wait: {self.data_wait:.1%} of the step | checkpoint stall: {self.checkpoint_stall:.1f} s | "
            f"memory: {self.memory / 1e9:.2f} GB | {self.tflops:.2f} TFLOP/s per rank{used} |"
        )

    def record(self) -> dict[str, float]:
        """The interval's record in metrics.jsonl."""
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
    """Appends to metrics.jsonl, TensorBoard and W&B.

    Records that a killed attempt wrote past the iteration at which the run is resumed are cut off. Raises UserError
    when W&B is asked for but not available.
    """

    def __init__(self, args: Arguments, iteration: int, evaluation_due: bool) -> None:
        save, logging = args.checkpoint.save, args.logging
        save.mkdir(parents=True, exist_ok=True)
        self.asked, self.path = args.evaluation.metrics or (), save / METRICS
        self.more = {
            name: get for flag, found in ON_REQUEST.items() if getattr(logging, flag) for name, get in found.items()
        }
        cut_off(self.path, iteration, keep_last_validation=not evaluation_due)
        self.board: SummaryWriter | None = None
        if logging.tensorboard_dir:
            from torch.utils.tensorboard.writer import SummaryWriter  # its import takes a second

            self.board = SummaryWriter(str(logging.tensorboard_dir), purge_step=iteration + 1)
        self.wandb = WandbRun(logging, save, args.as_json()) if logging.wandb_logger else None

    def log_interval(self, interval: Interval) -> None:
        """Record the numbers of a log line."""
        record = interval.record()
        self._append(record)
        scalars = {BOARD.get(name, f"numbers/{name}"): value for name, value in record.items()}
        self._scalars(scalars | {name: get(interval) for name, get in self.more.items()}, interval.iteration)

    def log_validation(self, iteration: int, result: Result) -> str:
        """Record an evaluation, and return the line to print."""
        found = {"validation_loss": result.loss, "validation_perplexity": perplexity(result.loss)}
        scalars = {"lm-loss-validation/lm loss validation": result.loss, "ppl/validation": perplexity(result.loss)}
        if result.accuracy is not None:
            found["validation_accuracy"] = scalars["lm accuracy validation/lm accuracy validation"] = result.accuracy
        self._append({"iteration": iteration, **found})
        self._scalars(scalars, iteration)
        return validation_line(iteration, result, self.asked)

    def close(self, *, failed: bool) -> None:
        """Flush all numbers that have not been written or sent yet."""
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
    """The perplexity: e to the power of a loss, with the exponent capped."""
    return math.exp(min(MAX_EXPONENT, loss))


def validation_line(iteration: int, result: Result, asked: Collection[str]) -> str:
    """The line to print for an evaluation, with the values that are `asked` for by --metrics."""
    line = (
        f" validation loss at iteration {iteration} | lm loss value: {result.loss:.6E} | "
        f"lm loss PPL: {perplexity(result.loss):.6E} |"
    )
    if "perplexity" in asked:
        line += f" ppl value: {perplexity(result.loss):.6E} |"
    return line + ("" if result.accuracy is None else f" lm accuracy value: {result.accuracy:.6E} |")


def cut_off(path: Path, iteration: int, *, keep_last_validation: bool) -> None:
    """Drop from metrics.jsonl all lines past an iteration, incomplete lines, and an evaluation that is to be
    repeated."""
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
