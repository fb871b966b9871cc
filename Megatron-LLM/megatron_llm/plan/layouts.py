"""Every way to spread a training run over so many GPUs, with its memory, its step time and its checkpoints.

Floating-point operations are counted as for MFU (Chowdhery et al. 2022, "PaLM", appendix B): two a token and parameter
of a matrix, and 4 x length x heads x head size a token and layer for attention, its causal half not taken off; a
backward pass takes twice as many. What is computed again comes on top. Through a pipeline an update takes as long as
its micro-batches and (stages - 1) / (stages of a rank) more (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).
Exchange between ranks, Adam's step and loading of data are not counted: the MFU stands for them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_llm.flags.arguments import Arguments
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.flops import parameter_count
from megatron_llm.model.llama import Part
from megatron_llm.plan import memory
from megatron_llm.plan.memory import FLOAT, Memory, Setting
from run_contract.errors import UserError

CONTEXT, FRAGMENTS = 10**9, 0.05
"""Reserve, assumed and not measured: bytes for CUDA's context and NCCL, and, as a share of the tensors, memory that the
allocator cannot use because it lies in pieces."""
SLICE_BYTES, STATE_BYTES = 1850, 10_000
"""That torch's checkpoint files spend on each slice of a tensor, and of state.json; measured."""
HELD_STAGES = (1, 2, 4)
"""Pipeline stages of a rank that are looked at."""
AMOUNTS = (None, "selective", "full")
"""Of recomputation, least first."""
FLAGS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "micro_batch_size",
    "recompute_granularity",
)
"""What ways differ in."""
Layout = tuple[int, int, int]
"""Tensor ranks, pipeline ranks, stages of a pipeline rank."""


def operations(s: Setting, stage: Part) -> float:
    """Of a stage's forward and backward pass over a micro-batch on all its tensor ranks, recomputation included."""
    c, layers = s.config, len(stage.layers)
    layer, _ = memory.pieces(c, 1, False, False)
    matrices = 2.0 * s.tokens * layers * sum(shape.numel() for shape, _ in layer if len(shape) > 1)
    seen = min(s.length, c.sliding_window_size or s.length)
    cores = 4.0 * s.tokens * layers * seen * c.num_attention_heads * c.kv_channels
    head = 2.0 * s.tokens * c.vocab_size * c.hidden_size if stage.last else 0.0
    again = {"selective": cores, "full": matrices + cores}.get(s.recompute or "", 0.0)
    return 3 * (matrices + cores + head) + again


def step_seconds(s: Setting, rate: float) -> float:
    """An update, with devices that do `rate` operations a second; the slowest pipeline rank sets the pace."""
    slowest = max(sum(operations(s, stage) for stage in s.stages(rank)) for rank in range(s.pipeline))
    return (s.micro_batches + (s.pipeline - 1) / s.held_stages) * slowest / (s.tensor * rate)


@dataclass(frozen=True)
class Checkpoints:
    """What a run writes."""

    size: int
    """Bytes of one."""
    written: int
    """How many, in the whole run."""
    kept: int
    """How many are there at the end."""

    @property
    def most(self) -> int:
        """How many are there at once: an old one goes when the next has been verified."""
        return min(self.written, self.kept + 1)


def checkpoints(s: Setting, args: Arguments) -> Checkpoints:
    """Of a run with these --save_interval, --keep_last and --keep_every: fp32 weights and two moments of each."""
    layer, ends = memory.pieces(s.config, s.tensor, True, True)
    cuts = [cut for _, cut in (*layer * s.config.num_layers, *ends)]
    slices = sum(s.data * (1 if cut is None else s.tensor) for cut in cuts)
    size = 3 * (FLOAT * parameter_count(s.config) + SLICE_BYTES * slices) + STATE_BYTES
    last, interval = args.train_iters, args.save_interval or args.train_iters
    saved = [*range(interval, last, interval), last]
    newest = saved if args.keep_last is None else saved[-args.keep_last :]
    forever = [n for n in saved if args.keep_every and n % args.keep_every == 0]
    return Checkpoints(size, len(saved), len({*newest, *forever}))


@dataclass(frozen=True)
class Way:
    """One way to run the training."""

    args: Arguments
    setting: Setting
    memory: Memory
    """Of the fullest rank."""
    seconds: float
    """Of an update."""
    room: int
    """Bytes of a GPU."""

    @property
    def reserve(self) -> int:
        """Bytes of a GPU that are not for tensors."""
        return CONTEXT + int(FRAGMENTS * self.memory.peak)

    @property
    def total(self) -> int:
        """Bytes needed."""
        return self.memory.peak + self.reserve

    @property
    def fits(self) -> bool:
        """Into a GPU."""
        return self.total <= self.room

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.setting.tokens * self.setting.micro_batches * self.setting.data / self.seconds

    @property
    def days(self) -> float:
        """For all iterations."""
        return self.seconds * self.args.train_iters / 86400

    @property
    def layout(self) -> Layout:
        """How the model is cut."""
        return self.setting.tensor, self.setting.pipeline, self.setting.held_stages

    @property
    def order(self) -> tuple[Any, ...]:
        """Smaller is better: what fits, then the fastest, then what cuts the model least and so exchanges least."""
        tensor, pipeline, held = self.layout
        return not self.fits, round(1 / self.tokens_per_second, 9), tensor * pipeline, pipeline, held


@dataclass(frozen=True)
class Question:
    """A model, its training as asked for, and the GPUs."""

    config: ModelConfig
    args: Arguments
    gpus: int
    room: int
    """Bytes of each."""
    rate: float
    """Operations a second of each, as far as it is reached."""

    @property
    def layout(self) -> Layout:
        """That the recipe or the flags name."""
        pipeline, depth = self.args.pipeline_model_parallel_size, self.args.num_layers_per_virtual_pipeline_stage
        held = self.config.num_layers // (pipeline * depth) if depth else 1
        return self.args.tensor_model_parallel_size, pipeline, held

    def way(self, args: Arguments) -> Way:
        """With these flags. Raises UserError when it cannot be run."""
        setting = Setting.of(self.config, args, self.gpus)
        return Way(args, setting, memory.fullest(setting), step_seconds(setting, self.rate), self.room)

    def ways(self) -> tuple[list[Way], dict[Layout, str]]:
        """Every layout with the other settings as asked for, best first; and those that cannot be run, with why."""
        found: list[Way] = []
        refused: dict[Layout, str] = {}
        for layout in self._layouts():
            try:
                found.append(self.way(self._spread(layout)))
            except UserError as error:
                if layout[2] == 1 or layout == self.layout:
                    refused[layout] = str(error)
        return sorted(found, key=lambda way: way.order), refused

    def _layouts(self) -> Iterator[Layout]:
        for tensor in _divisors(self.gpus):
            for pipeline in _divisors(self.gpus // tensor):
                for held in HELD_STAGES if pipeline > 1 else (1,):
                    if held == 1 or self.config.num_layers % (pipeline * held) == 0:
                        yield tensor, pipeline, held

    def _spread(self, layout: Layout) -> Arguments:
        tensor, pipeline, held = layout
        return replace(
            self.args,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            num_layers_per_virtual_pipeline_stage=self.config.num_layers // (pipeline * held) if held > 1 else None,
        )

    def changes(self, way: Way) -> dict[str, Any]:
        """Flags of a way that are not as asked for."""
        return {name: getattr(way.args, name) for name in FLAGS if getattr(way.args, name) != getattr(self.args, name)}

    def remedy(self, way: Way) -> Way | None:
        """The same layout with what makes it fit: more recomputation or smaller micro-batches."""
        asked = AMOUNTS.index(way.setting.recompute)
        return self._best(self._variants(way, AMOUNTS[asked:]))

    def suggestion(self, ways: Iterable[Way]) -> Way | None:
        """The best of all, with any amount of recomputation; what is as asked for wins over what is as fast."""
        return self._best(variant for way in ways for variant in self._variants(way, AMOUNTS))

    def _variants(self, way: Way, amounts: Sequence[str | None]) -> Iterator[Way]:
        size = way.args.micro_batch_size
        for amount in amounts:
            for smaller in (size >> times for times in range(size.bit_length())):
                args: Any = {"recompute_granularity": amount, "micro_batch_size": smaller}
                try:
                    yield self.way(replace(way.args, **args))
                except UserError:  # a batch of this size does not divide
                    continue

    def _best(self, ways: Iterable[Way]) -> Way | None:
        fitting = [way for way in ways if way.fits]
        return min(fitting, key=lambda way: (way.order[1], len(self.changes(way)), way.order), default=None)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
