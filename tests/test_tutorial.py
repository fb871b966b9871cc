"""The tutorial's commands, typed as they stand there, on small corpora of the same names."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml

from snakmodel.config.sections import PROJECT
from tests.diet import serving, write_corpora

TUTORIAL = PROJECT / "docs" / "tutorial.md"
COMMAND = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def commands() -> list[str]:
    """The blocks of commands, in order."""
    return COMMAND.findall(TUTORIAL.read_text(encoding="utf-8"))


def test_every_command_of_the_tutorial(tmp_path: Path, demo_base: Path) -> None:
    """From nothing to the data card: every command ends well, and the last one shows the card."""
    entries = write_corpora(tmp_path / "www")
    sources = {name: entries[name] for name in ("bookshop", "dawiki", "reddit")}
    sources["opensubtitles"] = {**entries["bookshop"], "url": "ADDRESS/da.txt.gz"}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"runs": str(tmp_path), "logs": str(tmp_path / "logs")}))
    environment = {
        **os.environ,
        "DATA": str(tmp_path / "data"),
        "SOURCES": str(tmp_path / "sources.yaml"),
        "BASE": str(demo_base),
        "RUNS": str(tmp_path / "runs"),
        "SNAKMODEL_RUNS": str(tmp_path / "runs"),
        "SNAKMODEL_LOGS": str(tmp_path / "logs"),
        "SNAKMODEL_SCHEDULER": "local",
    }
    said = ""
    with serving(tmp_path / "www") as address:
        (tmp_path / "sources.yaml").write_text(yaml.safe_dump(sources).replace("ADDRESS", address))
        for block in commands():
            block = block.replace("thresholds.json", str(tmp_path / "thresholds.json"))
            done = subprocess.run(
                ["bash", "-ec", block], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=900
            )
            said = done.stdout
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert "# Data card: Danish text" in said
    assert "| final-filter: lines |" in said
    assert (tmp_path / "thresholds.json").is_file()


def test_links_of_the_documentation_lead_somewhere() -> None:
    """Each relative link in README and docs is that of a file."""
    for page in (PROJECT / "README.md", PROJECT / "ARCHITECTURE.md", *(PROJECT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
