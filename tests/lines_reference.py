"""Removal of frequent lines in plain Python, which the tests compare with the commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def counted(texts: Iterable[str]) -> Counter[str]:
    """How often each line occurs, without white space at its ends and without blank lines."""
    return Counter(line.strip() for text in texts for line in text.split("\n") if line.strip())


def without(text: str, frequent: set[str]) -> str | None:
    """A document without the frequent lines; None if it had some and nothing else."""
    lines = text.split("\n")
    if not any(line.strip() in frequent for line in lines):
        return text
    kept: list[str] = []
    follows_removed = False
    for line in lines:
        if line.strip() in frequent:
            follows_removed = True
        elif line.strip() or not follows_removed or (kept and kept[-1].strip()):
            kept.append(line)
            follows_removed = False
    return "\n".join(kept) if any(line.strip() for line in kept) else None
