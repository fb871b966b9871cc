"""finetune.py as real processes over gloo: what it computes, how it stops and goes on, and how it fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatron_llm.checkpoint.folder import latest_valid, load_model_state
from megatron_llm.data import gpt_dataset
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import Llama, initial_weights
from megatron_llm.weights import megatron
from tests.engine import engine_ranks
from tests.engine.engine_ranks import FINETUNE, Ranks
from tests.engine.tiny_run import RUN, flags, metrics, tensors

LINE = re.compile(
    r" iteration [ \d]{8}/[ \d]{8} \| consumed samples: [ \d]{12} \| elapsed time per iteration \(ms\): \d+\.\d \| "
    r"rate \(tokens/sec\): \d+\.\d\d \| learning rate: \d\.\d{3}E[-+]\d\d \| global batch size: [ \d]{5} \| "
    r"lm loss: \d\.\d{6}E[-+]\d\d \| loss scale: 1\.0 \| grad norm: \d+\.\d{3} \| "
    r"number of skipped iterations:   0 \| number of nan iterations:   0 \|"
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> tuple[Path, str]:
    """The --save folder and the output of 40 iterations on two ranks without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    codes, text = engine_ranks.run(folder, flags(tiny_data, folder / "save", "--save_interval", 20))
    assert codes == [0, 0], text
    return folder / "save", text


def test_a_run_reports_what_it_did(straight: tuple[Path, str]) -> None:
    """One log line an iteration in upstream's format, an evaluation every 10, checkpoints every 20, loss going down."""
    save, text = straight
    lines = [line for line in text.splitlines() if line.startswith(" iteration ")]
    assert len(lines) == 40
    assert all(LINE.fullmatch(line) for line in lines), lines
    records = metrics(save)
    assert [r["iteration"] for r in records if "lm_loss" in r] == list(range(1, 41))
    assert [r["iteration"] for r in records if "validation_loss" in r] == [10, 20, 30, 40]
    assert records[0]["lm_loss"] > records[-2]["lm_loss"] + 0.01
    assert [r["learning_rate"] for r in records[:5]] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3], rel=2e-3)
    assert records[-2]["consumed_samples"] == 320
    present = sorted(path.name for path in save.iterdir())
    assert present == [
        "hardware.json",
        "iter_0000020",
        "iter_0000040",
        "latest_checkpointed_iteration.txt",
        "metrics.jsonl",
    ]


def test_interruptions_change_nothing(tmp_path: Path, tiny_data: Path, straight: tuple[Path, str]) -> None:
    """Stopped by interval, by a signal to one rank and by a file, a run ends in the same bytes as the straight one."""
    save = tmp_path / "save"
    argv = flags(tiny_data, save)
    assert engine_ranks.run(tmp_path, [*argv, "--exit_interval", 17])[0] == [75, 75]
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "17"

    ranks = Ranks(tmp_path, argv, 2, {})
    ranks.wait_for(" iteration       20/")
    os.kill(ranks.pid(1), signal.SIGTERM)
    assert ranks.wait() == [75, 75]

    ranks = Ranks(tmp_path, argv, 2, {})
    ranks.wait_for("continuing from")
    (save / "stop").touch()
    assert ranks.wait() == [76, 76]
    assert not (save / "stop").exists()

    codes, text = engine_ranks.run(tmp_path, argv)
    assert codes == [0, 0], text
    assert tensors(save, 40) == tensors(straight[0], 40)
    assert metrics(save) == metrics(straight[0])
    mine, other = (json.loads((s / "iter_0000040" / "state.json").read_text()) for s in (save, straight[0]))
    assert {k: v for k, v in mine.items() if k != "arguments"} == {k: v for k, v in other.items() if k != "arguments"}


def test_skipped_iterations(tmp_path: Path, tiny_data: Path, straight: tuple[Path, str]) -> None:
    """Their samples are passed over, without an update and without a step of the schedule, over a restart too."""
    save = tmp_path / "save"
    argv = flags(tiny_data, save, "--skip_iters", 3, 4, 7, "--log_interval", 2)
    codes, text = engine_ranks.run(tmp_path, [*argv, "--exit_interval", 3])
    assert codes == [75, 75], text
    assert "iteration 3 is skipped (--skip_iters): samples 16 to 23 are not trained on" in text
    codes, text = engine_ranks.run(tmp_path, [*argv, "--exit_interval", 9, "--log_interval", 1])
    assert codes == [75, 75], text
    found = {record["iteration"]: record for record in metrics(save) if "lm_loss" in record}
    plain = {record["iteration"]: record for record in metrics(straight[0]) if "lm_loss" in record}
    assert list(found) == [2, 5, 6, 8, 9]
    assert found[2]["lm_loss"] == pytest.approx((plain[1]["lm_loss"] + plain[2]["lm_loss"]) / 2)
    assert found[5]["consumed_samples"] == 40
    assert [found[n]["learning_rate"] for n in (5, 6, 8, 9)] == [plain[n]["learning_rate"] for n in (3, 4, 5, 6)]
    state = json.loads((save / "iter_0000009" / "state.json").read_text())
    assert (state["optimizer_steps"], state["consumed_train_samples"], state["skipped_train_samples"]) == (6, 72, 24)


def test_log_lines_count_skipped_iterations(tmp_path: Path, tiny_data: Path) -> None:
    """A line gives the mean over its interval's updates and the number of iterations without one since the line before;
    an interval without any has no line."""
    argv = flags(tiny_data, tmp_path / "save", "--skip_iters", 3, 4, 5, "--log_interval", 2, "--exit_interval", 6)
    codes, text = engine_ranks.run(tmp_path, argv)
    assert codes == [75, 75], text
    lines = [line for line in text.splitlines() if line.startswith(" iteration ")]
    assert [int(line.split("/")[0].split()[-1]) for line in lines] == [2, 6]
    assert ["skipped iterations:   0" in line for line in lines] == [True, False]
    assert "skipped iterations:   3 " in lines[1]


def test_a_time_limit_of_its_own_and_retention(tmp_path: Path, tiny_data: Path) -> None:
    """--exit_duration_in_mins lets an iteration pass, then exits 75; --keep_last leaves the newest and every tenth."""
    save = tmp_path / "save"
    argv = flags(tiny_data, save, "--save_interval", 5, "--keep_last", 1, "--keep_every", 10, "--eval_iters", 0)
    codes, text = engine_ranks.run(tmp_path, [*argv, "--exit_duration_in_mins", "0.00001"])
    assert codes == [75, 75], text
    assert "stopped after iteration 1 of 40" in text
    codes, text = engine_ranks.run(tmp_path, [*argv, "--exit_interval", 25, "--exit_duration_in_mins", "60"])
    assert codes == [75, 75], text
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000010", "iter_0000020", "iter_0000025"]
    assert f"deleted {save}/iter_0000001 (--keep_last 1)" in text


def test_a_damaged_newest_checkpoint_costs_only_the_way_back(
    tmp_path: Path, tiny_data: Path, straight: tuple[Path, str]
) -> None:
    """The run falls back to the one before, says so, and ends in the same bytes."""
    save = tmp_path / "save"
    argv = flags(tiny_data, save, "--save_interval", 30)
    assert engine_ranks.run(tmp_path, argv)[0] == [0, 0]
    damaged = save / "iter_0000040" / "__1_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    (save / ".iter_0000040.tmp-killed").mkdir()
    codes, text = engine_ranks.run(tmp_path, argv)
    assert codes == [0, 0], text
    assert "iter_0000040 is skipped: __1_0.distcp has" in text
    assert f"continuing from {save / 'iter_0000030'}" in text
    assert tensors(save, 40) == tensors(straight[0], 40)
    assert metrics(save) == metrics(straight[0])
    assert not list(save.glob(".iter*"))
    codes, text = engine_ranks.run(tmp_path, argv)
    assert codes == [0, 0]
    assert "nothing to do" in text


def test_an_interrupted_evaluation_is_repeated_whole(tmp_path: Path, tiny_data: Path) -> None:
    """A signal during a long evaluation does not wait for its end; afterwards the same samples are evaluated again."""
    argv = ["--eval_iters", 4, "--train_iters", 2, "--eval_interval", 1, "--lr_warmup_iters", 0]
    calm, save = tmp_path / "calm", tmp_path / "save"
    assert engine_ranks.run(tmp_path, flags(tiny_data, calm, *argv))[0] == [0, 0]
    hold = tmp_path / "held"
    hold.write_text("evaluate 0")
    ranks = Ranks(tmp_path, flags(tiny_data, save, *argv), 2, {"HELD": str(hold)}, engine_ranks.held_finetune)
    ranks.wait_for("at evaluate")
    os.kill(ranks.pid(0), signal.SIGUSR2)
    hold.unlink()
    assert ranks.wait() == [75, 75]
    state = json.loads((save / "iter_0000001" / "state.json").read_text())
    assert (state["evaluation_due"], state["consumed_valid_samples"]) == (True, 0)
    assert engine_ranks.run(tmp_path, flags(tiny_data, save, *argv))[0] == [0, 0]
    assert metrics(save) == metrics(calm)


def test_ranks_do_not_change_the_result(tmp_path: Path, tiny_data: Path, straight: tuple[Path, str]) -> None:
    """One process has the two ranks' losses and norms up to rounding, and two go on from its files."""
    save = tmp_path / "save"
    argv = flags(tiny_data, save)
    assert engine_ranks.run(tmp_path, [*argv, "--exit_interval", 12], size=1)[0] == [75]
    alone, together = metrics(save), metrics(straight[0])[:13]
    assert [r["iteration"] for r in alone] == [r["iteration"] for r in together]
    for mine, other in zip(alone, together, strict=True):
        assert mine == pytest.approx(other, rel=2e-5)
    assert engine_ranks.run(tmp_path, argv)[0] == [0, 0]
    assert metrics(save)[-1] == pytest.approx(metrics(straight[0])[-1], rel=1e-4)


def test_training_starts_from_megatron_shards(tmp_path: Path, tiny_data: Path, tiny_config: ModelConfig) -> None:
    """A TP 2 x PP 2 checkpoint is loaded; the first loss and norm are the plain model's on the samples asked for."""
    weights = dict(initial_weights(tiny_config, 3, 0.1))
    load = tmp_path / "megatron"
    megatron.save(load, "release", tiny_config, weights, tp=2, pp=2, dtype=torch.float32, extra_args={"seq_length": 32})
    argv = [
        *RUN.split(),
        "--data_path",
        tiny_data,
        "--save",
        tmp_path / "save",
        "--load",
        load,
        "--use_checkpoint_args",
    ]
    codes, text = engine_ranks.run(tmp_path, [*argv, "--exit_interval", 1])
    assert codes == [75, 75], text
    model = Llama(tiny_config)
    model.load_state_dict(weights)
    paths = gpt_dataset.DataPaths.of([str(tiny_data)], (None, None, None), "90,10,0")
    plan = gpt_dataset.plan(paths, 1234, 32, (320, 80, 0))[0]
    assert plan is not None
    train = gpt_dataset.open_split(plan, None)
    assert train is not None
    batch = torch.from_numpy(np.stack([train[k] for k in range(8)]))
    loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    first = metrics(tmp_path / "save")[0]
    assert first["lm_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    config, after, _ = load_model_state(tmp_path / "save" / "iter_0000001")
    assert config == tiny_config
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items()), "the first update has lr 0"


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ("--global_batch_size 6", 2, "--global_batch_size 6 is not a multiple of 4"),
        ("--tensor_model_parallel_size 3", 2, "2 ranks are not a multiple of 3"),
        ("--tensor_model_parallel_size 2 --ffn_hidden_size 47", 2, "does not divide ffn_hidden_size 47"),
        ("--seq_length 65", 2, "--seq_length 65 is more than the model's max_position_embeddings 64"),
        ("--load /nonexistent/folder", 3, "/nonexistent/folder is not a checkpoint folder"),
        ("--data_path /nonexistent/data", 3, "/nonexistent/data"),
        ("--eod_mask_loss", 2, "--eod_mask_loss: no EOD token ends the documents of"),
        ("--split 1,0,0", 2, "--split 1,0,0 gives valid 0 of 200 documents"),
    ],
)
def test_mistakes_end_all_ranks_with_one_line(
    tmp_path: Path, tiny_data: Path, more: str, code: int, message: str
) -> None:
    """Rank 0 prints what is wrong, the others nothing; all exit with the same code, none hangs."""
    engine_ranks.fails(tmp_path, flags(tiny_data, tmp_path / "save", *more.split()), code, message)


def test_data_of_another_tokenizer_is_refused(tmp_path: Path, tiny_data: Path, tiny_config: ModelConfig) -> None:
    """A model with a smaller vocabulary than the data's tokenizer is not trained on it."""
    small = replace(tiny_config, vocab_size=100)
    load = tmp_path / "megatron"
    weights = dict(initial_weights(small, 3, 0.1))
    megatron.save(load, "release", small, weights, tp=1, pp=1, dtype=torch.float32, extra_args={})
    argv = flags(tiny_data, tmp_path / "save", "--load", load, "--use_checkpoint_args")
    codes, text = engine_ranks.run(tmp_path, argv)
    assert codes == [2, 2]
    assert "has 131 kinds of tokens, but the model's embedding has only 100" in text


def test_what_decides_the_sample_order_may_not_change(
    tmp_path: Path, tiny_data: Path, straight: tuple[Path, str]
) -> None:
    """Another seed or global batch size in a run that has begun is refused; --finetune begins a new one."""
    codes, text = engine_ranks.run(tmp_path, flags(tiny_data, straight[0], "--seed", 5), size=1)
    assert codes == [2]
    assert "trained with seed 1234, and now it is 5" in text
    longer = flags(tiny_data, straight[0], "--train_iters", 60, "--override_opt_param_scheduler")
    codes, text = engine_ranks.run(tmp_path, longer, size=1)
    assert codes == [2]
    assert "belongs to a run of 320 samples, and now the run is to have 480: the passes over the data" in text
    new = flags(tiny_data, tmp_path / "save", "--seed", 5, "--load", straight[0], "--finetune", "--exit_interval", 1)
    codes, text = engine_ranks.run(tmp_path, new, size=1)
    assert codes == [75], text
    assert metrics(tmp_path / "save")[0]["iteration"] == 1


def test_a_run_may_become_longer(tmp_path: Path, tiny_data: Path) -> None:
    """As long as the samples keep their order, more iterations go on from where the shorter run ended."""
    save = tmp_path / "save"
    argv = flags(tiny_data, save, "--override_opt_param_scheduler", "--eval_iters", 0)
    assert engine_ranks.run(tmp_path, [*argv, "--train_iters", 10], size=1)[0] == [0]
    codes, text = engine_ranks.run(tmp_path, [*argv, "--train_iters", 12], size=1)
    assert codes == [0], text
    assert [record["consumed_samples"] for record in metrics(save)] == [8 * n for n in range(1, 13)]


def test_a_non_finite_loss_stops_before_the_update(tmp_path: Path, tiny_data: Path) -> None:
    """An absurd learning rate diverges: exit 1, the iteration is named, the checkpoint from before is whole."""
    save = tmp_path / "save"
    wild = flags(tiny_data, save, "--lr", "1e30", "--lr_warmup_iters", 0, "--save_interval", 1, "--clip_grad", 0)
    ranks = Ranks(tmp_path, wild, 2, {})
    assert ranks.wait() == [1, 1], ranks.text()
    error = re.search(r"error: iteration (\d+): lm loss is .* \(samples (\d+) to (\d+)\)", ranks.text())
    assert error, ranks.text()
    failed = int(error[1])
    assert [int(error[2]), int(error[3])] == [8 * (failed - 1), 8 * failed - 1]
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == str(failed - 1)
    assert not (save / f"iter_{failed:07d}").exists()


def test_a_killed_rank_takes_the_others_with_it(tmp_path: Path, tiny_data: Path) -> None:
    """A file `save` makes a checkpoint on the way; when a rank dies the other does not wait for it for ever."""
    save = tmp_path / "save"
    ranks = Ranks(tmp_path, flags(tiny_data, save, "--train_iters", 4000), 2, {})
    ranks.wait_for(" iteration        2/")
    (save / "save").touch()
    ranks.wait_for(f"saved {save}/iter_")
    ranks.wait_for(" iteration       20/")
    assert not (save / "save").exists()
    assert latest_valid(save)
    os.kill(ranks.pid(1), signal.SIGKILL)
    assert ranks.wait() == [1, -signal.SIGKILL]
    assert "rank 0 failed" in ranks.text()


def test_loading_processes_and_bf16_and_tensorboard(tmp_path: Path, tiny_data: Path) -> None:
    """Read-ahead by worker processes gives the batches of none; bf16 trains; TensorBoard files are written."""
    options = ["--bf16", "--exit_interval", 6, "--recompute_granularity", "full"]
    losses = []
    for workers in (0, 2):
        save = tmp_path / f"save-{workers}"
        argv = flags(tiny_data, save, *options, "--num_workers", workers, "--tensorboard_dir", tmp_path / "board")
        codes, text = engine_ranks.run(tmp_path, argv)
        assert codes == [75, 75], text
        losses.append([record["lm_loss"] for record in metrics(save)])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert list((tmp_path / "board").glob("events.out.tfevents*"))


def test_a_signal_during_start_up_is_not_lost(tmp_path: Path, tiny_data: Path) -> None:
    """TERM while torch is still being imported ends in exit 75, and transformers is never imported."""
    command = [sys.executable, "-X", "importtime", str(FINETUNE), *map(str, flags(tiny_data, tmp_path / "save"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not int(re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[0], 16) >> 14 & 1:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    text, imports = process.communicate(timeout=engine_ranks.TIMEOUT)
    assert process.returncode == 75, imports[-2000:]
    assert "stopped after iteration 0" in text
    assert "torch.distributed" in imports
    assert "transformers" not in imports
