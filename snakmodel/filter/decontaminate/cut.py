"""Cuts spans out of a text."""

from __future__ import annotations

from collections.abc import Iterable


def without(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """The text without these ranges of its UTF-8 bytes, which come in order and do not overlap.

    Where white space is on both sides of a cut, only one side's is kept: that before the cut, unless only that after it
    holds a line end. At the begin and the end of the text none is kept beside a cut.
    """
    data, last, kept = text.encode(), 0, ""
    for number, (begin, end) in enumerate(spans):
        piece = data[last:begin].decode()
        kept = joined(kept, piece) if number else piece
        last = end
    return joined(kept, data[last:].decode())


def joined(left: str, right: str) -> str:
    """What is left of a text on both sides of a cut."""
    ink_left, ink_right = left.rstrip(), right.lstrip()
    if not ink_left or not ink_right:
        return ink_left + ink_right
    before, after = left[len(ink_left) :], right[: len(right) - len(ink_right)]
    if not before or not after:
        return left + right
    return ink_left + (after if "\n" in after and "\n" not in before else before) + ink_right
