"""What a run that goes on may change: from our own checkpoints, of versions before too, and from the original's."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.flags import parser as flags_parser
from megatron_llm.flags.batch_sizes import BatchSizes
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import initial_weights
from megatron_llm.parallel.world import World
from megatron_llm.process.signals import StopRequest
from megatron_llm.training import assemble, batches, resume, run_changes
from megatron_llm.training.progress import Start
from megatron_llm.weights import megatron
from run_contract.errors import UserError
from tests.engine.tiny_run import RUN, flags, metrics


@pytest.fixture(scope="module")
def run(world: World) -> Callable[..., int]:
    """Runs a command line in this process; gives the exit code."""
    return lambda argv: assemble.run(flags_parser.parse([str(word) for word in argv]), world, StopRequest())


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, run: Callable[..., int]) -> Path:
    """The --save folder of a run that stopped after 6 of 40 iterations, with three evaluations of 16 samples."""
    save = tmp_path_factory.mktemp("begun") / "save"
    assert run(flags(tiny_data, save, "--eval_interval", 2, "--exit_interval", 6)) == 75
    return save


@pytest.fixture
def save(begun: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(begun, tmp_path / "save")
    return tmp_path / "save"


def found(argv: list[object]) -> Start:
    """Where a run starts, without running it."""
    args = flags_parser.parse([str(word) for word in argv])
    return resume.find(args, batches.identify(args.data, args.given), BatchSizes.of(8, None), 1)[0]


def rewrite(save: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change state.json of iteration 6."""
    path = save / "iter_0000006" / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("more", "begins_again"),
    [
        ("--eval_interval 40", True),
        ("--eval_interval 4 --eval_iters 3", True),
        ("--eval_interval 2 --eval_iters 40", True),
        ("--eval_interval 3 --eval_iters 3", False),
        ("--eval_iters 0", False),
    ],
)
def test_evaluations_may_change(
    save: Path,
    tiny_data: Path,
    run: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    more: str,
    begins_again: bool,
) -> None:
    """A run that evaluates more or less often goes on to its last iteration; where it has not enough validation
    samples in the same order, these begin again, and it says so."""
    argv = flags(tiny_data, save, "--eval_interval", 2, "--train_iters", 40, *more.split())
    assert run([*argv, "--exit_interval", 12, "--log_interval", 50]) == 75
    assert run([*argv, "--log_interval", 50]) == 0
    said = capfd.readouterr().out
    assert said.count("validation begins at its first sample again") == begins_again
    assert [record["iteration"] for record in metrics(save) if "validation_loss" in record][-1] == (
        6 if more == "--eval_iters 0" else 40
    )


def test_an_evaluation_that_is_due_can_be_left_out(save: Path, tiny_data: Path, run: Callable[..., int]) -> None:
    """A checkpoint of an interrupted evaluation goes on with --eval_iters 0."""
    rewrite(save, lambda state: state.update(evaluation_due=True))
    assert run(flags(tiny_data, save, "--eval_interval", 2, "--eval_iters", 0, "--exit_interval", 7)) == 75


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--seed 5",
            "trained with seed 1234, and now it is 5: samples would be repeated, lost or learnt in a different way; "
            "keep",
        ),
        ("--split 80,20,0", "trained with split 90,10,0, and now it is 80,20,0"),
        ("--seq_length 16", "trained with seq_length 32, and now it is 16"),
        (
            "--rampup_batch_size 2 2 40 --train_samples 320 --lr_warmup_samples 32",
            r"rampup_batch_size None, and now it is \[",
        ),
        (
            "--weight_decay 0.1",
            r"start_weight_decay 0\.01 -> 0\.1, end_weight_decay 0\.01 -> 0\.1\); pass --use_checkpoint",
        ),
        ("--lr 2e-3", r"max_lr 0\.001 -> 0\.002"),
        ("--rope_theta 500000", r"has rope_theta 10000\.0 \(flags: 500000\.0\)"),
    ],
)
def test_what_must_stay(save: Path, tiny_data: Path, flag: str, message: str) -> None:
    """One message names the value of before, the value now, and what to do; a version before did not record all."""
    argv = flags(tiny_data, save, "--eval_interval", 2, *flag.split())
    if "rampup" in flag:
        places = [argv.index(name) for name in ("--train_iters", "--lr_warmup_iters")]
        argv = [word for place, word in enumerate(argv) if not {place, place - 1} & set(places)]
        new = ("rampup_batch_size", "start_weight_decay", "given")
        rewrite(save, lambda state: [state["arguments"].pop(name) for name in new])
        rewrite(save, lambda state: [state["schedule"].pop(f"{end}_weight_decay") for end in ("start", "end")])
    args = flags_parser.parse([str(word) for word in argv])
    with pytest.raises(UserError, match=message):
        resume.schedule(args, 8, found(argv).saved)


def test_what_may_change_is_said(save: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is learnt differently from here on, also where a flag is only left out; and which schedule is kept."""
    rewrite(save, lambda state: state["arguments"].update(clip_grad=0.5))
    argv = flags(tiny_data, save, "--eval_interval", 2, "--bf16", "--num_workers", 1)
    assert found(argv).progress.iteration == 6
    said = capsys.readouterr().out
    assert "clip_grad was 0.5 until now and is 1.0 from here on" in said
    assert "bf16 was False until now and is True from here on" in said
    assert "num_workers" not in said
    keep = [*argv, "--lr", 2e-3, "--use_checkpoint_opt_param_scheduler"]
    args = flags_parser.parse([str(word) for word in keep])
    assert resume.schedule(args, 8, found(keep).saved).max_lr == 1e-3
    assert "the learning-rate schedule is kept from the checkpoint" in capsys.readouterr().out


def trainer_file(root: Path, config: ModelConfig, consumed: int, **more: object) -> Path:
    """A checkpoint of Megatron's trainer at iteration 20: weights, arguments, optimizer and schedule."""
    own = {"seq_length": 32, "seed": 1234, "split": "90, 10, 0", "global_batch_size": 8, "train_iters": 40, **more}
    extra = {**own, "consumed_train_samples": consumed, "consumed_valid_samples": 16}
    state = dict(initial_weights(config, 3, 0.1))
    megatron.save(root, 20, config, state, tp=1, pp=1, dtype=torch.float32, extra_args=extra)
    path = root / "iter_0000020" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content |= {"optimizer": {"state": {0: torch.ones(3)}}, "opt_param_scheduler": {"max_lr": 1e-3}}
    torch.save(content, path)
    return root


def original_flags(data: Path, save: Path, load: Path, *more: object) -> list[object]:
    """The command line that goes on from it."""
    return [*RUN.split(), "--data_path", data, "--save", save, "--load", load, "--use_checkpoint_args", *more]


def test_the_originals_optimizer_is_not_dropped_silently(
    tmp_path: Path, tiny_data: Path, tiny_config: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused without --no_load_optim or --finetune; with it, what is dropped and the learning rate are said."""
    load = trainer_file(tmp_path / "load", tiny_config, 160)
    argv = original_flags(tiny_data, tmp_path / "save", load)
    with pytest.raises(
        UserError, match="holds Adam's moments, the state of the schedule, from which the optimizer cannot go on"
    ):
        found(argv)
    progress = found([*argv, "--no_load_optim"]).progress
    assert (progress.iteration, progress.consumed_train_samples, progress.skipped_train_samples) == (20, 160, 160)
    said = capsys.readouterr().out
    assert "not taken over from" in said
    assert "the learning rate begins again at 0.000E+00, to reach 1.000E-03 after 32 samples" in said
    assert found([*argv, "--finetune"]).progress.iteration == 0
    assert found([*argv, "--eval_only"]).progress.iteration == 20
    kept = run_changes.original({"seed": 5, "split": "9,1", "position_embedding_type": object(), "fp8_margin": 0})
    assert kept == {"seed": 5, "split": "9,1"}, "enums of the original cannot be sent to other ranks"


@pytest.mark.parametrize(
    ("consumed", "recorded", "message"),
    [
        (160, {"seed": 5}, "trained with seed 5, and now it is 1234"),
        (160, {"global_batch_size": 16}, "trained with global_batch_size 16, and now it is 8"),
        (
            160,
            {"rampup_batch_size": ["2", "2", "40"]},
            r"trained with rampup_batch_size \[2, 2, 40\], and now it is None",
        ),
        (400, {}, "has consumed 400 samples in 20 iterations; 20 more iterations need 560 in all, and the run has 320"),
    ],
)
def test_the_originals_flags_and_counters_are_compared(
    tmp_path: Path, tiny_data: Path, tiny_config: ModelConfig, consumed: int, recorded: dict[str, object], message: str
) -> None:
    """They decide the order of samples as our own do, and a run never asks for samples that are not there."""
    load = trainer_file(tmp_path / "load", tiny_config, consumed, **recorded)
    with pytest.raises(UserError, match=message):
        found(original_flags(tiny_data, tmp_path / "save", load, "--no_load_optim"))


def test_the_checkpoints_sequence_length(tmp_path: Path, tiny_data: Path, tiny_config: ModelConfig) -> None:
    """Without --seq_length, and only with --use_checkpoint_args, it is what the checkpoint says."""
    load = trainer_file(tmp_path / "load", tiny_config, 160, seq_length=48)
    argv = original_flags(tiny_data, tmp_path / "save", load, "--finetune")
    place = argv.index("--seq_length")
    without = [*argv[:place], *argv[place + 2 :]]
    assert (found(argv).seq_length, found(without).seq_length) == (32, 48)
    with pytest.raises(UserError, match="--seq_length is missing; give it, or --use_checkpoint_args"):
        flags_parser.parse([str(word) for word in without if word != "--use_checkpoint_args"])
    path = load / "iter_0000020" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["args"] = argparse.Namespace(**{**vars(content["args"]), "seq_length": None})
    torch.save(content, path)
    with pytest.raises(UserError, match="does not say how long the samples of its training were; give --seq_length"):
        found(without)
