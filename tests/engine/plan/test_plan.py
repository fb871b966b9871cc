"""What the planner predicts is what the engine holds: counted on real ranks, and known for Llama-2-7B.

On CPUs attention runs in PyTorch's flash kernel, as on GPUs, so that what is kept is the same.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import weakref
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch.distributed.pipelining import ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.flags import arguments, model_flags
from megatron_llm.flags import parser as flags_parser
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import Llama, initial_weights
from megatron_llm.optim.adamw import MOMENTS
from megatron_llm.plan import __main__ as plan
from megatron_llm.plan import layouts as planning
from megatron_llm.plan import memory
from megatron_llm.plan.memory import Setting
from megatron_llm.weights import megatron
from run_contract.errors import InputsMissing, UserError
from tests.engine.engine_ranks import Ranks

GEOMETRY = (
    "--num_layers 4 --hidden_size 64 --num_attention_heads 8 --num_attention_heads_kv 4 --ffn_hidden_size 176 "
    "--max_position_embeddings 128 --no_tie_embed_logits"
)
RUN = (
    "--seq_length 128 --micro_batch_size 2 --train_iters 2 --lr 1e-3 --eval_iters 0 --num_workers 0 --log_interval 1 "
    "--split 1,0,0"
)
VOCABULARY = 131
TP, PP, SEQUENCE = "--tensor_model_parallel_size", "--pipeline_model_parallel_size", "--sequence_parallel"
VIRTUAL, RECOMPUTE = "--num_layers_per_virtual_pipeline_stage", "--recompute_granularity"
LAYOUTS: dict[int, dict[str, tuple[object, ...]]] = {
    1: {
        "alone": ("--global_batch_size", 4),
        "alone selective bf16": (RECOMPUTE, "selective", "--bf16"),
        "alone full bf16": (RECOMPUTE, "full", "--bf16"),
    },
    2: {
        "data": ("--global_batch_size", 8),
        "tensor": (TP, 2, SEQUENCE, "--global_batch_size", 4),
        "tensor bf16": (TP, 2, SEQUENCE, "--bf16"),
        "tensor selective": (TP, 2, SEQUENCE, RECOMPUTE, "selective"),
        "tensor full": (TP, 2, SEQUENCE, RECOMPUTE, "full"),
        "pipeline": (PP, 2, "--global_batch_size", 8),
        "interleaved full": (PP, 2, VIRTUAL, 1, RECOMPUTE, "full", "--global_batch_size", 8),
    },
    4: {
        "tensor and data": (TP, 2, SEQUENCE, "--bf16", "--global_batch_size", 8),
        "fewer heads than ranks": (TP, 4, "--num_attention_heads_kv", 2, "--global_batch_size", 4),
        "pipeline and data": (PP, 2, RECOMPUTE, "selective", "--global_batch_size", 8),
    },
}


class Live(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}
        self.watching, self.most = False, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        new = False
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = local(tensor).untyped_storage()
                if self.storages.get(storage._cdata, lambda: None)() is None:
                    self.storages[storage._cdata], new = weakref.ref(storage), True
        if self.watching and new:
            self.most = max(self.most, alive(self.storages))
        return result


def alive(storages: dict[int, Any]) -> int:
    """Bytes of those still there; what FSDP has emptied counts nothing."""
    found = {key: reference() for key, reference in storages.items()}
    for key in [key for key, storage in found.items() if storage is None]:
        del storages[key]
    return sum(storage.nbytes() for storage in found.values() if storage is not None)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Kept:
    """Bytes of distinct tensors, parameters not counted, that are kept when a backward pass begins."""

    def __init__(self) -> None:
        self.storages: dict[int, Any] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = weakref.ref(storage)
        return tensor

    def count(self) -> int:
        """Now; of FSDP's gathered weights only those of the whole model's module are still there."""
        models = [thing for thing in gc.get_objects() if issubclass(type(thing), Llama)]
        own = {local(parameter).untyped_storage()._cdata for model in models for parameter in model.parameters()}
        return alive({key: reference for key, reference in self.storages.items() if key not in own})


class Watch:
    """What a rank holds in a run of two updates: kept tensors in the first, the most of all in the second."""

    def __init__(self) -> None:
        self.live, self.kept, self.found = Live(), Kept(), dict[str, int]()
        self.step, self.backward = torch.optim.AdamW.step, torch.Tensor.backward

    def __enter__(self) -> Watch:
        torch.optim.AdamW.step, torch.Tensor.backward = self.at_step, self.at_backward  # type: ignore[assignment]
        self.live.__enter__()
        self.kept.hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.__exit__(None, None, None)
        torch.optim.AdamW.step, torch.Tensor.backward = self.step, self.backward  # type: ignore[method-assign]

    @property
    def at_backward(self) -> Any:
        def backward(tensor: torch.Tensor, **kwargs: Any) -> None:
            if "kept" not in self.found:
                self.found["kept"] = self.kept.count()
            self.backward(tensor, **kwargs)

        return backward

    @property
    def at_step(self) -> Any:
        def step(optimizer: Any) -> None:
            if self.live.watching:
                self.found["peak"] = self.live.most
                self.live.watching = False
            else:
                self.kept.hooks.__exit__()
                gc.collect()  # hooks that give tensors back as they are make cycles
                self.live.watching = True
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = [optimizer.state[parameter][name] for parameter in own for name in MOMENTS]
            held = {"weights": own, "gradients": [parameter.grad for parameter in own], "moments": moments}
            self.found |= {name: sum(local(t).nbytes for t in tensors) for name, tensors in held.items()}
            self.step(optimizer)

        return step


def watched(runs: list[list[str]]) -> None:
    """Several runs in one world; each rank prints what it held."""
    from megatron_llm.parallel import world as parallel
    from megatron_llm.process import signals
    from megatron_llm.training import assemble

    torch.set_num_threads(1)
    world = parallel.start()
    for argv in runs:
        args = flags_parser.parse(argv)
        sizes = args.parallel.tensor_model_parallel_size, args.parallel.pipeline_model_parallel_size
        mesh = parallel.layout_mesh(world.device, world.size, *sizes)
        with Watch() as watch:
            code = assemble.run(args, replace(world, mesh=mesh), signals.StopRequest())
        place = [mesh.get_local_rank(name) for name in ("pp", "dp", "tp")]
        print("watched", json.dumps({**watch.found, "code": code, "place": place}), flush=True)
    os._exit(0)


@dataclass(frozen=True)
class Held:
    """A run on real ranks: its prediction, and what each rank held."""

    setting: Setting
    args: arguments.Arguments
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> dict[str, Held]:
    """Every layout, run."""
    found: dict[str, Held] = {}
    for size, layouts in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(f"world-{size}")
        common = (*GEOMETRY.split(), *RUN.split(), "--data_path", tiny_data)
        argvs = {name: [*common, *more, "--save", folder / name] for name, more in layouts.items()}
        ranks = Ranks(folder, list(argvs.values()), size, {}, main=watched)
        assert ranks.wait() == [0] * size, ranks.text()
        lines = [
            [line for line in ranks.text(rank).splitlines() if line.startswith("watched ")] for rank in range(size)
        ]
        for (name, argv), own in zip(argvs.items(), zip(*lines, strict=True), strict=True):
            args = flags_parser.parse([str(part) for part in argv])
            setting = Setting.of(model_flags.config_from_flags(args.model, VOCABULARY), args, size)
            found[name] = Held(setting, args, [json.loads(line.removeprefix("watched ")) for line in own])
    return found


NAMES = [name for layouts in LAYOUTS.values() for name in layouts]


@pytest.mark.parametrize("name", NAMES)
def test_weights_gradients_and_moments_are_predicted_to_the_byte(held: dict[str, Held], name: str) -> None:
    """On every rank, at every layout; uneven slices of an odd vocabulary and copied key/value heads included."""
    run = held[name]
    assert {tuple(rank["place"]) for rank in run.ranks} == set(
        product(range(run.setting.pipeline), range(run.setting.data), range(run.setting.tensor))
    )
    for rank in run.ranks:
        pipeline, data, tensor = rank["place"]
        stages = run.setting.stages(pipeline)
        own = 4 * sum(memory.parameters(run.setting, stage, data, tensor) for stage in stages)
        assert (rank["weights"], rank["gradients"], rank["moments"]) == (own, own, 2 * own)
    for pipeline in range(run.setting.pipeline):
        predicted = memory.of_rank(run.setting, pipeline)
        assert predicted.weights == max(rank["weights"] for rank in run.ranks if rank["place"][0] == pipeline)


@pytest.mark.parametrize("name", [name for name in NAMES if "pipeline" not in name and "interleaved" not in name])
def test_what_is_kept_for_the_backward_pass_is_predicted(held: dict[str, Held], name: str) -> None:
    """Bytes of saved tensors of a micro-batch, within 1 % on every rank."""
    setting = held[name].setting
    (stage,) = setting.stages(0)
    predicted = memory.activations(setting, stage) + memory.logits(setting)[0]
    assert [rank["kept"] for rank in held[name].ranks] == pytest.approx([predicted] * len(held[name].ranks), rel=0.01)


def test_recomputing_keeps_less_on_tensor_ranks(held: dict[str, Held]) -> None:
    """With sequence parallelism: nothing recomputed > selective > full."""
    none, selective, full = (held[f"tensor{kind}"].ranks[1]["kept"] for kind in ("", " selective", " full"))
    assert none > 1.2 * selective > 1.2 * 4 * full


@pytest.mark.parametrize("name", NAMES)
def test_no_rank_needs_more_than_predicted(held: dict[str, Held], name: str) -> None:
    """The most of all tensors together in an update lies under the prediction, by at most a fifth."""
    for rank in held[name].ranks:
        predicted = memory.of_rank(held[name].setting, rank["place"][0]).peak
        assert rank["peak"] <= predicted <= 1.2 * rank["peak"], rank


@pytest.mark.parametrize("name", ["alone", "tensor and data", "pipeline"])
def test_a_checkpoint_is_as_large_as_predicted(held: dict[str, Held], name: str) -> None:
    """The folder that the run wrote, within 1 % and 20 kB; and the geometry is read from it."""
    run = held[name]
    folder = checkpoint.iteration_folder(run.args.checkpoint.save, 2)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert planning.checkpoints(run.setting, run.args).size == pytest.approx(size, rel=0.01, abs=20_000)
    assert plan.read_config(run.args.checkpoint.save) == run.setting.config


FALCON = {
    "use_rms_norm": False,
    "glu_activation": None,
    "parallel_attn": True,
    "tie_embed_logits": True,
    "ffn_hidden_size": 256,
}
MODELS: dict[str, dict[str, Any]] = {
    "tied Llama": {"tie_embed_logits": True},
    "Falcon 7B": FALCON | {"num_attention_heads_kv": 1},
    "Falcon 40B": FALCON | {"parallel_layernorm": True},
}


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_other_models_keep_what_is_predicted(
    tiny_config: ModelConfig, changes: dict[str, Any], dtype: torch.dtype, recompute: Any
) -> None:
    """Saved tensors of models with other norms, MLPs and branches, in both precisions, within 1 %."""
    config = replace(tiny_config, hidden_size=64, kv_channels=16, **changes)
    model, tokens, kept = Llama(config, recompute).to(dtype), torch.randint(0, VOCABULARY, (2, 65)), Kept()
    with kept.hooks:
        loss = model(tokens[:, :-1], tokens[:, 1:])
    assert loss.requires_grad
    setting = Setting(config, 1, 1, 1, config.num_layers, 2, 1, 64, dtype == torch.bfloat16, False, recompute)
    predicted = memory.activations(setting, setting.stages(0)[0]) + memory.logits(setting)[0]
    assert kept.count() == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize(("pipeline", "held", "micro_batches"), [(2, 2, 4), (4, 2, 8), (4, 3, 4), (2, 4, 6)])
def test_interleaved_stages_take_turns_as_in_torch(
    tiny_config: ModelConfig, pipeline: int, held: int, micro_batches: int
) -> None:
    """The order of forward and backward passes, from which follows how many are under way, is torch's."""
    config = replace(tiny_config, num_layers=pipeline * held)
    setting = Setting(config, 1, pipeline, 1, 1, 1, micro_batches, 16, False, False, None)
    schedule = SimpleNamespace(
        n_local_stages=held,
        microbatches_per_round=pipeline,
        pp_group_size=pipeline,
        _n_microbatches=micro_batches,
    )
    for rank in range(pipeline):
        actions = ScheduleInterleaved1F1B._calculate_single_rank_operations(schedule, rank)  # type: ignore[arg-type]
        theirs = [
            (action.computation_type.name == "FORWARD", action.stage_index // pipeline) for action in actions if action
        ]
        assert list(memory.order(setting, rank)) == theirs


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
}
PARAMETERS = 6_738_415_616
RECIPE = Path(__file__).parents[3] / "recipes" / "snakmodel-7b.yaml"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with nothing but Llama-2-7B's config.json."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """The planner's exit code and what it printed."""
    with mock.patch.object(sys, "argv", ["plan", *map(str, argv)]):
        code = plan.main()
    return code, capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """Its answer as JSON."""
    answer: dict[str, Any] = json.loads(planned(capsys, *argv, "--json")[1])
    return answer


def way(answer: dict[str, Any], tensor: int, pipeline: int = 1, held: int = 1) -> dict[str, Any]:
    """The row of a layout."""
    wanted = (tensor, pipeline, held)
    (found,) = (w for w in answer["ways"] if (w["tensor"], w["pipeline"], w["stages_per_rank"]) == wanted)
    return dict(found)


def test_llama_2_7b_on_four_gpus(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published run: 16 bytes a parameter over four tensor ranks are 27 GB, of 80 GB each, and fit."""
    answer = as_json(capsys, "--recipe", RECIPE, "--model", llama, "--gpus", 4, "--memory", "80GB")
    found = way(answer, 4)
    state = sum(found["memory"][part] for part in ("weights", "gradients", "moments"))
    assert answer["parameters"] == PARAMETERS
    assert state == pytest.approx(16 * PARAMETERS / 4, rel=1e-3)
    assert (found["asked"], found["fits"], found["data"], found["micro_batches"]) == (True, True, 1, 512)
    # a token and layer keep 2 bytes each of: two inputs of norms and two of matrices, queries, keys, values and the
    # attention's output, and three numbers of the MLP; all cut over four ranks
    layers = 32 * 4096 * 2 * (4 * 4096 + 4 * 4096 + 3 * 11008) // 4
    assert found["memory"]["activations"] == pytest.approx(layers, rel=0.02)
    # six operations a parameter and token but for the embedding's, and 12 a position, head channel, layer and token for
    # attention, whose forward pass selective recomputation repeats
    operations = 6 * (PARAMETERS - 32000 * 4096) + 16 * 32 * 4096 * 4096
    assert found["seconds_per_step"] == pytest.approx(512 * 4096 * operations / (4 * 0.4 * 312e12), rel=1e-3)
    assert found["days"] == pytest.approx(found["seconds_per_step"] * 12500 / 86400)
    assert answer["checkpoints"]["size"] == pytest.approx(12 * PARAMETERS, rel=1e-3)
    assert answer["checkpoints"]["kept"] == 25


def test_rows_are_sorted_and_explained(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What fits comes first and the fastest of it; each row says whether it is asked for, each impossible one why."""
    argv = ("--recipe", RECIPE, "--model", llama, "--gpus", 8, "--memory", "25GB", "--global_batch_size", 4)
    answer = as_json(capsys, *argv)
    order = [(not found["fits"], -found["tokens_per_second"]) for found in answer["ways"]]
    assert order == sorted(order)
    assert {found["fits"] for found in answer["ways"]} == {True, False}
    assert [found["tensor"] for found in answer["ways"] if found["asked"]] == [4]
    refused = {(r["tensor"], r["pipeline"]): r["reason"] for r in answer["refused"]}
    assert "--global_batch_size 4 is not a multiple of 8" in refused[1, 1]
    assert "a pipeline of 8 stages needs at least 8" in refused[1, 8]
    code, text = planned(capsys, *argv)
    assert code == 0
    assert sum(line.startswith("*") for line in text.splitlines()) == 1
    assert "not possible: TP 1 PP 8: " in text


def test_a_pipeline_stands_idle_at_both_ends(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages a rank divide the time in which the pipeline fills and empties, and only that."""
    answer = as_json(capsys, "--recipe", RECIPE, "--model", llama, "--gpus", 4, "--memory", "80GB")
    one, two, four = (way(answer, 1, 4, held)["seconds_per_step"] for held in (1, 2, 4))
    assert one / two == pytest.approx((512 + 3) / (512 + 3 / 2))
    assert one / four == pytest.approx((512 + 3) / (512 + 3 / 4))


def test_what_does_not_fit_is_made_to_fit(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the settings asked for are too large, the row names what helps, and with the suggestion it does fit."""
    argv = ["--recipe", RECIPE, "--model", llama, "--gpus", 4, "--memory", "40GB", "--micro_batch_size", 8]
    code, text = planned(capsys, *argv)
    asked = next(line for line in text.splitlines() if line.startswith("*"))
    assert code == 0
    assert " no " in asked
    assert "fits with --micro_batch_size" in asked
    changes = re.search(r"suggestion: (.*) \(", text)
    assert changes
    assert "micro_batch_size: " in changes[1]
    keys = dict(part.split(": ") for part in changes[1].split(", "))
    given = [part for key, value in keys.items() if value != "null" for part in (f"--{plan.KEYS[key]}", value)]
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["training"].update({key: None for key, value in keys.items() if value == "null"})
    changed = llama / "recipe.yaml"
    changed.write_text(yaml.safe_dump(recipe))
    code, text = planned(capsys, "--recipe", changed, *argv[2:], *given)
    assert " yes " in next(line for line in text.splitlines() if line.startswith("*"))
    assert "suggestion: as asked for" in text


def test_nothing_fits(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Then it says so, and exits 1."""
    code, text = planned(capsys, "--recipe", RECIPE, "--model", llama, "--gpus", 1, "--memory", "40GiB")
    assert code == 1
    assert "nothing fits" in text


def test_models_of_checkpoints_and_flags(
    tmp_path: Path, tiny_config: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a recipe: a Megatron checkpoint's geometry and the flags of finetune.py."""
    state = dict(initial_weights(tiny_config, 1, 0.02))
    megatron.save(tmp_path, "release", tiny_config, state, tp=1, pp=1, dtype=torch.float32, extra_args={})
    flags = "--seq_length 32 --micro_batch_size 2 --train_iters 90 --save_interval 10 --keep_last 2 --keep_every 50"
    answer = as_json(capsys, "--model", tmp_path, "--gpus", 2, "--memory", "2GB", *flags.split())
    assert answer["parameters"] == sum(weight.numel() for weight in state.values())
    stored = answer["checkpoints"]
    assert (stored["written"], stored["kept"], stored["most"]) == (9, 3, 4)
    assert not answer["suggestion"]["memory"]["pipeline"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--memory 40", "--memory 40: give a number above 0 and its unit"),
        ("--memory 0GB", "--memory 0GB: give a number above 0"),
        ("--memory 40Gb", r"its unit \(MB, GB, TB, MiB, GiB, TiB\), such as 40GB"),
        ("--memory 40GB --gpus 0", "--gpus 0: must be at least 1"),
        ("--memory 40GB --mfu 40", "--mfu 40: it is a share of the peak, at most 1"),
        ("--memory 40GB --bandwidth -1", "--bandwidth -1: must be above 0"),
        ("--memory 40GB", r"model.base: \$\{BASE\} is not set in the environment; set it, or name a folder"),
        ("--memory 40GB --recipe absent.yaml", "absent.yaml cannot be read: No such file"),
        ("--memory 40GB --micro_batch_size 0", "--micro_batch_size 0: must be at least 1"),
        ("--memory 40GB --hidden 3", "unrecognized arguments: --hidden 3"),
    ],
)
def test_mistakes_are_explained(monkeypatch: pytest.MonkeyPatch, argv: str, message: str) -> None:
    """The message names the flag or key, what was found and what to do."""
    monkeypatch.delenv("BASE", raising=False)
    monkeypatch.setattr(sys, "argv", ["plan", "--recipe", str(RECIPE), "--gpus", "4", *argv.split()])
    with pytest.raises(UserError, match=message):
        plan.main()


def test_a_base_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path) -> None:
    """The recipe's folder is taken when it is there; else the message says how to do without it."""
    monkeypatch.setattr(sys, "argv", ["plan", "--recipe", str(RECIPE), "--gpus", "4", "--memory", "80GB"])
    monkeypatch.setenv("BASE", str(llama))
    assert plan.main() == 0
    monkeypatch.setenv("BASE", str(tmp_path / "none"))
    with pytest.raises(InputsMissing, match=r"none does not exist; download the base model, or name a folder"):
        plan.main()
    (tmp_path / "wrong.yaml").write_text("model: {base: x}\ntraining: {train_iters: many}\n")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--recipe", str(tmp_path / "wrong.yaml")])
    with pytest.raises(UserError, match=r"wrong.yaml: training: argument --train_iters: invalid int value: 'many'"):
        plan.main()


def test_a_key_of_the_recipe_that_is_there_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path) -> None:
    """The planner refuses it as the launcher does: the last of the two would win without a word."""
    recipe = tmp_path / "twice.yaml"
    recipe.write_text(f"model: {{base: {llama}}}\ntraining:\n  lr: 1\n  lr: 2\n")
    monkeypatch.setattr(sys, "argv", ["plan", "--recipe", str(recipe), "--gpus", "4", "--memory", "80GB"])
    with pytest.raises(UserError, match=r"twice\.yaml .*the key 'lr' is there twice, in lines 3 and 4"):
        plan.main()
