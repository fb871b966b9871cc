"""Finds where a run starts: the newest valid checkpoint in --save, else --load, else random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.flags import model_flags
from megatron_llm.flags.arguments import Arguments, OptimizerFlags
from megatron_llm.flags.batch_sizes import BatchSizes
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import initial_weights, shapes
from megatron_llm.optim.adamw import Schedule
from megatron_llm.parallel import layout_checks
from megatron_llm.parallel.sharding import fill
from megatron_llm.parallel.world import World
from megatron_llm.training import run_changes
from megatron_llm.training.batches import DataIdentity, check_fits
from megatron_llm.training.progress import Progress, Start
from megatron_llm.weights import load_any, megatron
from run_contract.claim import check_claim
from run_contract.errors import UserError


class LoadedWeights:
    """The whole weights that rank 0 has loaded.

    Each is handed out once, so that its memory is free again while the ranks fill their parts of the model.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = dict(state)

    def take(self, name: str) -> Tensor:
        """A weight, which is forgotten here."""
        return self._state.pop(name)


def find(args: Arguments, identity: DataIdentity, sizes: BatchSizes, ranks: int) -> tuple[Start, LoadedWeights | None]:
    """Choose and check the starting point (rank 0 only).

    Weights that only rank 0 loads come from a layout other than this engine's checkpoints, or with --finetune; without
    them the second result is None. Raises UserError when checkpoint, flags and data do not fit together, and
    InputsMissing when --load has no files.
    """
    if not args.evaluation.eval_only:
        check_claim()
        checkpoint.remove_stale(args.checkpoint.save)
    start, weights = _choose(args, identity, sizes)
    where = start.folder or args.checkpoint.load
    if where:
        _check_family(start.config, args.model.model_name, where)
        begun = start.folder is not None and start.folder.parent == args.checkpoint.save
        start = replace(start, config=model_flags.of_checkpoint(start.config, args, where, begun=begun))
    args = replace(args, model=replace(args.model, seq_length=_length(args.model.seq_length, start, where)))
    layout_checks.check(start.config, args.parallel, args.model.seq_length, ranks)
    positions = start.config.max_position_embeddings
    check_fits(identity, args.data.paths(), args.model.seq_length, start.config.vocab_size, positions)
    if where and start.progress.iteration and not args.evaluation.eval_only:
        start = replace(start, progress=run_changes.check(start, args, identity, sizes, where))
    return replace(start, seq_length=args.model.seq_length), weights


def _length(asked: int | None, start: Start, where: Path | None) -> int:
    """The sequence length: --seq_length (`asked`), or the checkpoint's. Raises UserError when neither is known."""
    if asked is not None:
        return asked
    if length := start.recorded.get("seq_length"):
        print(f"--seq_length {length}, as in {where}", flush=True)
        return int(length)
    raise UserError(f"{where} does not say how long the samples of its training were; give --seq_length")


def _choose(args: Arguments, identity: DataIdentity, sizes: BatchSizes) -> tuple[Start, LoadedWeights | None]:
    own = None if args.evaluation.eval_only and args.checkpoint.load else checkpoint.latest_valid(args.checkpoint.save)
    if own:
        print(f"continuing from {own}", flush=True)
        return _as_asked(_from_ours(own), args, sizes, begun=True), None
    if args.checkpoint.load is None:
        return _anew(args, identity), None
    if any(args.checkpoint.save.glob("iter_*")) and not args.evaluation.eval_only:
        print(
            f"no checkpoint in {args.checkpoint.save} verifies: the run begins anew from {args.checkpoint.load}",
            flush=True,
        )
    plain = (
        args.checkpoint.load_iters is None and (args.checkpoint.load / "config.json").is_file()
    )  # a Hugging Face folder
    folder = args.checkpoint.load if plain else megatron.find(args.checkpoint.load, args.checkpoint.load_iters)
    print(f"loading {folder}", flush=True)
    if checkpoint.is_ours(folder) and not args.checkpoint.finetune:
        if reason := checkpoint.problem(folder):
            raise UserError(f"{folder} does not verify: {reason}; choose another with --load_iters")
        return _as_asked(_from_ours(folder), args, sizes, begun=False), None
    loaded = load_any.load(args.checkpoint.load, args.checkpoint.load_iters)
    begins = args.checkpoint.finetune or loaded.iteration == "release"
    progress = Progress() if begins else _original_progress(loaded, args, sizes)
    start = Start(loaded.config, progress, recorded=run_changes.original(loaded.args))
    return start, LoadedWeights(loaded.state)


def _anew(args: Arguments, identity: DataIdentity) -> Start:
    """The start of a run from random weights.

    Raises UserError with --eval_only, or when the vocabulary size is unknown.
    """
    if args.evaluation.eval_only:
        raise UserError(f"--eval_only: there is no checkpoint in {args.checkpoint.save}; give --load")
    if any(args.checkpoint.save.glob("iter_*")):
        print(f"no checkpoint in {args.checkpoint.save} verifies: the run begins anew from random weights", flush=True)
    if identity.vocab_size is None:
        raise UserError("the size of the vocabulary is unknown: give --vocab_file, or --load a checkpoint")
    print(
        f"no --load and no checkpoint to continue in {args.checkpoint.save}: random weights, seed {args.training.seed}",
        flush=True,
    )
    return Start(model_flags.config_from_flags(args.model, identity.vocab_size), Progress())


def _from_ours(folder: Path) -> Start:
    state = checkpoint.read_state(folder)
    try:
        before = run_changes.recorded(state["arguments"])
        return Start(ModelConfig(**state["model_config"]), Progress.of(state), folder, state, recorded=before)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / checkpoint.STATE} was not written by this version of the engine ({error!r}); load another "
            "checkpoint"
        ) from error


PARTS = {
    "optim": ("schedule", "Adam's moments begin at zero and the learning rate warms up again"),
    "rng": ("rng", "the random state is --seed's"),
}
"""The X of --no_save_X and --no_load_X -> its key in state.json, and what happens when that part is missing."""


def _as_asked(start: Start, args: Arguments, sizes: BatchSizes, *, begun: bool) -> Start:
    """The start from one of this engine's checkpoints, without what --no_load_optim and --no_load_rng exclude.

    begun: the checkpoint is in --save, so the run itself is continued. Then every part that was saved is loaded,
    whatever these flags say. Raises UserError when a part was not saved and --no_load_X does not accept its absence.
    """
    if args.evaluation.eval_only:
        return replace(start, with_optimizer=False)
    left_out = []
    for part, (name, effect) in PARTS.items():
        asked, lacks = getattr(args.checkpoint, f"no_load_{part}"), name not in start.saved
        if lacks and not asked:
            raise UserError(
                f"{start.folder} was saved with --no_save_{part}; pass --no_load_{part} to go on without: {effect}"
            )
        left_out += [name] if lacks or (asked and not begun) else []
    saved = {name: value for name, value in start.saved.items() if name not in left_out}
    if "schedule" not in left_out:
        return replace(start, saved=saved)
    _say_without_optimizer(start.folder, args, sizes)
    memory = replace(start.progress.memory, loss_scale=None)
    progress = replace(_warming_up(start.progress), optimizer_steps=0, memory=memory)
    return replace(start, saved=saved, progress=progress, with_optimizer=False)


def _warming_up(progress: Progress) -> Progress:
    """The same progress, but with the learning-rate schedule back at its beginning."""
    return replace(progress, skipped_train_samples=progress.consumed_train_samples)


def _say_without_optimizer(where: Path | None, args: Arguments, sizes: BatchSizes) -> None:
    flags = schedule(args, sizes.full, {})
    warmup = f", to reach {flags.max_lr:.3E} after {flags.warmup_samples:g} samples" if flags.warmup_samples else ""
    print(
        f"without the optimizer state of {where}: Adam's moments begin at zero, and the learning rate begins again at "
        f"{flags.at(0):.3E}{warmup}",
        flush=True,
    )


def _original_progress(loaded: load_any.Loaded, args: Arguments, sizes: BatchSizes) -> Progress:
    """The progress recorded in a checkpoint of Megatron's trainer, whose optimizer state is not taken over.

    Raises UserError unless --no_load_optim shows that the user knows this.
    """
    assert loaded.iteration != "release"
    if args.evaluation.eval_only:
        return Progress(loaded.iteration)
    held = ", ".join(megatron.training_state(loaded.folder)) or "no optimizer state"
    if not args.checkpoint.no_load_optim:
        raise UserError(
            f"{loaded.folder} was written by Megatron's trainer and holds {held}, from which the optimizer cannot go "
            f"on; pass --no_load_optim to go on at iteration {loaded.iteration} with Adam's moments at zero and the "
            "learning rate warming up again, or --finetune to take only the weights and begin at iteration 0"
        )
    print(f"not taken over from {loaded.folder}: {held}", flush=True)
    _say_without_optimizer(loaded.folder, args, sizes)
    train, valid = (int(loaded.args.get(f"consumed_{part}_samples") or 0) for part in ("train", "valid"))
    return _warming_up(Progress(loaded.iteration, train, valid))


def _check_family(found: ModelConfig, model_name: str, where: Path | None) -> None:
    """Check that a Falcon checkpoint is trained as a Falcon, and any other model not as one. Raises UserError."""
    if found.parallel_attn != (model_name == "falcon"):
        kind = "a Falcon" if found.parallel_attn else "no Falcon but one of the Llamas or Mistral"
        raise UserError(
            f"{where} has a different architecture: it is {kind}, and --model_name is {model_name}; give the name of "
            "the checkpoint's architecture, or the checkpoint of a different model"
        )


def weights_in_order(
    config: ModelConfig, weights: LoadedWeights | None, seed: int, deviation: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor) of every parameter in the model's order (rank 0 only).

    Without loaded weights they are random: normal, with mean 0 and this standard deviation.
    """
    if weights is None:
        return initial_weights(config, seed, deviation)
    return ((name, weights.take(name)) for name in shapes(config))


def load_model(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    start: Start,
    weights: Iterator[tuple[str, Tensor]],
    world: World,
) -> None:
    """Load the values of the sharded model, and the optimizer's moments when a run is continued. Collective.

    weights: see `weights_in_order`; used only on rank 0, and not if the start is one of this engine's checkpoints.
    """
    if start.folder:
        checkpoint.load(start.folder, parameters, optimizer if start.with_optimizer else None)
    else:
        fill(parameters, shapes(start.config), world, weights)


def schedule(args: Arguments, global_batch: int, saved: dict[str, Any]) -> Schedule:
    """The learning-rate schedule from the flags, or from the checkpoint being continued. Raises UserError."""
    flags, samples = args.optimizer, args.samples(global_batch)[0]
    decay = flags.lr_decay_samples or (flags.lr_decay_iters or 0) * global_batch or samples
    warmup: float = flags.lr_warmup_samples or flags.lr_warmup_iters * global_batch
    if flags.lr_warmup_fraction is not None:
        warmup = flags.lr_warmup_fraction * decay
    found = Schedule(
        flags.lr,
        flags.min_lr,
        warmup,
        decay,
        flags.lr_decay_style,
        **_weight_decay(args.optimizer, samples),
    )
    if flags.lr_decay_style == "WSD":
        last = flags.lr_wsd_decay_samples or (flags.lr_wsd_decay_iters or 0) * global_batch
        found = replace(found, wsd_style=flags.lr_wsd_decay_style, wsd_samples=last)
    if "schedule" not in saved:
        return found
    constant = saved["arguments"]["weight_decay"]  # older checkpoints know only a constant weight decay
    before = {"start_weight_decay": constant, "end_weight_decay": constant, **saved["schedule"]}
    return found.resumed(
        before,
        use_checkpoint=args.checkpoint.use_checkpoint_opt_param_scheduler,
        override=args.checkpoint.override_opt_param_scheduler,
    )


def _weight_decay(flags: OptimizerFlags, samples: int) -> dict[str, Any]:
    """The fields of the schedule that describe how the weight decay grows over a run of `samples` samples."""
    if flags.weight_decay_incr_style == "constant":
        return {"start_weight_decay": flags.weight_decay, "end_weight_decay": flags.weight_decay}
    return {
        "start_weight_decay": flags.start_weight_decay,
        "end_weight_decay": flags.end_weight_decay,
        "weight_decay_style": flags.weight_decay_incr_style,
        "weight_decay_samples": samples,
    }
