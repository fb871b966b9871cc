"""What is printed without a connection: the table, the plan, and commands that can be copied."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from snakmodel.collect.fetch import fetch
from snakmodel.collect.listing import offline, plan, state, table
from snakmodel.collect.places import Place
from snakmodel.collect.sources import Source
from tests.collect.loopback import Site

ASKED = Source(ask="Ask Ada for it.", files=["a b.txt"], format="lines", licence="CC0-1.0")
FAR = Source(urls=["https://h.invalid/1.gz", "https://h.invalid/2.gz"], format="lines", licence="unknown")
HUB = Source(dataset="org/corpus", config="da", format="parquet", licence="unknown")


def test_states(tmp_path: Path) -> None:
    """A source goes from missing, by partly downloaded and not converted, to collected, changed and damaged."""
    place = Place(tmp_path, "a")
    assert state(place, ASKED) == "missing"
    partial = Place(tmp_path, "far").partial("1.gz")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(5000))
    assert state(Place(tmp_path, "far"), FAR) == "partly downloaded, 5.0 kB"
    place.downloads.mkdir(parents=True)
    (place.downloads / "a b.txt").write_text("hej\n")
    assert state(place, ASKED) == "files are there, not converted"
    fetch(place, ASKED)
    assert state(place, ASKED) == "collected"
    changed = Source(**{**ASKED.entry(), "min_characters": 2})
    assert state(place, changed) == "changed in the file of sources"
    (place.folder / "00000.txt.gz").unlink()
    assert state(place, ASKED) == "collected, but files are missing"


def test_the_table(tmp_path: Path) -> None:
    """Each source has a row with its way, its state and its licence."""
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(table(tmp_path, {"asked": ASKED, "far": FAR, "hub": HUB}))
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["asked", "by hand", "missing", "", "", "CC0-1.0"],
        ["far", "h.invalid", "missing", "", "", "unknown"],
        ["hub", "Hub: org/corpus", "missing", "", "", "unknown"],
    ]


def test_a_dry_run(tmp_path: Path) -> None:
    """The plan says of each file where it comes from, and changes nothing."""
    text = "\n".join(
        line for name, one in (("a", ASKED), ("f", FAR), ("h", HUB)) for line in plan(Place(tmp_path, name), one)
    )
    assert f"{tmp_path}/.collected/a/a b.txt: has to be put in place. Ask Ada for it." in text
    assert f"{tmp_path}/.collected/f/2.gz: would be downloaded from https://h.invalid/2.gz" in text
    assert "would ask the Hub for the Parquet files of org/corpus, revision main" in text
    assert not [*tmp_path.iterdir()]


def test_offline_commands(tmp_path: Path) -> None:
    """Exactly what is missing is listed; what has been collected is not."""
    data = tmp_path / "my data"
    for name, file in (("done", "a b.txt"), ("far", "2.gz")):
        folder = Place(data, name).downloads
        folder.mkdir(parents=True)
        (folder / file).write_text("hej\n")
    fetch(Place(data, "done"), ASKED)
    sources = {"done": ASKED, "asked": ASKED, "far": FAR, "hub": HUB}
    lines = offline(data, sources, Path("s.yaml"))
    at = f"'{data}/.collected"
    fetching = "python -m snakmodel.collect fetch --sources s.yaml --source"
    assert lines == [
        "# asked: missing",
        f"mkdir -p {at}/asked'",
        "# Ask Ada for it.",
        f"# missing: {data}/.collected/asked/a b.txt",
        f"{fetching} asked --output '{data}' --offline",
        "",
        "# far: partly downloaded, 4 bytes",
        f"mkdir -p {at}/far'",
        f"curl --location --fail --continue-at - --output {at}/far/1.gz' https://h.invalid/1.gz",
        f"{fetching} far --output '{data}' --offline",
        "",
        "# hub: missing",
        f"mkdir -p {at}/hub'",
        f"hf download org/corpus --repo-type dataset --revision main --include 'da/*.parquet' --local-dir {at}/hub'",
        f"{fetching} hub --output '{data}' --offline",
        "",
    ]
    assert offline(data, {"done": ASKED}, Path("s.yaml")) == ["# Nothing is missing."]


def test_the_commands_do_what_they_say(site: Site, tmp_path: Path) -> None:
    """A shell that runs the listed commands collects the source."""
    data, sources = tmp_path / "data", tmp_path / "s.yaml"
    url = site.add("/Denmark~1.txt", b"hej\n")
    sources.write_text(f"x:\n  url: {url}\n  format: lines\n  licence: unknown\n")
    commands = offline(data, {"x": Source(url=url, format="lines", licence="unknown")}, sources)
    if subprocess.run(["which", "curl"], capture_output=True, check=False).returncode:
        pytest.skip("curl is not installed here")
    script = "\n".join(commands).replace("\npython ", f"\n{shlex.quote(sys.executable)} ")
    subprocess.run(["sh", "-ec", script], check=True, capture_output=True)
    assert state(Place(data, "x"), Source(url=url, format="lines", licence="unknown")) == "collected"


def test_help_has_an_example() -> None:
    """The help of the command and of its parts shows what to type."""
    for part in ([], ["fetch"], ["list"]):
        command = [sys.executable, "-m", "snakmodel.collect", *part, "--help"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "python -m snakmodel.collect" in text.split("usage:", 1)[1].split("\n", 1)[1]
        assert "--sources recipes/sources/danish.yaml" in text
