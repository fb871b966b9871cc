"""What a run was frozen with at its first submission, run.yaml, and what a later change of it touches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from run_contract.errors import UserError
from run_contract.publish import write_text
from snakmodel.chain.stage import Chain
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.prepare.folders import shortened
from snakmodel.run.paths import RunPaths


def read_frozen(path: Path) -> dict[str, Any] | None:
    """What run.yaml says, or None if there is none. Raises UserError if it cannot be read."""
    if not path.exists():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("recipe", "stage_keys", "shards_per_job")}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read as the record of a run ({error}). Restore it, or give another --run-dir."
        ) from error


def freeze(path: Path, config: Config, chain: Chain, shards_per_job: int | None, before: dict[str, str]) -> None:
    """Write run.yaml. Keys in `before` of stages that were not declared this time are kept.

    `shards_per_job` is None as long as there are no shards.
    """
    value = {
        "recipe": config.recipe.model_dump(mode="json"),
        "shards_per_job": shards_per_job,
        "stage_keys": {**before, **chain.stage_keys()},
    }
    text = "# What this run does, as resolved at its first submission.\n" + yaml.safe_dump(
        value, sort_keys=False, allow_unicode=True
    )
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def touched_stages(frozen: dict[str, Any], chain: Chain) -> list[str]:
    """The stages that would now do something else than when they were frozen.

    A stage that the run did not have before is new, and does not count as touched.
    """
    keys = chain.stage_keys()
    return [name for name in keys if frozen["stage_keys"].get(name, keys[name]) != keys[name]]


def refuse_unless_restarted(
    paths: RunPaths,
    config: Config,
    frozen: dict[str, Any],
    touched: list[str],
    restart_from: Sequence[str],
    chain: Chain,
    files: Sequence[str],
) -> None:
    """Raise UserError, with what was changed, unless the user asks to do again all that the change touches.

    `files` are sentences or names of what changed outside the recipe.
    """
    if set(touched) <= set(downstream(chain, restart_from)):
        return
    now = _flat(config.recipe.model_dump(mode="json"))
    before = _flat(_with_defaults(frozen["recipe"]))
    changes = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if files:
        changes.append(f"the input files: {shortened(files)}")
    what = "; ".join(changes) or "the input files, the base model or the runs in dedup.against"
    starts = [name for name in touched if not set(chain[name].waits) & set(touched)]
    raise UserError(
        f"{paths.root} was made with a different recipe, which {paths.frozen.name} records. Changed: {what}. "
        f"This touches: {', '.join(touched)}. Give another --run-dir, undo the change, "
        f"or redo what it touches with --restart-from {' '.join(starts)}."
    )


def _with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an earlier version froze, completed with the defaults of the keys that it did not know."""
    try:
        return Recipe.model_validate(recipe).model_dump(mode="json")
    except ValidationError:
        return recipe


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, item in value.items()
        for key, leaf in _flat(item, f"{prefix}.{name}" if prefix else name).items()
    }


def downstream(chain: Chain, first: Sequence[str]) -> list[str]:
    """These stages, and all stages that wait for them directly or indirectly."""
    found = list(first)
    for stage in chain.stages:
        if stage.name not in found and any(other in found for other in stage.waits):
            found.append(stage.name)
    return found
