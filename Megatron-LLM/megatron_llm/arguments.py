"""The flags of finetune.py: upstream Megatron-LLM's spelling and defaults, parsed into one frozen object.

Each field of `Arguments` is a flag of the same name; its type, default and help are declared once, here.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from megatron_llm.files import UserError
from megatron_llm.model_config import ModelConfig

NO_EFFECT = {
    "use_flash_attn": "attention always runs through PyTorch's fused kernels",
    "no_bias_gelu_fusion": "there is no such fusion here",
    "no_bias_dropout_fusion": "there is no such fusion here",
    "no_masked_softmax_fusion": "there is no such fusion here",
    "no_gradient_accumulation_fusion": "there is no such fusion here",
    "no_async_tensor_model_parallel_allreduce": "these sums are never overlapped here",
    "no_persist_layer_norm": "there is no such kernel here",
    "accumulate_allreduce_grads_in_fp32": "gradients are always reduced in fp32",
    "use_distributed_optimizer": "the optimizer is always sharded over the data ranks",
    "use_multiquery_attn": "the number of kv heads decides",
}
"""Flags of published scripts that change nothing in this engine, and why."""
PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
)
GEOMETRY = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """One training run. `None` means not given."""

    # checkpoints
    load: Annotated[Path | None, "checkpoint folder to start from; without it the weights are random"] = None
    load_iters: Annotated[int | None, "iteration of --load; default: the one its tracker file names"] = None
    save: Annotated[Path, "folder for checkpoints and metrics; a run found there is continued"]
    save_interval: Annotated[int | None, "iterations between checkpoints; default: only at the end or when stopped"] = (
        None
    )
    finetune: Annotated[bool, "take only the weights of --load and begin at iteration 0"] = False
    use_checkpoint_args: Annotated[bool, "take the model's geometry from the checkpoint, not from flags"] = False
    use_checkpoint_opt_param_scheduler: Annotated[bool, "when continuing, keep the checkpoint's schedule"] = False
    override_opt_param_scheduler: Annotated[bool, "when continuing, take the schedule of these flags"] = False
    # model
    model_name: Annotated[
        Literal["llama", "llama2", "llama3", "codellama", "mistral", "falcon"],
        "architecture; the Llamas and Mistral differ only in other flags",
    ] = "llama2"
    num_layers: Annotated[int | None, "transformer layers"] = None
    hidden_size: Annotated[int | None, "width of the residual stream"] = None
    ffn_hidden_size: Annotated[int | None, "width of the MLP"] = None
    num_attention_heads: Annotated[int | None, "query heads"] = None
    num_attention_heads_kv: Annotated[int | None, "key/value heads; default: as many as query heads"] = None
    kv_channels: Annotated[int | None, "size of a head; default: hidden_size / num_attention_heads"] = None
    max_position_embeddings: Annotated[int | None, "longest sequence the model is made for"] = None
    seq_length: Annotated[int, "tokens of a training sample"]
    layernorm_epsilon: Annotated[float, "added to the variance in norms"] = 1e-05
    rope_theta: Annotated[float, "base of the rotary frequencies"] = 10000.0
    rope_scaling_factor: Annotated[float, "position interpolation"] = 1.0
    rope_scaling_type: Annotated[Literal["linear", "llama3"], "which rotary frequencies it divides"] = "linear"
    rope_low_freq_factor: Annotated[float, "llama3: original positions / this: waves above are scaled in full"] = 1.0
    rope_high_freq_factor: Annotated[float, "llama3: original positions / this: waves below are kept"] = 4.0
    rope_original_max_positions: Annotated[int, "llama3: positions before the interpolation"] = 8192
    sliding_window_size: Annotated[int | None, "positions that a position sees; default: all before it"] = None
    position_embedding_type: Annotated[Literal["rotary"], "kind of position embedding"] = "rotary"
    glu_activation: Annotated[Literal["swiglu"], "gate of the MLP; falcon has none"] = "swiglu"
    use_rms_norm: Annotated[bool, "RMSNorm, which all but falcon have"] = False
    parallel_attn: Annotated[bool, "falcon: attention and MLP side by side, which it always has"] = False
    parallel_layernorm: Annotated[bool, "falcon: a norm for each of the two, as in the 40B"] = False
    no_tie_embed_logits: Annotated[bool, "an output layer of its own instead of the embedding's weight"] = False
    init_method_std: Annotated[float, "standard deviation of random weights"] = 0.02
    hidden_dropout: Annotated[float, "only 0.0"] = 0.0
    attention_dropout: Annotated[float, "only 0.0"] = 0.0
    recompute_granularity: Annotated[
        Literal["full", "selective"] | None,
        "compute again in the backward pass: whole layers (full) or attention and MLP activation (selective)",
    ] = None
    # parallelism and precision
    tensor_model_parallel_size: Annotated[int, "ranks that share each layer's matrices"] = 1
    sequence_parallel: Annotated[bool, "between these matrices each tensor rank holds its part of the sequence"] = False
    pipeline_model_parallel_size: Annotated[int, "ranks that hold different layers; the rest is data parallel"] = 1
    num_layers_per_virtual_pipeline_stage: Annotated[
        int | None, "interleaved pipeline: layers of one of the several stages of a rank"
    ] = None
    bf16: Annotated[bool, "compute in bfloat16, with fp32 master weights and reductions"] = False
    fp16: Annotated[bool, "not supported"] = False
    threads: Annotated[int, "CPU threads of each rank; results depend on it in the last bits"] = 1
    # data
    data_path: Annotated[list[str], "one prefix of .bin and .idx, or: weight prefix weight prefix …"]
    split: Annotated[str, "proportions of documents for training, validation and test"] = "969,30,1"
    tokenizer_type: Annotated[Literal["SentencePieceTokenizer"], "kind of tokenizer"] = "SentencePieceTokenizer"
    vocab_file: Annotated[Path | None, "tokenizer.model; checked against the data and the model"] = None
    no_new_tokens: Annotated[bool, "add no special tokens to the vocabulary"] = False
    vocab_extra_ids_list: Annotated[str | None, "comma-separated tokens added to the vocabulary"] = None
    num_workers: Annotated[int, "data-loading processes of each rank"] = 2
    # training
    micro_batch_size: Annotated[int, "samples a rank computes at once"]
    global_batch_size: Annotated[int | None, "samples of an update; default: one micro-batch a rank"] = None
    train_iters: Annotated[int, "updates of the whole run, over all its restarts"]
    exit_interval: Annotated[int | None, "save and exit 75 after an iteration divisible by this"] = None
    seed: Annotated[int, "decides the sample order and random weights"] = 1234
    log_interval: Annotated[int, "iterations between log lines"] = 100
    tensorboard_dir: Annotated[Path | None, "where TensorBoard files go; default: none"] = None
    eval_interval: Annotated[int, "iterations between evaluations"] = 1000
    eval_iters: Annotated[int, "global batches of an evaluation; 0: none"] = 100
    # optimizer
    lr: Annotated[float, "highest learning rate"]
    min_lr: Annotated[float, "learning rate at the end of the decay"] = 0.0
    lr_decay_style: Annotated[Literal["constant", "linear", "cosine", "inverse-square-root"], "shape of the decay"] = (
        "linear"
    )
    lr_decay_iters: Annotated[int | None, "iterations until min_lr; default: train_iters"] = None
    lr_warmup_iters: Annotated[int, "iterations of linear warm-up"] = 0
    lr_warmup_fraction: Annotated[float | None, "warm-up as a fraction of the decay iterations"] = None
    weight_decay: Annotated[float, "decoupled weight decay of matrices"] = 0.01
    clip_grad: Annotated[float, "global gradient norm above which gradients are scaled down; 0: never"] = 1.0
    adam_beta1: Annotated[float, "decay of the first moment"] = 0.9
    adam_beta2: Annotated[float, "decay of the second moment"] = 0.999
    adam_eps: Annotated[float, "added to Adam's denominator"] = 1e-08
    no_effect: tuple[str, ...] = ()
    """The given ones among NO_EFFECT; not a flag."""

    def as_json(self) -> dict[str, Any]:
        """The flags as JSON values, for state.json."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; run with --help for the list")


def parse(argv: Sequence[str]) -> Arguments:
    """Parse and check what can be checked without files or ranks. Raises UserError."""
    parser = _Parser("finetune.py", description="Train a language model on tokenised text.", allow_abbrev=False)
    hints = get_type_hints(Arguments, include_extras=True)
    for entry in dataclasses.fields(Arguments):
        if entry.name != "no_effect":
            parser.add_argument(f"--{entry.name}", **_options(hints[entry.name], entry.default))
    for name, reason in NO_EFFECT.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"no effect: {reason}")
    values = vars(parser.parse_args(argv))
    no_effect = tuple(name for name in NO_EFFECT if values.pop(name))
    args = Arguments(**values, no_effect=no_effect)
    _check_supported(args)
    _check_numbers(args)
    return args


def _options(hint: Any, default: Any) -> dict[str, Any]:
    """argparse options of a field: bool is a switch, list takes several, Literal is a choice, `| None` is optional."""
    kind, text = get_args(hint)
    kind = (
        next((part for part in get_args(kind) if part is not type(None)), kind)
        if type(None) in get_args(kind)
        else kind
    )
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if kind is bool:
        return options | {"action": "store_true"}
    options |= {"required": True} if default is dataclasses.MISSING else {"default": default}
    if get_origin(kind) is Literal:
        return options | {"choices": get_args(kind)}
    if get_origin(kind) is list:
        return options | {"nargs": "+"}
    return options | {"type": kind}


def _check_supported(args: Arguments) -> None:
    if args.fp16:
        raise UserError("--fp16: training in fp16 is not supported; use --bf16 or neither (fp32)")
    for name in ("hidden_dropout", "attention_dropout"):
        if (value := getattr(args, name)) != 0.0:
            raise UserError(f"--{name} {value}: only 0.0 is supported")
    falcon = args.model_name == "falcon"
    for name in ("parallel_attn", "parallel_layernorm"):
        if getattr(args, name) and not falcon:
            raise UserError(f"--{name}: only for --model_name falcon")
    if args.use_rms_norm and falcon:
        raise UserError("--use_rms_norm: --model_name falcon has LayerNorm; leave it out")
    if args.use_checkpoint_opt_param_scheduler and args.override_opt_param_scheduler:
        raise UserError("--use_checkpoint_opt_param_scheduler and --override_opt_param_scheduler exclude each other")
    if args.use_checkpoint_args and args.load is None:
        raise UserError("--use_checkpoint_args needs a checkpoint; give --load")


def _check_numbers(args: Arguments) -> None:
    at_least_one = ("seq_length", "micro_batch_size", "global_batch_size", "train_iters", "save_interval", "threads")
    for name in (
        *at_least_one,
        *PARALLEL,
        *GEOMETRY,
        "sliding_window_size",
        "exit_interval",
        "log_interval",
        "eval_interval",
        "lr_decay_iters",
    ):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    for name in ("eval_iters", "num_workers", "lr_warmup_iters", "weight_decay", "clip_grad", "min_lr"):
        if (value := getattr(args, name)) < 0:
            raise UserError(f"--{name} {value}: must not be negative")
    if args.lr_warmup_fraction is not None and (args.lr_warmup_iters or not 0 <= args.lr_warmup_fraction < 1):
        raise UserError("--lr_warmup_fraction must be in [0, 1) and excludes --lr_warmup_iters")


def batch_layout(args: Arguments, ranks: int) -> tuple[int, int]:
    """(global batch size, micro-batches a rank computes for each update). Raises UserError when ranks or batch do not
    divide."""
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if ranks % (tensor * pipeline):
        raise UserError(
            f"{ranks} ranks are not a multiple of {tensor * pipeline} (--tensor_model_parallel_size {tensor} x "
            f"--pipeline_model_parallel_size {pipeline}); start a multiple, or change one of the two"
        )
    copies = ranks // (tensor * pipeline)
    together = args.micro_batch_size * copies
    total = args.global_batch_size or together * pipeline
    if total % together:
        raise UserError(
            f"--global_batch_size {total} is not a multiple of {together} "
            f"(--micro_batch_size {args.micro_batch_size} x {copies} data-parallel ranks); change one of the three"
        )
    micro_batches = total // together
    interleaved = args.num_layers_per_virtual_pipeline_stage is not None
    if micro_batches < pipeline or (interleaved and micro_batches % pipeline):
        kind = "a multiple of" if interleaved else "at least"
        raise UserError(
            f"--global_batch_size {total} gives each rank {micro_batches} micro-batches an update; a pipeline of "
            f"{pipeline} stages needs {kind} {pipeline}: change --global_batch_size or --micro_batch_size"
        )
    return total, micro_batches


def config_from_flags(args: Arguments, vocab_size: int) -> ModelConfig:
    """The geometry that the flags describe. Raises UserError when a part is missing or wrong."""
    if missing := [f"--{name}" for name in GEOMETRY if getattr(args, name) is None]:
        raise UserError(f"missing {' '.join(missing)}; or give --load and --use_checkpoint_args")
    falcon, heads = args.model_name == "falcon", args.num_attention_heads
    assert heads is not None
    derived: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_attention_heads_kv": args.num_attention_heads_kv or heads,
        "kv_channels": args.kv_channels or (args.hidden_size or 0) // heads,
        "tie_embed_logits": not args.no_tie_embed_logits,
        "use_rms_norm": not falcon,
        "glu_activation": None if falcon else args.glu_activation,
        "parallel_attn": falcon,
    }
    flags: dict[str, Any] = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(ModelConfig)}
    try:
        return ModelConfig(**flags | derived)
    except ValueError as error:
        raise UserError(str(error)) from error
