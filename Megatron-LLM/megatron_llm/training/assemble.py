"""Assembles one training run on this rank: checks -> starting point -> data, sharded model, optimizer -> the loop."""

from __future__ import annotations

import base64
import os
import platform
import shutil
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_llm.checkpoint.saver import Saver
from megatron_llm.flags.arguments import Arguments
from megatron_llm.flags.original_flags import NO_EFFECT
from megatron_llm.metrics.log import Metrics, validation_line
from megatron_llm.metrics.meter import Waited, Work
from megatron_llm.metrics.sample_log import Numbered, SampleLog
from megatron_llm.model.config import ModelConfig
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
    if args.sequence_parallel and args.tensor_model_parallel_size == 1:
        world.say("--sequence_parallel has no effect: it needs --tensor_model_parallel_size above 1")
    if args.torch_compile and world.device.type == "cpu" and not shutil.which(compiler := os.environ.get("CXX", "g++")):
        raise UserError(f"--torch_compile needs a C++ compiler and there is no {compiler}; install one or leave it out")
    sizes = batch_sizes(args, world.size)
    identity = world.on_rank0(lambda: batches.identify(args))
    weights: dict[str, Tensor] = {}
    found = world.on_rank0(lambda: resume.find(args, identity, sizes, world.size, weights))
    world.on_every_rank(lambda: check_outputs(stop.lost))
    args = replace(with_normalisation(args, found.saved), seq_length=found.seq_length)
    if args.eval_only:
        return _evaluate_only(args, world, found, weights)
    if found.progress.iteration >= args.train_iters and not found.progress.evaluation_due:
        world.say(f"already at iteration {found.progress.iteration} of {args.train_iters}: nothing to do")
        return 0
    trainer = _trainer(args, world, stop, identity, found, weights, heartbeat)
    world.limit_waiting(args.distributed_timeout_minutes)
    failed = True
    try:
        code = trainer.run()
        failed = False
    except RuntimeError as error:
        raise RuntimeError(f"in {trainer.heartbeat}{_peers(args, world)}: {error}") from error
    finally:
        if trainer.metrics:
            trainer.metrics.close(failed=failed)
    return code


def _peers(args: Arguments, world: World) -> str:
    """A clause for an error of this rank, which names other ranks as a possible cause; empty with one rank."""
    if world.size == 1:
        return ""
    limit = f"--distributed_timeout_minutes {args.distributed_timeout_minutes:g}"
    return f", perhaps as another rank has ended or stands still ({limit})"


def _trainer(
    args: Arguments,
    world: World,
    stop: StopRequest,
    identity: DataIdentity,
    found: Start,
    weights: dict[str, Tensor],
    heartbeat: Heartbeat,
) -> Trainer:
    """Build the trainer: data, model and optimizer in the state from which the run starts or goes on."""
    metrics = _metrics(args, world, found.progress)
    sizes = batch_sizes(args, world.size)
    schedule = world.on_rank0(lambda: resume.schedule(args, sizes.full, found.saved))
    indices = world.on_rank0(lambda: batches.find_indices(args, sizes.full))
    train, valid = world.on_every_rank(lambda: batches.datasets(args, sizes.full, indices))
    _set_random_state(args.seed, found.saved)
    models = models_of(args, world, found.config)
    parameters = sharding.parameters_by_name(models.values())
    optimizer = _filled_optimizer(args, world, found, weights, parameters)
    steps = _steps(args, world, models)
    progress = found.progress
    progress.memory.loss_scale = LossScale.of(args, progress.memory.loss_scale)
    first = progress.consumed_train_samples
    last = sizes.consumed(first, args.train_iters - progress.iteration)
    share = Share(first, last, args.micro_batch_size, world.data_rank, world.data_size)
    sample_log = SampleLog(args.save, world, progress.iteration) if args.log_samples else None
    train_batches = batches.load(Numbered(train) if sample_log else train, share, args.num_workers)
    saver = Saver(args, world, found.config)
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
        work=Work.of(args, found.config, sizes.full, world.size),
        evaluation=Evaluation(args, world, steps, list(models.values()), valid) if valid else None,
        metrics=metrics,
        saver=saver,
        sample_log=sample_log,
        saved_iteration=progress.iteration if found.folder and found.folder.parent == args.save else -1,
    )


def _metrics(args: Arguments, world: World, progress: Progress) -> Metrics | None:
    """The metrics writer, created on rank 0 only (None elsewhere); if that fails, the error is raised on every rank."""
    opened: list[Metrics] = []
    world.on_rank0(lambda: opened.append(Metrics(args, progress.iteration, progress.evaluation_due)))
    world.on_rank0(lambda: write_json(args.save / HARDWARE, _hardware(world)))
    return opened[0] if opened else None


def _hardware(world: World) -> dict[str, Any]:
    """The hardware that this attempt runs on, for the model card."""
    gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if gpu else f"CPU ({platform.machine()})"
    return {"device": device, "ranks": world.size, "torch": torch.__version__}


def models_of(args: Arguments, world: World, config: ModelConfig) -> dict[int, Llama]:
    """This rank's pipeline stages by stage number; they are sharded, but their parameters have no values yet."""
    tp, models = world.tensor_parallel(sequence=args.sequence_parallel), {}
    whole = WholeLayers.of(args.recompute_method, args.recompute_num_layers)
    for number, part in pipeline.stages(config, args, world).items():
        with torch.device("meta"):
            models[number] = Llama(config, args.recompute_granularity, part, tp, whole)
        if args.torch_compile:
            models[number].compile_layers()
        sharding.shard(models[number], world, bf16=args.bf16, fp16=args.fp16)
    return models


def _steps(args: Arguments, world: World, models: dict[int, Llama]) -> Steps:
    """The steps object that computes global batches on this rank; the models must already have their values."""
    masks, (_, micro_batches) = world.on_rank0(lambda: Masks.of(args)), batch_layout(args, world.size)
    if args.pipeline_model_parallel_size > 1:
        return pipeline.Pipelined(models, args, world, micro_batches, masks)
    return Direct(models[0], micro_batches, world, masks)


def _evaluate_only(args: Arguments, world: World, found: Start, weights: dict[str, Tensor]) -> int:
    """Carry out --eval_only: print the loss on the first validation samples. Nothing in --save is changed."""
    sizes = batch_sizes(args, world.size)
    indices = world.on_rank0(lambda: batches.find_indices(args, sizes.full))
    _, valid = world.on_every_rank(lambda: batches.datasets(args, sizes.full, indices))
    assert valid, "argument_checks wants --eval_iters above 0"
    models = models_of(args, world, found.config)
    resume.load_model(sharding.parameters_by_name(models.values()), None, found, weights, args, world)
    evaluation = Evaluation(args, world, _steps(args, world, models), list(models.values()), valid)
    world.limit_waiting(args.distributed_timeout_minutes)
    result = evaluation.run(0, sizes.full)
    assert result, "nothing gives it up"
    world.say(validation_line(found.progress.iteration, result, args))
    return 0


def _filled_optimizer(
    args: Arguments, world: World, found: Start, weights: dict[str, Tensor], parameters: dict[str, nn.Parameter]
) -> torch.optim.AdamW:
    """Build the optimizer, and fill the parameters and the optimizer's moments with their values."""
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = build_optimizer(parameters.values(), betas=betas, epsilon=args.adam_eps, weight_decay=args.weight_decay)
    resume.load_model(parameters, optimizer, found, weights, args, world)
    set_steps(optimizer, found.progress.optimizer_steps)
    return optimizer


def _set_random_state(seed: int, saved: dict[str, Any]) -> None:
    """Restore the random state of the checkpoint, or seed a new one where the checkpoint has none."""
    torch.manual_seed(seed)
    if "rng" in saved:
        state = bytearray(base64.b64decode(saved["rng"]["torch"]))
        torch.set_rng_state(torch.frombuffer(state, dtype=torch.uint8))
