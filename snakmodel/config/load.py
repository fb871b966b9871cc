"""Loads cluster.yaml (where) and a recipe (what) into one validated, frozen Config; unknown keys are refused by name.

Strings may use `${NAME}` and `${NAME:-default}` from the environment. Relative paths start from the project's folder.
In the sections of a recipe that only some stages use, a variable that is not set stays as it is written, and the stages
that need it refuse it.
"""

from __future__ import annotations

import os
import re
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from run_contract.errors import UserError
from snakmodel.config.cluster import Cluster, Resources
from snakmodel.config.filters import CUSTOM_STAGE
from snakmodel.config.recipe import Recipe
from snakmodel.config.sections import Section, suggest
from snakmodel.config.yaml_file import read_yaml


class Config(Section):
    """A recipe and a cluster.yaml together."""

    recipe: Recipe
    cluster: Cluster


def load(recipe: Path, cluster: Path, stage_names: typing.Sequence[str]) -> Config:
    """Read and validate both files. `stage_names` are the valid names of stages.

    Raises UserError that names the file, the key, what was found and what is valid.
    """
    config = Config(recipe=_read(recipe, Recipe), cluster=_read(cluster, Cluster))
    for name, values in config.cluster.stages.items():
        if name not in stage_names and not CUSTOM_STAGE.fullmatch(name):
            raise UserError(f"{cluster}: stages.{name}: there is no such stage. {suggest(name, stage_names)}")
        validate(cluster, f"stages.{name}.", Resources, values)
    return config


def load_cluster(path: Path) -> Cluster:
    """Read and validate cluster.yaml alone, for commands that need no recipe."""
    return _read(path, Cluster)


SectionType = TypeVar("SectionType", bound=Section)


def _read(path: Path, model: type[SectionType]) -> SectionType:
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give an existing one with --{model.__name__.lower()}.") from None
    if raw is None and model is Cluster:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found {type(raw).__name__}, expected keys such as {', '.join(model.model_fields)}")
    expanded = {key: _expand(value, str(key), path, str(key) in _USED_BY_SOME) for key, value in raw.items()}
    return validate(path, "", model, expanded)


def validate(path: Path, prefix: str, model: type[SectionType], raw: dict[str, Any]) -> SectionType:
    """The section that the keys of a file make up; `prefix` is where they are in the file, such as `stages.train.`.

    Raises UserError with one line for each wrong key: the file, the key, what was found and what is valid.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(problem, prefix, model) for problem in error.errors()]
        raise UserError(f"{path}: " + f"\n  {path}: ".join(lines)) from error


def _explain(problem: Any, prefix: str, model: type[Section]) -> str:
    where = (prefix + ".".join(str(part) for part in problem["loc"])).rstrip(".")
    if problem["type"] == "extra_forbidden":
        valid = list(_section_at(model, problem["loc"][:-1]).model_fields)
        return f"{where}: unknown key. {suggest(str(problem['loc'][-1]), valid)}"
    if problem["type"] == "missing":
        return f"{where}: missing. Add this key."
    if problem["type"] == "value_error":
        return f"{where + ': ' if where else ''}{problem['ctx']['error']}"
    return f"{where}: found {problem['input']!r}. {problem['msg']}."


def _section_at(model: type[Section], location: tuple[int | str, ...]) -> type[Section]:
    """The section at a place, which may lie within lists and dictionaries of sections."""
    for part in location:
        if str(part) in model.model_fields:  # else it is the number or name of a section within a list or dictionary
            model = _section_in(model.model_fields[str(part)].annotation) or model
    return model


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a type such as `Container | None`, `list[Custom]` or `dict[str, SourceCard]` is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for one in typing.get_args(annotation) if (found := _section_in(one))), None)


VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_USED_BY_SOME = ("tokenizer", "model")
"""The sections of a recipe that preparation and deduplication do not use."""


def not_set(name: str) -> str:
    """The message about a variable that a file uses but the environment lacks."""
    return f"${{{name}}} is not set in the environment. Set it, or write a default after :-"


def _expand(value: Any, key: str, path: Path, lenient: bool) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in every string in `value`, which is the value of `key`.

    With `lenient`, variables that are not set stay as they are; without it, they raise UserError.
    """
    if isinstance(value, dict):
        return {name: _expand(item, f"{key}.{name}", path, lenient) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, key, path, lenient) for item in value]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        found = os.environ.get(match[1]) or match[2]
        if found is None and not lenient:
            raise UserError(f"{path}: {key}: {not_set(match[1])}")
        return match[0] if found is None else found

    return VARIABLE.sub(replacement, value)
