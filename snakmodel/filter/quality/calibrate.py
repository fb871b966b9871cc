"""python -m snakmodel.filter calibrate --input REFERENCE.arrow … --output THRESHOLDS.json [--percentile 1]

Thresholds from a reference corpus, a table and a picture of what each rule would remove; nothing is removed.

The threshold of a rule is the percentile of its measure in the reference: of the reference documents at most so many
per cent fail it. Of each document a number per rule is kept in memory, about 300 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from run_contract.errors import UserError
from run_contract.publish import publishing, write_json
from snakmodel.filter.quality.measures import NAMES, Numbers
from snakmodel.filter.quality.rules import RULES, Rule, Thresholds, as_json, failures
from snakmodel.filter.quality.step import Measurer, add_threshold_flags, thresholds_of
from snakmodel.shards.arrow_stream import Rows, arrays

HELP = "thresholds for the step quality from a reference corpus, and what each rule would remove"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="Arrow shards of the reference corpus")
    parser.add_argument("--candidates", type=Path, nargs="*", default=[], help="Arrow shards that are to be filtered")
    parser.add_argument("--output", type=Path, required=True, help="file of thresholds, such as thresholds.json")
    parser.add_argument(
        "--percentile",
        type=float,
        default=1.0,
        help="at most so many per cent of the reference documents fail a rule (default: %(default)g)",
    )
    add_threshold_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Write the thresholds and, beside them, the picture; print the table."""
    if not 0 <= args.percentile < 50:
        raise UserError(f"--percentile is {args.percentile:g}; a number from 0 to less than 50 is needed")
    if args.output.suffix == ".png":
        raise UserError(f"--output {args.output} would be overwritten by the picture; name it {args.output.stem}.json")
    base = thresholds_of(args)
    measurer = Measurer(base)
    reference = measures_of(measurer, args.input)
    if not len(reference):
        raise UserError("the reference corpus holds no document; name shards with text after --input")
    chosen = calibrated(reference, base, args.percentile)
    corpora = {"reference": reference}
    if args.candidates:
        corpora["candidates"] = measures_of(measurer, args.candidates)
    found = shares(corpora, {"published": base, "calibrated": chosen})
    from snakmodel.filter.quality.figure import draw

    with publishing(args.output.with_suffix(".png"), args.output) as (picture, file):
        draw(found, {name: len(measures) for name, measures in corpora.items()}, picture)
        write_json(file, as_json(chosen))
    print("\n".join(as_table(found, base, chosen)))


def measures_of(measurer: Measurer, shards: Sequence[Path]) -> Numbers:
    """The measures of all documents of some shards, (n, len(NAMES))."""
    found = [measurer.measure(texts).measures for shard in shards for texts in arrays(Rows(shard))]
    return np.concatenate([np.empty((0, len(NAMES)), np.int64), *found])


def calibrated(reference: Numbers, base: Thresholds, percentile: float) -> Thresholds:
    """The thresholds of which each fails at most so many per cent of the reference documents.

    A rule that is switched off stays so. One that applies to no document, or that asks for yes or no, keeps its
    threshold.
    """
    chosen: dict[str, Any] = {}
    for rule in RULES:
        value = limit(rule, reference, percentile)
        if value is not None and getattr(base, rule.name) is not None and not rule.is_yes_or_no:
            chosen[rule.name] = value
    return dataclasses.replace(base, **chosen)


def limit(rule: Rule, reference: Numbers, percentile: float) -> float | None:
    """The strictest threshold that fails at most so many per cent of the documents to which the rule applies."""
    values = rule.values(reference)
    values = np.sort(values[~np.isnan(values)])
    if not len(values):
        return None
    failing = int(len(values) * percentile / 100)
    value = float(values[failing] if rule.is_minimum else values[len(values) - 1 - failing])
    return int(value) if rule.per is None else value


def shares(
    corpora: dict[str, Numbers], thresholds: dict[str, Thresholds]
) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Which share of each corpus fails each rule and, in the last place, any rule, (len(RULES) + 1,)."""
    found = {}
    for corpus, measures in corpora.items():
        for name, one in thresholds.items():
            failed = failures(measures, one)
            total = np.append(failed.sum(axis=0), failed.any(axis=1).sum())
            found[corpus, name] = total / max(1, len(measures))
    return found


def as_table(found: dict[tuple[str, str], NDArray[np.float64]], base: Thresholds, chosen: Thresholds) -> list[str]:
    """The lines of the table: thresholds, and the per cent of documents that each rule would remove."""
    heads = ["rule", "published", "calibrated", *(f"{corpus}, {name}" for corpus, name in found)]
    rows = [heads]
    for place, rule in enumerate(RULES):
        limits = [shown(getattr(thresholds, rule.name)) for thresholds in (base, chosen)]
        rows.append([rule.name, *limits, *(f"{100 * share[place]:.2f} %" for share in found.values())])
    rows.append(["any rule", "", "", *(f"{100 * share[-1]:.2f} %" for share in found.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def shown(threshold: Any) -> str:
    """A threshold as the table shows it."""
    return "off" if threshold is None else f"{threshold:.4g}" if isinstance(threshold, float) else f"{threshold:,}"
