"""Saves checkpoints beside training: copy -> a thread writes and digests -> ranks agree -> rename -> retention.

The threads of the ranks communicate over a gloo group of their own, because their messages would get mixed up with
those of the training loop on its group. Only the rename and the replacement of the tracker file happen between two
steps of training, once all ranks have written.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.checkpoint import retention
from megatron_llm.flags.arguments import CheckpointFlags
from megatron_llm.model.config import ModelConfig
from megatron_llm.parallel.world import GLOO, World
from megatron_llm.process.errors import REPORTED_ERRORS, SaveFailed
from run_contract.claim import attempt_name
from run_contract.errors import NoRoom, UserError, kind_of
from run_contract.publish import free_bytes, remove

IDLE, WRITTEN, BUSY, FAILED = range(4)
"""The states of a rank's saving thread; ranks agree on the largest."""
TIMEOUT = timedelta(hours=6)
"""How long the fastest rank waits at most until the slowest has written."""
Files = dict[str, tuple[int, str]]


class Saver:
    """This rank's part in writing checkpoints, one at a time. All methods except `status` are collective."""

    def __init__(self, flags: CheckpointFlags, world: World, config: ModelConfig) -> None:
        self.flags, self.world, self.config = flags, world, config
        self.needed = checkpoint.needed_bytes(config, world.size, with_optimizer=not flags.no_save_optim)
        self.group = dist.new_group(backend=GLOO, timeout=TIMEOUT)
        self.thread = ThreadPoolExecutor(1, "save", initializer=_use_device, initargs=(world.device,))
        self.job: Future[bool | None] | None = None
        """The thread's current work: writing a checkpoint or, on rank 0 after that, deleting old ones.

        The result of writing says whether a checkpoint of the same name exists and is to stay.
        """
        self.temporary: Path | None = None
        """The temporary folder being written; None once it is published."""
        self.iteration, self.began = 0, 0.0
        self.copies: dict[str, Tensor] = {}
        """Memory for the copies of this rank's tensors, which every save uses again."""

    def begin(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, state: dict[str, Any]
    ) -> None:
        """Wait for the previous save, copy this rank's tensors, and let the thread write them as state["iteration"].

        With --no_async_save, returns only when the checkpoint is published. Raises UserError when there is not enough
        space, and what `finish` raises.
        """
        self.finish()
        self.iteration, self.began = state["iteration"], time.perf_counter()
        self.temporary = self.world.on_rank0(self._prepare)
        tensors = checkpoint.stored(parameters, optimizer)
        copies = None if self.flags.no_async_save else self._copied(tensors)
        self.job = self.thread.submit(self._write, self.temporary, tensors, copies, state)
        if self.flags.no_async_save:
            self.finish()

    def status(self) -> int:
        """The state of this rank's thread."""
        if self.job is None:
            return IDLE
        if not self.job.done():
            return BUSY
        if self.job.exception():
            return FAILED
        return WRITTEN if self.temporary else IDLE

    def advance(self, status: int) -> None:
        """Publish a checkpoint that all ranks have written, or raise what failed; see `finish`.

        To be called between two steps, with the largest status of all ranks.
        """
        if status == WRITTEN:
            self._publish()
        elif status == FAILED:
            self.finish()

    def finish(self) -> None:
        """Wait until nothing is being written and the last save is published.

        An error on any rank is raised on all ranks: UserError (such as a full disk), Superseded or SaveFailed. In that
        case nothing is published, and the temporary folder is removed.
        """
        if self.temporary:
            self._settle()
            self._publish()
        self._settle()

    def _prepare(self) -> Path:
        """Make the empty folder to write into (rank 0), before other ranks write to it."""
        self._check_space()
        final = checkpoint.iteration_folder(self.flags.save, self.iteration)
        temporary = final.with_name(f".{final.name}.tmp-{attempt_name()}")
        try:
            remove(temporary)
            temporary.mkdir(parents=True)
        except OSError as error:
            raise _as_reported(error, final) from error
        return temporary

    def _check_space(self) -> None:
        """Raise NoRoom unless a checkpoint fits on the file system of --save (rank 0).

        If it does not fit, the old checkpoints that retention does not keep are deleted first.
        """
        needed, save = self.needed, self.flags.save
        if free_bytes(save) < needed:
            self._prune()
        if (free := free_bytes(save)) < needed:
            newest = max(save.glob("iter_*"), default=None)
            raise NoRoom(
                f"--save {save}: a checkpoint needs {_amount(needed)} and {_amount(free)} are free; nothing was "
                f"written, {f'{newest.name} stays the last one' if newest else 'there is none yet'}. Free space, keep "
                "fewer (--keep_last), or move the folder"
            )

    def forecast(self) -> str:
        """The text to print about the size of a checkpoint and the free space."""
        free = free_bytes(self.flags.save)
        text = f"a checkpoint takes {_amount(self.needed)}; {self.flags.save} has {_amount(free)} free"
        return text if free >= self.needed else f"warning: {text}: the next one will not fit"

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the current values of this rank's tensors to host memory."""
        cuda = self.world.device.type == "cuda"
        for name, tensor in tensors.items():
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if name not in self.copies:
                self.copies[name] = torch.empty(own.shape, dtype=own.dtype, pin_memory=cuda)
            self.copies[name].copy_(own, non_blocking=cuda)
        if cuda:
            torch.cuda.synchronize()
        return self.copies

    def _write(
        self,
        temporary: Path,
        tensors: Mapping[str, Tensor],
        copies: Mapping[str, Tensor] | None,
        state: dict[str, Any],
    ) -> bool:
        """Write a complete checkpoint except for its final name; runs in the thread.

        Returns whether a valid checkpoint of that name exists already. An error on any rank makes this fail on every
        rank, so that no rank is left waiting for another.
        """
        final = checkpoint.iteration_folder(self.flags.save, self.iteration)
        try:
            checkpoint.write(temporary, tensors, copies, self.group)
            files = self._gathered(temporary)
            if self.world.rank != 0:
                return False
            checkpoint.complete(temporary, {**state, "model_config": asdict(self.config), "files": files})
            return final.is_dir() and checkpoint.problem(final) is None
        except REPORTED_ERRORS:
            raise
        except (Exception, CheckpointException) as error:  # CheckpointException is not an Exception
            raise _as_reported(error, final) from error

    def _gathered(self, temporary: Path) -> Files:
        """Sizes and checksums of the files of all ranks.

        The OSError of the lowest rank that had one is raised on all ranks.
        """
        own: Files | OSError
        try:
            own = checkpoint.digests(temporary, self.world.rank)
        except OSError as error:
            own = error
        shares: list[Files | OSError] = [{}] * self.world.size
        dist.all_gather_object(shares, own, group=self.group)
        files: Files = {}
        for share in shares:
            if isinstance(share, OSError):
                raise share
            files |= share
        return files

    def _settle(self) -> None:
        """Wait for the thread. An error on any rank is raised on all ranks."""
        error = self.job.exception() if self.job else None
        errors: list[BaseException | None] = [None] * self.world.size
        dist.all_gather_object(errors, error)
        if first := next((found for found in errors if found), None):
            self._drop()
            raise first

    def _drop(self) -> None:
        """Discard the save that was begun."""
        if self.temporary and self.world.rank == 0:
            remove(self.temporary)
        self.temporary = self.job = None

    def _publish(self) -> None:
        """Publish the folder that all ranks have written, and let rank 0's thread delete checkpoints that are not
        kept."""
        temporary, keep = self.temporary, bool(self.job and self.job.result())
        assert temporary

        def publish() -> None:
            try:
                checkpoint.publish(temporary, self.iteration, keep=keep)
            except OSError as error:
                raise _as_reported(error, final) from error
            finally:
                remove(temporary)  # exists only if it was not renamed

        final = checkpoint.iteration_folder(self.flags.save, self.iteration)
        self.temporary = self.job = None
        self.world.on_rank0(publish)
        self.world.say(f"saved {final} in {time.perf_counter() - self.began:.1f} s")
        if self.world.rank == 0:
            self.job = self.thread.submit(self._prune)

    def _prune(self) -> None:
        try:
            retention.prune(self.flags.save, self.flags.keep_last, self.flags.keep_every)
        except OSError as error:
            raise SaveFailed(
                f"old checkpoints in {self.flags.save} cannot be deleted: {error}; make the folder writable, or leave "
                "out --keep_last"
            ) from error


def _use_device(device: torch.device) -> None:
    """Select the rank's GPU in a new thread: the selection is per thread, and a new thread would use the first GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _as_reported(error: BaseException, final: Path) -> UserError | SaveFailed:
    """The error, readable for a user, that reports a failed save."""
    where, cause = "", error
    if isinstance(error, CheckpointException):
        rank, (found, _) = min(error.failures.items())
        where, cause = f"rank {rank}: ", found
    if not isinstance(cause, OSError):
        traceback.print_exception(error)
    kind = (kind_of(cause) if isinstance(cause, OSError) else None) or SaveFailed
    return kind(f"{final} could not be saved: {where}{cause}; the checkpoints before it are kept")


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
