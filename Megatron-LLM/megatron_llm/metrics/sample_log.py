"""The log of --log_samples: the samples of each iteration, as they were loaded -> SAVE/samples.jsonl, one line each.

A line has the lowest and the highest sample number, the number of samples, and a digest of their numbers and tokens.
The digest does not depend on which rank loaded which sample, so a run that is spread over different ranks has the same
lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from megatron_llm.data.gpt_dataset import Samples
from megatron_llm.metrics.log import cut_off
from megatron_llm.parallel.world import World

SAMPLES = "samples.jsonl"
MODULUS = 1 << 64


class Numbered:
    """Samples with their own number in front of their tokens."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, k: int) -> NDArray[np.int64]:
        """The number k and the seq_length + 1 tokens of sample k, int64."""
        return np.concatenate([np.array([k], np.int64), self.samples[k]])


class SampleLog:
    """The sample log: records what this rank loads; rank 0 writes the record of all ranks."""

    def __init__(self, save_dir: Path, world: World, iteration: int) -> None:
        """Open the log. Lines past `iteration`, from an attempt that got further, are cut off."""
        self.path, self.world = save_dir / SAMPLES, world
        self.rows: list[NDArray[np.int64]] = []
        if world.rank == 0:
            save_dir.mkdir(parents=True, exist_ok=True)
            cut_off(self.path, iteration, keep_last_validation=True)

    def watched(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield the micro-batches without the sample numbers, which are recorded."""
        for batch in batches:
            self.rows.extend(batch.numpy())
            yield batch[:, 1:]

    def write(self, iteration: int, updates: int) -> None:
        """Record the samples since the last call as those of `iteration`, after `updates` updates. Collective."""
        numbers = [int(row[0]) for row in self.rows]
        digest = sum(xxhash.xxh3_64_intdigest(row.tobytes()) for row in self.rows) % MODULUS
        self.rows = []
        own = torch.tensor([self.world.data_rank, len(numbers), min(numbers), max(numbers), *divmod(digest, 1 << 32)])
        parts = [torch.empty_like(own) for _ in range(self.world.size)]
        dist.all_gather(parts, own)
        loaded: dict[int, list[int]] = {}
        for rank, *found in (part.tolist() for part in parts):
            assert found == loaded.setdefault(rank, found), f"iteration {iteration}: data rank {rank} has two batches"
        counts, firsts, lasts, high, low = zip(*loaded.values(), strict=True)
        record = {
            "iteration": iteration,
            "updates": updates,
            "first": min(firsts),
            "last": max(lasts),
            "samples": sum(counts),
            "digest": f"{((sum(high) << 32) + sum(low)) % MODULUS:016x}",
        }
        if self.world.rank == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
