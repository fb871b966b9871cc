"""The flags of the training stage: which of them are part of its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.chain.test_refused_plans import furnish, plan, recipe


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, demo_base: Path) -> Path:
    """A folder with text and a base model."""
    return furnish(tmp_path_factory.mktemp("desk"), demo_base)


def planned(desk: Path, monkeypatch: pytest.MonkeyPatch, **training: Any) -> tuple[str, list[str]]:
    """The key of the training, and its whole command line, with these settings."""
    monkeypatch.setattr("snakmodel.chain.plan.ask_engine", lambda *_: None)
    changed = recipe(desk)
    changed["training"] |= training
    chain = plan(desk, changed).chain
    task = chain["train"].tasks[0]
    return chain.keys["train"][0], [*task.argv, *task.unkeyed]


@pytest.mark.parametrize(
    ("setting", "value", "words", "is_keyed"),
    [
        ("torch_compile", True, ["--torch_compile"], True),
        ("extra_flags", ["--exit_interval", "100"], ["--exit_interval", "100"], True),
        ("log_samples", True, ["--log_samples"], False),
        ("distributed_timeout_minutes", 30, ["--distributed_timeout_minutes", "30.0"], False),
        ("keep_last", 2, ["--keep_last", "2"], False),
    ],
)
def test_settings_of_training(
    desk: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: Any, words: list[str], is_keyed: bool
) -> None:
    """Each becomes its flag; what does not change the result may change while the run is under way."""
    before, plain = planned(desk, monkeypatch)
    after, line = planned(desk, monkeypatch, **{setting: value})
    place = line.index(words[0])
    assert line[place : place + len(words)] == words
    assert words[0] not in plain
    assert (before != after) == is_keyed
