"""Sums up the training of a run: its tokens, epochs of the corpus, GPU-hours and disk.

The launcher prints the sums before it submits the run, and status shows them later.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from rich.filesize import decimal

from run_contract.publish import write_json
from snakmodel.chain.disk_forecast import Forecast, forecast_plan
from snakmodel.chain.engine_check import Facts, device_of
from snakmodel.chain.plan import RunPlan
from snakmodel.config.recipe import Recipe
from snakmodel.prepare.input_files import input_files
from snakmodel.run.paths import RunPaths

MANY_EPOCHS = 4
"""The number of epochs up to which repeated text is almost as good as new text (Muennighoff et al. 2023,
arXiv:2305.16264)."""
USUAL_MFU = 0.4
"""The share of a GPU's peak that trainings of this kind usually reach."""
_BYTES_PER_TOKEN = 3
"""Bytes of raw text per token, as in the disk forecast."""
_CORPUS = "tokens/corpus_text_document.json"


def lines(plan: RunPlan, *, dry: bool) -> list[str]:
    """Lines that tell what a plan's missing training will take: tokens, epochs, GPU-hours and disk.

    Unless `dry`, those of them that cannot be computed again later are stored in the run's folder, for status.
    """
    recipe, resources = plan.config.recipe, plan.config.cluster.resources("train")
    text = sum(one.text_bytes() for one in input_files(recipe.data.path, recipe.data.shares))
    hours = gpu_hours(plan.facts, device_of(resources)) if plan.facts and resources.has_gpus else ""
    costs = [*filter(None, [hours]), *disk(recipe, forecast_plan(plan))]
    if not dry:
        write_json(plan.paths.training_sum, {"text_bytes": text, "costs": costs})
    return [*tokens_and_epochs(recipe, plan.paths.root, text), *costs]


def remembered(paths: RunPaths) -> list[str]:
    """The same lines for a run that was started before, with the epochs computed from the tokens that exist by now.

    Lines about what is not known any more are left out.
    """
    try:
        recipe = Recipe.model_validate(yaml.safe_load(paths.frozen.read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # written by an older version, or damaged
        return []
    try:
        kept = json.loads(paths.training_sum.read_text(encoding="utf-8"))
        text, costs = int(kept["text_bytes"]), [str(line) for line in kept["costs"]]
    except (OSError, ValueError, KeyError, TypeError):
        text, costs = None, []
    return [*tokens_and_epochs(recipe, paths.root, text), *costs]


def corpus_tokens(root: Path) -> int | None:
    """The number of tokens in the run's corpus; None before it is tokenised."""
    try:
        return int(json.loads((root / _CORPUS).read_text(encoding="utf-8"))["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tokens_and_epochs(recipe: Recipe, root: Path, text_bytes: int | None) -> list[str]:
    """Lines about the tokens and epochs of the training, with a warning if the corpus would be repeated too often.

    `text_bytes` is the size of the raw text; as long as there are no tokens, the epochs are estimated from it.
    """
    t = recipe.training
    total = t.train_iters * t.global_batch_size * t.seq_length
    lines = [
        f"training: {t.train_iters:,} iterations of {t.global_batch_size:,} samples of {t.seq_length:,} tokens, "
        f"{total:,} tokens"
    ]
    known = corpus_tokens(root)
    tokens = known or (text_bytes or 0) // _BYTES_PER_TOKEN
    parts = [float(part) for part in t.split.split(",")]
    if not tokens or not parts[0]:
        return lines
    epochs = total / (tokens * parts[0] / sum(parts))
    basis = f"{tokens:,} tokens" if known else f"about {tokens:,} tokens, estimated from the raw text"
    lines.append(f"epochs: {epochs:.1f} of the training part of the corpus ({basis})")
    if epochs > MANY_EPOCHS:
        lines.append(
            f"warning: the corpus would be repeated {epochs:.0f} times. Above {MANY_EPOCHS} epochs repeated text "
            "teaches less and less: give more text, or lower training.train_iters"
        )
    return lines


def gpu_hours(facts: Facts, device: str) -> str:
    """The GPU-hours of the training at the usual share of the GPU's peak, as a line; empty if the peak is not known."""
    if not facts.training_flops or not facts.peak_tflops:
        return ""
    hours = facts.training_flops / (facts.peak_tflops * 1e12 * USUAL_MFU) / 3600
    shown = f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
    return (
        f"GPU-hours: about {shown} on {device.upper()}, at {USUAL_MFU:.0%} of its peak of {facts.peak_tflops:g} TFLOP/s"
    )


def disk(recipe: Recipe, needs: Forecast) -> list[str]:
    """Lines about the disk that the run needs at most.

    They hold a hint if most of it is checkpoints and the recipe does not limit how many are kept.
    """
    t, checkpoints = recipe.training, needs.parts["checkpoints"]
    lines = [f"disk: {decimal(needs.total)} at most, {decimal(checkpoints)} of it for checkpoints"]
    saves = -(-t.train_iters // t.save_interval)
    if t.keep_last is None and saves > 3 and 2 * checkpoints > needs.total:
        lines.append(
            f"note: all {saves} checkpoints are kept; training.keep_last: 2 would need "
            f"{decimal(checkpoints * 3 // (saves + 1))} for them instead of {decimal(checkpoints)}"
        )
    return lines
