"""The step `where`: keeps the documents whose columns fulfil a condition."""

from __future__ import annotations

import argparse
from typing import Any

import pyarrow as pa

from snakmodel.shards.condition import Condition

HELP = "Keeps documents whose columns fulfil a condition."


class WhereStep:
    """A `Step` that keeps the documents for which a condition holds."""

    name = "where"

    def __init__(self, condition: Condition) -> None:
        self._condition = condition

    def schema(self, schema: Any) -> Any:
        """See `Step`. Raises UserError if there is no such column, or if it cannot be compared so."""
        self._condition.check(schema)
        return schema

    def run(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """See `Step`; it has no counts of its own."""
        columns = {name: batch.column(name) for name in self._condition.columns}
        return batch.filter(pa.array(self._condition.mask(columns))), {}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the step."""
    parser.add_argument("--condition", required=True, help="such as: 'language_probability > 0.8 and source != \"x\"'")


def check(args: argparse.Namespace, schema: Any) -> Any:
    """See `StepKind.check`."""
    return make_step(args).schema(schema)


def make_step(args: argparse.Namespace) -> WhereStep:
    """The step of the parsed flags."""
    return WhereStep(Condition(args.condition, "where"))
