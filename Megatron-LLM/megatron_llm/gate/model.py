"""Our model for the logits gate: whole in this process, or spread over ranks by the same code as in training.

When spread, each rank holds its pipeline stage and its part of every matrix, sharded and filled as in training. Hidden
states are passed from stage to stage, logits are gathered over the vocabulary, and the loss is the one that an
evaluation computes. Data-parallel ranks compute different batches at the same time, as they do in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llm.flags.arguments import Arguments
from megatron_llm.gate.compare import hidden_states
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import Llama, shapes
from megatron_llm.model.tensor_parallel import gather
from megatron_llm.parallel import layout_checks, sharding
from megatron_llm.parallel.world import World
from megatron_llm.training import assemble, pipeline
from megatron_llm.training.steps import Direct, Steps


class GateModel(Protocol):
    """The interface of our model that the gate needs."""

    @property
    def at_once(self) -> int:
        """Number of batches that are computed at the same time."""
        ...

    def logits(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The logits (b, s, vocab_size) of each of `at_once` batches (b, s) int64; meaningful on rank 0."""
        ...

    def losses(self, batches: Sequence[Tensor]) -> list[float | None]:
        """The mean cross-entropy of each of `at_once` batches (b, s + 1); None if it is to be computed from the
        logits."""
        ...

    def layers(self, tokens: Tensor) -> list[Tensor]:
        """The outputs of the embedding and of every layer, on the CPU; empty on all ranks but rank 0."""
        ...


class WholeModel:
    """The whole model in this process."""

    at_once = 1
    """See GateModel."""

    def __init__(self, config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> None:
        with torch.device("meta"):
            model = Llama(config)
        model.load_state_dict(dict(state), assign=True)
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.device = device

    def logits(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """See GateModel."""
        return [self.model(tokens.to(self.device)) for tokens in batches]

    def losses(self, batches: Sequence[Tensor]) -> list[float | None]:
        """See GateModel."""
        return [None for _ in batches]

    def layers(self, tokens: Tensor) -> list[Tensor]:
        """See GateModel."""
        outputs = hidden_states(_layers(self.model), lambda: self.logits([tokens]))
        return [output.cpu() for output in outputs]


@dataclass(frozen=True)
class ShardedModel:
    """This rank's part of the model. Every method is collective."""

    world: World
    model: Llama
    steps: Steps
    micro_batches: int
    dtype: torch.dtype
    """Data type of the hidden states between stages."""

    @property
    def at_once(self) -> int:
        """See GateModel: one batch for each data rank."""
        return self.world.data_size

    def logits(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """See GateModel; the same on every rank."""
        own = batches[self.world.data_rank].to(self.world.device)
        with torch.no_grad():
            out = self._forward(own)
            whole = _gathered(out, self.model) if self.model.part.last else None
            return [self._from_last_stage(number, whole, own) for number in range(self.at_once)]

    def _from_last_stage(self, data_rank: int, whole: Tensor | None, like: Tensor) -> Tensor:
        """The logits (b, s, V) of a data rank's batch, sent to every rank by the first rank that holds them."""
        pipeline, data, tensor = self.world.mesh.shape
        source = ((pipeline - 1) * data + data_rank) * tensor
        if whole is None or data_rank != self.world.data_rank:
            whole = torch.empty(*like.shape, self.model.config.vocab_size, dtype=self.dtype, device=like.device)
        dist.broadcast(whole, src=source)
        return whole

    def losses(self, batches: Sequence[Tensor]) -> list[float | None]:
        """See GateModel; the same on every rank."""
        own = batches[self.world.data_rank]
        with torch.no_grad():
            loss = self.steps.evaluate(iter([own] * self.micro_batches)).double().cpu()
        mine = torch.zeros(self.at_once, dtype=torch.float64)
        mine[self.world.data_rank] = loss / self.world.mesh["tp"].size()
        dist.all_reduce(mine)
        return [float(one) for one in mine]

    def layers(self, tokens: Tensor) -> list[Tensor]:
        """See GateModel."""
        tp = self.model.tp
        outputs = hidden_states(_layers(self.model), lambda: self.logits([tokens] * self.at_once))
        outputs = [(gather(output, tp) if tp.sequence else output).cpu() for output in outputs]
        stages: list[list[Tensor]] = [[] for _ in range(self.world.size)]
        dist.gather_object(outputs, stages if self.world.rank == 0 else None)
        copies = self.world.size // self.world.mesh["pp"].size()
        return [output for stage in stages[::copies] for output in stage]

    def _forward(self, tokens: Tensor) -> Tensor:
        """Run this rank's layers on tokens, or on the previous stage's output, and send the result to the next
        stage."""
        mesh, part, tp = self.world.mesh["pp"], self.model.part, self.model.tp
        stage, x = mesh.get_local_rank(), tokens
        if not part.first:
            length = tokens.shape[1] // (tp.size if tp.sequence else 1)
            size = (len(tokens), length, self.model.config.hidden_size)
            x = torch.empty(size, dtype=self.dtype, device=tokens.device)
            dist.recv(x, group=mesh.get_group(), group_src=stage - 1)
        out: Tensor = self.model(x)
        if not part.last:
            dist.send(out.contiguous(), group=mesh.get_group(), group_dst=stage + 1)
        return out


def _layers(model: Llama) -> list[torch.nn.Module]:
    """The modules of this process whose outputs are compared."""
    return [*([model.embedding] if model.part.first else []), *model.layers.values()]


def _gathered(logits: Tensor, model: Llama) -> Tensor:
    """Gather the parts of the vocabulary of all tensor ranks, of which the last may be smaller. Collective."""
    tp, count = model.tp, model.config.vocab_size
    if tp.size == 1:
        return logits.contiguous()
    own = logits.new_zeros(*logits.shape[:-1], -(-count // tp.size))
    own[..., : logits.shape[-1]] = logits
    parts = [torch.empty_like(own) for _ in range(tp.size)]
    dist.all_gather(parts, own, group=tp.group)
    return torch.cat(parts, -1)[..., :count].contiguous()


def training_arguments(
    *, rows: int, length: int, tensor: int, pipeline: int, sequence: bool, bf16: bool, load: Path
) -> Arguments:
    """The arguments with which training would spread a model in this way."""
    return Arguments.of(
        {
            "save": load,
            "seq_length": length,
            "micro_batch_size": rows,
            "train_iters": 1,
            "lr": 0.0,
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "sequence_parallel": sequence,
            "bf16": bf16,
        }
    )


def spread(config: ModelConfig, state: Mapping[str, Tensor], args: Arguments, world: World) -> ShardedModel:
    """Build this rank's part and fill it with weights that only rank 0 holds.

    Collective. Raises UserError on all ranks.
    """
    layout_checks.check(config, args.parallel, args.model.seq_length, world.size)
    _, micro_batches = layout_checks.batch_layout(args.parallel, args.training, world.size)
    models = assemble.models_of(args.model, args.parallel, args.precision, world, config)
    (model,) = models.values()
    names = shapes(config)
    sharding.fill(sharding.parameters_by_name([model]), names, world, ((name, state[name]) for name in names))
    model.eval().requires_grad_(False)
    shape = args.training.micro_batch_size, args.model.seq_length
    steps: Steps = (
        Direct(model, micro_batches, world)
        if args.parallel.pipeline_model_parallel_size == 1
        else pipeline.Pipelined(models, world, micro_batches, shape, args.precision.compute_dtype())
    )
    return ShardedModel(world, model, steps, micro_batches, args.precision.compute_dtype())
