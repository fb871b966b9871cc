"""Forecasts the GPU memory in bytes that a rank of a training run needs, by part, before anything is started.

Memory that stays allocated (weights, gradients, Adam's moments) is counted on the model itself, which is built without
memory and cut as in parallel/sharding.py. Activation memory follows, tensor by tensor, what model/llama.py,
model/tensor_parallel.py and torch's FSDP2 and pipeline keep for the backward pass. The idea of such a count is that of
Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models" (arXiv:2205.05198), section 4;
the numbers are this engine's.

Attention is assumed to run in a flash kernel, which keeps queries, keys, values, outputs and one fp32 number per
position and head. PyTorch's fallback kernel would also keep scores of length x length per head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from megatron_llm.flags.arguments import Arguments
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import Llama, StageLayers
from megatron_llm.model.recompute import Recompute
from megatron_llm.model.tensor_parallel import TensorParallel
from megatron_llm.parallel import layout_checks

FLOAT, INT64 = 4, 8
"""Bytes per fp32 number and per token."""
Piece = tuple[torch.Size, int | None]
"""The shape of a parameter, and the dimension in which tensor ranks cut it, or None."""


@dataclass(frozen=True)
class Setting:
    """The setting of a training: a model, and how its training is spread over ranks."""

    config: ModelConfig
    tensor: int
    pipeline: int
    data: int
    depth: int
    """Number of layers per pipeline stage."""
    micro_batch: int
    micro_batches: int
    """Number of micro-batches that a rank computes per update."""
    length: int
    half: bool
    """Whether the computation is in bf16 or fp16."""
    sequence: bool
    """Whether sequence parallelism is used."""
    recompute: Recompute
    documents: bool = False
    """Whether attention is limited to documents, so that each sample has a mask of its own."""

    @classmethod
    def of(cls, config: ModelConfig, args: Arguments, ranks: int) -> Setting:
        """The setting that the flags give on `ranks` ranks. Raises UserError when they do not fit together."""
        micro_batches = layout_checks.batch_layout(args.parallel, args.training, ranks)[1]
        layout_checks.check(config, args.parallel, args.model.seq_length, ranks)
        tensor, pipeline = args.parallel.tensor_model_parallel_size, args.parallel.pipeline_model_parallel_size
        return cls(
            config=config,
            tensor=tensor,
            pipeline=pipeline,
            data=ranks // (tensor * pipeline),
            depth=args.parallel.num_layers_per_virtual_pipeline_stage or config.num_layers // pipeline,
            micro_batch=args.training.micro_batch_size,
            micro_batches=micro_batches,
            length=args.model.seq_length,
            half=args.precision.bf16 or args.precision.fp16,
            sequence=args.parallel.sequence_parallel and tensor > 1,
            recompute=args.model.recompute_granularity,
            documents=args.data.reset_attention_mask,
        )

    @property
    def width(self) -> int:
        """Bytes per number in the precision of the computation."""
        return 2 if self.half else FLOAT

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered or converted before use; a single data rank in fp32 needs neither."""
        return self.data > 1 or self.half

    @property
    def tokens(self) -> int:
        """Number of tokens of a micro-batch."""
        return self.micro_batch * self.length

    @property
    def hidden(self) -> int:
        """Number of elements of a hidden state that a rank holds between the cut matrices."""
        return self.tokens * self.config.hidden_size // (self.tensor if self.sequence else 1)

    @property
    def held_stages(self) -> int:
        """Number of pipeline stages per rank; more than one means an interleaved pipeline."""
        return self.config.num_layers // (self.depth * self.pipeline)

    def stages(self, rank: int) -> list[StageLayers]:
        """The stages of a pipeline rank, as training.pipeline.stages assigns them."""
        count = self.config.num_layers // self.depth
        return [
            StageLayers(range(n * self.depth, (n + 1) * self.depth), first=n == 0, last=n == count - 1)
            for n in range(rank, count, self.pipeline)
        ]


@dataclass(frozen=True)
class Memory:
    """The memory of one rank in bytes, by part, each at its own peak."""

    weights: int
    """This rank's slice of the fp32 master weights; gradients and moments are counted likewise."""
    gradients: int
    moments: int
    gathered: int
    """Weights of whole layers, gathered over the data ranks in the precision of the computation."""
    accumulated: int
    """Additional gradient memory with several micro-batches, because only the last one reduces over the data ranks."""
    activations: int
    """Tensors that are kept for the backward passes of all micro-batches in progress."""
    pipeline: int
    """Hidden states and gradients that were received from other stages."""
    working: int
    """The larger of two: working memory of one layer's backward pass with its gradients, or of logits and loss."""
    micro_batches: int

    @property
    def peak(self) -> int:
        """The memory at the fullest moment. With one micro-batch, gradients replace activations as these are freed."""
        both = self.gradients + self.activations, max(self.gradients, self.activations)
        step = both[self.micro_batches == 1] + self.gathered + self.accumulated + self.working
        return self.weights + self.moments + self.pipeline + step


@cache
def pieces(config: ModelConfig, tensor: int, first: bool, last: bool) -> tuple[list[Piece], list[Piece]]:
    """The parameters of one layer, and those that a stage has besides its layers."""
    with torch.device("meta"):
        model = Llama(config, None, StageLayers(range(1), first, last), TensorParallel(size=tensor))
    layer: list[Piece] = []
    ends: list[Piece] = []
    for name, module in model.named_modules():
        cut = getattr(module, "split", None) if tensor > 1 else None
        part = layer if name.startswith("layers.") else ends
        part += [(parameter.shape, cut) for parameter in module.parameters(recurse=False)]
    return layer, ends


def _chunk(size: int, parts: int, index: int) -> int:
    """Number of rows of a rank if `size` rows are cut as torch.chunk does: equal parts, fewer at the end."""
    step = -(-size // parts)
    return max(0, min(step, size - index * step))


def _slice(piece: Piece, s: Setting, data_rank: int, tensor_rank: int, *, whole: bool) -> int:
    """Number of elements of a parameter that a rank holds; with `whole`, including those of the other data ranks."""
    shape, cut = list(piece[0]), piece[1]
    if cut is not None:
        shape[cut] = _chunk(shape[cut], s.tensor, tensor_rank)
    if not whole:
        across = 1 if cut == 0 else 0
        shape[across] = _chunk(shape[across], s.data, data_rank)
    return torch.Size(shape).numel()


def parameters(s: Setting, stage: StageLayers, data_rank: int = 0, tensor_rank: int = 0, *, whole: bool = False) -> int:
    """Number of elements of a stage's parameters that a rank holds; with `whole`, as gathered over the data ranks."""
    layer, ends = (
        sum(_slice(piece, s, data_rank, tensor_rank, whole=whole) for piece in part)
        for part in pieces(s.config, s.tensor, stage.first, stage.last)
    )
    return len(stage.layers) * layer + ends


def _norm(s: Setting, *, kept: bool) -> int:
    """Bytes that a norm keeps besides its input; 0 if it is recomputed."""
    statistics = FLOAT * s.hidden // s.config.hidden_size
    if not kept:
        return 0
    if not s.config.use_rms_norm:
        return 2 * statistics
    return statistics + s.width * s.hidden + (FLOAT * s.hidden if s.half else 0)  # normed; in bf16 also its fp32 input


def _layer(s: Setting, recompute: Recompute) -> int:
    """Bytes that a layer keeps per micro-batch."""
    c, hidden = s.config, s.width * s.hidden
    if recompute == "full":
        return hidden
    plain, parallel = recompute != "selective", c.parallel_attn
    norms = 2 if not parallel or c.parallel_layernorm else 1
    own_input = s.half and c.use_rms_norm and plain  # then the norm keeps an fp32 copy instead
    inputs = 0 if own_input else hidden * (1 if parallel else 2)
    queries = s.tokens * c.num_attention_heads // s.tensor
    heads = queries + s.tokens * max(1, c.num_attention_heads_kv // s.tensor)
    attention = s.width * 2 * heads * c.kv_channels + (FLOAT * queries if plain else 0)
    inner = s.width * s.tokens * c.ffn_hidden_size // s.tensor
    mlp = inner * ((4 if plain else 3) if c.glu_activation else 2)
    return inputs + norms * (hidden + _norm(s, kept=plain)) + attention + mlp


def activations(s: Setting, stage: StageLayers) -> int:
    """Bytes that a stage keeps per micro-batch until its backward pass, without logits and loss."""
    c, hidden = s.config, s.width * s.hidden
    total = len(stage.layers) * _layer(s, s.recompute)
    total += 2 * s.width * s.length * c.kv_channels  # cosines and sines
    windowed = c.sliding_window_size is not None and c.sliding_window_size < s.length
    masks = s.micro_batch if s.documents else int(windowed)
    total += masks * s.width * s.length**2
    if stage.first:
        total += s.tokens * (INT64 + (INT64 + 1 if s.tensor > 1 else 0))
    elif not (s.half and c.use_rms_norm and s.recompute not in ("selective", "full")):
        total -= hidden  # the first layer's input is counted with what is received
    if stage.last:
        total += _norm(s, kept=True) + hidden + (0 if s.half and c.use_rms_norm else hidden)
    else:
        total += hidden  # what was sent to the next stage stays too
    return total


def logits(s: Setting) -> tuple[int, int]:
    """Bytes of logits and loss of a micro-batch: those kept for the backward pass, and the peak."""
    vocabulary = -(-s.config.vocab_size // s.tensor)
    numbers = s.tokens * vocabulary
    kept = FLOAT * numbers + s.tokens * INT64
    beside = 2 * FLOAT if s.tensor == 1 else FLOAT + (s.width if s.half else 0)
    return kept, kept + beside * numbers


def order(s: Setting, rank: int) -> Iterator[tuple[bool, int]]:
    """Yield (forward?, number of the stage) for everything that a pipeline rank computes per update, in order.

    1F1B and interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473, section 2.2), as torch implements them.
    """
    held, total = s.held_stages, s.held_stages * s.micro_batches
    later = s.pipeline - 1 - rank
    ahead = min(total, later if held == 1 else (held - 1) * s.pipeline + 2 * later)
    for step in range(total + ahead):
        if step < total:
            yield True, step // s.pipeline % held
        if step >= ahead:
            yield False, held - 1 - (step - ahead) // s.pipeline % held


def _under_way(s: Setting, rank: int) -> int:
    """Bytes kept for backward passes, at the moment when they are most."""
    stages = s.stages(rank)
    kept = [activations(s, stage) for stage in stages]
    now = most = 0
    for forward, number in order(s, rank):
        now += kept[number] if forward else -kept[number]
        most = max(most, now)
    return most


def _layer_working(s: Setting, ends: int, layer: int) -> int:
    """Bytes of temporary memory in the backward pass of a layer; at its beginning everything else is still allocated.

    ends, layer: number of elements of the parameters of a rank's embedding and head, and of one layer, both gathered.
    """
    c = s.config
    inner = s.width * s.tokens * c.ffn_hidden_size // s.tensor
    matrices = 2 * inner + (3 if s.sequence else 2) * s.width * s.tokens * c.hidden_size
    norm = (4 * FLOAT + s.width) * s.hidden
    again = {"full": _layer(s, None) - s.width * s.hidden, "selective": inner}.get(s.recompute or "", 0)
    into = s.half or s.micro_batches == 1 or not s.sharded  # else each is added to the accumulated ones at once
    fresh = s.width * (ends + layer) if into else 0
    # memory to reduce gradients, which is needed when a layer's activations are freed
    buffer = s.sharded * max(0, FLOAT * layer - _layer(s, s.recompute))
    ahead = 2 * s.width * layer if s.data > 1 else 0  # the next layer's weights, being gathered
    return max(matrices, norm) + again + fresh + buffer + ahead


def of_rank(s: Setting, rank: int) -> Memory:
    """The memory of a pipeline rank, for its first data and tensor rank, whose slices are the largest."""
    stages = s.stages(rank)
    own, whole = (sum(parameters(s, stage, whole=whole) for stage in stages) for whole in (False, True))
    layer = parameters(s, StageLayers(range(1), first=False, last=False), whole=True)
    ends = whole - layer * s.depth * len(stages)
    # torch's stages have a buffer for each micro-batch that they receive, and keep one gradient until it is sent
    buffers = sum((not stage.first) * (s.micro_batches + 1) + (not stage.last) * s.micro_batches for stage in stages)
    gathered = whole if s.pipeline > 1 else ends + layer  # a pipeline stage keeps its layers gathered
    return Memory(
        weights=FLOAT * own,
        gradients=FLOAT * own,
        moments=2 * FLOAT * own,
        gathered=s.sharded * s.width * gathered,
        accumulated=FLOAT * (whole - own) if s.micro_batches > 1 else 0,
        activations=_under_way(s, rank),
        pipeline=buffers * s.width * s.hidden,
        working=max(_layer_working(s, ends, layer), logits(s)[1] if stages[-1].last else 0),
        micro_batches=s.micro_batches,
    )


def fullest(s: Setting) -> Memory:
    """The memory of the pipeline rank that needs most."""
    return max((of_rank(s, rank) for rank in range(s.pipeline)), key=lambda memory: memory.peak)
