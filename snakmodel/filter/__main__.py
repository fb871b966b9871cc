"""python -m snakmodel.filter STEP --input SHARD.arrow --output PATH …

Passes one Arrow shard through a step of a filter, writes PATH.arrow and the counts PATH.json, and prints the counts.
Each step has its own flags: `python -m snakmodel.filter STEP --help` shows them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from run_contract.entry_point import run_main
from snakmodel.filter import language, lines, pii
from snakmodel.filter.decontaminate import report as contamination
from snakmodel.filter.decontaminate import step as decontaminate
from snakmodel.filter.quality import calibrate
from snakmodel.filter.quality import step as quality
from snakmodel.filter.shard import Step, filter_shard

STEPS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Step]]] = {
    "language": ("Keeps documents or lines of some languages.", language.add_flags, language.make_step),
    "pii": ("Replaces personal data by placeholders.", pii.add_flags, pii.make_step),
    "quality": (quality.HELP, quality.add_flags, quality.make),
    "decontaminate": (decontaminate.HELP, decontaminate.add_flags, decontaminate.make),
    "lines": (lines.HELP, lines.add_flags, lines.make),
}
"""Name of a step -> what it does, what adds its flags to a parser, and what makes the step of the parsed flags."""

COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "calibrate": (calibrate.HELP, calibrate.add_flags, calibrate.run),
    "contamination": (contamination.HELP, contamination.add_flags, contamination.run),
}
"""Name of a command that is no step -> what it does, what adds its flags to a parser, and what runs it."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the steps and their flags."""
    parser = argparse.ArgumentParser(
        prog="python -m snakmodel.filter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for name, (text, add_flags, _) in STEPS.items():
        step = steps.add_parser(name, help=text, description=text, allow_abbrev=False)
        step.add_argument("--input", type=Path, required=True, help="an Arrow shard")
        step.add_argument("--output", type=Path, required=True, help="output path without suffix")
        add_flags(step)
    for name, (text, add_flags, _) in COMMANDS.items():
        add_flags(steps.add_parser(name, help=text, description=text, allow_abbrev=False))
    return parser


def main() -> None:
    """Pass one shard through one step, and print the counts; or run a command that is no step."""
    args = make_parser().parse_args()
    if args.step in COMMANDS:
        return COMMANDS[args.step][2](args)
    step = STEPS[args.step][2](args)
    print(json.dumps(filter_shard(args.input, args.output, [step]), ensure_ascii=False))


if __name__ == "__main__":
    run_main(main)
