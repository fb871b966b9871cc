"""Layouts of ranks change nothing but the speed: the whole matrix of a world size in one launch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch.nn import functional

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.data import gpt_dataset
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import initial_weights, shapes
from megatron_llm.optim.adamw import MOMENTS
from tests.engine import engine_ranks
from tests.engine.hf_reference import hf_model, theirs
from tests.engine.tiny_run import FALCON, flags, metrics, tensors

TP, PP = "--tensor_model_parallel_size", "--pipeline_model_parallel_size"
VIRTUAL = "--num_layers_per_virtual_pipeline_stage"
SEQUENCE = "--sequence_parallel"
FULL = ("--recompute_granularity", "full")
SHORT = ("--train_iters", 20, "--eval_interval", 20, "--log_samples")
LAYOUTS: dict[int, dict[str, tuple[object, ...]]] = {
    1: {"1,1,1": ()},
    2: {
        "1,1,2": (),
        "1,1,2 selective": ("--recompute_granularity", "selective"),
        "2,1,1": (TP, 2),
        "2,1,1 sequence": (TP, 2, SEQUENCE),
        "2,1,1 compiled": (TP, 2, SEQUENCE, "--torch_compile"),
        "1,2,1": (PP, 2),
        "1,2,1 interleaved": (PP, 2, VIRTUAL, 1),
    },
    4: {
        "4,1,1 with 2 kv heads": (TP, 4, SEQUENCE),
        "2,2,1 interleaved": (TP, 2, PP, 2, VIRTUAL, 1, SEQUENCE),
        "1,2,2 full": (PP, 2, *FULL, "--recompute_method", "block", "--recompute_num_layers", 1),
    },
    8: {"2,2,2": (TP, 2, PP, 2, SEQUENCE, "--recompute_granularity", "selective")},
}
BRIEF = ("--train_iters", 6, "--lr_decay_iters", 20, "--eval_interval", 6)
BF16: dict[int, tuple[object, ...]] = {1: (), 2: (TP, 2, SEQUENCE), 4: (TP, 2, PP, 2, SEQUENCE)}
"""In bfloat16, on so many ranks."""
TIED: dict[int, dict[str, tuple[object, ...]]] = {
    1: {"1,1,1": ()},
    2: {"2,1,1": (TP, 2, SEQUENCE), "1,2,1": (PP, 2), "1,2,1 interleaved": (PP, 2, VIRTUAL, 1)},
    4: {
        "2,2,1 interleaved": (TP, 2, PP, 2, VIRTUAL, 1, SEQUENCE),
        "1,2,2 full": (PP, 2, *FULL, "--recompute_method", "uniform", "--recompute_num_layers", 2),
        "1,4,1": (PP, 4),
    },
}
"""A Falcon, whose output layer is its embedding."""
STOPPED = ("--exit_interval", 11)
RESUMED = "2,2,1 interleaved"
"""The layout at which a run is stopped and continued."""


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> dict[str, Path]:
    """The --save folder of 20 iterations at every layout, and of runs stopped at 11: `resumed` at the same layout,
    `moved` from pipeline to tensor ranks, `spread` from one process to eight."""
    root = tmp_path_factory.mktemp("layouts")
    names = [name for layouts in LAYOUTS.values() for name in layouts]
    folders = {name: root / name.replace(" ", "-") for name in [*names, "resumed", "moved", "spread"]}

    def argv(name: str, *more: object) -> list[object]:
        return flags(tiny_data, folders[name], *SHORT, *more)

    several = {size: [argv(name, *more) for name, more in layouts.items()] for size, layouts in LAYOUTS.items()}
    several[1].append(argv("spread", *STOPPED))
    several[2].append(argv("moved", *LAYOUTS[2]["1,2,1"], *STOPPED))
    several[4].append(argv("resumed", *LAYOUTS[4][RESUMED], *STOPPED))
    several[4].append(argv("resumed", *LAYOUTS[4][RESUMED]))
    several[4].append(argv("moved", *LAYOUTS[4]["4,1,1 with 2 kv heads"]))
    several[8].append(argv("spread", *LAYOUTS[8]["2,2,2"]))
    for size, more in BF16.items():
        folders[f"bf16 {size}"] = root / f"bf16-{size}"
        several[size].append(argv(f"bf16 {size}", *BRIEF, "--bf16", *more))
    tied = [(size, name, more) for size, layouts in TIED.items() for name, more in layouts.items()]
    tied += [(2, "moved", (*TIED[2]["1,2,1"], "--exit_interval", 3)), (4, "moved", TIED[4]["2,2,1 interleaved"])]
    for size, name, more in tied:
        folders[f"tied {name}"] = root / f"tied-{name.replace(' ', '-')}"
        brief = (*BRIEF, "--init_method_std", 0.1, *more)
        several[size].append(flags(tiny_data, folders[f"tied {name}"], *brief, geometry=FALCON))
    for size, argvs in several.items():
        engine_ranks.run_several(root, argvs, size)
    return folders


def training_samples(data: Path) -> gpt_dataset.Samples:
    """What 20 iterations read."""
    paths = gpt_dataset.DataPaths.of([str(data)], (None, None, None), "90,10,0")
    plan = gpt_dataset.plan(paths, 1234, 32, (160, 32, 0))[0]
    assert plan is not None
    return gpt_dataset.open_split(plan, None)


def test_the_same_layout_goes_on_to_the_bit(saves: dict[str, Path]) -> None:
    """Stopped after 11 iterations, tensor and interleaved pipeline ranks end in the bytes of the straight run."""
    assert tensors(saves["resumed"], 20) == tensors(saves[RESUMED], 20)
    assert metrics(saves["resumed"]) == metrics(saves[RESUMED])


@pytest.mark.parametrize("name", ["moved", "spread"])
def test_another_layout_goes_on(saves: dict[str, Path], name: str) -> None:
    """Stopped after 11 iterations and continued by another number of tensor, pipeline and data ranks, a run has the
    losses of the straight one."""
    for one, other in zip(metrics(saves["1,1,1"]), metrics(saves[name]), strict=True):
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("name", [name for layouts in LAYOUTS.values() for name in layouts] + ["moved", "spread"])
def test_every_layout_takes_the_same_samples(saves: dict[str, Path], name: str, tiny_data: Path) -> None:
    """What the ranks loaded, by number and content, is in every iteration what the order of the samples says; stopped
    and continued at another layout nothing is lost or repeated."""
    train = training_samples(tiny_data)
    lines = [json.loads(line) for line in (saves[name] / "samples.jsonl").read_text().splitlines()]
    for step, line in enumerate(lines):
        numbers = range(8 * step, 8 * step + 8)
        digest = sum(xxhash.xxh3_64_intdigest(np.array([k, *train[k]], np.int64).tobytes()) for k in numbers) % 2**64
        expected = {"iteration": step + 1, "updates": step + 1, "first": numbers[0], "last": numbers[-1]}
        assert line == expected | {"samples": 8, "digest": f"{digest:016x}"}
    assert len(lines) == 20


@pytest.mark.parametrize("layout", [*(name for layouts in TIED.values() for name in layouts), "moved"][1:])
def test_falcon_and_tied_embeddings(saves: dict[str, Path], layout: str) -> None:
    """One key/value head, norms with bias, parallel branches and an embedding at both ends of the pipeline give the
    losses and norms of one process, over a move from two pipeline ranks to four too; the embedding is stored once."""
    alone, spread = metrics(saves["tied 1,1,1"]), metrics(saves[f"tied {layout}"])
    assert len(alone) == len(spread) == 7
    for one, other in zip(alone, spread, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    folders = [checkpoint.iteration_folder(saves[f"tied {name}"], 6) for name in ("1,1,1", layout)]
    config, weights, _ = checkpoint.load_model_state(folders[0])
    assert_holds(folders[1], config, weights)


@pytest.mark.parametrize("size", [2, 4])
def test_bf16_on_tensor_and_pipeline_ranks(saves: dict[str, Path], size: int) -> None:
    """Losses in bfloat16 stay within its precision of one process's, which are not those in fp32; weights are fp32."""
    alone, spread, exact = (metrics(saves[name])[:6] for name in ("bf16 1", f"bf16 {size}", "1,1,1"))
    for one, other in zip(alone, spread, strict=True):
        assert other["lm_loss"] == pytest.approx(one["lm_loss"], rel=1e-3)
    assert alone[0]["lm_loss"] != exact[0]["lm_loss"]
    _, weights, _ = checkpoint.load_model_state(checkpoint.iteration_folder(saves[f"bf16 {size}"], 6))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_one_process_equals_a_plain_loop_over_transformers(
    saves: dict[str, Path], tiny_data: Path, tiny_config: ModelConfig
) -> None:
    """Losses of 20 steps are those of LlamaForCausalLM, torch's AdamW and clipping, and nothing of ours but the data
    and the initial weights."""
    model = hf_model(tiny_config)
    own = theirs(tiny_config, dict(model.named_parameters()))
    with torch.no_grad():
        for name, tensor in initial_weights(tiny_config, 1234, 0.02):
            own[name].copy_(tensor)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    train = training_samples(tiny_data)
    for step, record in enumerate(metrics(saves["1,1,1"])[:20]):
        batch = torch.from_numpy(np.stack([train[8 * step + row] for row in range(8)]))
        logits = model(batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step / 4 if step < 4 else decay)
        optimizer.step()
        optimizer.zero_grad()
        assert record["lm_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("layout", [name for layouts in LAYOUTS.values() for name in layouts][1:])
def test_layouts_give_equal_losses(saves: dict[str, Path], layout: str) -> None:
    """Training loss, gradient norm and validation loss of 20 steps equal those of one process."""
    alone, spread = metrics(saves["1,1,1"]), metrics(saves[layout])
    assert len(alone) == len(spread) == 21
    for one, other in zip(alone, spread, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("layout", [name for layouts in LAYOUTS.values() for name in layouts])
def test_checkpoints_hold_the_whole_model(saves: dict[str, Path], layout: str, tiny_config: ModelConfig) -> None:
    """Each weight and moment is stored once, under the model's own name, at its whole and true size."""
    alone = checkpoint.load_model_state(checkpoint.iteration_folder(saves["1,1,1"], 20))[1]
    assert_holds(checkpoint.iteration_folder(saves[layout], 20), tiny_config, alone)


def assert_holds(folder: Path, config: ModelConfig, expected_weights: Mapping[str, torch.Tensor]) -> None:
    """The checkpoint has every weight and moment of the model and nothing else, and about these weights."""
    stored: Any = checkpoint._Reader(folder).read_metadata().state_dict_metadata
    expected = {
        f"{prefix}.{name}": shape
        for prefix in ("model", *(f"optimizer.{moment}" for moment in MOMENTS))
        for name, shape in shapes(config).items()
    }
    assert {name: entry.size for name, entry in stored.items()} == expected
    _, weights, _ = checkpoint.load_model_state(folder)
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-4, rtol=0)
