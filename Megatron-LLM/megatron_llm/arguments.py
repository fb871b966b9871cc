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
    "no_async_tensor_model_parallel_allreduce": "there is no tensor parallelism here",
    "no_persist_layer_norm": "there is no such kernel here",
    "accumulate_allreduce_grads_in_fp32": "gradients are always reduced in fp32",
    "use_distributed_optimizer": "the optimizer is always sharded over all ranks",
    "sequence_parallel": "it needs a tensor parallel size above 1",
    "use_multiquery_attn": "the number of kv heads decides",
}
"""Flags of published scripts that change nothing in this engine, and why."""
PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
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
    model_name: Annotated[Literal["llama", "llama2"], "architecture"] = "llama2"
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
    rope_scaling_factor: Annotated[float, "linear position interpolation"] = 1.0
    position_embedding_type: Annotated[Literal["rotary"], "kind of position embedding"] = "rotary"
    glu_activation: Annotated[Literal["swiglu"], "gate of the MLP"] = "swiglu"
    use_rms_norm: Annotated[bool, "RMSNorm, which these models always have"] = False
    no_tie_embed_logits: Annotated[bool, "an output layer of its own instead of the embedding's weight"] = False
    init_method_std: Annotated[float, "standard deviation of random weights"] = 0.02
    hidden_dropout: Annotated[float, "only 0.0"] = 0.0
    attention_dropout: Annotated[float, "only 0.0"] = 0.0
    recompute_granularity: Annotated[
        Literal["full", "selective"] | None,
        "compute again in the backward pass: whole layers (full) or attention and MLP activation (selective)",
    ] = None
    # parallelism and precision
    tensor_model_parallel_size: Annotated[int, "only 1: this engine trains with sharded data parallelism"] = 1
    pipeline_model_parallel_size: Annotated[int, "only 1"] = 1
    bf16: Annotated[bool, "compute in bfloat16, with fp32 master weights and reductions"] = False
    fp16: Annotated[bool, "not supported"] = False
    threads: Annotated[int, "CPU threads of each rank; results depend on it in the last bits"] = 1
    # data
    data_path: Annotated[list[str], "one prefix of .bin and .idx, or: weight prefix weight prefix …"]
    split: Annotated[str, "proportions of documents for training, validation and test"] = "969,30,1"
    tokenizer_type: Annotated[Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"], "kind of tokenizer"] = (
        "SentencePieceTokenizer"
    )
    vocab_file: Annotated[Path | None, "tokenizer.model or tokenizer.json; checked against the data and the model"] = (
        None
    )
    no_new_tokens: Annotated[bool, "add no special tokens to the vocabulary"] = False
    vocab_extra_ids_list: Annotated[str | None, "comma-separated tokens added to the vocabulary"] = None
    num_workers: Annotated[int, "data-loading processes of each rank"] = 2
    # training
    micro_batch_size: Annotated[int, "samples a rank computes at once"]
    global_batch_size: Annotated[int | None, "samples of an update; default: micro_batch_size * ranks"] = None
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
    parser = _Parser("finetune.py", description="Train a Llama on tokenised text.", allow_abbrev=False)
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
    for name in PARALLEL:
        if (size := getattr(args, name)) != 1:
            raise UserError(
                f"--{name} {size}: this engine trains with sharded data parallelism, so use 1; "
                "checkpoints of any tensor and pipeline parallel size can be loaded"
            )
    if args.fp16:
        raise UserError("--fp16: training in fp16 is not supported; use --bf16 or neither (fp32)")
    for name in ("hidden_dropout", "attention_dropout"):
        if (value := getattr(args, name)) != 0.0:
            raise UserError(f"--{name} {value}: only 0.0 is supported")
    if args.use_checkpoint_opt_param_scheduler and args.override_opt_param_scheduler:
        raise UserError("--use_checkpoint_opt_param_scheduler and --override_opt_param_scheduler exclude each other")
    if args.use_checkpoint_args and args.load is None:
        raise UserError("--use_checkpoint_args needs a checkpoint; give --load")


def _check_numbers(args: Arguments) -> None:
    at_least_one = ("seq_length", "micro_batch_size", "global_batch_size", "train_iters", "save_interval", "threads")
    for name in (*at_least_one, "exit_interval", "log_interval", "eval_interval", "lr_decay_iters"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    for name in ("eval_iters", "num_workers", "lr_warmup_iters", "weight_decay", "clip_grad", "min_lr"):
        if (value := getattr(args, name)) < 0:
            raise UserError(f"--{name} {value}: must not be negative")
    if args.lr_warmup_fraction is not None and (args.lr_warmup_iters or not 0 <= args.lr_warmup_fraction < 1):
        raise UserError("--lr_warmup_fraction must be in [0, 1) and excludes --lr_warmup_iters")


def batch_layout(args: Arguments, ranks: int) -> tuple[int, int]:
    """(global batch size, micro-batches a rank computes for each update). Raises UserError when it does not divide."""
    together = args.micro_batch_size * ranks
    total = args.global_batch_size or together
    if total % together:
        raise UserError(
            f"--global_batch_size {total} is not a multiple of {together} "
            f"(--micro_batch_size {args.micro_batch_size} x {ranks} ranks); change one of the three"
        )
    return total, total // together


def config_from_flags(args: Arguments, vocab_size: int) -> ModelConfig:
    """The geometry that the flags describe. Raises UserError when a part is missing or wrong."""
    sizes: dict[str, int | None] = {name: getattr(args, name) for name in GEOMETRY}
    if missing := [f"--{name}" for name, size in sizes.items() if size is None]:
        raise UserError(f"missing {' '.join(missing)}; or give --load and --use_checkpoint_args")
    given = {name: size for name, size in sizes.items() if size is not None}
    heads = given["num_attention_heads"]
    try:
        return ModelConfig(
            **given,
            vocab_size=vocab_size,
            num_attention_heads_kv=args.num_attention_heads_kv or heads,
            kv_channels=args.kv_channels or given["hidden_size"] // heads,
            layernorm_epsilon=args.layernorm_epsilon,
            rope_theta=args.rope_theta,
            rope_scaling_factor=args.rope_scaling_factor,
            tie_embed_logits=not args.no_tie_embed_logits,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
