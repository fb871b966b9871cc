"""Reads the file of thresholds that a user gives: YAML or JSON, the keys of `rules.Thresholds`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from pathlib import Path
from typing import Any

import yaml

from run_contract.errors import InputsMissing, UserError
from snakmodel.filter.quality.rules import RULES, STOP_WORDS, Thresholds

_RULES = {rule.name for rule in RULES}
_FIELDS = tuple(field.name for field in dataclasses.fields(Thresholds))
_WORDS = ("stop_words", "c4_line_policy")
_FLAGS = ("c4_line_citations", "c4_line_stopped", "c4_line_javascript")


def defaults(language: str) -> Thresholds:
    """The published thresholds with the stop words of a language.

    Without stop words of its own, a language has no rule for them.
    """
    if language in STOP_WORDS:
        return Thresholds(stop_words=STOP_WORDS[language])
    return Thresholds(stop_words=(), gopher_min_stop_words=None)


def read(path: Path, base: Thresholds) -> Thresholds:
    """The thresholds of a file; `base` fills in those that it lacks.

    Raises UserError for a key or a value that is wrong.
    """
    if not path.is_file():
        raise InputsMissing(
            f"--thresholds {path} does not exist; `python -m snakmodel.filter calibrate` writes such a file"
        )
    try:
        given = _parsed(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(given, dict):
        raise UserError(f"{path} holds {given!r:.80}; a mapping is needed, such as gopher_min_words: 50")
    for key, value in given.items():
        if key not in _FIELDS:
            near = difflib.get_close_matches(str(key), _FIELDS, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{path}: there is no threshold {key!r}; {hint}valid names are {', '.join(_FIELDS)}")
        if wanted := _wanted(key, value):
            raise UserError(f"{path}: {key} is {value!r}; {wanted} is needed")
    values: dict[str, Any] = {key: tuple(value) if key in _WORDS else value for key, value in given.items()}
    return _checked(dataclasses.replace(base, **values), path)


def _parsed(text: str) -> Any:
    """The value of a JSON text, else of a YAML text: for PyYAML, JSON's 1e-05 is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def _wanted(key: str, value: Any) -> str | None:
    """What a key needs, if the value is not that."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if key in _RULES:
        return None if value is None or is_number else "a number of at least 0, or null to switch the rule off"
    if key in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if key in _WORDS:
        is_list = isinstance(value, list) and all(isinstance(word, str) and word.strip() for word in value)
        if key == "stop_words":
            is_list = is_list and all(word.split() == [word] for word in value)
            return None if is_list else "a list of words without white space"
        return None if is_list else "a list of phrases"
    if is_number and isinstance(value, int):
        return None
    if key == "fineweb_short_line":
        return "a whole number of at least 0"
    return None if value is None else "a whole number of at least 0, or null to switch the rule off"


def _checked(thresholds: Thresholds, path: Path) -> Thresholds:
    """The same thresholds. Raises UserError if no document can meet them."""
    few = len(set(thresholds.stop_words))
    if (thresholds.gopher_min_stop_words or 0) > few:
        raise UserError(
            f"{path}: gopher_min_stop_words is {thresholds.gopher_min_stop_words}, but stop_words has {few}; no "
            "document could pass. Give more words, a lower number, or null"
        )
    for name in ("words", "mean_word_length"):
        low, high = getattr(thresholds, f"gopher_min_{name}"), getattr(thresholds, f"gopher_max_{name}")
        if low is not None and high is not None and low > high:
            raise UserError(
                f"{path}: gopher_min_{name} is {low}, above gopher_max_{name}, which is {high}; no document could pass"
            )
    return thresholds
