"""The numbers of a run: data wait, TFLOP/s, MFU, memory and the stall of checkpoints, wherever they are reported."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_llm.metrics.meter import Waited, Work, peak_memory
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.flops import training_flops
from tests.engine import engine_ranks
from tests.engine.tiny_run import MEASURED, flags

SECOND_LINE = re.compile(
    r" data wait: (\d+\.\d)% of the step \| checkpoint stall: \d+\.\d s \| memory: \d+\.\d\d GB \| "
    r"\d+\.\d\d TFLOP/s per rank( \| MFU: \d+\.\d%)? \|"
)


def test_waiting_for_batches_is_timed() -> None:
    """A slow source's seconds are counted, those between two batches are not; its end passes through."""

    def slow() -> object:
        time.sleep(0.05)
        yield torch.zeros(1)

    batches = Waited(slow())  # type: ignore[arg-type]
    next(batches)
    before = batches.seconds
    time.sleep(0.01)
    assert before == batches.seconds >= 0.05
    with pytest.raises(StopIteration):
        next(batches)


def test_work_is_shared_by_the_ranks(tiny_config: ModelConfig) -> None:
    """Each rank's TFLOP/s is its part of the model FLOPs by the time; without a peak there is no MFU."""
    flops = training_flops(tiny_config, 32, 8)
    assert Work.of(None, torch.float32, flops, 4).rate(2.0) == (pytest.approx(flops / 8e12), None)
    given = Work.of(1e-6, torch.float32, flops, 1)
    assert given.rate(2.0) == (pytest.approx(flops / 2e12), pytest.approx(flops / 2e6))


def test_memory_is_at_least_what_is_held() -> None:
    """The process's peak covers a tensor that it has written to."""
    held = torch.ones(50_000_000)
    assert min(peak_memory(held.device)) > 200_000_000


def test_a_run_reports_its_numbers(tmp_path: Path, tiny_data: Path, tiny_config: ModelConfig) -> None:
    """A second line under each of Megatron's, the same numbers in metrics.jsonl and TensorBoard; MFU from the peak."""
    more = ("--peak_tflops", "0.5", "--save_interval", 2, "--log_interval", 2, "--tensorboard_dir", tmp_path / "board")
    codes, text = engine_ranks.run(tmp_path, flags(tiny_data, tmp_path / "save", *more, "--exit_interval", 4))
    assert codes == [75, 75], text
    lines = text.splitlines()
    first = [number for number, line in enumerate(lines) if line.startswith(" iteration ")]
    assert all(SECOND_LINE.fullmatch(lines[number + 1]) for number in first), text
    one, two = (json.loads(line) for line in (tmp_path / "save" / "metrics.jsonl").read_text().splitlines())
    assert one.keys() >= MEASURED
    assert one["checkpoint_stall"] == 0.0 < two["checkpoint_stall"]
    assert 0 < one["data_wait"] < 1
    flops_per_token = training_flops(tiny_config, 32, 8) / (8 * 32)
    for record in (one, two):
        assert record["tflops_per_rank"] == pytest.approx(
            record["tokens_per_second"] * flops_per_token / 2e12, abs=1e-5
        )
        assert record["mfu"] == pytest.approx(record["tflops_per_rank"] / 0.5, abs=2e-5)
        assert 0.05 < record["memory_gb"] <= record["memory_reserved_gb"]
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"lm-loss-training/lm loss", "learning-rate/learning-rate", "grad-norm/grad-norm"} <= tags
    assert tags >= {f"numbers/{name}" for name in MEASURED}
