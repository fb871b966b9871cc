"""The examples run as their README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import yaml

from snakmodel.config.recipe import Recipe
from snakmodel.config.sections import PROJECT
from snakmodel.filter.custom import run_command
from tests import toy

FOLDER = PROJECT / "examples" / "custom_filter"


def test_a_classifier_of_your_own(tmp_path: Path) -> None:
    """The recipe in the README is valid and names both files; its command scores, and leaves out what scores low."""
    found = re.search(r"```yaml\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    [custom] = Recipe.model_validate(toy.recipe(**yaml.safe_load(found[1]))).data.custom
    assert custom.paths == [FOLDER / "classify.py", FOLDER / "weights.json"]
    texts = ["Dansk er et sprog.", "Klik her: tilbud!", "", "Vejret er godt"]
    table = pa.table({"text": pa.array(texts, pa.large_string()), "source": ["a"] * 4, "number": range(4)})
    with pa.ipc.new_stream(str(tmp_path / "in.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    command = custom.command.replace("examples/", f"{PROJECT}/examples/")
    counts = run_command(custom.name, command, tmp_path / "in.arrow", tmp_path / "out")
    with pa.ipc.open_stream(str(tmp_path / "out.arrow")) as reader:
        rows = reader.read_all().to_pylist()
    assert [(row["number"], row["score"]) for row in rows] == [(0, 0.5), (2, 0.0), (3, 0.0)]
    assert counts["documents"] == 3


def test_the_command_to_try_names_existing_flags() -> None:
    """The README's command for one shard is understood by the command line."""
    help_ = subprocess.run(
        [sys.executable, "-m", "snakmodel.filter", "custom", "--help"], cwd=PROJECT, capture_output=True, text=True
    ).stdout
    shown = re.search(r"```bash\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shown
    assert all(flag in help_ for flag in re.findall(r"(?<= )--(?:name|input|output|command)", shown[1]))
