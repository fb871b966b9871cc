"""The training loop: start -> (stop or save requested? | evaluate | step) … -> last iteration.

A step is one update from one global batch. Requests, evaluations and checkpoints are handled between steps, on all
ranks together. The result of a run does not depend on how often it was interrupted.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from megatron_llm.checkpoint.saver import IDLE, Saver
from megatron_llm.flags.arguments import Arguments
from megatron_llm.flags.batch_sizes import BatchSizes
from megatron_llm.metrics.log import Interval, Metrics
from megatron_llm.metrics.meter import Waited, Work, peak_memory
from megatron_llm.metrics.sample_log import SampleLog
from megatron_llm.model.config import ModelConfig
from megatron_llm.optim.adamw import (
    Schedule,
    clip_gradients,
    gradient_norm,
    update,
    weight_norm,
)
from megatron_llm.optim.update_guards import Diverged, JudgedIteration, objection
from megatron_llm.parallel.world import World
from megatron_llm.process.errors import check_outputs
from megatron_llm.process.heartbeat import Heartbeat
from megatron_llm.process.signals import StopRequest
from megatron_llm.training.batches import DataIdentity
from megatron_llm.training.evaluation import Evaluation
from megatron_llm.training.progress import Progress
from megatron_llm.training.steps import Steps, agreed_mean
from run_contract.errors import EXIT_AGAIN, EXIT_STOPPED, UserError
from run_contract.publish import remove

GO_ON, SAVE, OUTPUT_LOST, SIGNALLED, STOP = range(5)
"""What the loop is asked to do, in ascending priority; ranks agree on the largest value."""
SAVE_FILE, STOP_FILE = "save", "stop"
"""Files that a user can create in --save to make a request: save and go on; save and exit with 76."""


@dataclass
class Trainer:
    """One rank's part of a training run."""

    args: Arguments
    world: World
    heartbeat: Heartbeat
    stop: StopRequest
    identity: DataIdentity
    sizes: BatchSizes
    config: ModelConfig
    parameters: dict[str, nn.Parameter]
    """This rank's slices of the parameters, by their names in the whole model."""
    steps: Steps
    optimizer: torch.optim.AdamW
    schedule: Schedule
    progress: Progress
    train_batches: Waited
    work: Work
    evaluation: Evaluation | None
    """The evaluation; None with --eval_iters 0."""
    metrics: Metrics | None
    """The metrics writer; None on all ranks but rank 0."""
    saver: Saver
    saved_iteration: int
    """Iteration of the newest checkpoint in --save, published or begun; -1 when there is none."""
    sample_log: SampleLog | None
    """The sample log; None without --log_samples."""
    seconds: float = 0.0
    """Time spent in steps since the last log line."""
    steps_timed: int = 0
    samples_timed: int = 0
    save_seconds: float = 0.0
    """Time for which training stood still because of checkpoints, since the last log line."""
    began: float = field(default_factory=time.monotonic)

    def run(self) -> int:
        """Train to the last iteration or until asked to stop, and return the exit code.

        A checkpoint that was begun is published before this returns, and also before Diverged or UserError is raised.
        """
        try:
            return self.loop()
        except (Diverged, UserError):
            self.saver.finish()
            raise

    def loop(self) -> int:
        """The loop itself; see `run`."""
        first = self.progress.iteration
        while not self.finished():
            self.heartbeat.beat("step", self.progress.iteration + 1)
            request = self.request()
            if request == SAVE:
                self.save_if_new()
                self.world.on_rank0(lambda: remove(self.args.checkpoint.save / SAVE_FILE))
            elif request != GO_ON:
                return self.leave(request)
            if self.progress.evaluation_due:
                self.evaluate()
            elif self.progress.iteration + 1 in (self.args.training.skip_iters or ()):
                self.skip()
            else:
                self.step()
            if not self.progress.evaluation_due and self.progress.iteration > first:
                if self.divides(self.args.checkpoint.save_interval):
                    self.save_if_new()
                if (self.divides(self.args.training.exit_interval) or self.out_of_time()) and not self.finished():
                    return self.leave(SIGNALLED)
        self.save_if_new()
        self.finish_saving()
        return 0

    def finished(self) -> bool:
        """Whether the last iteration and its evaluation are done."""
        return self.progress.iteration >= self.args.training.train_iters and not self.progress.evaluation_due

    def divides(self, interval: int | None) -> bool:
        """Whether something that is to be done every `interval` iterations is due now."""
        return interval is not None and self.progress.iteration % interval == 0

    def out_of_time(self) -> bool:
        """Whether --exit_duration_in_mins has passed, by the clock of rank 0. Collective."""
        minutes = self.args.training.exit_duration_in_mins
        return minutes is not None and self.world.on_rank0(lambda: time.monotonic() - self.began > 60 * minutes)

    def request(self) -> int:
        """The request that all ranks agree on: a signal or a failing output on any rank, or a file that rank 0 sees.

        Also publishes a checkpoint that all ranks have finished writing, and raises if a write failed. Collective.
        """
        code = SIGNALLED if self.stop.signalled else OUTPUT_LOST if self.stop.lost else GO_ON
        if self.world.rank == 0:
            code = max(code, SAVE if (self.args.checkpoint.save / SAVE_FILE).exists() else GO_ON)
            code = max(code, STOP if (self.args.checkpoint.save / STOP_FILE).exists() else GO_ON)
        agreed, saving = self.world.max_over_ranks(code, self.saver.status())
        if saving != IDLE:
            self.stand_still(lambda: self.saver.advance(saving))
        return agreed

    def leave(self, request: int) -> int:
        """Save the state if it is not saved yet, and return the exit code.

        If the reason to stop is an output that failed, raises on all ranks what `check_outputs` raises.
        """
        self.save_if_new()
        self.finish_saving()
        if request == OUTPUT_LOST:
            self.world.on_every_rank(lambda: check_outputs(self.stop.lost))
        if request == STOP:
            self.world.on_rank0(lambda: remove(self.args.checkpoint.save / STOP_FILE))
        self.world.say(f"stopped after iteration {self.progress.iteration} of {self.args.training.train_iters}")
        return EXIT_STOPPED if request == STOP else EXIT_AGAIN

    def batch_size(self) -> int:
        """Number of samples in the global batch of the next update."""
        return self.sizes.at(self.progress.consumed_train_samples)

    def micro_batches(self, batch_size: int) -> int:
        """Number of micro-batches that each rank computes for a global batch of this size."""
        return batch_size // (self.args.training.micro_batch_size * self.world.data_size)

    def step(self) -> None:
        """Make one update from one global batch, unless a guard objects.

        Raises Diverged, before the update, if the run must stop.
        """
        began, scale = time.perf_counter(), self.progress.memory.loss_scale
        self.steps.loss_scale, self.steps.micro_batches = self.loss_scale(), self.micro_batches(self.batch_size())
        mean = agreed_mean(self.world, self.steps, self.steps.train(self.train_batches))
        if scale:
            scale.divide(self.parameters.values())
        first = self.world.mesh.get_local_rank("tp") == 0
        norm = gradient_norm(self.parameters.values(), self.world.total, count_copies=first)
        if reason := objection(
            self.args.training, self.args.precision, self.progress.memory, mean, float(norm), self.place()
        ):
            self.optimizer.zero_grad(set_to_none=True)
            self.pass_over(reason, began)
            return
        clip_gradients(self.parameters.values(), norm, self.args.optimizer.clip_grad)
        update(self.optimizer, self.learning_rate(), self.schedule.weight_decay(self.scheduled_samples()))
        self.seconds += time.perf_counter() - began
        self.progress.optimizer_steps += 1
        self.progress.losses_since_log.append(mean)
        self.advance()

    def skip(self) -> None:
        """Consume the samples of an iteration without making an update."""
        began = time.perf_counter()
        for _ in range(self.micro_batches(self.batch_size())):
            next(self.train_batches)
        self.pass_over("--skip_iters", began)

    def pass_over(self, reason: str, began: float) -> None:
        """Count an iteration that made no update; the learning-rate schedule does not count it."""
        self.world.say(f"iteration {self.place().iteration} is skipped ({reason}): {self.place()} are not trained on")
        self.progress.skipped_train_samples += self.batch_size()
        self.progress.memory.skips_since_log += 1
        self.seconds += time.perf_counter() - began
        self.advance()

    def loss_scale(self) -> float:
        """Loss scale of the next update: 1 unless fp16 needs a different one."""
        scale = self.progress.memory.loss_scale
        return scale.factor if scale else 1.0

    def place(self) -> JudgedIteration:
        """The iteration being computed, and its samples."""
        first = self.progress.consumed_train_samples
        return JudgedIteration(self.progress.iteration + 1, range(first, first + self.batch_size()))

    def scheduled_samples(self) -> int:
        """Number of samples that the schedule has counted: those consumed, without those skipped."""
        return self.progress.consumed_train_samples - self.progress.skipped_train_samples

    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return self.schedule.at(self.scheduled_samples())

    def advance(self) -> None:
        """Count a finished iteration, and write the log lines when the log interval is full."""
        progress, size = self.progress, self.batch_size()
        progress.iteration += 1
        progress.consumed_train_samples += size
        self.steps_timed, self.samples_timed = self.steps_timed + 1, self.samples_timed + size
        if self.sample_log:
            self.sample_log.write(progress.iteration, progress.optimizer_steps)
        last = progress.iteration == self.args.training.train_iters
        progress.evaluation_due = self.evaluation is not None and (
            last or self.divides(self.args.evaluation.eval_interval)
        )
        if self.divides(self.args.logging.log_interval):
            if progress.losses_since_log:
                self.log()
            progress.losses_since_log, self.seconds, self.steps_timed, self.samples_timed = [], 0.0, 0, 0
            self.train_batches.seconds = 0.0

    def log(self) -> None:
        """Print and record the log lines of an interval in which there was at least one update. Collective."""
        progress, seconds = self.progress, self.seconds / self.steps_timed
        wait = self.train_batches.seconds / self.seconds
        wait, memory, reserved = self.world.largest([wait, *peak_memory(self.world.device)])
        tflops, utilisation = self.work.rate(self.seconds, self.samples_timed / self.sizes.full)
        interval = Interval(
            iteration=progress.iteration,
            consumed_samples=progress.consumed_train_samples,
            seconds_per_iteration=seconds,
            tokens_per_second=self.samples_timed * self.args.model.seq_length / self.seconds,
            learning_rate=self.learning_rate(),
            lm_loss=sum(progress.losses_since_log) / len(progress.losses_since_log),
            grad_norm=progress.memory.norm,
            loss_scale=self.loss_scale(),
            skipped=progress.memory.skips_since_log,
            tflops=tflops,
            utilisation=utilisation,
            data_wait=wait,
            checkpoint_stall=self.save_seconds,
            memory=int(memory),
            reserved=int(reserved),
            batch_size=self.sizes.last(progress.consumed_train_samples),
            ranks=self.world.size,
            params_norm=self.params_norm() if self.args.logging.log_params_norm else None,
        )
        self.save_seconds, progress.memory.skips_since_log = 0.0, 0
        self.world.say(f"{interval.line(self.args.training.train_iters)}\n{interval.second_line()}")
        self.record(lambda metrics: metrics.log_interval(interval))

    def params_norm(self) -> float:
        """L2 norm of all weights. Collective."""
        first = self.world.mesh.get_local_rank("tp") == 0
        return float(weight_norm(self.parameters.values(), self.world.total, count_copies=first))

    def evaluate(self) -> None:
        """Measure the mean validation loss over --eval_iters global batches, and record it.

        The batches have the size of the last update's batch, as in Megatron. If a stop is requested during it, the
        evaluation is given up and later repeated from its beginning.
        """
        assert self.evaluation
        size = self.sizes.last(self.progress.consumed_train_samples)
        if result := self.evaluation.run(self.progress.consumed_valid_samples, size, self.stops_evaluation):
            self.progress.consumed_valid_samples += self.args.evaluation.eval_iters * size
            self.progress.evaluation_due = False
            self.record(lambda metrics: print(metrics.log_validation(self.progress.iteration, result), flush=True))

    def record(self, write: Callable[[Metrics], None]) -> None:
        """Write to the metrics, on rank 0 only. An OSError counts as a request to stop, as a failing output does."""
        if self.metrics:
            try:
                write(self.metrics)
            except OSError as error:
                self.stop.lose("the files of metrics", error)

    def stops_evaluation(self) -> bool:
        """Whether an evaluation must be given up because of a request. Collective."""
        self.heartbeat.beat("evaluation", self.progress.iteration)
        return self.request() >= OUTPUT_LOST

    def save_if_new(self) -> None:
        """Begin writing a checkpoint of this iteration, unless there is one already."""
        if self.progress.iteration <= max(self.saved_iteration, 0):
            return
        self.heartbeat.beat("checkpoint", self.progress.iteration)
        self.stand_still(lambda: self.saver.begin(self.parameters, self.saved_optimizer(), self.state()))
        self.saved_iteration = self.progress.iteration

    def saved_optimizer(self) -> torch.optim.AdamW | None:
        """The optimizer whose moments go into checkpoints; None with --no_save_optim."""
        return None if self.args.checkpoint.no_save_optim else self.optimizer

    def finish_saving(self) -> None:
        """Wait until the checkpoint that was begun is published."""
        self.heartbeat.beat("checkpoint", self.progress.iteration)
        self.stand_still(self.saver.finish)

    def stand_still(self, act: Callable[[], None]) -> None:
        """Do some work for checkpoints while training waits, and measure the time."""
        began = time.perf_counter()
        act()
        self.save_seconds += time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """The content of state.json besides the model's geometry and the list of files."""
        state = {
            **asdict(self.progress),
            "global_batch_size": self.sizes.full,
            "data": asdict(self.identity),
            "arguments": self.args.as_json(),
        }
        if not self.args.checkpoint.no_save_optim:
            state["schedule"] = asdict(self.schedule)
        if not self.args.checkpoint.no_save_rng:
            state["rng"] = {"torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()}
        return state
