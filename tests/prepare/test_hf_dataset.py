"""The published script's flags: datasets on disk, made on one machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
import pytest


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Sources a (two files), b (a file directly in the folder) and c (empty documents only)."""
    for name, content in {
        "a/1.txt": "en\n\nto\n",
        "a/2.txt": "tre æ\n",
        "b.danish": "fire\n",
        "c/x.txt": " \n",
    }.items():
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "raw"


def run(raw: Path, names: str, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakmodel.prepare", "--data_path", str(raw), "--dataset_names", names]
    return subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, check=False)


A = {"text": ["en", "to", "tre æ"], "source": ["a", "a", "a"]}
BOTH = {"text": ["en", "to", "tre æ", "fire"], "source": ["a", "a", "a", "b"]}


def test_named_datasets_and_all_of_them(raw: Path, tmp_path: Path) -> None:
    """One dataset a name, with text and source, and `all` for the named ones; the published layout opens too."""
    done = run(raw, "a b all", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert "all: 4 documents, 14 bytes, 1 empty ones left out" in done.stdout
    assert datasets.load_from_disk(tmp_path / "hf/a").to_dict() == A
    assert datasets.load_from_disk(tmp_path / "hf/all").to_dict() == BOTH
    assert datasets.load_from_disk(tmp_path / "hf/all/train")["train"].to_dict() == BOTH
    split = datasets.load_from_disk(tmp_path / "hf/all/train/train")
    assert split.to_dict() == BOTH
    assert split.map(lambda one: {"text": one["text"].upper()}).to_dict()["text"][-1] == "FIRE"
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["a", "all", "b"]


def test_all_alone_is_every_source(raw: Path, tmp_path: Path) -> None:
    """`all` alone finds every source of the folder; a source without documents is an error, and is not published."""
    done = run(raw, "all", tmp_path / "hf")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "source 'c' has no documents that could be kept (0 documents, 0 bytes, 1 empty ones left out)" in done.stderr
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["a", "b"]
    (raw / "c/x.txt").unlink()
    assert run(raw, "all", tmp_path / "hf").returncode == 0
    assert datasets.load_from_disk(tmp_path / "hf/all").to_dict()["text"] == ["fire", "en", "to", "tre æ"]


def test_mistakes(raw: Path, tmp_path: Path) -> None:
    """An unknown name, no name, and flags that do not belong together are said in one line."""
    unknown, none = run(raw, "bb all", tmp_path / "hf"), run(raw, "", tmp_path / "hf")
    assert "unknown source 'bb'" in unknown.stderr
    assert "--dataset_names is empty; " in none.stderr
    assert (unknown.returncode, none.returncode) == (2, 2)
    command = [sys.executable, "-m", "snakmodel.prepare", "--data_path", str(raw), "--shard", "1"]
    mixed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert mixed.returncode == 2
    assert "give either --shards, --shard and --output, or --data_path and --dataset_names" in mixed.stderr
    assert not (tmp_path / "hf").exists()
