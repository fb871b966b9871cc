"""finetune.py's flags, their defaults and their help, and `arguments` in state.json, as they were recorded.

After a change that is meant: `python -m tests.engine.flags.test_golden_flags > tests/data/finetune_flags.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_llm.flags.parser import parse, parser
from tests.engine.flags.test_arguments import PUBLISHED_FLAGS, REQUIRED

GOLDEN = Path(__file__).parents[2] / "data" / "finetune_flags.json"


def as_recorded() -> dict[str, Any]:
    """Everything that --help says, and what state.json keeps of two command lines."""
    flags = {
        " ".join(action.option_strings): {
            "default": repr(action.default),
            "type": getattr(action.type, "__name__", repr(action.type)),
            "choices": sorted(map(str, action.choices or ())),  # the order depends on what Python has seen before
            "nargs": action.nargs,
            "help": action.help,
        }
        for action in parser()._actions
    }
    lines = {"published": PUBLISHED_FLAGS.split(), "required": REQUIRED}
    return {"flags": flags, "arguments": {name: parse(words).as_json() for name, words in lines.items()}}


def test_flags_and_arguments_are_those_that_were_recorded() -> None:
    """Neither a flag, a default, a line of help nor a recorded argument has changed."""
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(as_recorded()))
    assert now["flags"] == recorded["flags"]
    assert now["arguments"] == recorded["arguments"]


if __name__ == "__main__":
    json.dump(as_recorded(), sys.stdout, indent=1, ensure_ascii=False)
