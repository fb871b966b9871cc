"""The size of each update with --rampup_batch_size, against Megatron's own counting written out."""

from __future__ import annotations

import pytest

from megatron_llm.flags.batch_sizes import BatchSizes
from megatron_llm.flags.parser import parse
from megatron_llm.parallel.layout_checks import batch_layout
from run_contract.errors import UserError

REQUIRED = "--data_path d --save s --seq_length 32 --micro_batch_size 2 --lr 1e-3 --global_batch_size 16"
FLAGS = REQUIRED.split()


def original(full: int, start: int, increment: int, ramp: int, train_samples: int) -> list[int]:
    """The batch sizes of a run as megatron/microbatches.py and training.update_train_iters count them."""
    per_increment = ramp / ((full - start) // increment)

    def current(consumed: int) -> int:
        return full if consumed > ramp else start + int(consumed / per_increment) * increment

    iterations = consumed = 0
    while consumed <= ramp:
        consumed += current(consumed)
        iterations += 1
    iterations += (train_samples - consumed) // full
    sizes: list[int] = []
    for _ in range(iterations):
        sizes.append(current(sum(sizes)))
    return sizes


@pytest.mark.parametrize(
    ("full", "ramp"), [(16, (2, 2, 40)), (16, (4, 4, 100)), (512, (32, 32, 10_000)), (64, (8, 56, 1)), (30, (3, 3, 97))]
)
def test_sizes_are_megatrons(full: int, ramp: tuple[int, int, int]) -> None:
    """Each update's size, their number, and what is consumed after any of them; from the consumed samples alone."""
    sizes, expected = BatchSizes.of(full, ramp), original(full, *ramp, 20_000)
    assert sizes.iterations(20_000) == len(expected)
    consumed = 0
    for number, size in enumerate(expected):
        assert sizes.at(consumed) == size
        consumed += size
        assert sizes.last(consumed) == size
        assert sizes.consumed(0, number + 1) == consumed
    assert sizes.consumed(sum(expected[:3]), 5) == sum(expected[:8])
    assert set(expected) <= set(sizes.all())


def test_without_a_ramp_all_are_alike() -> None:
    """The plain case is the global batch size."""
    sizes = BatchSizes.of(16, None)
    assert (sizes.at(0), sizes.last(16), sizes.all(), sizes.iterations(83), sizes.consumed(16, 3)) == (
        16,
        16,
        [16],
        5,
        64,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train_iters 9 --rampup_batch_size 2 2 40", "give --train_samples instead"),
        ("--train_samples 99 --rampup_batch_size 2 40", "give three numbers above 0"),
        ("--train_samples 99 --rampup_batch_size 2 4 40", "must be 2 plus a whole number of increments of 4"),
        ("--train_samples 99 --rampup_batch_size 16 2 40", "must be 16 plus"),
        ("--train_samples 40 --rampup_batch_size 2 2 40", "the growth of the batch size alone takes"),
        ("--train_samples 99 --rampup_batch_size 2 2 40 --lr_warmup_iters 2", "give --lr_warmup_samples"),
        ("--train_samples 99 --rampup_batch_size 3 1 40", "a batch size of 3 is not a multiple of 2"),
        (
            "--train_samples 99 --rampup_batch_size 2 2 40 --pipeline_model_parallel_size 2",
            "a batch size of 2 gives each rank 1 micro-batches",
        ),
    ],
)
def test_wrong_ramps_are_refused(flags: str, message: str) -> None:
    """Every size of the ramp must be computable by the ranks, before the run begins."""
    with pytest.raises(UserError, match=message):
        args = parse([*FLAGS, *flags.split()])
        batch_layout(args.parallel, args.training, 2 if "pipeline" in flags else 1)
