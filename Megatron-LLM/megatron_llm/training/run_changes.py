"""Which flags may change when a run goes on: one table of rules for all flags, and the checks that enforce them.

A run goes on from its own newest checkpoint, from another checkpoint of this engine in --load, or from a checkpoint of
the original Megatron trainer. The earlier flags are those that the checkpoint recorded; checkpoints of the original
trainer use the same names for the flags that are compared here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_llm.data import gpt_dataset
from megatron_llm.flags import model_flags
from megatron_llm.flags.arguments import FLAGS, Arguments
from megatron_llm.flags.batch_sizes import BatchSizes
from megatron_llm.training.batches import DataIdentity
from run_contract.errors import UserError

if TYPE_CHECKING:
    from megatron_llm.training.progress import Progress, Start

NEW_RUN = "begin a new run from it with --finetune and another --save folder"


class Rule(Enum):
    """The rule for a flag whose value differs from the earlier one when a run goes on."""

    FREE = "may change"
    SAID = "may change; the run says so"
    SCHEDULE = (
        "the checkpoint's with --use_checkpoint_opt_param_scheduler, the flag with --override_opt_param_scheduler"
    )
    EVALUATION = "may change; validation begins at its first sample again where it cannot go on"
    LENGTH = "may change as long as the samples keep their order"
    DATA = "may be another file with the same content"
    MODEL = "must agree with the checkpoint"
    NORMALISATION = "with eod_mask_loss must stay, and stays when it is not given"
    FIXED = "must stay"


_NAMED = {
    Rule.FIXED: "global_batch_size rampup_batch_size seq_length seed split reset_position_ids reset_attention_mask "
    "eod_mask_loss",
    Rule.NORMALISATION: "loss_normalisation",
    Rule.DATA: "data_path train_data_path valid_data_path test_data_path tokenizer_type vocab_file no_new_tokens "
    "vocab_extra_ids vocab_extra_ids_list",
    Rule.LENGTH: "train_iters train_samples",
    Rule.EVALUATION: "eval_interval eval_iters",
    Rule.SCHEDULE: "lr min_lr lr_decay_style lr_decay_iters lr_decay_samples lr_wsd_decay_style lr_wsd_decay_iters "
    "lr_wsd_decay_samples lr_warmup_iters lr_warmup_samples lr_warmup_fraction weight_decay start_weight_decay "
    "end_weight_decay weight_decay_incr_style",
    Rule.SAID: "adam_beta1 adam_beta2 adam_eps clip_grad bf16 fp16 loss_scale min_loss_scale loss_scale_window "
    "hysteresis skip_iters skip_spikes spike_window",
    Rule.MODEL: " ".join(["model_name", "position_embedding_type", *model_flags.FLAGS.values()]),
    Rule.FREE: "load load_iters save save_interval keep_last keep_every no_async_save finetune no_load_optim "
    "no_load_rng no_save_optim no_save_rng use_checkpoint_args override_model_args use_checkpoint_opt_param_scheduler "
    "override_opt_param_scheduler init_method_std hidden_dropout attention_dropout recompute_granularity "
    "recompute_activations recompute_method recompute_num_layers torch_compile tensor_model_parallel_size "
    "sequence_parallel pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage distributed_timeout_minutes "
    "initial_loss_scale threads index_path num_workers micro_batch_size exit_interval exit_duration_in_mins "
    "log_interval log_samples log_params_norm tensorboard_dir log_timers_to_tensorboard log_batch_size_to_tensorboard "
    "log_memory_to_tensorboard log_world_size_to_tensorboard wandb_logger wandb_project wandb_entity wandb_name "
    "wandb_id peak_tflops eval_only metrics",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _NAMED.items() for name in names.split()}
"""Flag -> the rule for changing it; every flag is listed."""


def recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of one of this engine's checkpoints; flags that its version did not have yet get their default."""
    defaults = {name: field.default for name, field in FLAGS.items() if field.default is not dataclasses.MISSING}
    return defaults | dict(arguments)


def original(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a checkpoint of the original trainer that have a rule here and a value of a plain type."""
    kinds = (int, float, str, list, type(None))
    return {name: value for name, value in arguments.items() if name in RULES and isinstance(value, kinds)}


def check(start: Start, args: Arguments, identity: DataIdentity, sizes: BatchSizes, where: Path) -> Progress:
    """The progress from which the run goes on. Raises UserError if anything has changed that must not."""
    before = start.recorded
    if start.saved:
        _check_data(start.saved["data"], identity, where)
        before = {**before, "global_batch_size": start.saved["global_batch_size"]}
    now = {**args.as_json(), "global_batch_size": sizes.full}
    for name in (name for name, rule in RULES.items() if rule in (Rule.FIXED, Rule.SAID) and name in before):
        if (old := _plain(before[name])) == (new := _plain(now[name])):
            continue
        if RULES[name] is Rule.FIXED:
            raise _refusal(where, name, old, new)
        print(f"{name} was {old} until now and is {new} from here on", flush=True)
    earlier = _earlier(args, before)
    _check_train_samples(start.progress, args, earlier, sizes, where)
    return _with_validation(start.progress, args, earlier, sizes)


def _plain(value: Any) -> Any:
    """A value in a uniform spelling: the original trainer keeps the spaces of `969, 30, 1` and the words of a list."""
    if isinstance(value, (list, tuple)):
        return [int(part) for part in value]
    return value.replace(" ", "") if isinstance(value, str) else value


def _refusal(where: Path, name: str, old: Any, new: Any) -> UserError:
    return UserError(
        f"{where} was trained with {name} {old}, and now it is {new}: samples would be repeated, lost or learnt in a "
        f"different way; keep it, or {NEW_RUN}"
    )


def _check_data(before: Mapping[str, Any], identity: DataIdentity, where: Path) -> None:
    """Check that the documents are the same, and the tokenizer too where both are known. Raises UserError."""
    old, new = before["tokenizer_fingerprint"], identity.tokenizer_fingerprint
    if None not in (old, new) and old != new:
        raise UserError(
            f"{where} was trained on data of a different tokenizer (fingerprint {old}, now {new}); tokenise the data "
            "with the run's tokenizer, or give its --vocab_file"
        )
    if before["fingerprint"] != identity.fingerprint:
        raise _refusal(where, "data", before["fingerprint"], identity.fingerprint)


def _earlier(args: Arguments, before: Mapping[str, Any]) -> Arguments | None:
    """The flags with the earlier lengths of the run and its evaluations; None if the checkpoint lacks one of them."""
    lengths, evaluation = ([name for name in RULES if RULES[name] is rule] for rule in (Rule.LENGTH, Rule.EVALUATION))
    if not all(name in before for name in (*lengths, *evaluation)):
        return None
    return replace(
        args,
        training=replace(args.training, **{name: before[name] for name in lengths}),
        evaluation=replace(args.evaluation, **{name: before[name] for name in evaluation}),
    )


def _plan(args: Arguments, split: int, samples: int) -> gpt_dataset.SplitPlan | None:
    """The plan of what is read of the training (0) or validation (1) data."""
    wanted = (samples, 0, 0) if split == 0 else (0, samples, 0)
    return gpt_dataset.plan(args.data.paths(), args.training.seed, args.model.seq_length, wanted)[split]


def _same_order(args: Arguments, split: int, before: int, wanted: int) -> bool:
    """Whether the samples of a split come in the same order for both numbers of samples."""
    if before == wanted:
        return True
    first, second = (_plan(args, split, count) for count in (before, wanted))
    return first is not None and second is not None and first.orders == second.orders


def _enough(args: Arguments, split: int, wanted: int, last: int) -> bool:
    """Whether a split planned for `wanted` samples contains `last` of them; without a blend the last pass over the data
    is complete, so there may be more than planned."""
    if last <= wanted:
        return True
    plan = _plan(args, split, wanted) if wanted else None
    return plan is not None and plan.weights is None and last <= plan.samples()


def _check_train_samples(
    progress: Progress, args: Arguments, earlier: Arguments | None, sizes: BatchSizes, where: Path
) -> None:
    """Check that the training samples keep their order and suffice if the run's length has changed.

    Raises UserError.
    """
    wanted = args.samples(sizes.full)[0]
    before = earlier.samples(sizes.full)[0] if earlier else wanted
    if not _same_order(args, 0, before, wanted):
        raise UserError(
            f"{where} belongs to a run of {before} samples, and now the run is to have {wanted}: the passes over the "
            "data would be shuffled in a different way, and samples would be repeated or lost; keep the run as long as "
            f"it was, or {NEW_RUN}"
        )
    more = max(0, args.training.train_iters - progress.iteration)
    last = sizes.consumed(progress.consumed_train_samples, more)
    if more and not _enough(args, 0, wanted, last):
        raise UserError(
            f"{where} has consumed {progress.consumed_train_samples} samples in {progress.iteration} iterations; "
            f"{more} more iterations need {last} in all, and the run has {wanted}: keep --global_batch_size and "
            f"--train_iters (or --train_samples) as they were, or {NEW_RUN}"
        )


def _with_validation(progress: Progress, args: Arguments, earlier: Arguments | None, sizes: BatchSizes) -> Progress:
    """The progress, with validation going on where it stopped or, if its samples changed or run out, beginning anew."""
    if not args.evaluation.eval_iters:
        return replace(progress, evaluation_due=False)
    wanted = args.samples(sizes.full)[1]
    before = earlier.samples(sizes.full)[1] if earlier else wanted
    first, interval = progress.iteration, args.evaluation.eval_interval
    evaluations = progress.evaluation_due + max(0, -(-args.training.train_iters // interval) - first // interval)
    last = progress.consumed_valid_samples + evaluations * args.evaluation.eval_iters * sizes.full
    if not progress.consumed_valid_samples:
        return progress
    if before and _same_order(args, 1, before, wanted) and _enough(args, 1, wanted, last):
        return progress
    print(
        f"validation begins at its first sample again: it was made for {before} samples and is now for {wanted} "
        "(--eval_interval, --eval_iters, the length of the run)",
        flush=True,
    )
    return replace(progress, consumed_valid_samples=0)
