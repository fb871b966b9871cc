"""Checks whether a model and its batches can be spread over tensor, pipeline and data ranks as the flags ask."""

from __future__ import annotations

from megatron_llm.flags.arguments import ParallelFlags, TrainingFlags
from megatron_llm.flags.batch_sizes import BatchSizes
from megatron_llm.model.config import ModelConfig
from run_contract.errors import UserError


def batch_layout(parallel: ParallelFlags, training: TrainingFlags, ranks: int) -> tuple[int, int]:
    """(full global batch size, micro-batches per rank and update).

    Raises UserError when ranks or batch sizes do not divide.
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if ranks % (tensor * pipeline):
        raise UserError(
            f"{ranks} ranks are not a multiple of {tensor * pipeline} (--tensor_model_parallel_size {tensor} x "
            f"--pipeline_model_parallel_size {pipeline}); start a multiple of {tensor * pipeline} ranks, or change one "
            "of the two"
        )
    copies = ranks // (tensor * pipeline)
    together = training.micro_batch_size * copies
    sizes = batch_sizes(parallel, training, ranks)
    for size in sizes.all():
        flag = "--rampup_batch_size: a batch size of" if sizes.ramp else "--global_batch_size"
        if size % together:
            raise UserError(
                f"{flag} {size} is not a multiple of {together} "
                f"(--micro_batch_size {training.micro_batch_size} x {copies} data-parallel ranks); change one of the "
                "three"
            )
        _check_micro_batches(flag, size, size // together, parallel)
    return sizes.full, sizes.full // together


def batch_sizes(parallel: ParallelFlags, training: TrainingFlags, ranks: int) -> BatchSizes:
    """The batch sizes of all updates. The default is one micro-batch per data rank and pipeline stage."""
    full = training.global_batch_size or training.micro_batch_size * (ranks // parallel.tensor_model_parallel_size)
    return BatchSizes.of(full, training.rampup_batch_size)


def _check_micro_batches(flag: str, size: int, micro_batches: int, parallel: ParallelFlags) -> None:
    pipeline = parallel.pipeline_model_parallel_size
    interleaved = parallel.num_layers_per_virtual_pipeline_stage is not None
    if micro_batches < pipeline or (interleaved and micro_batches % pipeline):
        kind = "a multiple of" if interleaved else "at least"
        raise UserError(
            f"{flag} {size} gives each rank {micro_batches} micro-batches an update; a pipeline of {pipeline} stages "
            f"needs {kind} {pipeline}: change --global_batch_size or --micro_batch_size"
        )


def check(config: ModelConfig, parallel: ParallelFlags, length: int, ranks: int) -> None:
    """Raise UserError, naming the sizes, unless model and sample length fit the parallel sizes on `ranks` ranks."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if tensor > 1:
        _check_tensor(config, parallel, length, ranks // (tensor * pipeline))
    _check_pipeline(config.num_layers, pipeline, parallel.num_layers_per_virtual_pipeline_stage)


def _check_tensor(config: ModelConfig, parallel: ParallelFlags, length: int, copies: int) -> None:
    size, groups = parallel.tensor_model_parallel_size, config.num_attention_heads_kv
    counts = {
        "num_attention_heads": config.num_attention_heads,
        "ffn_hidden_size": config.ffn_hidden_size,
    } | ({"seq_length": length} if parallel.sequence_parallel else {})
    for name, count in counts.items():
        if count % size:
            raise UserError(f"--tensor_model_parallel_size {size} does not divide {name} {count}; choose one that does")
    if groups % size and size % groups:
        raise UserError(
            f"--tensor_model_parallel_size {size} neither divides nor is a multiple of num_attention_heads_kv "
            f"{groups}; choose one that does"
        )
    if (size - 1) * -(-config.vocab_size // size) >= config.vocab_size:
        raise UserError(
            f"--tensor_model_parallel_size {size} leaves a rank without any of the {config.vocab_size} tokens of the "
            "vocabulary; choose a smaller one"
        )
    if config.hidden_size % copies:
        raise UserError(
            f"hidden_size {config.hidden_size} is not a multiple of the {copies} data-parallel ranks, as it must be "
            f"with --tensor_model_parallel_size {size}; start a different number of ranks"
        )


def _check_pipeline(layers: int, stages: int, depth: int | None) -> None:
    if depth is not None and stages == 1:
        raise UserError(f"--num_layers_per_virtual_pipeline_stage {depth} needs --pipeline_model_parallel_size above 1")
    if layers % (stages * (depth or 1)):
        held = f" x --num_layers_per_virtual_pipeline_stage {depth}" if depth else ""
        raise UserError(
            f"--pipeline_model_parallel_size {stages}{held} does not divide the model's {layers} layers; choose sizes "
            "that do"
        )
