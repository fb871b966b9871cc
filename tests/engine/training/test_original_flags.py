"""What the original's flags do in training: ramp-up, evaluation only, logging, checkpoints without parts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.data import gpt_dataset
from megatron_llm.flags import parser as flags_parser
from megatron_llm.model.llama import Llama
from megatron_llm.parallel.world import World
from megatron_llm.process.signals import StopRequest
from megatron_llm.training import assemble
from run_contract.errors import UserError
from tests.engine import engine_ranks
from tests.engine.tiny_run import flags, metrics, tensors

RAMP = ("--rampup_batch_size", 2, 2, 40, "--train_samples", 100, "--lr_warmup_samples", 16, "--eval_interval", 5)


def without(argv: list[object], *names: str) -> list[object]:
    """A command line without some flags that have one value."""
    places = [argv.index(name) for name in names if name in argv]
    return [word for place, word in enumerate(argv) if not {place, place - 1} & set(places)]


@pytest.fixture(scope="module")
def run(world: World) -> Callable[..., int]:
    """Runs a command line in this process; gives the exit code."""
    return lambda argv: assemble.run(flags_parser.parse([str(word) for word in argv]), world, StopRequest())


def ramp_flags(data: Path, save: Path, *more: object) -> list[object]:
    """The tiny run with a batch size that grows from 2 to 8 over 40 samples."""
    return without(flags(data, save, *RAMP, *more), "--train_iters", "--lr_warmup_iters")


@pytest.fixture(scope="module")
def ramped(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, run: Callable[..., int]) -> Path:
    """The --save folder of a run with a growing batch size, without interruption."""
    save = tmp_path_factory.mktemp("ramped") / "save"
    assert run(ramp_flags(tiny_data, save, "--log_samples")) == 0
    return save


def test_the_batch_size_grows(ramped: Path, tiny_data: Path, tmp_path: Path, run: Callable[..., int]) -> None:
    """Each update has Megatron's size; stopped within the growth and across its end, a run ends in the same bytes."""
    samples = [json.loads(line) for line in (ramped / "samples.jsonl").read_text().splitlines()]
    expected, consumed = [], 0
    while consumed <= 40:
        expected.append(2 + int(consumed / (40 / 3)) * 2)
        consumed += expected[-1]
    expected += [8] * ((100 - consumed) // 8)
    assert [record["samples"] for record in samples] == expected
    assert [record["consumed_samples"] for record in metrics(ramped) if "lm_loss" in record] == np.cumsum(
        expected
    ).tolist()
    save = tmp_path / "save"
    for last in (4, 11, 13, len(expected)):
        code = run(ramp_flags(tiny_data, save, "--log_samples", "--exit_interval", last))
        assert code == (0 if last == len(expected) else 75)
    assert tensors(save, len(expected)) == tensors(ramped, len(expected))
    assert metrics(save) == metrics(ramped)
    assert (save / "samples.jsonl").read_bytes() == (ramped / "samples.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"trained with rampup_batch_size \[2, 2, 40\], and now it is \[4, 2, 40\]"):
        run([*ramp_flags(tiny_data, save), "--rampup_batch_size", 4, 2, 40])


def test_a_pipeline_with_a_growing_batch_size(ramped: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Two stages, with micro-batches of 1, compute the same; log lines name each update's size."""
    save = tmp_path / "save"
    argv = [*ramp_flags(tiny_data, save), "--micro_batch_size", 1, "--pipeline_model_parallel_size", 2]
    codes, text = engine_ranks.run(tmp_path, argv)
    assert codes == [0, 0], text
    ours, theirs = metrics(save), metrics(ramped)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    consumed = [record["consumed_samples"] for record in theirs if "lm_loss" in record]
    shown = [int(size) for size in re.findall(r"global batch size: +(\d+)", text)]
    assert shown == [consumed[0], *np.diff(consumed).tolist()]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, run: Callable[..., int]) -> Path:
    """The --save folder of 4 iterations, then one evaluation, with everything that can be logged."""
    save = tmp_path_factory.mktemp("evaluated") / "save"
    more = ("--train_iters", 4, "--lr_warmup_iters", 0, "--metrics", "perplexity", "accuracy", "--log_params_norm")
    board = ("--tensorboard_dir", save / "board", "--log_timers_to_tensorboard", "--log_memory_to_tensorboard")
    assert run(flags(tiny_data, save, *more, *board, "--log_batch_size_to_tensorboard", "--no_save_optim")) == 0
    return save


def test_numbers_on_request(evaluated: Path, tiny_data: Path) -> None:
    """The weights' norm, the accuracy on the validation samples and what TensorBoard gets, against plain arithmetic."""
    _, state, _ = checkpoint.load_model_state(evaluated / "iter_0000004")
    config = checkpoint.load_model_state(evaluated / "iter_0000004")[0]
    last, validation = metrics(evaluated)[-2:]
    norm = sum(float(tensor.double().square().sum()) for tensor in state.values()) ** 0.5
    assert last["params_norm"] == pytest.approx(norm, rel=1e-6)
    model = Llama(config)
    model.load_state_dict(dict(state))
    plan = gpt_dataset.plan(
        gpt_dataset.DataPaths.of([str(tiny_data)], (None, None, None), "90,10,0"), 1234, 32, (0, 16, 0)
    )
    assert plan[1]
    valid = gpt_dataset.open_split(plan[1], None)
    batch = torch.from_numpy(np.stack([valid[k] for k in range(16)]))
    right = (model(batch[:, :-1]).argmax(-1) == batch[:, 1:]).double().mean().item()
    assert validation["validation_accuracy"] == pytest.approx(right)
    events = b"".join(path.read_bytes() for path in (evaluated / "board").glob("events.*"))
    for name in ("iteration-time/", "batch-size/", "mem-reserved-bytes/", "params-norm/", "lm accuracy validation/"):
        assert name.encode() in events
    assert b"world-size" not in events


def test_evaluation_only(evaluated: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Of the newest checkpoint in --save: the line of the run's own first evaluation, over tensor ranks too; nothing is
    written, and neither schedule nor optimizer matter."""
    before = {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")}
    more = ("--eval_only", "--metrics", "perplexity", "accuracy", "--lr", 5, "--tensor_model_parallel_size", 2)
    codes, text = engine_ranks.run(tmp_path, flags(tiny_data, evaluated, "--train_iters", 4, *more))
    assert codes == [0, 0], text
    found = re.search(
        r"validation loss at iteration 4 \| lm loss value: (\S+) \| lm loss PPL: (\S+) \| ppl value: (\S+) \| "
        r"lm accuracy value: (\S+) \|",
        text,
    )
    assert found, text
    record = metrics(evaluated)[-1]
    names = ("validation_loss", "validation_perplexity", "validation_perplexity", "validation_accuracy")
    assert [float(value) for value in found.groups()] == pytest.approx([record[name] for name in names], rel=1e-5)
    assert {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")} == before


def test_checkpoints_without_the_optimizer(
    evaluated: Path, tiny_data: Path, tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """--no_save_optim: weights only; going on needs --no_load_optim, and says what the learning rate will be."""
    folder = evaluated / "iter_0000004"
    with checkpoint._readable(folder) as reader:
        assert all(name.startswith("model.") for name in reader.read_metadata().state_dict_metadata)
    argv = flags(tiny_data, tmp_path / "save", "--load", evaluated, "--train_iters", 6, "--eval_iters", 0)
    with pytest.raises(UserError, match="saved with --no_save_optim; pass --no_load_optim to go on without"):
        run(argv)
    assert run([*argv, "--no_load_optim", "--lr_warmup_iters", 1]) == 0
    assert "the learning rate begins again at 0.000E+00, to reach 1.000E-03 after 8 samples" in capsys.readouterr().out
    assert metrics(tmp_path / "save")[0]["learning_rate"] == 1e-3
    state = json.loads((tmp_path / "save" / "iter_0000006" / "state.json").read_text())
    assert (state["optimizer_steps"], state["consumed_train_samples"], state["skipped_train_samples"]) == (2, 48, 32)


@pytest.mark.parametrize(("given", "times"), [((), 1), (("--hidden_dropout", 0.0, "--attention_dropout", 0.0), 0)])
def test_the_default_of_dropout_is_said(
    tiny_data: Path,
    tmp_path: Path,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    given: tuple[object, ...],
    times: int,
) -> None:
    """Without its flags a run says once that dropout is 0, where Megatron's default is another."""
    short = ("--train_iters", 2, "--lr_warmup_iters", 0, "--eval_iters", 0)
    assert run(flags(tiny_data, tmp_path / "save", *short, *given)) == 0
    said = "--hidden_dropout and --attention_dropout are 0, where Megatron's default is 0.1"
    assert capsys.readouterr().out.count(said) == times
