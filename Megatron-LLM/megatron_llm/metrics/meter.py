"""Measurements of a rank during training: how long it waits for data, how much it computes and how much memory it
uses."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.model.flops import peak_tflops


class Waited(Iterator[Tensor]):
    """An iterator over batches that adds up the seconds spent waiting for them."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __next__(self) -> Tensor:
        began = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - began


@dataclass(frozen=True)
class Work:
    """The work of each rank per iteration, and the peak rate of its device."""

    tera_flops: float
    """Model FLOPs / 10^12 per full global batch, divided equally among the ranks."""
    peak: float | None
    """Peak TFLOP/s of its device; None when unknown."""

    @classmethod
    def of(cls, peak: float | None, dtype: torch.dtype, flops: float, ranks: int) -> Work:
        """The work of each of `ranks` ranks that share `flops` model FLOPs per full global batch.

        Without --peak_tflops (`peak`) it is that of this process's device, of which only half precision is known.
        """
        if peak is None and torch.cuda.is_available() and dtype != torch.float32:
            peak = peak_tflops(torch.cuda.get_device_name())
        return cls(flops / ranks / 1e12, peak)

    def rate(self, seconds: float, part: float = 1.0) -> tuple[float, float | None]:
        """(TFLOP/s of a rank, share of the peak or None), given the seconds that a part of a full global batch took."""
        reached = self.tera_flops * part / seconds
        return reached, reached / self.peak if self.peak else None


def peak_memory(device: torch.device) -> tuple[int, int]:
    """The largest number of bytes that tensors of this process have used, and that were reserved for them.

    On the CPU both are the peak resident memory of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident, resident
