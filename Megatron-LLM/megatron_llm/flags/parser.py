"""The parser of finetune.py's flags."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from megatron_llm.flags import argument_parser, checks
from megatron_llm.flags.argument_parser import Parser
from megatron_llm.flags.arguments import DERIVED, SECTIONS, Arguments
from megatron_llm.flags.batch_sizes import BatchSizes
from megatron_llm.flags.original_flags import NO_EFFECT
from run_contract.errors import UserError


def parser(*, optional: Collection[str] = (), **about: str) -> Parser:
    """The parser of these flags; see `parse`."""
    texts = {"prog": "finetune.py", "description": "Train a language model on tokenised text.", **about}
    return argument_parser.make(SECTIONS.values(), (*optional, *DERIVED), **texts)


def parse(argv: Sequence[str], *, optional: Collection[str] = (), **about: str) -> Arguments:
    """Parse the flags, and check what can be checked without files or ranks. Raises UserError.

    Another program that takes these flags passes its `prog` and `description`, and names in `optional` the flags that
    it does not require.
    """
    values = vars(parser(optional=optional, **about).parse_args(argv))
    given = tuple(sorted(name for name in values if name not in NO_EFFECT))
    no_effect = tuple(name for name in NO_EFFECT if values.pop(name, None) is not None)
    values = dict.fromkeys((*optional, *DERIVED)) | values
    if values["seq_length"] is None and not values.get("use_checkpoint_args"):
        raise UserError("--seq_length is missing; give it, or --use_checkpoint_args to take it from the checkpoint")
    _resolve_recomputation(values)
    values["train_iters"] = _iterations(values)
    args = Arguments.of(values, no_effect=no_effect, given=given)
    checks.check(args)
    return args


def _resolve_recomputation(values: dict[str, Any]) -> None:
    """Resolve --recompute_activations, the original's short form of --recompute_granularity selective.

    Raises UserError.
    """
    if not values.get("recompute_activations"):
        return
    if (granularity := values.setdefault("recompute_granularity", "selective")) != "selective":
        raise UserError(
            f"--recompute_activations means --recompute_granularity selective, and {granularity} is given; leave out "
            "one of the two"
        )


def _iterations(values: dict[str, Any]) -> int:
    """The number of iterations: --train_iters, or --train_samples in whole batches, as upstream counts them.

    Raises UserError.
    """
    iterations, samples, batch = (values.get(name) for name in ("train_iters", "train_samples", "global_batch_size"))
    if (iterations is None) == (samples is None):
        raise UserError(
            f"--train_iters and --train_samples are {'both missing' if samples is None else 'both given'}; give either "
            "--train_iters or --train_samples"
        )
    ramp = values.get("rampup_batch_size")
    if samples is None:
        if ramp:
            raise UserError("--rampup_batch_size counts in samples: give --train_samples instead of --train_iters")
        assert iterations is not None
        return int(iterations)
    if batch is None or not 0 < batch <= samples:
        raise UserError(
            f"--train_samples {samples} needs --global_batch_size, from 1 up to the number of samples; give it, or "
            "train on more"
        )
    return BatchSizes.of(batch, ramp).iterations(samples)
