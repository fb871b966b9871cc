"""The record of samples is of what was loaded, and of no attempt that was given up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_llm.metrics.sample_log import Numbered, SampleLog
from megatron_llm.parallel.world import World


class Squares:
    """Sample k is k * k and k * k + 1."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, k: int) -> NDArray[np.int64]:
        return np.array([k * k, k * k + 1], np.int64)


def logged(folder: Path, world: World, first: int, *iterations: list[list[int]]) -> list[dict[str, object]]:
    """Log iterations of micro-batches of sample numbers, from `first` on: all lines then."""
    samples, log = Numbered(Squares()), SampleLog(folder, world, first)
    batches = [torch.from_numpy(np.stack([samples[k] for k in micro])) for part in iterations for micro in part]
    watched = log.watched(iter(batches))
    for number, part in enumerate(iterations, first + 1):
        for micro in part:
            assert torch.equal(next(watched), torch.tensor([[k * k, k * k + 1] for k in micro]))
        log.write(number, number)
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_digest_is_of_the_set_of_samples(tmp_path: Path, world: World) -> None:
    """It does not depend on order or micro-batches, but on every number and token; batches come out unchanged."""
    lines = logged(tmp_path, world, 0, [[4, 5], [6, 7]], [[7, 6, 5, 4]], [[4, 5], [6, 8]])
    assert [(line["first"], line["last"], line["samples"]) for line in lines] == [(4, 7, 4), (4, 7, 4), (4, 8, 4)]
    assert lines[0]["digest"] == lines[1]["digest"] != lines[2]["digest"]


def test_a_repeated_sample_shows(tmp_path: Path, world: World) -> None:
    """Samples that are there twice, in place of two others of the range, change the digest."""
    lines = logged(tmp_path, world, 0, [[4, 5, 6, 7]], [[4, 4, 7, 7]])
    assert lines[0]["digest"] != lines[1]["digest"]


def test_what_is_done_again_is_logged_once(tmp_path: Path, world: World) -> None:
    """An attempt that goes on from iteration 1 replaces what one before it logged after that."""
    logged(tmp_path, world, 0, [[0, 1]], [[2, 3]], [[4, 5]])
    lines = logged(tmp_path, world, 1, [[2, 3]])
    assert [(line["iteration"], line["first"]) for line in lines] == [(1, 0), (2, 2)]
