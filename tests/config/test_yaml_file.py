"""What YAML files of users may say, and what they are read as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from run_contract.errors import UserError
from snakmodel.config.yaml_file import read_yaml


def read(folder: Path, text: str) -> Any:
    """The content of a file with this text."""
    path = folder / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("lr: 1\nother: 2\nlr: 3\n", "1 and 3"),
        ("training:\n  lr: 1\n  lr: 1\n", "2 and 3"),
        ("training: {lr: 1, lr: 2}\n", "1 and 1"),
        ("stages:\n- {a: 1}\n- a: {b: 1}\n  lr: 2\n  'lr': 2\n", "4 and 5"),
    ],
)
def test_a_key_that_is_there_twice(tmp_path: Path, text: str, lines: str) -> None:
    """Of two equal keys the last one would win without a word: both lines are named, at any depth."""
    with pytest.raises(UserError, match=rf"file\.yaml: .*the key 'lr' is there twice, in lines {lines}"):
        read(tmp_path, text)


def test_equal_keys_of_different_sections(tmp_path: Path) -> None:
    """The same key may stand in two sections, and a merged section may be overruled."""
    text = "a: &a {lr: 1, x: 1}\nb: {<<: *a, lr: 2}\nc: {lr: 3}\n"
    assert read(tmp_path, text) == {"a": {"lr": 1, "x": 1}, "b": {"lr": 2, "x": 1}, "c": {"lr": 3}}


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("24:00:00", "24:00:00"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("trueish", "trueish"),
        ("010", "010"),
        ("0", 0),
        ("-12", -12),
        ("1_000", 1000),
        ("0x1f", 31),
        ("2.5", 2.5),
        ("", None),
    ],
)
def test_values_are_what_was_written(tmp_path: Path, written: str, found: Any) -> None:
    """A time of day, a leading zero and the language code `no` are not turned into other values."""
    value = read(tmp_path, f"key: {written}\n")["key"]
    assert (value, type(value)) == (found, type(found))


def test_files_that_are_not_yaml(tmp_path: Path) -> None:
    """An error of syntax names the file and the line; bytes that are not UTF-8 are named too."""
    with pytest.raises(UserError, match=r"(?s)file\.yaml: not readable as YAML: .*line 2"):
        read(tmp_path, "a: 1\n b: 2\n")
    (tmp_path / "file.yaml").write_bytes(b"name: r\xf8d\n")
    with pytest.raises(UserError, match="byte 7 is not UTF-8"):
        read_yaml(tmp_path / "file.yaml")
