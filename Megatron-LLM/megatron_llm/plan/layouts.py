"""Evaluates every way to spread a training run over a number of GPUs: its memory, step time and checkpoints.

Floating-point operations are counted as for MFU (Chowdhery et al. 2022, "PaLM", appendix B): 2 per token and matrix
parameter, and 4 x length x heads x head size per token and layer for attention, without subtracting its causal half. A
backward pass takes twice as many as a forward pass. Recomputation is added. In a pipeline, an update takes as long as
its micro-batches plus (stages - 1) / (stages per rank) more (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).
Communication between ranks, Adam's step and the loading of data are not counted; the MFU is meant to include them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_llm.flags.arguments import Arguments
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.flops import parameter_count
from megatron_llm.model.llama import StageLayers
from megatron_llm.model.recompute import Recompute
from megatron_llm.plan import memory
from megatron_llm.plan.memory import FLOAT, Memory, Setting
from run_contract.errors import UserError

CONTEXT, FRAGMENTS = 10**9, 0.05
"""The reserve, which is assumed and not measured.

First the bytes for CUDA's context and NCCL; then, as a share of the tensors, the memory that the allocator cannot use
because of fragmentation.
"""
SLICE_BYTES, STATE_BYTES = 1850, 10_000
"""Measured sizes in bytes: what torch's checkpoint files add per slice of a tensor, and state.json."""
HELD_STAGES = (1, 2, 4)
"""Numbers of pipeline stages per rank that are considered."""
AMOUNTS: tuple[Recompute, ...] = (None, "selective", "full")
"""The amounts of recomputation, in ascending order."""
FLAGS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "micro_batch_size",
    "recompute_granularity",
)
"""The flags in which ways can differ."""
Layout = tuple[int, int, int]
"""A layout: number of tensor ranks, of pipeline ranks, and of stages per pipeline rank."""


def operations(s: Setting, stage: StageLayers) -> float:
    """Floating-point operations of a stage's forward and backward pass over one micro-batch, including recomputation.

    They are counted over all tensor ranks of the stage.
    """
    c, layers = s.config, len(stage.layers)
    layer, _ = memory.pieces(c, 1, False, False)
    matrices = 2.0 * s.tokens * layers * sum(shape.numel() for shape, _ in layer if len(shape) > 1)
    seen = min(s.length, c.sliding_window_size or s.length)
    cores = 4.0 * s.tokens * layers * seen * c.num_attention_heads * c.kv_channels
    head = 2.0 * s.tokens * c.vocab_size * c.hidden_size if stage.last else 0.0
    again = {"selective": cores, "full": matrices + cores}.get(s.recompute or "", 0.0)
    return 3 * (matrices + cores + head) + again


def step_seconds(s: Setting, rate: float) -> float:
    """Seconds per update, with devices that do `rate` operations per second; the slowest pipeline rank sets the
    pace."""
    slowest = max(sum(operations(s, stage) for stage in s.stages(rank)) for rank in range(s.pipeline))
    return (s.micro_batches + (s.pipeline - 1) / s.held_stages) * slowest / (s.tensor * rate)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints that a run writes."""

    size: int
    """Size of one checkpoint in bytes."""
    written: int
    """Number of checkpoints written in the whole run."""
    kept: int
    """Number of checkpoints at the end of the run."""

    @property
    def most(self) -> int:
        """Largest number at one time: an old checkpoint is deleted only after the next one has been verified."""
        return min(self.written, self.kept + 1)


def checkpoints(s: Setting, args: Arguments) -> Checkpoints:
    """The checkpoints of a run with these --save_interval, --keep_last and --keep_every: fp32 weights and moments."""
    layer, ends = memory.pieces(s.config, s.tensor, True, True)
    cuts = [cut for _, cut in (*layer * s.config.num_layers, *ends)]
    slices = sum(s.data * (1 if cut is None else s.tensor) for cut in cuts)
    size = 3 * (FLOAT * parameter_count(s.config) + SLICE_BYTES * slices) + STATE_BYTES
    last, interval = args.training.train_iters, args.checkpoint.save_interval or args.training.train_iters
    saved = [*range(interval, last, interval), last]
    newest = saved if args.checkpoint.keep_last is None else saved[-args.checkpoint.keep_last :]
    forever = [n for n in saved if args.checkpoint.keep_every and n % args.checkpoint.keep_every == 0]
    return Checkpoints(size, len(saved), len({*newest, *forever}))


@dataclass(frozen=True)
class LayoutForecast:
    """One way to run the training, with its forecast."""

    args: Arguments
    setting: Setting
    memory: Memory
    """Memory of the fullest rank."""
    seconds: float
    """Seconds per update."""
    room: int
    """Memory of a GPU in bytes."""

    @property
    def reserve(self) -> int:
        """Number of bytes of a GPU that are not available for tensors."""
        return CONTEXT + int(FRAGMENTS * self.memory.peak)

    @property
    def total(self) -> int:
        """Number of bytes needed per GPU."""
        return self.memory.peak + self.reserve

    @property
    def fits(self) -> bool:
        """Whether the training fits into a GPU."""
        return self.total <= self.room

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs together."""
        return self.setting.tokens * self.setting.micro_batches * self.setting.data / self.seconds

    @property
    def days(self) -> float:
        """Number of days for all iterations."""
        return self.seconds * self.args.training.train_iters / 86400

    @property
    def layout(self) -> Layout:
        """The layout into which the model is cut."""
        return self.setting.tensor, self.setting.pipeline, self.setting.held_stages

    @property
    def order(self) -> tuple[Any, ...]:
        """A sort key; the smallest is the best way.

        First come forecasts that fit, then the fastest, then those that cut the model least and so communicate least.
        """
        tensor, pipeline, held = self.layout
        return not self.fits, round(1 / self.tokens_per_second, 9), tensor * pipeline, pipeline, held


@dataclass(frozen=True)
class PlanRequest:
    """The question to answer: a model, its training as requested, and the GPUs."""

    config: ModelConfig
    args: Arguments
    gpus: int
    room: int
    """Memory of each GPU in bytes."""
    rate: float
    """Operations per second that each GPU reaches."""

    @property
    def layout(self) -> Layout:
        """The layout that the recipe or the flags name."""
        pipeline, depth = (
            self.args.parallel.pipeline_model_parallel_size,
            self.args.parallel.num_layers_per_virtual_pipeline_stage,
        )
        held = self.config.num_layers // (pipeline * depth) if depth else 1
        return self.args.parallel.tensor_model_parallel_size, pipeline, held

    def forecast(self, args: Arguments) -> LayoutForecast:
        """The way with these flags. Raises UserError when it cannot be run."""
        setting = Setting.of(self.config, args, self.gpus)
        return LayoutForecast(args, setting, memory.fullest(setting), step_seconds(setting, self.rate), self.room)

    def forecasts(self) -> tuple[list[LayoutForecast], dict[Layout, str]]:
        """All layouts with the other settings as requested, best first; and those that cannot be run, with the
        reason."""
        found: list[LayoutForecast] = []
        refused: dict[Layout, str] = {}
        for layout in self._layouts():
            try:
                found.append(self.forecast(self._spread(layout)))
            except UserError as error:
                if layout[2] == 1 or layout == self.layout:
                    refused[layout] = str(error)
        return sorted(found, key=lambda one: one.order), refused

    def _layouts(self) -> Iterator[Layout]:
        for tensor in _divisors(self.gpus):
            for pipeline in _divisors(self.gpus // tensor):
                for held in HELD_STAGES if pipeline > 1 else (1,):
                    if held == 1 or self.config.num_layers % (pipeline * held) == 0:
                        yield tensor, pipeline, held

    def _spread(self, layout: Layout) -> Arguments:
        tensor, pipeline, held = layout
        parallel = replace(
            self.args.parallel,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            num_layers_per_virtual_pipeline_stage=self.config.num_layers // (pipeline * held) if held > 1 else None,
        )
        return replace(self.args, parallel=parallel)

    def changes(self, forecast: LayoutForecast) -> dict[str, Any]:
        """The flags of a way that differ from the request."""
        asked, found = self.args.flags(), forecast.args.flags()
        return {name: found[name] for name in FLAGS if found[name] != asked[name]}

    def remedy(self, forecast: LayoutForecast) -> LayoutForecast | None:
        """The best way to make the same layout fit, with more recomputation or smaller micro-batches; or None."""
        asked = AMOUNTS.index(forecast.setting.recompute)
        return self._best(self._variants(forecast, AMOUNTS[asked:]))

    def suggestion(self, forecasts: Iterable[LayoutForecast]) -> LayoutForecast | None:
        """The best of all ways, with any amount of recomputation; of equally fast ones the one closest to the
        request."""
        return self._best(variant for forecast in forecasts for variant in self._variants(forecast, AMOUNTS))

    def _variants(self, forecast: LayoutForecast, amounts: Sequence[Recompute]) -> Iterator[LayoutForecast]:
        size = forecast.args.training.micro_batch_size
        for amount in amounts:
            for smaller in (size >> times for times in range(size.bit_length())):
                model = replace(forecast.args.model, recompute_granularity=amount)
                training = replace(forecast.args.training, micro_batch_size=smaller)
                try:
                    yield self.forecast(replace(forecast.args, model=model, training=training))
                except UserError:  # a batch of this size does not divide
                    continue

    def _best(self, forecasts: Iterable[LayoutForecast]) -> LayoutForecast | None:
        fitting = [one for one in forecasts if one.fits]
        return min(fitting, key=lambda one: (one.order[1], len(self.changes(one)), one.order), default=None)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
