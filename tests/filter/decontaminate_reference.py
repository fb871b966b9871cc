"""Decontamination in plain Python, which the tests compare with the compiled one."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple


class Word(NamedTuple):
    """A word of a text: its spelling, and the bytes at which it begins and ends."""

    spelling: str
    begin: int
    end: int


def category(character: str) -> str:
    return unicodedata.category(character)


def words(text: str) -> list[Word]:
    """The words of a text, by the definition in docs/filters.md."""
    found: list[Word] = []
    is_open, at = False, 0
    for character in text:
        size = len(character.encode())
        if category(character)[0] in "LMN":
            folded = unicodedata.normalize("NFKD", character).casefold()
            letters = "".join(one for one in folded if category(one)[0] in "LMN")
            before = found.pop() if is_open else Word("", at, at)
            found.append(Word(before.spelling + letters, before.begin, at + size))
            is_open = True
        elif category(character) != "Cf":
            is_open = False
        at += size
    return found


def contaminated(text: str, items: list[str], ngram: int) -> tuple[list[tuple[int, int]], set[tuple[int, int]]]:
    """The spans of a document in bytes, and each span's place with each item that it holds words of."""
    spelled = [word.spelling for word in words(text)]
    covered = [False] * len(spelled)
    matches: list[tuple[int, int]] = []
    for number, item in enumerate(items):
        own = [word.spelling for word in words(item)]
        length = min(ngram, len(own))
        if length < min(ngram, 8):
            continue
        grams = {tuple(own[first : first + length]) for first in range(len(own) - length + 1)}
        for first in range(len(spelled) - length + 1):
            if tuple(spelled[first : first + length]) in grams:
                covered[first : first + length] = [True] * length
                matches.append((first, number))
    place, of_word, spans = -1, [-1] * len(spelled), list[tuple[int, int]]()
    for index, word in enumerate(words(text)):
        if covered[index]:
            if index == 0 or not covered[index - 1]:
                place += 1
                spans.append((word.begin, word.end))
            spans[-1] = (spans[-1][0], word.end)
            of_word[index] = place
    return spans, {(of_word[first], number) for first, number in matches}
