"""Pipeline parallelism: which layers a rank holds, and how a global batch passes through the stages of all ranks.

The schedule is 1F1B where a rank holds one stage, and interleaved 1F1B where it holds several. Every stage passes on
its hidden states. The last stage returns the loss itself, so that logits are freed with their micro-batch. A tied
embedding belongs to the first stage; the last stage computes with a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from megatron_llm.flags.arguments import ParallelFlags
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import Llama, StageLayers
from megatron_llm.parallel.sharding import free_gathered_weights
from megatron_llm.parallel.world import World
from megatron_llm.training.document_masks import NONE, Masks
from megatron_llm.training.steps import Intake


def stages(config: ModelConfig, flags: ParallelFlags, world: World) -> dict[int, StageLayers]:
    """This rank's stages by their number in the pipeline: every n-th one, where n is the pipeline-parallel size."""
    size, rank = flags.pipeline_model_parallel_size, world.mesh.get_local_rank("pp")
    depth = flags.num_layers_per_virtual_pipeline_stage or config.num_layers // size
    count = config.num_layers // depth
    return {
        stage: StageLayers(range(stage * depth, (stage + 1) * depth), first=stage == 0, last=stage == count - 1)
        for stage in range(rank, count, size)
    }


class TiedEmbedding:
    """A tied embedding: the first stage holds the weight, and the last stage's output layer is a copy on another rank.

    The copy receives the embedding's values before it is used, and its gradient is added to the embedding's gradient.
    So the gradient norm, the optimizer and the checkpoints see one weight only, the embedding. Without tied embeddings
    all methods do nothing.
    """

    def __init__(self, models: Sequence[Llama], group: dist.ProcessGroup) -> None:
        """models: this rank's stages in pipeline order; group: the ranks of the pipeline."""
        tied, self.group, self.stale = models[0].config.tie_embed_logits, group, True
        self.embedding = models[0].embedding.weight if tied and models[0].part.first else None
        self.copy = models[-1].lm_head.weight if tied and models[-1].part.last else None

    @torch.no_grad()
    def share(self) -> None:
        """Send the embedding's values to the copy if they may have changed.

        The first and the last rank must call it together.
        """
        if not self.stale:
            return
        self.stale = False
        if self.embedding is not None:
            self._send(self.embedding, self.group.size() - 1)
        if self.copy is not None:
            _slice(self.copy).copy_(self._received(self.copy, 0))

    @torch.no_grad()
    def collect(self) -> None:
        """Add the copy's gradient to the embedding's, before an update.

        The first and the last rank must call it together.
        """
        self.stale = True
        if self.copy is not None:
            assert self.copy.grad is not None
            self._send(self.copy.grad, 0)
            self.copy.grad = None
        if self.embedding is not None:
            assert self.embedding.grad is not None
            _slice(self.embedding.grad).add_(self._received(self.embedding, self.group.size() - 1))

    def _send(self, tensor: Tensor, rank: int) -> None:
        if (own := _slice(tensor)).numel():
            dist.send(own.contiguous(), group=self.group, group_dst=rank)

    def _received(self, like: Tensor, rank: int) -> Tensor:
        own = torch.empty_like(_slice(like), memory_format=torch.contiguous_format)
        if own.numel():
            dist.recv(own, group=self.group, group_src=rank)
        return own


def _slice(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Pipelined:
    """The steps of a rank that holds only some of the layers; see steps.Steps."""

    def __init__(
        self,
        models: Mapping[int, Llama],
        world: World,
        micro_batches: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        masks: Masks = NONE,
    ) -> None:
        """models: this rank's stages by number, with their values. micro_batches: how many each rank computes per full
        global batch; the attribute changes with the batch size. shape: (b, s) of a micro-batch's tokens. dtype: the
        data type of the hidden states that stages exchange."""
        self.models, self.micro_batches, self.device = list(models.values()), micro_batches, world.device
        self.intake = Intake(self.models[0].config.vocab_size, world, masks)
        self.tied = TiedEmbedding(self.models, world.mesh.get_group("pp"))
        self.tied.share()
        self.loss_scale = 1.0
        count = world.mesh["pp"].size() * len(models)
        self.stages = [_stage(model, number, count, shape, dtype, world) for number, model in models.items()]
        self.schedules: dict[int, Schedule1F1B | ScheduleInterleaved1F1B] = {}
        """The latest schedule, by its number of micro-batches, which grows with --rampup_batch_size."""

    @property
    def schedule(self) -> Schedule1F1B | ScheduleInterleaved1F1B:
        """The order of the stages' work for the next global batch."""
        count = self.micro_batches
        if count not in self.schedules:
            own = self.stages
            self.schedules = {
                count: Schedule1F1B(own[0], count, loss_fn=self._share, scale_grads=False)
                if len(own) == 1
                else ScheduleInterleaved1F1B([*own], count, loss_fn=self._share, scale_grads=False)
            }
        return self.schedules[count]

    def train(self, batches: Iterator[Tensor]) -> Tensor:
        """See steps.Steps."""
        losses: list[Tensor] = []
        tokens, named = self._global_batch(batches)
        self.tied.share()
        self.schedule.step(*tokens, **named, losses=losses, return_outputs=False)
        self.tied.collect()
        return self._sum(losses)

    def evaluate(self, batches: Iterator[Tensor]) -> Tensor:
        """See steps.Steps."""
        losses: list[Tensor] = []
        tokens, named = self._global_batch(batches)
        self.tied.share()
        self.schedule.eval(*tokens, **named, losses=losses, return_outputs=False)
        return self._sum(losses)

    def check(self) -> None:
        """See steps.Steps."""
        self.intake.check()

    def free(self) -> None:
        """See steps.Steps."""
        for model in self.models:
            free_gathered_weights(model)

    def _global_batch(self, batches: Iterator[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The inputs of the pipeline for one global batch, which the schedule cuts into micro-batches.

        First the positional inputs of this rank's first stage, which are empty unless that is the first stage of the
        model; then the named inputs, which every stage receives.
        """
        tokens, targets, named = self.intake.together(batches, self.micro_batches)
        return ((tokens,) if self.models[0].part.first else ()), {"target": targets, "targets": targets, **named}

    def _share(self, loss: Tensor, _targets: Tensor) -> Tensor:
        """The contribution of a micro-batch to the mean loss of the global batch, times the loss scale."""
        return loss / self.micro_batches * self.loss_scale

    def _sum(self, losses: list[Tensor]) -> Tensor:
        total = torch.stack(losses).detach().sum() if losses else torch.zeros((), device=self.device)
        return self.intake.judged(total / self.loss_scale)


def _stage(
    model: Llama, number: int, count: int, shape: tuple[int, int], dtype: torch.dtype, world: World
) -> PipelineStage:
    """A pipeline stage with its input and output shapes given, so that torch need not find them by a trial run."""
    length = shape[1] // (model.tp.size if model.tp.sequence else 1)
    tokens = torch.empty(*shape, dtype=torch.int64, device="meta")
    size = (shape[0], length, model.config.hidden_size)
    hidden = torch.empty(size, dtype=dtype, device="meta", requires_grad=True)
    loss = torch.empty((), device="meta", requires_grad=True)
    return PipelineStage(
        model,
        number,
        count,
        world.device,
        input_args=tokens if model.part.first else hidden,
        output_args=loss if model.part.last else hidden,
        group=world.mesh.get_group("pp"),
    )
