"""Assembles one training run on this rank: checks -> starting point -> data, sharded model, optimizer -> the loop."""

from __future__ import annotations

import base64
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_llm.checkpoint.saver import Saver
from megatron_llm.flags.arguments import Arguments, ModelFlags, OptimizerFlags, ParallelFlags, PrecisionFlags
from megatron_llm.flags.original_flags import NO_EFFECT
from megatron_llm.metrics.log import Metrics, validation_line
from megatron_llm.metrics.meter import Waited, Work
from megatron_llm.metrics.sample_log import Numbered, SampleLog
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.flops import training_flops
from megatron_llm.model.llama import Llama
from megatron_llm.model.recompute import WholeLayers
from megatron_llm.optim.adamw import build_optimizer, set_steps
from megatron_llm.optim.loss_scale import LossScale
from megatron_llm.parallel import sharding
from megatron_llm.parallel.layout_checks import batch_layout, batch_sizes
from megatron_llm.parallel.world import World
from megatron_llm.process.errors import check_outputs
from megatron_llm.process.heartbeat import Heartbeat
from megatron_llm.process.signals import StopRequest
from megatron_llm.training import batches, pipeline, resume
from megatron_llm.training.batches import DataIdentity, Share
from megatron_llm.training.document_masks import Masks, with_normalisation
from megatron_llm.training.evaluation import Evaluation
from megatron_llm.training.progress import Progress, Start
from megatron_llm.training.resume import LoadedWeights
from megatron_llm.training.steps import Direct, Steps
from megatron_llm.training.trainer import Trainer
from megatron_llm.weights.model_card import HARDWARE
from run_contract.errors import UserError
from run_contract.publish import write_json


def run(args: Arguments, world: World, stop: StopRequest) -> int:
    """Set up this rank, train, and return the exit code. Raises UserError, on all ranks alike, or Diverged."""
    heartbeat = Heartbeat()
    heartbeat.beat("start", 0)
    if not {"hidden_dropout", "attention_dropout"} & set(args.given):
        world.say("--hidden_dropout and --attention_dropout are 0, where Megatron's default is 0.1")
    for name in args.no_effect:
        world.say(f"--{name} has no effect: {NO_EFFECT[name]}")
    if args.parallel.sequence_parallel and args.parallel.tensor_model_parallel_size == 1:
        world.say("--sequence_parallel has no effect: it needs --tensor_model_parallel_size above 1")
    if (
        args.model.torch_compile
        and world.device.type == "cpu"
        and not shutil.which(compiler := os.environ.get("CXX", "g++"))
    ):
        raise UserError(
            f"--torch_compile needs a C++ compiler, and {compiler} is not found; install it, or leave the flag out"
        )
    sizes = batch_sizes(args.parallel, args.training, world.size)
    identity = world.on_rank0(lambda: batches.identify(args.data, args.given))
    found, weights = world.split_from_rank0(lambda: resume.find(args, identity, sizes, world.size))
    world.on_every_rank(lambda: check_outputs(stop.lost))
    args = replace(
        args,
        model=replace(args.model, seq_length=found.seq_length),
        data=with_normalisation(args.data, found.saved),
    )
    if args.evaluation.eval_only:
        return _evaluate_only(args, world, found, weights)
    if found.progress.iteration >= args.training.train_iters and not found.progress.evaluation_due:
        world.say(f"already at iteration {found.progress.iteration} of {args.training.train_iters}: nothing to do")
        return 0
    trainer = _trainer(args, world, stop, identity, found, weights, heartbeat)
    world.limit_waiting(args.parallel.distributed_timeout_minutes)
    failed = True
    try:
        code = trainer.run()
        failed = False
    except RuntimeError as error:
        raise RuntimeError(
            f"in {trainer.heartbeat}{_peers(args.parallel.distributed_timeout_minutes, world)}: {error}"
        ) from error
    finally:
        if trainer.metrics:
            trainer.metrics.close(failed=failed)
    return code


def _peers(minutes: float, world: World) -> str:
    """A clause for an error of this rank, which names other ranks as a possible cause; empty with one rank."""
    if world.size == 1:
        return ""
    limit = f"--distributed_timeout_minutes {minutes:g}"
    return f", perhaps as another rank has ended or stands still ({limit})"


def _trainer(
    args: Arguments,
    world: World,
    stop: StopRequest,
    identity: DataIdentity,
    found: Start,
    weights: LoadedWeights | None,
    heartbeat: Heartbeat,
) -> Trainer:
    """Build the trainer: data, model and optimizer in the state from which the run starts or goes on."""
    metrics = _metrics(args, world, found.progress)
    sizes = batch_sizes(args.parallel, args.training, world.size)
    schedule = world.on_rank0(lambda: resume.schedule(args, sizes.full, found.saved))
    indices = world.on_rank0(lambda: batches.find_indices(args, sizes.full))
    train, valid = world.on_every_rank(lambda: batches.datasets(args, sizes.full, indices))
    _set_random_state(args.training.seed, found.saved)
    models = models_of(args.model, args.parallel, args.precision, world, found.config)
    parameters = sharding.parameters_by_name(models.values())
    optimizer = _filled_optimizer(args.optimizer, world, found, _values(args, found, weights), parameters)
    steps = _steps(args, world, models)
    progress = found.progress
    progress.memory.loss_scale = LossScale.of(args.precision, progress.memory.loss_scale)
    first = progress.consumed_train_samples
    last = sizes.consumed(first, args.training.train_iters - progress.iteration)
    rows, flops = args.training.micro_batch_size, training_flops(found.config, args.model.seq_length, sizes.full)
    share = Share(first, last, rows, world.data_rank, world.data_size)
    sample_log = SampleLog(args.checkpoint.save, world, progress.iteration) if args.logging.log_samples else None
    train_batches = batches.load(Numbered(train) if sample_log else train, share, args.data.num_workers)
    saver = Saver(args.checkpoint, world, found.config)
    world.say(saver.forecast())
    return Trainer(
        args=args,
        world=world,
        heartbeat=heartbeat,
        stop=stop,
        identity=identity,
        sizes=sizes,
        config=found.config,
        parameters=parameters,
        steps=steps,
        optimizer=optimizer,
        schedule=schedule,
        progress=progress,
        train_batches=Waited(sample_log.watched(train_batches) if sample_log else train_batches),
        work=Work.of(args.logging.peak_tflops, args.precision.compute_dtype(), flops, world.size),
        evaluation=Evaluation(args.evaluation, rows, world, steps, list(models.values()), valid) if valid else None,
        metrics=metrics,
        saver=saver,
        sample_log=sample_log,
        saved_iteration=progress.iteration if found.folder and found.folder.parent == args.checkpoint.save else -1,
    )


def _metrics(args: Arguments, world: World, progress: Progress) -> Metrics | None:
    """The metrics writer, created on rank 0 only (None elsewhere); if that fails, the error is raised on every rank."""

    def opened() -> tuple[None, Metrics]:
        metrics = Metrics(args, progress.iteration, progress.evaluation_due)
        write_json(args.checkpoint.save / HARDWARE, _hardware(world))
        return None, metrics

    return world.split_from_rank0(opened)[1]


def _hardware(world: World) -> dict[str, Any]:
    """The hardware that this attempt runs on, for the model card."""
    gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if gpu else f"CPU ({platform.machine()})"
    return {"device": device, "ranks": world.size, "torch": torch.__version__}


def models_of(
    flags: ModelFlags, parallel: ParallelFlags, precision: PrecisionFlags, world: World, config: ModelConfig
) -> dict[int, Llama]:
    """This rank's pipeline stages by stage number; they are sharded, but their parameters have no values yet."""
    tp, models = world.tensor_parallel(sequence=parallel.sequence_parallel), {}
    whole = WholeLayers.of(flags.recompute_method, flags.recompute_num_layers)
    for number, part in pipeline.stages(config, parallel, world).items():
        with torch.device("meta"):
            models[number] = Llama(config, flags.recompute_granularity, part, tp, whole)
        if flags.torch_compile:
            models[number].compile_layers()
        sharding.shard(models[number], world, bf16=precision.bf16, fp16=precision.fp16)
    return models


def _steps(args: Arguments, world: World, models: dict[int, Llama]) -> Steps:
    """The steps object that computes global batches on this rank; the models must already have their values."""
    masks = world.on_rank0(lambda: Masks.of(args.data))
    _, micro_batches = batch_layout(args.parallel, args.training, world.size)
    if args.parallel.pipeline_model_parallel_size > 1:
        shape = args.training.micro_batch_size, args.model.seq_length
        return pipeline.Pipelined(models, world, micro_batches, shape, args.precision.compute_dtype(), masks)
    return Direct(models[0], micro_batches, world, masks)


def _evaluate_only(args: Arguments, world: World, found: Start, weights: LoadedWeights | None) -> int:
    """Carry out --eval_only: print the loss on the first validation samples. Nothing in --save is changed."""
    sizes = batch_sizes(args.parallel, args.training, world.size)
    indices = world.on_rank0(lambda: batches.find_indices(args, sizes.full))
    _, valid = world.on_every_rank(lambda: batches.datasets(args, sizes.full, indices))
    assert valid, "flags.checks wants --eval_iters above 0"
    models = models_of(args.model, args.parallel, args.precision, world, found.config)
    values = _values(args, found, weights)
    resume.load_model(sharding.parameters_by_name(models.values()), None, found, values, world)
    steps, rows = _steps(args, world, models), args.training.micro_batch_size
    evaluation = Evaluation(args.evaluation, rows, world, steps, list(models.values()), valid)
    world.limit_waiting(args.parallel.distributed_timeout_minutes)
    result = evaluation.run(0, sizes.full)
    assert result, "nothing gives it up"
    world.say(validation_line(found.progress.iteration, result, args.evaluation.metrics or ()))
    return 0


def _values(args: Arguments, found: Start, weights: LoadedWeights | None) -> Iterator[tuple[str, Tensor]]:
    """The values of the model's parameters, for rank 0 to hand out."""
    return resume.weights_in_order(found.config, weights, args.training.seed, args.model.init_method_std)


def _filled_optimizer(
    flags: OptimizerFlags,
    world: World,
    found: Start,
    values: Iterator[tuple[str, Tensor]],
    parameters: dict[str, nn.Parameter],
) -> torch.optim.AdamW:
    """Build the optimizer, and fill the parameters and the optimizer's moments with their values."""
    betas = (flags.adam_beta1, flags.adam_beta2)
    optimizer = build_optimizer(
        parameters.values(), betas=betas, epsilon=flags.adam_eps, weight_decay=flags.weight_decay
    )
    resume.load_model(parameters, optimizer, found, values, world)
    set_steps(optimizer, found.progress.optimizer_steps)
    return optimizer


def _set_random_state(seed: int, saved: dict[str, Any]) -> None:
    """Restore the random state of the checkpoint, or seed a new one where the checkpoint has none."""
    torch.manual_seed(seed)
    if "rng" in saved:
        state = bytearray(base64.b64decode(saved["rng"]["torch"]))
        torch.set_rng_state(torch.frombuffer(state, dtype=torch.uint8))
