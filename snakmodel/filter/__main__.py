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
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from run_contract.entry_point import run_main
from run_contract.errors import UserError
from snakmodel.filter import custom, language, pii, where
from snakmodel.filter.quality import calibrate
from snakmodel.filter.quality import step as quality
from snakmodel.filter.shard import Step, filter_shard

STEPS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Step]]] = {
    "language": ("Keeps documents or lines of some languages.", language.add_flags, language.make_step),
    "pii": ("Replaces personal data by placeholders.", pii.add_flags, pii.make_step),
    "quality": (quality.HELP, quality.add_flags, quality.make),
    "where": ("Keeps documents whose columns fulfil a condition.", where.add_flags, where.make_step),
}
"""Name of a step -> what it does, what adds its flags to a parser, and what makes the step of the parsed flags."""

COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "calibrate": (calibrate.HELP, calibrate.add_flags, calibrate.run),
    "custom": (custom.HELP, custom.add_flags, custom.run),
}
"""Name of a command that is no step -> what it does, what adds its flags to a parser, and what runs it."""


SEVERAL = "steps"
THEN = "+"
"""The word before each step, where there are several."""


def make_parser(*, files: bool = True) -> argparse.ArgumentParser:
    """The parser of the steps and their flags. `files`: with the flags that say which shards are read and written."""
    parser = argparse.ArgumentParser(
        prog="python -m snakmodel.filter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for name, (text, add_flags, _) in STEPS.items():
        step = steps.add_parser(name, help=text, description=text, allow_abbrev=False)
        if files:
            _add_files(step)
        add_flags(step)
    if files:
        text = f"Passes a shard through several steps in one pass: {THEN} STEP … {THEN} STEP …"
        _add_files(steps.add_parser(SEVERAL, help=text, description=text, allow_abbrev=False))
        for name, (text, add_flags, _) in COMMANDS.items():
            add_flags(steps.add_parser(name, help=text, description=text, allow_abbrev=False))
    return parser


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, help="an Arrow shard")
    parser.add_argument("--output", type=Path, required=True, help="output path without suffix")


def make_steps(words: Sequence[str]) -> list[Step]:
    """The steps of the words `+ STEP … + STEP …`. Raises UserError if a step cannot be made of its flags."""
    parser = make_parser(files=False)
    groups = [list(group) for is_border, group in groupby(words, THEN.__eq__) if not is_border]
    parsed = [parser.parse_args(group) for group in groups]
    return [STEPS[one.step][2](one) for one in parsed]


def main() -> None:
    """Pass one shard through one step or several, and print the counts; or run a command that is no step."""
    words = sys.argv[1:]
    border = words.index(THEN) if words[:1] == [SEVERAL] and THEN in words else len(words)
    args = make_parser().parse_args(words[:border])
    if args.step in COMMANDS:
        return COMMANDS[args.step][2](args)
    steps = make_steps(words[border:]) if args.step == SEVERAL else [STEPS[args.step][2](args)]
    if not steps:
        raise UserError(f"{SEVERAL} needs at least one step: {THEN} STEP …, of {', '.join(STEPS)}")
    print(json.dumps(filter_shard(args.input, args.output, steps), ensure_ascii=False))


if __name__ == "__main__":
    run_main(main)
