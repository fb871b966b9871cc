"""metrics.jsonl after a restart holds every iteration once."""

from __future__ import annotations

from pathlib import Path

from megatron_llm.metrics.log import cut_off

LINES = [
    '{"iteration": 9, "lm_loss": 1.0}',
    '{"iteration": 10, "lm_loss": 1.0}',
    '{"iteration": 10, "validation_loss": 2.0}',
    '{"iteration": 11, "lm_loss": 1.0}',
    '{"iteration": 12, "lm_lo',
]


def test_lines_past_the_resumed_iteration_are_cut_off(tmp_path: Path) -> None:
    """What the killed attempt wrote after its last checkpoint goes, half lines too; a finished evaluation stays."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(LINES))
    cut_off(path, 10, keep_last_validation=True)
    assert path.read_text().splitlines() == LINES[:3]
    cut_off(path, 10, keep_last_validation=False)
    assert path.read_text().splitlines() == LINES[:2]


def test_without_a_file_there_is_nothing_to_cut(tmp_path: Path) -> None:
    """A new run starts without one."""
    cut_off(tmp_path / "metrics.jsonl", 0, keep_last_validation=True)
    assert not list(tmp_path.iterdir())
