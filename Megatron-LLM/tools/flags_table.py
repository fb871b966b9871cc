"""python Megatron-LLM/tools/flags_table.py > docs/flags.md

Writes the table of all flags of the original Megatron-LLM. It is made from docs/megatron-flags.tsv (the original's
flags) and the parsers of the programs here (what they do with each flag): it works, has no effect, or is refused with a
reason.
"""

from __future__ import annotations

import argparse
import ast
import csv
import runpy
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_llm.flags import parser as flags_parser
from megatron_llm.flags.argument_parser import OnlyThese
from megatron_llm.training import run_changes

ENGINE = Path(__file__).resolve().parents[1]
ORIGINAL = ENGINE.parent / "docs" / "megatron-flags.tsv"
MEGATRON = "megatron arguments (finetune, verify)"
VERIFY = "verify_correctness.py"
TITLES = {MEGATRON: "finetune.py: Megatron's arguments"}
ELSEWHERE = {
    "tools/checkpoint_loader_megatron.py": "tools/checkpoint_util.py",
    "tools/checkpoint_saver_megatron.py": "tools/checkpoint_util.py",
}
"""Programs of the original -> the program that takes their flags here."""
MISSING = {"tools/preprocess_instruct_data.py": "instruction tuning is not done here, so its data are not prepared"}
"""Programs of the original that do not exist here -> the reason."""
INTRODUCTION = """# Flags of the original programs

Every flag of epfLLM's Megatron-LLM, and what the program of the same name does with it here.
`python Megatron-LLM/tools/flags_table.py > docs/flags.md` writes this file.

- **works**: with the original's meaning.
- **no effect**: accepted, so that a script need not be changed, but nothing depends on it.
- **refused**: an error that names the reason.

The last column of finetune.py's tables says what happens when a run goes on (from `--save`, or from a training
checkpoint in `--load` without `--finetune`) with another value: the same table decides it in the code
(`megatron_llm/training/run_changes.py`).
"""


@cache
def parser_of(where: str) -> argparse.ArgumentParser:
    """The parser of the program here that takes the flags of one of the original's programs."""
    if where in (MEGATRON, "finetune.py"):
        return flags_parser.parser()
    script = runpy.run_path(str(ENGINE / ELSEWHERE.get(where, where)), run_name="flags_table")
    parser: argparse.ArgumentParser = script["make_parser"]()
    return parser


def original_flags() -> list[dict[str, str]]:
    """One row per flag of the original: where, flag, type, action, default, choices, nargs, required."""
    with ORIGINAL.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def find(parser: argparse.ArgumentParser, flag: str) -> argparse.Action | None:
    """The action of a parser for a flag or a positional argument; None if it has none."""
    for action in parser._actions:
        if flag in action.option_strings or (not action.option_strings and action.dest == flag):
            return action
    return None


def status(row: dict[str, str]) -> tuple[str, str]:
    """The status (works, no effect or refused), and what the flag does here or why it does not."""
    if reason := MISSING.get(row["where"]):
        return "refused", reason
    action = find(parser_of(row["where"]), row["flag"])
    if action is None:
        raise LookupError(f"{row['where']} has no {row['flag']}")
    text = (action.help or "").replace("%%", "%")
    for word in ("no effect", "refused"):
        if text.startswith(f"{word}: "):
            return word, text.removeprefix(f"{word}: ")
    if isinstance(action, OnlyThese):
        return "works", f"only `{action.metavar}`; others are refused: {text}"
    return "works", "; ".join(part for part in (text, _left_out(row, action)) if part)


def _left_out(row: dict[str, str], action: argparse.Action) -> str:
    """A clause that names those of the original's values that are not possible here; or an empty string."""
    try:
        values = ast.literal_eval(row["choices"])
    except (ValueError, SyntaxError):
        return ""
    missing = sorted(str(value) for value in values if action.choices is not None and value not in action.choices)
    return f"refused: {', '.join(missing)}" if missing else ""


def _rows(where: str, rows: list[dict[str, str]]) -> Iterator[str]:
    """The lines of the markdown table for one of the original's programs."""
    changes = where in (MEGATRON, "finetune.py")
    yield f"\n## {TITLES.get(where, where)}\n"
    yield "| flag | original's default | here | |" + (" when a run goes on |" if changes else "")
    yield "|---|---|---|---|" + ("---|" if changes else "")
    for row in rows:
        word, text = status(row)
        rule: Any = run_changes.RULES.get(row["flag"].removeprefix("--"))
        last = f" {rule.value if rule else ''} |" if changes else ""
        default = f"`{row['default']}`" if row["default"] else ""
        yield f"| `{row['flag']}` | {default} | {word} | {_escaped(text)} |{last}"


def _escaped(text: str) -> str:
    """Escape text for a markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _of_verify(rows: list[dict[str, str]]) -> str:
    """A sentence that lists which of Megatron's arguments the gate takes."""
    taken = [row["flag"] for row in rows if row["where"] == MEGATRON and find(parser_of(VERIFY), row["flag"])]
    return (
        f"\nOf Megatron's arguments {VERIFY} takes {', '.join(f'`{flag}`' for flag in taken)}; it asks the checkpoint "
        "for everything else and refuses other flags."
    )


def document() -> str:
    """The complete text of docs/flags.md."""
    lines, flags = [INTRODUCTION.rstrip("\n")], original_flags()
    for where, rows in groupby(flags, key=lambda row: row["where"]):
        lines += _rows(where, list(rows))
        lines += [_of_verify(flags)] if where == VERIFY else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
