"""Checks of finetune.py's flags that need neither files nor ranks."""

from __future__ import annotations

from megatron_llm.flags.arguments import Arguments
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
    _check_weight_decay(args)
    _check_recomputation(args)


def _check_supported(args: Arguments) -> None:
    if args.fp16 and args.bf16:
        raise UserError("--fp16 and --bf16 exclude each other")
    for name in ("hidden_dropout", "attention_dropout"):
        if (value := getattr(args, name)) != 0.0:
            raise UserError(f"--{name} {value}: only 0.0 is supported")
    falcon = args.model_name == "falcon"
    for name in ("parallel_attn", "parallel_layernorm"):
        if getattr(args, name) and not falcon:
            raise UserError(f"--{name}: only for --model_name falcon")
    if args.use_rms_norm and falcon:
        raise UserError("--use_rms_norm: --model_name falcon has LayerNorm; leave it out")
    if "glu_activation" in args.given and falcon:
        raise UserError(f"--glu_activation {args.glu_activation}: --model_name falcon has no gate; leave it out")
    if args.use_checkpoint_opt_param_scheduler and args.override_opt_param_scheduler:
        raise UserError("--use_checkpoint_opt_param_scheduler and --override_opt_param_scheduler exclude each other")
    for name in ("use_checkpoint_args", "override_model_args"):
        if getattr(args, name) and args.load is None:
            raise UserError(f"--{name} needs a checkpoint; give --load")
    if args.eval_only and not args.eval_iters:
        raise UserError("--eval_only with --eval_iters 0: nothing is left to do; leave out one of the two")
    args.data()


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
        if (value := getattr(args, name)) is not None and value < 1:
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
        if (value := getattr(args, name)) is not None and value < 0:
            raise UserError(f"--{name} {value}: must not be negative")
    above_0 = ("exit_duration_in_mins", "peak_tflops", "loss_scale", "initial_loss_scale", "min_loss_scale")
    for name in (*above_0, "skip_spikes", "distributed_timeout_minutes"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise UserError(f"--{name} {value}: must be above 0")
    if args.min_loss_scale > args.initial_loss_scale:
        raise UserError(
            f"--min_loss_scale {args.min_loss_scale:g} is more than --initial_loss_scale {args.initial_loss_scale:g}; "
            "make it at most that"
        )
    if args.spike_window < 4:
        raise UserError(f"--spike_window {args.spike_window}: must be at least 4, to know a standard deviation")
    if args.keep_every and not args.keep_last:
        raise UserError("--keep_every says what is kept beside the newest checkpoints: give --keep_last too")
    if args.skip_iters and min(args.skip_iters) < 1:
        raise UserError(f"--skip_iters {min(args.skip_iters)}: iterations are numbered from 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: must be from 0 to {2**32 - 1}")


def _check_schedule(args: Arguments) -> None:
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        if getattr(args, f"{name}_iters") and getattr(args, f"{name}_samples"):
            raise UserError(f"--{name}_iters and --{name}_samples exclude each other")
        if args.rampup_batch_size and getattr(args, f"{name}_iters"):
            raise UserError(
                f"--{name}_iters: with --rampup_batch_size iterations differ in length; give --{name}_samples"
            )
    warmup = args.lr_warmup_iters or args.lr_warmup_samples
    if args.lr_warmup_fraction is not None and (warmup or not 0 <= args.lr_warmup_fraction < 1):
        raise UserError("--lr_warmup_fraction must be in [0, 1) and excludes --lr_warmup_iters and --lr_warmup_samples")
    if (args.lr_decay_style == "WSD") != (args.lr_wsd_decay_iters is not None or args.lr_wsd_decay_samples is not None):
        raise UserError(
            "--lr_decay_style WSD and --lr_wsd_decay_iters (or --lr_wsd_decay_samples), the length of its decay, "
            "belong together: give both or neither"
        )


def _check_weight_decay(args: Arguments) -> None:
    grows = args.weight_decay_incr_style != "constant"
    ends = args.start_weight_decay, args.end_weight_decay
    if any((end is not None) != grows for end in ends):
        raise UserError(
            "--weight_decay_incr_style linear or cosine, --start_weight_decay and --end_weight_decay belong together: "
            "give all three, or --weight_decay alone"
        )
    if grows and "weight_decay" in args.given:
        raise UserError(
            f"--weight_decay {args.weight_decay:g} has no meaning with --weight_decay_incr_style "
            f"{args.weight_decay_incr_style}, which grows from --start_weight_decay; leave it out"
        )
    if ends[0] is not None and ends[1] is not None and ends[0] > ends[1]:
        raise UserError(f"--start_weight_decay {ends[0]:g} is more than --end_weight_decay {ends[1]:g}; it only grows")


def _check_recomputation(args: Arguments) -> None:
    method, granularity = args.recompute_method, args.recompute_granularity
    if method is not None and granularity != "full":
        raise UserError(
            f"--recompute_method {method} chooses among whole layers; give --recompute_granularity full too, or leave "
            "it out"
        )
    if method is None and "recompute_num_layers" in args.given:
        raise UserError(f"--recompute_num_layers {args.recompute_num_layers} needs --recompute_method uniform or block")
