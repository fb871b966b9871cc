"""The stages of the weights, the training and the export."""

from __future__ import annotations

from pathlib import Path

from run_contract.errors import UserError
from snakmodel.chain.card_stage import DATA_CARD
from snakmodel.chain.context import CHECKPOINT_UTIL, CORPUS, INDEX, TRACKER, Context, flags
from snakmodel.chain.stage import Input, Stage, Task
from snakmodel.run.markers import READ, Marker, marker_path
from snakmodel.run.paths import shard_name

_HF_TO_MEGATRON = "Megatron-LLM/weights_conversion/hf_to_megatron.py"
_MEGATRON_TO_HF = "Megatron-LLM/weights_conversion/megatron_to_hf.py"
_VERIFY = "Megatron-LLM/verify_correctness.py"
_FINETUNE = "Megatron-LLM/finetune.py"
_PUSH = "Megatron-LLM/tools/push_to_hub.py"
_SAMPLE_TEXT = f"arrow/{shard_name(0)}.arrow"


def weight_stages(c: Context) -> list[Stage]:
    """Declare the stages that convert the base model, verify the result, and shard it for training."""
    m, t = c.recipe.model, c.recipe.training
    c.check_base()
    size = (f"--size={m.size}",) if m.size else ()
    files = _files(m.base)
    marker = Marker.read(marker_path(c.root, "convert", 0))
    read = marker.counts.get(READ, {}) if marker else {}
    convert = Task(
        ("python", _HF_TO_MEGATRON, m.family, *size, f"--out={c.path('megatron')}", f"--model-path={m.base}"),
        ("megatron/release", f"megatron/{TRACKER}"),
        outside=[c.inputs.whole(path, read.get(path.name)) for path in files],
        reads=tuple(map(str, files)),
    )
    verify = Task(
        _verify(c, "megatron", str(m.base), "megatron/verify.json", c.recipe.export.tolerance),
        ("megatron/verify.json",),
        (Input("convert"), Input("prepare", 0, only=(_SAMPLE_TEXT,))),
        "megatron/verify.json",
        _device(c, "verify"),
        c.vocabulary,
    )
    shard = Task(
        _reshard(c, "megatron", "sharded", t.tensor_parallel, t.pipeline_parallel, t.dtype),
        ("sharded/release", f"sharded/{TRACKER}"),
        (Input("convert"), Input("verify")),
    )
    return [
        c.stage("convert", [convert]),
        c.stage("verify", [verify]),
        c.stage("shard", [shard]),
    ]


def _files(base: Path) -> list[Path]:
    """The files in a model's folder.

    Raises UserError if one is a link whose target does not exist, as in a cache from which files were removed.
    """
    for path in base.iterdir():
        if not path.exists():
            raise UserError(f"model.base: {path} is a link to {path.readlink()}, which is not there; download it again")
    return [path for path in sorted(base.iterdir()) if path.is_file()]


_UNKEYED = {"keep_last", "keep_every", "log_samples", "distributed_timeout_minutes"}
"""The settings of training that do not change its results, so that they may change while a run is under way."""


def train_stages(c: Context) -> list[Stage]:
    """Declare the training stage. Raises UserError if its number of ranks is not a multiple of the parallel sizes."""
    _check_ranks(c)
    outputs = [f"checkpoints/iter_{iteration:07d}" for iteration in c.recipe.exported_iterations]
    task = Task(
        ("python", _FINETUNE, *_training_flags(c), *_extra_flags(c)),
        (*outputs, "checkpoints/metrics.jsonl"),
        (Input("merge-tokens"), Input("index"), Input("shard")),
        unkeyed=flags(**c.recipe.training.model_dump(include=_UNKEYED)),
        outside=c.vocabulary,
    )
    train = c.stage(
        "train",
        [task],
        resumable=True,
        progress=f"checkpoints/{TRACKER}",
        environment={"OMP_NUM_THREADS": str(c.recipe.training.threads)},
    )
    return [train]


def _check_ranks(c: Context) -> None:
    t, ranks = c.recipe.training, c.cluster.resources("train").ranks
    if ranks % (t.tensor_parallel * t.pipeline_parallel):
        raise UserError(
            f"stages.train has {ranks} ranks (nodes x ranks_per_node in cluster.yaml), not a multiple of the recipe's "
            f"training.tensor_parallel {t.tensor_parallel} x training.pipeline_parallel {t.pipeline_parallel}; "
            "change either"
        )


def export_stages(c: Context) -> list[Stage]:
    """Declare the stages that turn each exported iteration into a Hugging Face folder, verify it and push it."""
    every = list(enumerate(c.recipe.exported_iterations))
    return [
        c.stage("merge", [_merge(c, iteration) for _, iteration in every]),
        c.stage("export-hf", [_export_hf(c, *one) for one in every]),
        c.stage("verify-export", [_verify_export(c, *one) for one in every]),
        c.stage("push", [_push(c, *one) for one in every]),
    ]


def _export_dtype(c: Context) -> str:
    return c.recipe.export.dtype or c.recipe.training.dtype


def _merge(c: Context, iteration: int) -> Task:
    name = f"iter_{iteration:07d}"
    argv = (*_reshard(c, "checkpoints", "merged", 1, 1, _export_dtype(c)), "--load_iters", str(iteration))
    return Task(argv, (f"merged/{name}",), (Input("train", 0, only=(f"checkpoints/{name}",)),))


def _export_hf(c: Context, index: int, iteration: int) -> Task:
    name = f"iter_{iteration:07d}"
    argv = ("python", _MEGATRON_TO_HF, f"--input_dir={c.path('merged')}", "--load_iters", str(iteration))
    more = (f"--output_dir={c.path(f'hf/{name}')}", "--vocab_file", str(c.recipe.tokenizer.file))
    return Task((*argv, *more), (f"hf/{name}",), (Input("merge", index),), outside=c.vocabulary)


def _verify_export(c: Context, index: int, iteration: int) -> Task:
    name = f"iter_{iteration:07d}"
    report = f"hf/reports/{name}.json"
    exact = ("--tolerance", "0.1") if _export_dtype(c) != "fp32" else ("--max_tolerance", "1e-4")
    argv = _verify(c, "checkpoints", c.path(f"hf/{name}"), report, c.recipe.export.tolerance)
    checkpoint = Input("train", 0, only=(f"checkpoints/{name}",))
    reads = (checkpoint, Input("export-hf", index), Input("prepare", 0, only=(_SAMPLE_TEXT,)))
    divergence = f"hf/reports/{name}.divergence"
    more = flags(load_iters=iteration, base_model=c.recipe.model.base, divergence=c.path(f"{divergence}.json"))
    argv = (*argv, *exact, *more, "--compare_tokenizer")
    outputs = (report, f"{divergence}.json", f"{divergence}.png")
    return Task(argv, outputs, reads, report, _device(c, "verify-export"), c.vocabulary)


def _push(c: Context, index: int, iteration: int) -> Task:
    push, name = c.recipe.push, f"iter_{iteration:07d}"
    settings = flags(max_shard_size=push.max_shard_size, run_dir=c.root, license=push.license)
    argv = ("python", _PUSH, c.path(f"hf/{name}"), *settings)
    losses = Input("train", 0, only=("checkpoints/metrics.jsonl",))
    card = (Input(DATA_CARD),) if c.recipe.data_card else ()
    inputs = (Input("export-hf", index), Input("verify-export", index), losses, *card)
    if push.repository:
        revision = None if index == len(c.recipe.exported_iterations) - 1 else name
        target = flags(hf_repo_name=push.repository, revision=revision, public=push.public)
        return Task((*argv, *target), (), inputs)
    return Task((*argv, "--output_folder", c.path(f"pushed/{name}")), (f"pushed/{name}",), inputs)


def _device(c: Context, stage: str) -> tuple[str, ...]:
    return ("--huggingface_device", "cuda" if c.cluster.resources(stage).gpus_per_node else "cpu")


def _verify(c: Context, load: str, folder: str, report: str, tolerance: float) -> tuple[str, ...]:
    more = flags(
        seq_length=c.recipe.training.seq_length,
        iterations=c.recipe.export.verify_batches,
        tolerance=tolerance,
        report=c.path(report),
    )
    paths = flags(load=c.path(load), huggingface_cache=folder, input=c.path(_SAMPLE_TEXT))
    return ("python", _VERIFY, f"--model_name={c.recipe.model.family}", *paths, *c.tokenizer_flags(), *more)


def _reshard(c: Context, load: str, save: str, tensor: int, pipeline: int, dtype: str) -> tuple[str, ...]:
    settings = flags(
        target_tensor_parallel_size=tensor,
        target_pipeline_parallel_size=pipeline,
        load_dir=c.path(load),
        save_dir=c.path(save),
        model_type=c.recipe.model.family,
        true_vocab_size=c.vocab_size,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
    )
    return ("python", CHECKPOINT_UTIL, *settings)


def _training_flags(c: Context) -> tuple[str, ...]:
    t = c.recipe.training
    elsewhere = {"dtype", "tensor_parallel", "pipeline_parallel", "recompute_granularity", "extra_flags"}
    named = t.model_dump(exclude=elsewhere | _UNKEYED)
    return (
        *flags(**named),
        *flags(tensor_model_parallel_size=t.tensor_parallel, pipeline_model_parallel_size=t.pipeline_parallel),
        *flags(load=c.path("sharded"), save=c.path("checkpoints"), tensorboard_dir=c.path("checkpoints/tensorboard")),
        *flags(data_path=c.path(CORPUS), index_path=c.path(INDEX), model_name=c.recipe.model.family),
        *c.tokenizer_flags(),
        *("--use_checkpoint_args", "--use_flash_attn", "--hidden_dropout", "0.0", "--attention_dropout", "0.0"),
        *_model_flags(c),
        *("--no_new_tokens", "--no_bias_gelu_fusion"),
        *flags(
            bf16=t.dtype == "bf16",
            fp16=t.dtype == "fp16",
            wandb_logger=t.wandb_project is not None,
            sequence_parallel=t.tensor_parallel > 1,
            recompute_granularity=t.recompute_granularity,
        ),
    )


def _extra_flags(c: Context) -> tuple[str, ...]:
    """The recipe's own flags of finetune.py. Raises UserError if one of them is set by the chain already."""
    extra = tuple(c.recipe.training.extra_flags)
    own = {word.split("=")[0] for word in (*_training_flags(c), *map("--{}".format, _UNKEYED)) if word.startswith("--")}
    if taken := [word for word in extra if word.split("=")[0] in own]:
        raise UserError(
            f"training.extra_flags: {taken[0]} is set by the chain itself. Use the recipe's key for it, or leave it out"
        )
    return extra


def _model_flags(c: Context) -> tuple[str, ...]:
    """Flags that describe the base model. They are for readers of the command line; the engine asks the checkpoint."""
    llama = c.recipe.model.family != "falcon"
    return flags(use_rms_norm=llama, glu_activation="swiglu" if llama else None, no_tie_embed_logits=not c.tied)
