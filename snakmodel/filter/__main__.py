"""python -m snakmodel.filter STEP --input SHARD.arrow --output PATH …
       python -m snakmodel.filter steps --input SHARD.arrow --output PATH + STEP … + STEP …

Passes one Arrow shard through a step of a filter, or through several in one pass, writes PATH.arrow and the counts
PATH.json, and prints the counts. Each step has its own flags: `python -m snakmodel.filter STEP --help` shows them.

    python -m snakmodel.filter steps --input in.arrow --output out + language --keep da + quality --mode remove + pii
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from run_contract.entry_point import run_main
from run_contract.errors import UserError
from snakmodel.filter import custom
from snakmodel.filter.decontaminate import report as contamination
from snakmodel.filter.quality import calibrate
from snakmodel.filter.shard import filter_shard
from snakmodel.filter.steps import STEPS, THEN, make_steps

COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "calibrate": (calibrate.HELP, calibrate.add_flags, calibrate.run),
    "contamination": (contamination.HELP, contamination.add_flags, contamination.run),
    "custom": (custom.HELP, custom.add_flags, custom.run),
}
"""Name of a command that is no step -> what it does, what adds its flags to a parser, and what runs it."""


SEVERAL = "steps"


def make_parser() -> argparse.ArgumentParser:
    """The parser of the steps, with their flags and those of the files, and of the other commands."""
    parser = argparse.ArgumentParser(
        prog="python -m snakmodel.filter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="step", required=True)
    for name, kind in STEPS.items():
        step = commands.add_parser(name, help=kind.help, description=kind.help, allow_abbrev=False)
        _add_files(step)
        kind.add_flags(step)
    text = f"Passes a shard through several steps in one pass: {THEN} STEP … {THEN} STEP …"
    _add_files(commands.add_parser(SEVERAL, help=text, description=text, allow_abbrev=False))
    for name, (text, add_flags, _) in COMMANDS.items():
        add_flags(commands.add_parser(name, help=text, description=text, allow_abbrev=False))
    return parser


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, help="an Arrow shard")
    parser.add_argument("--output", type=Path, required=True, help="output path without suffix")


def main() -> None:
    """Pass one shard through one step or several, and print the counts; or run a command that is no step."""
    words = sys.argv[1:]
    border = words.index(THEN) if words[:1] == [SEVERAL] and THEN in words else len(words)
    args = make_parser().parse_args(words[:border])
    if args.step in COMMANDS:
        return COMMANDS[args.step][2](args)
    steps = make_steps(words[border:]) if args.step == SEVERAL else [STEPS[args.step].make(args)]
    if not steps:
        raise UserError(f"{SEVERAL} needs at least one step: {THEN} STEP …, of {', '.join(STEPS)}")
    print(json.dumps(filter_shard(args.input, args.output, steps), ensure_ascii=False))


if __name__ == "__main__":
    run_main(main)
