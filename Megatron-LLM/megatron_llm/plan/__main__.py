"""python -m megatron_llm.plan --recipe R.yaml --gpus N --memory 40GB [--model FOLDER] [flags of finetune.py]

Answers before GPUs are requested: would this training fit on them, how fast could it be, and how large are its
checkpoints? Each way of spreading the model over N GPUs gets a row with the memory of the fullest GPU, by part, and the
time per step. Then follow the ways that cannot be run, the checkpoints, and a suggestion.

The training is that of a recipe, in which flags of finetune.py change single values, or of such flags alone:

  python -m megatron_llm.plan --recipe recipes/snakmodel-7b.yaml --gpus 4 --memory 80GB --micro_batch_size 2
  python -m megatron_llm.plan --model LLAMA --gpus 8 --memory 40GB --seq_length 4096 --micro_batch_size 1
      --global_batch_size 512 --train_iters 1000 --bf16 --sequence_parallel --recompute_granularity selective

Exit codes: 0 something fits; 1 nothing fits; 2 the user has made a mistake; 3 the model's configuration is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.flags import parser as flags_parser
from megatron_llm.flags.arguments import Arguments
from megatron_llm.model import flops
from megatron_llm.model.config import ModelConfig
from megatron_llm.plan import layouts
from megatron_llm.plan.layouts import AMOUNTS, Layout, LayoutForecast, PlanRequest
from megatron_llm.weights import hf_config, megatron
from run_contract.entry_point import run_main
from run_contract.errors import InputsMissing, UserError

PROJECT = Path(__file__).resolve().parents[3]
"""The folder from which relative paths of a recipe start."""
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
KEYS = {
    "train_iters": "train_iters",
    "global_batch_size": "global_batch_size",
    "micro_batch_size": "micro_batch_size",
    "seq_length": "seq_length",
    "save_interval": "save_interval",
    "keep_last": "keep_last",
    "keep_every": "keep_every",
    "recompute_granularity": "recompute_granularity",
    "tensor_parallel": "tensor_model_parallel_size",
    "pipeline_parallel": "pipeline_model_parallel_size",
}
"""Keys of a recipe's `training` that matter here -> flags of finetune.py."""
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def main() -> int:
    """Parse the flags, evaluate every layout, and print the result."""
    options, rest = _options(sys.argv[1:])
    recipe = _read(options.recipe) if options.recipe else {}
    args = _arguments(options.recipe, recipe, rest)
    config = read_config(options.model or _base(options.recipe, recipe))
    peak = options.peak_tflops or flops.GPUS[options.gpu][args.precision.compute_dtype() == torch.float32]
    question = PlanRequest(config, args, options.gpus, options.memory, peak * 1e12 * options.mfu)
    forecasts, refused = question.forecasts()
    # a recipe has no key for interleaved stages
    suggestion = question.suggestion(
        forecast for forecast in forecasts if not recipe or forecast.setting.held_stages == 1
    )
    if options.json:
        print(json.dumps(_as_json(question, forecasts, refused, suggestion), indent=1))
    else:
        device = f"{options.peak_tflops:g} TFLOP/s" if options.peak_tflops else options.gpu
        print("\n".join(_report(question, f"{device} at MFU {options.mfu:g}", forecasts, refused)))
        print(_storage(forecasts[0], options.bandwidth) if forecasts else "")
        print(_advice(question, suggestion, KEYS if recipe else {}))
    return 0 if suggestion else 1


def _options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's own flags, and the remaining ones, which are finetune.py's. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_llm.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", type=Path, help="its model.base and training are planned")
    model = "folder of a Hugging Face model, of which only config.json is read, or of a checkpoint"
    parser.add_argument("--model", type=Path, help=f"{model}; default: the recipe's model.base")
    parser.add_argument("--gpus", type=int, required=True, help="how many there are")
    parser.add_argument("--memory", required=True, help="of each, with its unit, such as 40GB (10^9) or 80GiB (2^30)")
    parser.add_argument("--gpu", choices=flops.GPUS, default="A100", help="whose peak speed is taken; default: A100")
    parser.add_argument("--peak_tflops", type=float, help="peak TFLOP/s of another device")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached; default: 0.4")
    parser.add_argument("--bandwidth", type=float, default=1.0, help="GB/s to the checkpoints' disk; default: 1")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options, rest = parser.parse_known_args(argv)
    options.memory = _bytes(options.memory)
    if not (options.recipe or options.model):
        raise UserError("give --recipe, or --model and flags of finetune.py; --help shows examples")
    if options.gpus < 1:
        raise UserError(f"--gpus {options.gpus}: must be at least 1")
    for name in ("peak_tflops", "mfu", "bandwidth"):
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} {value:g}: must be above 0")
    if options.mfu > 1:
        raise UserError(f"--mfu {options.mfu:g}: it is a share of the peak, at most 1; 0.3 to 0.5 are usual")
    return options, rest


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
    if not found or found[2] not in UNITS or float(found[1]) == 0:
        raise UserError(f"--memory {text}: give a number above 0 and its unit ({', '.join(UNITS)}), such as 40GB")
    return int(float(found[1]) * UNITS[found[2]])


class _OneOfEachKey(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that occurs twice is an error; PyYAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping. Raises a YAML error that names both lines when a key occurs twice."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"the key {name!r} is there twice, in lines {lines[name]} and {line}")
            lines[name] = line
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    """Read a recipe, as far as it is needed for the plan. Raises UserError, InputsMissing."""
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=_OneOfEachKey)
    except OSError as error:
        raise InputsMissing(f"{path} cannot be read: {error.strerror}; give an existing recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as YAML: {error}; correct it") from error
    for section in ("model", "training"):
        if not isinstance(recipe, dict) or not isinstance(recipe.get(section), dict):
            raise UserError(f"{path} has no section {section}: is it a recipe, such as those in recipes/?")
    return dict(recipe)


def _arguments(path: Path | None, recipe: dict[str, Any], rest: list[str]) -> Arguments:
    """The recipe's training as flags, with changes by the given flags. Raises UserError."""
    flags: list[str] = []
    if recipe:
        training = {"micro_batch_size": 1} | recipe["training"]
        for key, flag in KEYS.items():
            if training.get(key) is not None:
                flags += [f"--{flag}", str(training[key])]
        flags += ["--sequence_parallel", *_precision(training.get("dtype", "bf16"))]
        try:
            _parse(flags)
        except UserError as error:
            raise UserError(f"{path}: training: {error}") from error
    args = _parse([*flags, *rest])
    if args.model.seq_length is None:
        raise UserError("--seq_length is missing; no checkpoint is read here, so give the number that the run will use")
    if args.model.recompute_method is not None:
        raise UserError(
            "--recompute_method: the plan covers only the recomputation of every layer by itself; leave the flag out"
        )
    if args.model.recompute_granularity in AMOUNTS:
        return args
    return replace(args, model=replace(args.model, recompute_granularity=None))


def _precision(dtype: str) -> list[str]:
    return [] if dtype == "fp32" else [f"--{dtype}"]


def _parse(flags: list[str]) -> Arguments:
    planned = ["--data_path", "none"]  # no data is read
    return flags_parser.parse([*planned, *flags], optional=("save", "lr"), prog="megatron_llm.plan")


def _base(path: Path, recipe: dict[str, Any]) -> Path:
    """The folder of a recipe's model.base. Raises UserError, InputsMissing."""
    remedy = "or name a folder that has the model's config.json with --model"
    found = recipe["model"].get("base")
    if not isinstance(found, str):
        raise UserError(f"{path}: model.base is {found!r}; give the base model's folder there, {remedy}")

    def value(match: re.Match[str]) -> str:
        given = os.environ.get(match[1]) or match[2]
        if given is None:
            raise UserError(f"{path}: model.base: ${{{match[1]}}} is not set in the environment; set it, {remedy}")
        return given

    base = PROJECT / Path(VARIABLE.sub(value, found)).expanduser()
    if not base.is_dir():
        raise InputsMissing(f"{path}: model.base: {base} does not exist; download the base model, {remedy}")
    return base


def read_config(folder: Path) -> ModelConfig:
    """The geometry of a Hugging Face folder or of a checkpoint. Raises UserError, InputsMissing."""
    if (folder / "config.json").is_file() or not (folder / checkpoint.TRACKER).is_file():
        return hf_config.load(folder)
    newest = megatron.find(folder)
    if checkpoint.is_ours(newest):
        return ModelConfig(**checkpoint.read_state(newest)["model_config"])
    return megatron.load_folder(newest)[0]


def _report(
    question: PlanRequest, device: str, forecasts: list[LayoutForecast], refused: dict[Layout, str]
) -> list[str]:
    """The lines of the table, and the layouts that cannot be run."""
    args, count = question.args, flops.parameter_count(question.config)
    precision = str(args.precision.compute_dtype()).removeprefix("torch.")
    lines = [
        f"{count:,} parameters on {question.gpus} GPUs of {_gb(question.room)} GB, {device}; "
        f"{args.model.seq_length} tokens a sample, micro-batch {args.training.micro_batch_size}, {precision}, "
        f"recomputation {args.model.recompute_granularity or 'none'}",
        "GB on the fullest GPU at its fullest moment; VP: pipeline stages of a GPU; *: as asked for",
        "",
        "  TP  PP  DP  VP weights  grads   Adam gathered activations pipeline working reserve   total fits"
        "   s/step  tokens/s   days",
    ]
    for forecast in forecasts:
        s, m, remedy = forecast.setting, forecast.memory, None if forecast.fits else question.remedy(forecast)
        lines.append(
            f"{'*' if forecast.layout == question.layout else ' '}{s.tensor:3}{s.pipeline:4}{s.data:4}{s.held_stages:4}"
            f"{_gb(m.weights):>8}{_gb(m.gradients):>7}{_gb(m.moments):>7}{_gb(m.gathered + m.accumulated):>9}"
            f"{_gb(m.activations):>12}{_gb(m.pipeline):>9}{_gb(m.working):>8}{_gb(forecast.reserve):>8}"
            f"{_gb(forecast.total):>8}{'yes' if forecast.fits else 'no':>5}{forecast.seconds:9.2f}"
            f"{forecast.tokens_per_second:10,.0f}{forecast.days:7.2f}"
            + (f"  fits with {_remedy(forecast, remedy)}" if remedy else "")
        )
    for (tensor, pipeline, held), reason in sorted(refused.items()):
        lines.append(f"not possible: TP {tensor} PP {pipeline}{f' VP {held}' if held > 1 else ''}: {reason}")
    return lines


def _remedy(forecast: LayoutForecast, remedy: LayoutForecast) -> str:
    changes = {name: remedy.args.flag(name) for name in ("micro_batch_size", "recompute_granularity")}
    return _settings({name: value for name, value in changes.items() if value != forecast.args.flag(name)}, {})


def _gb(size: int) -> str:
    return f"{size / UNITS['GB']:.2f}"


def _storage(forecast: LayoutForecast, bandwidth: float) -> str:
    stored = layouts.checkpoints(forecast.setting, forecast.args)
    seconds = stored.size / (bandwidth * UNITS["GB"])
    kept = "none is deleted" if stored.kept == stored.written else f"{stored.kept} stay"
    return (
        f"checkpoints: {_gb(stored.size)} GB each, {seconds:.0f} s at {bandwidth:g} GB/s; {stored.written} written in "
        f"all, {kept}; at most {_gb(stored.most * stored.size)} GB at once"
    )


def _settings(changes: dict[str, Any], keys: dict[str, str]) -> str:
    """The changed settings as flags, or as keys of the recipe."""
    if keys:
        names = {flag: key for key, flag in keys.items()}
        return ", ".join(f"{names[name]}: {'null' if value is None else value}" for name, value in changes.items())
    return " ".join(f"--{name} {'none' if value is None else value}" for name, value in changes.items())


def _advice(question: PlanRequest, forecast: LayoutForecast | None, keys: dict[str, str]) -> str:
    if forecast is None:
        return "suggestion: nothing fits; take more GPUs, or GPUs with more memory"
    speed = f"{forecast.tokens_per_second:,.0f} tokens/s, {_gb(forecast.total)} GB"
    if not (changes := question.changes(forecast)):
        return f"suggestion: as asked for ({speed}); nothing else that fits is expected to be faster"
    return f"suggestion: {_settings(changes, keys)} ({speed})"


def _forecast_json(question: PlanRequest, forecast: LayoutForecast) -> dict[str, Any]:
    s = forecast.setting
    return {
        "tensor": s.tensor,
        "pipeline": s.pipeline,
        "data": s.data,
        "stages_per_rank": s.held_stages,
        "micro_batch_size": s.micro_batch,
        "micro_batches": s.micro_batches,
        "recompute_granularity": s.recompute,
        "asked": not question.changes(forecast),
        "memory": asdict(forecast.memory) | {"reserve": forecast.reserve, "total": forecast.total},
        "fits": forecast.fits,
        "seconds_per_step": forecast.seconds,
        "tokens_per_second": forecast.tokens_per_second,
        "days": forecast.days,
    }


def _as_json(
    question: PlanRequest,
    forecasts: list[LayoutForecast],
    refused: dict[Layout, str],
    suggestion: LayoutForecast | None,
) -> dict[str, Any]:
    names = ("tensor", "pipeline", "stages_per_rank")
    stored = layouts.checkpoints(forecasts[0].setting, question.args) if forecasts else None
    return {
        "parameters": flops.parameter_count(question.config),
        "gpus": question.gpus,
        "memory": question.room,
        "ways": [_forecast_json(question, forecast) for forecast in forecasts],
        "refused": [dict(zip(names, layout, strict=True)) | {"reason": why} for layout, why in refused.items()],
        "checkpoints": asdict(stored) | {"most": stored.most} if stored else None,
        "suggestion": _forecast_json(question, suggestion) if suggestion else None,
    }


if __name__ == "__main__":
    run_main(main)
