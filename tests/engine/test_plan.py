"""What the planner predicts is what the engine allocates: counted on real ranks, and by hand for Llama-2-7B."""

from __future__ import annotations

import gc
import json
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_ranks import Ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from megatron_llm import arguments, memory
from megatron_llm.memory import Setting
from megatron_llm.model import Llama
from megatron_llm.model_config import ModelConfig
from megatron_llm.optimizer import MOMENTS

GEOMETRY = (
    "--num_layers 4 --hidden_size 64 --num_attention_heads 8 --num_attention_heads_kv 4 --ffn_hidden_size 176 "
    "--max_position_embeddings 128 --no_tie_embed_logits"
)
RUN = (
    "--seq_length 128 --micro_batch_size 2 --train_iters 2 --lr 1e-3 --eval_iters 0 --num_workers 0 --log_interval 1 "
    "--split 1,0,0"
)
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
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        if self.watching:
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
        models = [thing for thing in gc.get_objects() if isinstance(thing, Llama)]
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
            if not self.live.watching:
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
    from megatron_llm import parallel, signals, train

    torch.set_num_threads(1)
    world = parallel.start()
    for argv in runs:
        args = arguments.parse(argv)
        sizes = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        mesh = parallel.layout_mesh(world.device, world.size, *sizes)
        with Watch() as watch:
            code = train.run(args, replace(world, mesh=mesh), signals.StopRequest())
        place = [mesh.get_local_rank(name) for name in ("pp", "dp", "tp")]
        print("watched", json.dumps({**watch.found, "code": code, "place": place}), flush=True)
    os._exit(0)
