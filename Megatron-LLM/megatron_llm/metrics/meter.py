"""What a rank measures while it trains: how long it waits for data, how much it computes, how much memory it takes."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.flags.arguments import Arguments
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.flops import peak_tflops, training_flops


class Waited(Iterator[Tensor]):
    """An iterator over batches that adds up the seconds in which it was waited for."""

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
    """What each rank computes in an iteration, and at most could."""

    tera_flops: float
    """Model FLOPs / 10^12 of a full global batch, a rank's equal part."""
    peak: float | None
    """TFLOP/s of its device, None when unknown."""

    @classmethod
    def of(cls, args: Arguments, config: ModelConfig, global_batch: int, ranks: int) -> Work:
        """From the run's sizes and this process's device. Only half precision has a known peak."""
        peak = args.peak_tflops
        if peak is None and torch.cuda.is_available() and args.compute_dtype() != torch.float32:
            peak = peak_tflops(torch.cuda.get_device_name())
        return cls(training_flops(config, args.seq_length, global_batch) / ranks / 1e12, peak)

    def rate(self, seconds: float, part: float = 1.0) -> tuple[float, float | None]:
        """(TFLOP/s of a rank, share of the peak or None) when this part of a full global batch takes so long."""
        reached = self.tera_flops * part / seconds
        return reached, reached / self.peak if self.peak else None


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that tensors of this process have taken at most and that were reserved for them; on the CPU twice its peak
    resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident, resident
