"""No update is made from a spike or an fp16 overflow; what was skipped changes nothing else, over restarts too."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_llm.flags.arguments import PrecisionFlags, TrainingFlags
from megatron_llm.flags.parser import parse
from megatron_llm.optim.loss_scale import LossScale
from megatron_llm.optim.update_guards import SKIPS_IN_A_ROW, Diverged, JudgedIteration, SpikeHistory, objection
from megatron_llm.training.progress import Progress
from tests.engine import engine_ranks
from tests.engine.tiny_run import flags, metrics, tensors

PLACE = JudgedIteration(12, range(88, 96))
SPIKES = ("--skip_spikes", "1.0", "--spike_window", 8)


def arguments(*more: object) -> tuple[TrainingFlags, PrecisionFlags]:
    """The tiny run's flags and more, as far as the guards take them."""
    args = parse([str(flag) for flag in flags(Path("d"), Path("s"), *more)])
    return args.training, args.precision


def remembered(*losses: float) -> SpikeHistory:
    """After updates with these losses, and norms of 1 and 1.2."""
    return SpikeHistory(list(losses), [1.0, 1.2] * (len(losses) // 2))


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (2.3, 1.3, None),
        (2.4, 1.1, r"lm loss 2\.4 is more than 2 standard deviations of 0\.11547 above 2\.1"),
        (2.0, 1.4, r"grad norm 1\.4 is more than 2 standard deviations of 0\.11547 above 1\.1"),
        (0.1, 0.1, None),
    ],
)
def test_what_is_a_spike(loss: float, norm: float, reason: str | None) -> None:
    """Losses 2.0 and 2.2 twice have mean 2.1 and standard deviation 0.11547: two of them above the mean is too much."""
    memory = remembered(2.0, 2.2, 2.0, 2.2)
    found = objection(*arguments("--skip_spikes", 2, "--spike_window", 8), memory, loss, norm, PLACE)
    if reason is None:
        assert found is None
        assert memory.losses[-1] == loss
    else:
        assert re.match(reason, str(found))
        assert (memory.losses, memory.skips_in_a_row) == ([2.0, 2.2, 2.0, 2.2], 1)


def test_the_window_slides_and_needs_half_of_itself() -> None:
    """Nothing is a spike before half a window is known; old values leave it."""
    args, memory = arguments("--skip_spikes", 1, "--spike_window", 4), SpikeHistory()
    assert objection(*args, memory, 1.0, 1.0, PLACE) is None
    assert objection(*args, memory, 9.0, 9.0, PLACE) is None
    assert objection(*args, memory, 99.0, 99.0, PLACE) is not None
    for loss in (5.0, 5.1, 5.0):
        assert objection(*args, memory, loss, loss, PLACE) is None
    assert memory.losses == [9.0, 5.0, 5.1, 5.0]


def test_spikes_without_end_stop_the_run() -> None:
    """After ten skips in a row the next spike is an error; an update in between begins the count again."""
    args, memory = arguments("--skip_spikes", 2, "--spike_window", 4), remembered(2.0, 2.2)
    for _ in range(SKIPS_IN_A_ROW):
        assert objection(*args, memory, 9.0, 1.0, PLACE)
    with pytest.raises(Diverged, match=r"iteration 12: lm loss 9 .* \(samples 88 to 95\); 10 iterations before it"):
        objection(*args, memory, 9.0, 1.0, PLACE)
    assert objection(*args, memory, 2.1, 1.1, PLACE) is None
    assert memory.skips_in_a_row == 0


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_what_is_no_number_stops_the_run(loss: float, norm: float) -> None:
    """With or without a guard against spikes; with fp16 a loss does, while a gradient may overflow."""
    for more in ((), SPIKES):
        with pytest.raises(Diverged, match=f"iteration 12: lm loss is {loss} and the grad norm {norm}"):
            objection(*arguments(*more), SpikeHistory(), loss, norm, PLACE)
    fp16, memory = arguments("--fp16"), SpikeHistory(loss_scale=LossScale(8.0))
    if loss == 1.0:
        assert objection(*fp16, memory, loss, norm, PLACE) == "gradients overflow fp16 at loss scale 8, next is 8"
        assert objection(*fp16, memory, loss, norm, PLACE) == "gradients overflow fp16 at loss scale 8, next is 4"
    else:
        with pytest.raises(Diverged):
            objection(*fp16, memory, loss, norm, PLACE)


def test_the_loss_scale_moves_as_upstreams() -> None:
    """Window 3, hysteresis 2: one overflow is forgiven, each further one halves; three clean updates double it and
    forgive again; not below the minimum."""
    _, args = arguments("--fp16", "--initial_loss_scale", 16, "--loss_scale_window", 3, "--min_loss_scale", 4)
    scale = LossScale.of(args, None)
    assert scale
    events = [True, True, True, False, False, True, False, False, False, True, True, True]
    factors = [16, 8, 4, 4, 4, 4, 4, 4, 8, 8, 4, 4]
    for overflow, factor in zip(events, factors, strict=True):
        scale.adjust(args, overflow=overflow)
        assert scale.factor == factor
    assert scale.at_floor(args)


def test_which_loss_scale_a_run_goes_on_with() -> None:
    """The checkpoint's, unless a constant one or another precision is asked for."""
    saved = LossScale(64.0, 3, 1)
    assert LossScale.of(arguments("--fp16")[1], saved) is saved
    assert LossScale.of(arguments("--fp16")[1], None) == LossScale(2.0**32)
    assert LossScale.of(arguments("--fp16", "--loss_scale", 128)[1], saved) == LossScale(128.0)
    assert LossScale.of(arguments("--bf16")[1], saved) is None


def test_a_constant_loss_scale_that_overflows_stops_the_run() -> None:
    """It cannot become smaller, so ten overflows in a row are enough; one that can goes on becoming smaller."""
    constant, memory = arguments("--fp16", "--loss_scale", 128), SpikeHistory(loss_scale=LossScale(128.0))
    for _ in range(SKIPS_IN_A_ROW):
        assert objection(*constant, memory, 1.0, float("inf"), PLACE)
    with pytest.raises(Diverged, match="gradients overflow fp16 at loss scale 128"):
        objection(*constant, memory, 1.0, float("inf"), PLACE)
    moving = SpikeHistory(loss_scale=LossScale(2.0**32))
    for _ in range(20):
        assert objection(*arguments("--fp16"), moving, 1.0, float("inf"), PLACE)
    assert moving.loss_scale == LossScale(2.0**13, 0, 20)


def test_checkpoints_from_before_the_guards() -> None:
    """They have no memory of them, and load; what they must have is still missed."""
    state = {name: value for name, value in asdict(Progress(3, 24)).items() if name != "memory"}
    assert Progress.of(state) == Progress(3, 24)
    memory = SpikeHistory([1.0], [2.0], 2.0, 1, 1, LossScale(4.0, 1, 1))
    assert Progress.of(json.loads(json.dumps({**state, "memory": asdict(memory)}))).memory == memory
    del state["optimizer_steps"]
    with pytest.raises(KeyError):
        Progress.of(state)


def run_twice(folder: Path, data: Path, *more: object) -> tuple[Path, str]:
    """A run of 20 iterations that is stopped at 13, after asserting that it ends in the bytes of one that is not."""
    argv = ("--train_iters", 20, "--eval_iters", 0, *more)
    saves = folder / "straight", folder / "save"
    codes, text = engine_ranks.run(folder, flags(data, saves[0], *argv, "--save_interval", 1))
    assert codes == [0, 0], text
    assert engine_ranks.run(folder, flags(data, saves[1], *argv, "--exit_interval", 13))[0] == [75, 75]
    codes, _ = engine_ranks.run(folder, flags(data, saves[1], *argv))
    assert codes == [0, 0]
    assert tensors(saves[0], 20) == tensors(saves[1], 20)
    assert metrics(saves[0]) == metrics(saves[1])
    assert state(saves[0], 20) == state(saves[1], 20)
    return saves[0], text


def state(save: Path, iteration: int) -> dict[str, Any]:
    """state.json without the flags."""
    found = json.loads((save / f"iter_{iteration:07d}" / "state.json").read_text())
    return {name: value for name, value in found.items() if name != "arguments"}


def skipped(text: str) -> list[int]:
    """The iterations that were said to make no update."""
    return [int(number) for number in re.findall(r"^iteration (\d+) is skipped", text, re.MULTILINE)]


def test_a_skipped_spike_leaves_no_trace(tmp_path: Path, tiny_data: Path) -> None:
    """Weights, moments and the learning rate stay as they were, the samples are passed over, the window is not fed."""
    save, text = run_twice(tmp_path, tiny_data, *SPIKES)
    spikes = skipped(text)
    assert 0 < len(spikes) < 10, text
    assert "standard deviations" in text
    for number in spikes:
        assert tensors(save, number) == tensors(save, number - 1)
        before, after = state(save, number - 1), state(save, number)
        assert after["consumed_train_samples"] == before["consumed_train_samples"] + 8
        assert after["skipped_train_samples"] == before["skipped_train_samples"] + 8
        assert after["optimizer_steps"] == before["optimizer_steps"]
        assert after["memory"]["losses"] == before["memory"]["losses"]
    assert [record["iteration"] for record in metrics(save)] == [n for n in range(1, 21) if n not in spikes]
    counted = [number for number in spikes if number < metrics(save)[-1]["iteration"]]
    assert sum(record["skipped_iterations"] for record in metrics(save)) == len(counted) > 0


def test_a_log_line_over_a_restart(tmp_path: Path, tiny_data: Path) -> None:
    """Its only update was made before the restart, and it still reports that one's gradient norm."""
    argv = ("--skip_iters", 2, "--log_interval", 2, "--train_iters", 40)
    for save, stops in (("straight", [2]), ("save", [1, 2])):
        for stop in stops:
            run = flags(tiny_data, tmp_path / save, *argv, "--exit_interval", stop)
            assert engine_ranks.run(tmp_path, run, size=1)[0] == [75]
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "save")
    assert metrics(tmp_path / "save")[0]["grad_norm"] > 0


def test_fp16_finds_its_scale_and_trains(tmp_path: Path, tiny_data: Path) -> None:
    """From 2^32 overflows halve the scale and make no update; then losses are fp32's up to rounding, and it grows."""
    more = ("--loss_scale_window", 4, "--initial_loss_scale", 2.0**25, "--lr_warmup_iters", 2)
    save, text = run_twice(tmp_path, tiny_data, "--fp16", *more)
    first = next(number for number in range(1, 20) if number not in skipped(text))
    assert 3 <= first < 12
    assert "gradients overflow fp16 at loss scale 3.35544e+07, next is 3.35544e+07" in text
    records = metrics(save)
    assert records[0]["iteration"] == first
    assert records[0]["loss_scale"] == 2.0 ** (25 - (first - 2))
    assert max(record["loss_scale"] for record in records) > records[0]["loss_scale"]
    plain = tmp_path / "plain"
    skip = [str(number) for number in skipped(text)]
    argv = flags(
        tiny_data, plain, "--train_iters", 20, "--eval_iters", 0, "--lr_warmup_iters", 2, "--skip_iters", *skip
    )
    assert engine_ranks.run(tmp_path, argv)[0] == [0, 0]
    for mine, other in zip(records, metrics(plain), strict=True):
        assert mine["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
    assert records[-1]["lm_loss"] < records[0]["lm_loss"]


def test_fp16_over_tensor_and_pipeline_ranks(tmp_path: Path, tiny_data: Path) -> None:
    """With the model cut in two either way, overflows are noticed by all ranks and the losses are one rank's."""
    argv = ("--fp16", "--train_iters", 6, "--eval_iters", 1, "--eval_interval", 6, "--initial_loss_scale", 2.0**18)
    layouts = {
        "one": (),
        "tensor": ("--tensor_model_parallel_size", 2, "--sequence_parallel"),
        "pipeline": ("--pipeline_model_parallel_size", 2),
    }
    runs = [flags(tiny_data, tmp_path / name, *argv, *more) for name, more in layouts.items()]
    engine_ranks.run_several(tmp_path, runs, 2)
    one, tensor, pipeline = (metrics(tmp_path / name) for name in layouts)
    for mine, *others in zip(one, tensor, pipeline, strict=True):
        for other in others:
            assert other == pytest.approx(mine, rel=2e-3)
