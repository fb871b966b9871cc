"""Where a run starts: the newest valid checkpoint in --save, else --load, else random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_llm import any_weights, checkpoint, gpt_dataset, layout, masks, megatron_weights
from megatron_llm.arguments import Arguments, config_from_flags
from megatron_llm.batches import DataIdentity, check_fits
from megatron_llm.files import UserError, check_claim
from megatron_llm.guards import Memory
from megatron_llm.loss_scale import LossScale
from megatron_llm.model import initial_weights, shapes
from megatron_llm.model_config import ModelConfig
from megatron_llm.optimizer import Schedule
from megatron_llm.parallel import World
from megatron_llm.sharding import fill


@dataclass
class Progress:
    """How far a run is; stored in every checkpoint."""

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    optimizer_steps: int = 0
    """Updates that Adam's moments have seen: fewer than iterations when only weights were taken over."""
    skipped_train_samples: int = 0
    """Consumed in iterations that made no update: the learning rate does not count them."""
    evaluation_due: bool = False
    """The evaluation after this iteration has not been made, or was interrupted."""
    losses_since_log: list[float] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """From state.json; checkpoints from before the guards had a memory lack it. Raises KeyError, TypeError."""
        memory = dict(state.get("memory", {}))
        if scale := memory.pop("loss_scale", None):
            memory["loss_scale"] = LossScale(**scale)
        values = {name: state[name] for name in cls.__dataclass_fields__ if name != "memory"}
        return cls(**values, memory=Memory(**memory))


@dataclass(frozen=True)
class Start:
    """What rank 0 found, without the weights."""

    config: ModelConfig
    progress: Progress
    folder: Path | None = None
    """One of our checkpoints, to be loaded by all ranks together."""
    saved: dict[str, Any] = field(default_factory=dict)
    """Its state.json, without what flags say is not to be taken over."""
    with_optimizer: bool = True
    """Whether Adam's moments are loaded from it."""


def find(args: Arguments, identity: DataIdentity, global_batch: int, ranks: int, weights: dict[str, Tensor]) -> Start:
    """Choose and check the start (rank 0). A Megatron checkpoint's weights are put into `weights`.

    Raises UserError when checkpoint, flags and data do not fit together, InputsMissing when --load has no files.
    """
    check_claim()
    checkpoint.remove_stale(args.save)
    start = _choose(args, identity, weights)
    where = start.folder or args.load
    _check_family(start.config, args.model_name, where)
    if not args.use_checkpoint_args:
        _check_geometry(start.config, config_from_flags(args, start.config.vocab_size), where)
    layout.check(start.config, args, ranks)
    check_fits(identity, args, start.config.vocab_size, start.config.max_position_embeddings)
    if start.saved:
        _check_continues(start, args, identity, global_batch)
    return start


def _choose(args: Arguments, identity: DataIdentity, weights: dict[str, Tensor]) -> Start:
    if own := checkpoint.latest_valid(args.save):
        print(f"continuing from {own}", flush=True)
        return _from_ours(own)
    if any(args.save.glob("iter_*")):
        begin = args.load or "random weights"
        print(f"no checkpoint in {args.save} verifies: the run begins anew from {begin}", flush=True)
    if args.load is None:
        if identity.vocab_size is None:
            raise UserError("the size of the vocabulary is unknown: give --vocab_file, or --load a checkpoint")
        print(f"no --load and no checkpoint to continue in {args.save}: random weights, seed {args.seed}", flush=True)
        return Start(config_from_flags(args, identity.vocab_size), Progress())
    plain = args.load_iters is None and (args.load / "config.json").is_file()  # a Hugging Face folder
    folder = args.load if plain else megatron_weights.find(args.load, args.load_iters)
    print(f"loading {folder}", flush=True)
    if checkpoint.is_ours(folder) and not args.finetune:
        if reason := checkpoint.problem(folder):
            raise UserError(f"{folder} does not verify: {reason}; choose another with --load_iters")
        return _as_asked(_from_ours(folder), args)
    loaded = any_weights.load(args.load, args.load_iters)
    weights.update(loaded.state)
    return Start(loaded.config, Progress() if args.finetune else _upstream_progress(loaded))


def _from_ours(folder: Path) -> Start:
    state = checkpoint.read_state(folder)
    try:
        return Start(ModelConfig(**state["model_config"]), Progress.of(state), folder, state)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / checkpoint.STATE} is not of this version: {error!r}") from error


def _as_asked(start: Start, args: Arguments) -> Start:
    """Without what --no_load_optim and --no_load_rng leave out of a checkpoint in --load."""
    left_out = {"schedule": args.no_load_optim, "rng": args.no_load_rng}
    saved = {name: value for name, value in start.saved.items() if not left_out.get(name)}
    if not args.no_load_optim:
        return replace(start, saved=saved)
    consumed = start.progress.consumed_train_samples
    memory = replace(start.progress.memory, loss_scale=None)
    progress = replace(start.progress, optimizer_steps=0, skipped_train_samples=consumed, memory=memory)
    return replace(start, saved=saved, progress=progress, with_optimizer=False)


def _upstream_progress(loaded: any_weights.Loaded) -> Progress:
    """Iteration and consumed samples of a Megatron trainer's checkpoint; a converted one starts at 0."""
    if loaded.iteration == "release":
        return Progress()
    train, valid = (int(loaded.args.get(f"consumed_{part}_samples") or 0) for part in ("train", "valid"))
    return Progress(loaded.iteration, train, valid)


def _check_family(found: ModelConfig, model_name: str, where: Path | None) -> None:
    """A Falcon is not trained as one of the others, nor they as a Falcon. Raises UserError."""
    if found.parallel_attn != (model_name == "falcon"):
        kind = "a Falcon" if found.parallel_attn else "no Falcon but one of the Llamas or Mistral"
        raise UserError(
            f"{where} is of another architecture: it is {kind}, and --model_name is {model_name}; give the name of "
            "the checkpoint's architecture, or the checkpoint of another model"
        )


def _check_geometry(found: ModelConfig, asked: ModelConfig, where: Path | None) -> None:
    """Flags that describe the model must describe the checkpoint's. Raises UserError."""
    asked_values = asdict(asked)
    differing = [
        f"{name} {value} (flags: {asked_values[name]})"
        for name, value in asdict(found).items()
        if value != asked_values[name]
    ]
    if differing:
        raise UserError(f"{where} has {', '.join(differing)}; correct the flags or pass --use_checkpoint_args")


def _check_continues(start: Start, args: Arguments, identity: DataIdentity, global_batch: int) -> None:
    """What decides the order of samples, or what is learnt from them, may not change within a run."""
    given = start.saved["arguments"]
    earlier = replace(args, train_iters=given["train_iters"], train_samples=given["train_samples"])
    if (wanted := args.samples(global_batch)[0]) != (before := earlier.samples(global_batch)[0]):
        _check_order(start, args, before, wanted)
    _check_tokenizer(start, identity)
    now = {
        "global_batch_size": global_batch,
        "seq_length": args.seq_length,
        "seed": args.seed,
        "split": args.split,
        "data": identity.fingerprint,
    }
    known = {**start.saved, "data": start.saved["data"]["fingerprint"]}
    for name, value in now.items():
        if (before := known[name] if name in known else given[name]) != value:
            raise UserError(
                f"{start.folder} was trained with {name} {before}, now it is {value}: samples would be repeated or "
                "lost; keep it, or begin a new run from it with --finetune and another --save folder"
            )
    for name in masks.FLAGS:
        if (before := given.get(name, False)) != getattr(args, name):
            raise UserError(
                f"{start.folder} was trained {'with' if before else 'without'} --{name}; keep it so, or begin a new "
                "run from it with --finetune and another --save folder"
            )


def _check_tokenizer(start: Start, identity: DataIdentity) -> None:
    """Data of the run's own tokenizer, where both are known. Raises UserError."""
    before = start.saved["data"]["tokenizer_fingerprint"]
    if None not in (before, identity.tokenizer_fingerprint) and before != identity.tokenizer_fingerprint:
        raise UserError(
            f"{start.folder} was trained on data of another tokenizer (fingerprint {before}, now "
            f"{identity.tokenizer_fingerprint}); tokenise the data with the run's tokenizer, or give its --vocab_file"
        )


def _check_order(start: Start, args: Arguments, before: int, wanted: int) -> None:
    """Another length of the run is fine as long as its samples come in the same order."""
    plans = [
        gpt_dataset.plan(args.data(), args.seed, args.seq_length, (samples, 0, 0))[0] for samples in (before, wanted)
    ]
    orders = [plan.orders for plan in plans if plan]
    if orders[0] != orders[1]:
        raise UserError(
            f"{start.folder} is of a run of {before} samples, now it is to have {wanted}: the passes over the data "
            "would be shuffled in another way, and samples repeated or lost; keep the run as long as it was, or begin "
            "a new one from it with --finetune and another --save folder"
        )


def weights_in_order(start: Start, weights: dict[str, Tensor], args: Arguments) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every parameter in the model's order, loaded or random (rank 0)."""
    if not weights:
        return initial_weights(start.config, args.seed, args.init_method_std)
    return ((name, weights.pop(name)) for name in shapes(start.config))


def load_model(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    start: Start,
    weights: dict[str, Tensor],
    args: Arguments,
    world: World,
) -> None:
    """Give the sharded model its values, and the optimizer its moments when a run is continued. Collective."""
    if start.folder:
        checkpoint.load(start.folder, parameters, optimizer if start.with_optimizer else None)
    else:
        fill(parameters, shapes(start.config), world, weights_in_order(start, weights, args))


def schedule(args: Arguments, global_batch: int, saved: dict[str, Any]) -> Schedule:
    """The learning-rate schedule of the flags, or of the checkpoint being continued. Raises UserError."""
    decay = args.lr_decay_samples or (args.lr_decay_iters or 0) * global_batch or args.samples(global_batch)[0]
    warmup: float = args.lr_warmup_samples or args.lr_warmup_iters * global_batch
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    flags = Schedule(args.lr, args.min_lr, warmup, decay, args.lr_decay_style)
    if args.lr_decay_style == "WSD":
        last = args.lr_wsd_decay_samples or (args.lr_wsd_decay_iters or 0) * global_batch
        flags = replace(flags, wsd_style=args.lr_wsd_decay_style, wsd_samples=last)
    if "schedule" not in saved:
        return flags
    return flags.resumed(
        saved["schedule"],
        use_checkpoint=args.use_checkpoint_opt_param_scheduler,
        override=args.override_opt_param_scheduler,
    )
