"""Learning rate, Adam and clipping follow Megatron's definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megatron_llm.optim.adamw import Schedule, build_optimizer, clip_gradients, gradient_norm, set_steps, update
from run_contract.errors import UserError


@pytest.mark.parametrize(
    ("style", "samples", "expected"),
    [
        ("cosine", 0, 0.0),
        ("cosine", 50, 0.5),
        ("cosine", 100, 1.0),
        ("cosine", 600, 0.55),
        ("cosine", 350, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))),
        ("cosine", 1100, 0.1),
        ("cosine", 5000, 0.1),
        ("linear", 350, 0.775),
        ("linear", 1101, 0.1),
        ("constant", 99, 0.99),
        ("constant", 5000, 1.0),
        ("inverse-square-root", 400, 0.5),
        ("inverse-square-root", 1100, math.sqrt(100 / 1100)),
        ("inverse-square-root", 1101, 0.1),
    ],
)
def test_schedule(style: str, samples: int, expected: float) -> None:
    """Warm-up over 100 samples to 1, decay to 0.1 at sample 1100, in each style."""
    assert Schedule(1.0, 0.1, 100, 1100, style).at(samples) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("style", "samples", "expected"),
    [
        ("linear", 50, 0.5),
        ("linear", 100, 1.0),
        ("linear", 700, 1.0),
        ("linear", 800, 1.0 - 0.9 * 0.25),
        ("cosine", 800, 0.1 + 0.9 * (0.5 + math.sqrt(2) / 4)),
        ("exponential", 900, 0.1 + 0.9 * (math.sqrt(2) - 1)),
        ("minus_sqrt", 800, 0.1 + 0.9 * 0.5),
        ("minus_sqrt", 1100, 0.1),
        ("exponential", 1100, 0.1),
        ("cosine", 1101, 0.1),
    ],
)
def test_warm_up_stable_decay(style: str, samples: int, expected: float) -> None:
    """WSD stays at 1 from sample 100 to 700, then falls to 0.1 at 1100, in each style."""
    schedule = Schedule(1.0, 0.1, 100, 1100, "WSD", style, 400)
    assert schedule.at(samples) == pytest.approx(expected, abs=1e-12)


def test_the_last_decay_fits_into_the_schedule() -> None:
    """One of nothing leaves the top as it is to the end; one longer than all of the schedule is refused."""
    assert Schedule(1.0, 0.1, 0, 1100, "WSD", "linear", 0).at(1100) == 1.0
    with pytest.raises(UserError, match="--lr_wsd_decay_iters is 101 samples, but the whole decay has only 100"):
        Schedule(1.0, 0.1, 0, 100, "WSD", "linear", 101)


def test_schedule_without_warm_up_starts_at_the_top() -> None:
    """With no warm-up the first update has the full learning rate."""
    assert Schedule(1.0, 0.0, 0, 100, "cosine").at(0) == 1.0


@pytest.mark.parametrize(("low", "warmup"), [(2.0, 0), (-1.0, 0), (0.0, 100)])
def test_impossible_schedules_are_refused(low: float, warmup: int) -> None:
    """min_lr above lr, a negative one, and a warm-up as long as the decay are errors."""
    with pytest.raises(UserError, match=r"--min_lr|warm-up"):
        Schedule(1.0, low, warmup, 100, "linear")


def test_a_changed_schedule_must_be_meant() -> None:
    """When a run is continued, a different schedule needs a flag that says which of the two is to be used."""
    old, new = Schedule(1.0, 0.0, 0, 100, "linear"), Schedule(0.5, 0.0, 0, 100, "linear")
    saved = dict(vars(old))
    assert old.resumed(saved, use_checkpoint=False, override=False) == old
    assert new.resumed(saved, use_checkpoint=True, override=False) == old
    assert new.resumed(saved, use_checkpoint=False, override=True) == new
    with pytest.raises(UserError, match=r"max_lr 1\.0 -> 0\.5"):
        new.resumed(saved, use_checkpoint=False, override=False)


def test_schedules_of_checkpoints_from_before_wsd() -> None:
    """They lack its fields, which changes nothing unless WSD is asked for now."""
    saved = {"max_lr": 1.0, "min_lr": 0.0, "warmup_samples": 0, "decay_samples": 100, "style": "linear"}
    same, other = Schedule(1.0, 0.0, 0, 100, "linear"), Schedule(1.0, 0.0, 0, 100, "WSD", "cosine", 50)
    assert same.resumed(saved, use_checkpoint=False, override=False) == same
    assert other.resumed(saved, use_checkpoint=True, override=False) == same
    with pytest.raises(UserError, match=r"style linear -> WSD, wsd_style  -> cosine, wsd_samples 0 -> 50"):
        other.resumed(saved, use_checkpoint=False, override=False)


@pytest.mark.parametrize(
    ("style", "samples", "expected"),
    [
        ("constant", 0, 0.3),
        ("linear", 0, 0.1),
        ("linear", 50, 0.15),
        ("linear", 200, 0.3),
        ("linear", 201, 0.3),
        ("cosine", 0, 0.1),
        ("cosine", 100, 0.2),
        ("cosine", 50, 0.1 + 0.2 * 0.5 * (math.cos(math.pi * 0.75) + 1)),
        ("cosine", 999, 0.3),
    ],
)
def test_weight_decay_grows_as_megatrons(style: str, samples: int, expected: float) -> None:
    """From one value to another over 200 samples, as OptimizerParamScheduler.get_wd has it."""
    schedule = Schedule(1.0, 0.0, 0, 100, "linear", "", 0, 0.1, 0.3, style, 200)
    assert schedule.weight_decay(samples) == pytest.approx(expected, abs=1e-12)


class Small(nn.Module):
    """One matrix and one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
        self.vector = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))


def test_updates_are_decoupled_adam_without_decay_of_vectors() -> None:
    """Five steps equal the textbook formula: bias-corrected moments, eps outside the root, decay of matrices only."""
    model = Small()
    optimizer = build_optimizer(model.parameters(), betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.1)
    expected = [1.0, -2.0, 3.0]
    m, v = [0.0] * 3, [0.0] * 3
    for step in range(1, 6):
        gradients, lr = [0.3 * step, -0.2, 0.5 / step], 0.01 * step
        model.matrix.grad = torch.tensor([gradients[:2]], dtype=torch.float64)
        model.vector.grad = torch.tensor(gradients[2:], dtype=torch.float64)
        decay = 0.1 * step
        update(optimizer, lr, decay)
        for i, g in enumerate(gradients):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
            direction = (m[i] / (1 - 0.9**step)) / (math.sqrt(v[i] / (1 - 0.999**step)) + 1e-8)
            expected[i] -= lr * (direction + (decay * expected[i] if i < 2 else 0.0))
    assert [*model.matrix[0].tolist(), *model.vector.tolist()] == pytest.approx(expected, rel=1e-12)


def test_steps_can_be_restored() -> None:
    """After set_steps the bias correction goes on from there."""
    model = Small()
    optimizer = build_optimizer(model.parameters(), betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0)
    set_steps(optimizer, 7)
    model.vector.grad = torch.tensor([1.0], dtype=torch.float64)
    update(optimizer, 1.0)
    step = (0.1 / (1 - 0.9**8)) / math.sqrt(0.001 / (1 - 0.999**8))
    assert model.vector.item() == pytest.approx(3.0 - step, rel=1e-6)


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_clipping_uses_the_norm_of_all_gradients(limit: float, expected: float) -> None:
    """Gradients of norm 5 are scaled to the limit, and left alone under it or when the limit is 0."""
    model = Small()
    model.matrix.grad = torch.tensor([[0.0, 3.0]], dtype=torch.float64)
    model.vector.grad = torch.tensor([4.0], dtype=torch.float64)
    parameters = list(model.parameters())
    norm = gradient_norm(parameters, total=lambda x: x, count_copies=True)
    clip_gradients(parameters, norm, limit)
    assert norm.item() == 5.0
    assert gradient_norm(parameters, total=lambda x: x, count_copies=True).item() == pytest.approx(expected, rel=1e-5)
