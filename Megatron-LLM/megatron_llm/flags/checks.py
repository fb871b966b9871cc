"""Checks of finetune.py's flags that need neither files nor ranks."""

from __future__ import annotations

from collections.abc import Collection

from megatron_llm.flags.arguments import Arguments, ModelFlags, OptimizerFlags
from run_contract.errors import UserError

PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
)


def check(args: Arguments) -> None:
    """Raise UserError for values that are out of range, exclude each other or are not supported."""
    _check_supported(args)
    _check_numbers(args)
    _check_schedule(args)
    _check_weight_decay(args.optimizer, args.given)
    _check_recomputation(args.model, args.given)


def _check_supported(args: Arguments) -> None:
    if args.precision.fp16 and args.precision.bf16:
        raise UserError("--fp16 and --bf16 exclude each other; give one of them")
    for name in ("hidden_dropout", "attention_dropout"):
        if (value := args.flag(name)) != 0.0:
            raise UserError(f"--{name} {value}: only 0.0 is supported; leave it out")
    falcon = args.model.model_name == "falcon"
    for name in ("parallel_attn", "parallel_layernorm"):
        if args.flag(name) and not falcon:
            raise UserError(f"--{name}: the flag is only for --model_name falcon; leave it out")
    if args.model.use_rms_norm and falcon:
        raise UserError("--use_rms_norm: --model_name falcon has LayerNorm; leave it out")
    if "glu_activation" in args.given and falcon:
        raise UserError(f"--glu_activation {args.model.glu_activation}: --model_name falcon has no gate; leave it out")
    if args.checkpoint.use_checkpoint_opt_param_scheduler and args.checkpoint.override_opt_param_scheduler:
        raise UserError(
            "--use_checkpoint_opt_param_scheduler and --override_opt_param_scheduler exclude each other; give one of "
            "them"
        )
    for name in ("use_checkpoint_args", "override_model_args"):
        if args.flag(name) and args.checkpoint.load is None:
            raise UserError(f"--{name} needs a checkpoint; give --load")
    if args.evaluation.eval_only and not args.evaluation.eval_iters:
        raise UserError("--eval_only with --eval_iters 0: nothing is left to do; leave out one of the two")
    args.data.paths()


def _check_numbers(args: Arguments) -> None:
    at_least_one = ("seq_length", "micro_batch_size", "global_batch_size", "train_iters", "save_interval", "threads")
    for name in (
        *at_least_one,
        *PARALLEL,
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "ffn_hidden_size",
        "max_position_embeddings",
        "sliding_window_size",
        "exit_interval",
        "keep_last",
        "keep_every",
        "log_interval",
        "eval_interval",
        "recompute_num_layers",
        "lr_decay_iters",
        "lr_decay_samples",
        "loss_scale_window",
        "hysteresis",
    ):
        if (value := args.flag(name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    not_negative = ("eval_iters", "num_workers", "weight_decay", "clip_grad", "min_lr", "vocab_extra_ids")
    for name in (
        *not_negative,
        "start_weight_decay",
        "end_weight_decay",
        "lr_warmup_iters",
        "lr_warmup_samples",
        "lr_wsd_decay_iters",
        "lr_wsd_decay_samples",
    ):
        if (value := args.flag(name)) is not None and value < 0:
            raise UserError(f"--{name} {value}: must not be negative")
    above_0 = ("exit_duration_in_mins", "peak_tflops", "loss_scale", "initial_loss_scale", "min_loss_scale")
    for name in (*above_0, "skip_spikes", "distributed_timeout_minutes"):
        if (value := args.flag(name)) is not None and value <= 0:
            raise UserError(f"--{name} {value}: must be above 0")
    if args.precision.min_loss_scale > args.precision.initial_loss_scale:
        raise UserError(
            f"--min_loss_scale {args.precision.min_loss_scale:g} is more than --initial_loss_scale "
            f"{args.precision.initial_loss_scale:g}; make it at most that"
        )
    if args.training.spike_window < 4:
        raise UserError(
            f"--spike_window {args.training.spike_window}: must be at least 4, so that it has a standard deviation"
        )
    if args.checkpoint.keep_every and not args.checkpoint.keep_last:
        raise UserError("--keep_every says which checkpoints are kept beside the newest ones; give --keep_last too")
    if args.training.skip_iters and min(args.training.skip_iters) < 1:
        raise UserError(f"--skip_iters {min(args.training.skip_iters)}: iterations are numbered from 1")
    if not 0 <= args.training.seed < 2**32:
        raise UserError(f"--seed {args.training.seed}: must be from 0 to {2**32 - 1}")


def _check_schedule(args: Arguments) -> None:
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        if args.flag(f"{name}_iters") and args.flag(f"{name}_samples"):
            raise UserError(f"--{name}_iters and --{name}_samples exclude each other; give one of them")
        if args.training.rampup_batch_size and args.flag(f"{name}_iters"):
            raise UserError(
                f"--{name}_iters: with --rampup_batch_size, iterations differ in their number of samples; give "
                f"--{name}_samples"
            )
    warmup = args.optimizer.lr_warmup_iters or args.optimizer.lr_warmup_samples
    if args.optimizer.lr_warmup_fraction is not None and (warmup or not 0 <= args.optimizer.lr_warmup_fraction < 1):
        raise UserError(
            f"--lr_warmup_fraction {args.optimizer.lr_warmup_fraction:g}: must be at least 0 and below 1, and excludes "
            "--lr_warmup_iters and --lr_warmup_samples; give one of the three"
        )
    if (args.optimizer.lr_decay_style == "WSD") != (
        args.optimizer.lr_wsd_decay_iters is not None or args.optimizer.lr_wsd_decay_samples is not None
    ):
        raise UserError(
            "--lr_decay_style WSD and --lr_wsd_decay_iters (or --lr_wsd_decay_samples), the length of its decay, "
            "belong together: give both or neither"
        )


def _check_weight_decay(flags: OptimizerFlags, given: Collection[str]) -> None:
    grows = flags.weight_decay_incr_style != "constant"
    ends = flags.start_weight_decay, flags.end_weight_decay
    if any((end is not None) != grows for end in ends):
        raise UserError(
            "--weight_decay_incr_style linear or cosine, --start_weight_decay and --end_weight_decay belong together: "
            "give all three, or --weight_decay alone"
        )
    if grows and "weight_decay" in given:
        raise UserError(
            f"--weight_decay {flags.weight_decay:g} has no meaning with --weight_decay_incr_style "
            f"{flags.weight_decay_incr_style}, which grows from --start_weight_decay; leave it out"
        )
    if ends[0] is not None and ends[1] is not None and ends[0] > ends[1]:
        raise UserError(
            f"--start_weight_decay {ends[0]:g} is more than --end_weight_decay {ends[1]:g}; make it at most that, "
            "because the weight decay only grows"
        )


def _check_recomputation(flags: ModelFlags, given: Collection[str]) -> None:
    method, granularity = flags.recompute_method, flags.recompute_granularity
    if method is not None and granularity != "full":
        raise UserError(
            f"--recompute_method {method} chooses among whole layers; give --recompute_granularity full too, or leave "
            "it out"
        )
    if method is None and "recompute_num_layers" in given:
        raise UserError(
            f"--recompute_num_layers {flags.recompute_num_layers} needs --recompute_method uniform or block"
        )
