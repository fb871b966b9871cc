"""docs/flags.md says of every flag of the original what the programs here really do with it."""

from __future__ import annotations

import argparse
import ast
import runpy
from pathlib import Path
from typing import Any

import pytest

from megatron_llm.flags.arguments import FLAGS
from megatron_llm.training import run_changes
from run_contract.errors import UserError

ROOT = Path(__file__).parents[3]
TABLE: dict[str, Any] = runpy.run_path(str(ROOT / "Megatron-LLM" / "tools" / "flags_table.py"), run_name="table")
ROWS: list[dict[str, str]] = TABLE["original_flags"]()
SAMPLES = {"int": "1", "float": "0.5", "bool": "True"}


def value_of(row: dict[str, str], action: argparse.Action) -> list[str]:
    """Words that give the flag a value which the original takes, and ours too where the flag works."""
    if "store_" in row["action"]:
        return []
    if row["flag"].endswith("device"):
        return ["cpu"]
    try:
        values = [str(value) for value in ast.literal_eval(row["choices"])]
    except (ValueError, SyntaxError):
        values = [SAMPLES.get(row["type"], "x"), "1"]
    possible = str(action.metavar).split("|") if type(action).__name__ == "OnlyThese" else action.choices
    if possible is None:
        return [values[-1 if action.type in (int, float) else 0]]
    return [next(value for value in [*values, *possible] if value in map(str, possible))]


def test_every_flag_of_the_original_is_in_the_table() -> None:
    """All 290, and the file is what the parsers say now."""
    assert len(ROWS) == 290
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == TABLE["document"](), (
        "write it again: python Megatron-LLM/tools/flags_table.py > docs/flags.md"
    )


@pytest.mark.parametrize("where", sorted({row["where"] for row in ROWS} - set(TABLE["MISSING"])))
def test_flags_do_what_the_table_says(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag that works or has no effect is parsed; one that is refused is an error that gives the reason."""
    parser = TABLE["parser_of"](where)
    for needed in (*parser._actions, *parser._mutually_exclusive_groups):
        needed.required = False
    positional = [action for action in parser._actions if not action.option_strings]
    for row in (row for row in ROWS if row["where"] == where):
        word, text = TABLE["status"](row)
        action = TABLE["find"](parser, row["flag"])
        argv = [str((one.choices or ["x"])[0]) for one in positional]
        if row["flag"].startswith("-"):
            argv = [row["flag"], *value_of(row, action), *(["--", *argv] if argv else [])]
        if word == "refused":
            with pytest.raises((UserError, SystemExit)) as caught:
                parser.parse_args(argv)
            said = str(caught.value) + capsys.readouterr().err
            assert "refused" in said, row["flag"]
        else:
            parser.parse_args(argv)
        assert text or word == "works", row["flag"]


def test_every_flag_has_a_rule_for_runs_that_go_on() -> None:
    """None is left out of the table of what may change."""
    flags = set(FLAGS)
    assert flags == run_changes.RULES.keys()
