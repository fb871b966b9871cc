"""All steps by their names: their flags, how they are made, and how their flags are checked before a run starts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from snakmodel.filter import language, lines, pii, where
from snakmodel.filter.decontaminate import step as decontaminate
from snakmodel.filter.quality import step as quality
from snakmodel.filter.shard import Step

THEN = "+"
"""The word before each step, where there are several."""


@dataclass(frozen=True)
class StepKind:
    """One kind of step."""

    help: str
    """What it does."""
    add_flags: Callable[[argparse.ArgumentParser], None]
    """Adds its flags to a parser."""
    make: Callable[[argparse.Namespace], Step]
    """Makes the step of the parsed flags."""
    check: Callable[[argparse.Namespace, Any], Any]
    """Checks the parsed flags without compiling anything.

    It is given the `pyarrow.Schema` of the documents that come in, and returns that of those that go on. Raises
    UserError if the step could not be made, or could not work on such documents.
    """


STEPS = {
    "decontaminate": StepKind(decontaminate.HELP, decontaminate.add_flags, decontaminate.make, decontaminate.check),
    "lines": StepKind(lines.HELP, lines.add_flags, lines.make, lines.check),
    "language": StepKind(language.HELP, language.add_flags, language.make_step, language.check),
    "pii": StepKind(pii.HELP, pii.add_flags, pii.make_step, pii.check),
    "quality": StepKind(quality.HELP, quality.add_flags, quality.make, quality.check),
    "where": StepKind(where.HELP, where.add_flags, where.make_step, where.check),
}


def make_steps(words: Sequence[str]) -> list[Step]:
    """The steps of the words `+ STEP … + STEP …`. Raises UserError if a step cannot be made of its flags."""
    return [STEPS[args.step].make(args) for args in _parsed(words)]


def check_steps(words: Sequence[str], schema: Any) -> Any:
    """The schema of the documents that steps make of documents of a schema.

    Raises UserError if a step could not be made, or could not work on such documents.
    """
    for args in _parsed(words):
        schema = STEPS[args.step].check(args, schema)
    return schema


def _parsed(words: Sequence[str]) -> list[argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m snakmodel.filter", allow_abbrev=False)
    steps = parser.add_subparsers(dest="step", required=True)
    for name, kind in STEPS.items():
        kind.add_flags(steps.add_parser(name, description=kind.help, allow_abbrev=False))
    groups = [list(group) for is_border, group in groupby(words, THEN.__eq__) if not is_border]
    return [parser.parse_args(group) for group in groups]
