"""The rules of quality and their thresholds, as they were published.

A rule is named as its threshold is: `…_max_…` fails a document whose value is above the threshold, `…_min_…` one whose
value is below. A threshold of None switches the rule off. A quotient whose divisor is 0 fails no rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snakmodel.filter.quality.measures import COLUMN, Numbers

GOPHER, C4, FINEWEB = "Gopher", "C4", "FineWeb"
SOURCES = {
    GOPHER: "Rae et al. 2021, Scaling Language Models, arXiv:2112.11446, appendix A.1.1 and table A1",
    C4: "Raffel et al. 2020, Exploring the Limits of Transfer Learning, JMLR 21(140), section 2.2, and its code",
    FINEWEB: "Penedo et al. 2024, The FineWeb Datasets, arXiv:2406.17557, section 3.6",
}
"""Where the rules come from."""

STOP_WORDS = {
    "da": ("og", "i", "at", "det", "er", "en", "til", "på", "som", "af", "med", "for"),
    "de": ("der", "die", "und", "in", "den", "von", "zu", "das", "mit", "ist", "nicht", "ein"),
    "en": ("the", "be", "to", "of", "and", "that", "have", "with"),
    "nb": ("og", "i", "det", "er", "på", "til", "en", "som", "å", "av", "for", "med"),
    "sv": ("och", "i", "att", "det", "som", "en", "på", "är", "av", "för", "med", "till"),
}
"""Stop words by language. The English ones are Gopher's, which has no others; these are frequent words of their own."""


@dataclass(frozen=True)
class Thresholds:
    """The threshold of each rule, and what the rules look for. The names of measures are those of `measures.NAMES`."""

    gopher_min_words: float | None = 50
    """Gopher: `content_words`."""
    gopher_max_words: float | None = 100_000
    """Gopher: `content_words`."""
    gopher_min_mean_word_length: float | None = 3
    """Gopher: `content_characters` per `content_words`."""
    gopher_max_mean_word_length: float | None = 10
    """Gopher: `content_characters` per `content_words`."""
    gopher_max_hashes: float | None = 0.1
    """Gopher, symbol-to-word ratio: `hashes` per `words`."""
    gopher_max_ellipses: float | None = 0.1
    """Gopher, symbol-to-word ratio: `ellipses` per `words`."""
    gopher_max_bullet_lines: float | None = 0.9
    """Gopher: `bullet_lines` per `lines`."""
    gopher_max_ellipsis_lines: float | None = 0.3
    """Gopher: `ellipsis_lines` per `lines`."""
    gopher_min_alphabetic_words: float | None = 0.8
    """Gopher: `alphabetic_words` per `words`."""
    gopher_min_stop_words: float | None = 2
    """Gopher: `stop_words`."""
    gopher_max_repeated_lines: float | None = 0.3
    """Gopher, table A1, duplicate line fraction: `repeated_pieces` per `pieces`."""
    gopher_max_repeated_paragraphs: float | None = 0.3
    """Gopher, table A1, duplicate paragraph fraction: `repeated_paragraphs` per `paragraphs`."""
    gopher_max_repeated_line_characters: float | None = 0.2
    """Gopher, table A1: `repeated_piece_characters` per `characters`."""
    gopher_max_repeated_paragraph_characters: float | None = 0.2
    """Gopher, table A1: `repeated_paragraph_characters` per `characters`."""
    gopher_max_top_2_gram: float | None = 0.2
    """Gopher, table A1: `top_2_gram` per `characters`."""
    gopher_max_top_3_gram: float | None = 0.18
    """Gopher, table A1: `top_3_gram` per `characters`."""
    gopher_max_top_4_gram: float | None = 0.16
    """Gopher, table A1: `top_4_gram` per `characters`."""
    gopher_max_repeated_5_grams: float | None = 0.15
    """Gopher, table A1: `repeated_5_grams` per `characters`."""
    gopher_max_repeated_6_grams: float | None = 0.14
    """Gopher, table A1: `repeated_6_grams` per `characters`."""
    gopher_max_repeated_7_grams: float | None = 0.13
    """Gopher, table A1: `repeated_7_grams` per `characters`."""
    gopher_max_repeated_8_grams: float | None = 0.12
    """Gopher, table A1: `repeated_8_grams` per `characters`."""
    gopher_max_repeated_9_grams: float | None = 0.11
    """Gopher, table A1: `repeated_9_grams` per `characters`."""
    gopher_max_repeated_10_grams: float | None = 0.1
    """Gopher, table A1: `repeated_10_grams` per `characters`."""
    c4_min_sentences: float | None = 5
    """C4: `sentences`, of the lines that the line rules keep."""
    c4_max_lorem_ipsum_lines: float | None = 0
    """C4: `lorem_ipsum_lines`."""
    c4_max_curly_bracket_lines: float | None = 0
    """C4: `curly_bracket_lines`."""
    fineweb_min_lines: float | None = 1
    """FineWeb takes no empty text: `text_lines`."""
    fineweb_min_stopped_lines: float | None = 0.12
    """FineWeb, lines ending with punctuation: `stopped_lines` per `text_lines`."""
    fineweb_max_short_lines: float | None = 0.67
    """FineWeb: `short_lines` per `text_lines`."""
    fineweb_max_repeated_line_characters: float | None = 0.1
    """FineWeb: `repeated_text_characters` per `ink`. This is the paper's number; datatrove's default is 0.01."""
    fineweb_max_newlines: float | None = 0.3
    """The list rule of FineWeb's code: `newlines` per `words`."""

    stop_words: tuple[str, ...] = STOP_WORDS["en"]
    """The words that `stop_words` counts, in upper and lower case as written here."""
    fineweb_short_line: int = 30
    """The most characters of a line that `short_lines` counts."""
    c4_line_max_word_length: int | None = 1000
    """First line rule of C4 (its code): a line with a word of more characters is removed."""
    c4_line_citations: bool = True
    """C4's code: citation marks ([1], [], [edit] and [citation needed]) are removed from lines."""
    c4_line_stopped: bool = True
    """Second line rule of C4: a line that does not end in one of . ? ! " ' is removed, and one that ends in "..."."""
    c4_line_min_words: int | None = 3
    """Third line rule of C4: a line with fewer words is removed."""
    c4_line_javascript: bool = True
    """Fourth line rule of C4: a line that contains "javascript" is removed, in upper or lower case."""
    c4_line_policy: tuple[str, ...] = (
        "terms of use",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
    )
    """Fifth line rule of C4 (its code): a line that contains one of these is removed. The case of ASCII is ignored."""


@dataclass(frozen=True)
class Rule:
    """A rule: a measure, or the quotient of two, that is held against a threshold."""

    name: str
    """The name of the rule and of its threshold."""
    measure: str
    per: str | None = None
    is_yes_or_no: bool = False
    """Whether the rule asks if something is there at all, so that a reference corpus has no better threshold."""

    @property
    def source(self) -> str:
        """The key of SOURCES."""
        return next(source for source in SOURCES if self.name.startswith(f"{source.lower()}_"))

    @property
    def is_minimum(self) -> bool:
        """Whether values below the threshold fail, rather than those above."""
        return "_min_" in self.name

    def values(self, found: Numbers) -> NDArray[np.float64]:
        """The value of each document, (n,), of a matrix of measures; NaN where the divisor is 0."""
        values: NDArray[np.float64] = found[:, COLUMN[self.measure]].astype(np.float64)
        if self.per is None:
            return values
        divisors = found[:, COLUMN[self.per]].astype(np.float64)
        quotients = np.full(len(values), np.nan)
        np.divide(values, divisors, out=quotients, where=divisors != 0)
        return quotients

    def fails(self, found: Numbers, threshold: float | None) -> NDArray[np.bool_]:
        """Whether each document fails the rule, (n,)."""
        if threshold is None:
            return np.zeros(len(found), np.bool_)
        values = self.values(found)
        return values < threshold if self.is_minimum else values > threshold


def _rules() -> Iterator[Rule]:
    """The rules, in the order of the thresholds; the measures are those that the docstrings there name."""
    words, mean = ("content_words", None), ("content_characters", "content_words")
    yield from (Rule("gopher_min_words", *words), Rule("gopher_max_words", *words))
    yield from (Rule("gopher_min_mean_word_length", *mean), Rule("gopher_max_mean_word_length", *mean))
    for name in ("hashes", "ellipses"):
        yield Rule(f"gopher_max_{name}", name, "words")
    for name in ("bullet_lines", "ellipsis_lines"):
        yield Rule(f"gopher_max_{name}", name, "lines")
    yield Rule("gopher_min_alphabetic_words", "alphabetic_words", "words")
    yield Rule("gopher_min_stop_words", "stop_words")
    yield Rule("gopher_max_repeated_lines", "repeated_pieces", "pieces")
    yield Rule("gopher_max_repeated_paragraphs", "repeated_paragraphs", "paragraphs")
    yield Rule("gopher_max_repeated_line_characters", "repeated_piece_characters", "characters")
    yield Rule("gopher_max_repeated_paragraph_characters", "repeated_paragraph_characters", "characters")
    for n in range(2, 5):
        yield Rule(f"gopher_max_top_{n}_gram", f"top_{n}_gram", "characters")
    for n in range(5, 11):
        yield Rule(f"gopher_max_repeated_{n}_grams", f"repeated_{n}_grams", "characters")
    yield Rule("c4_min_sentences", "sentences")
    yield Rule("c4_max_lorem_ipsum_lines", "lorem_ipsum_lines", is_yes_or_no=True)
    yield Rule("c4_max_curly_bracket_lines", "curly_bracket_lines", is_yes_or_no=True)
    yield Rule("fineweb_min_lines", "text_lines", is_yes_or_no=True)
    yield Rule("fineweb_min_stopped_lines", "stopped_lines", "text_lines")
    yield Rule("fineweb_max_short_lines", "short_lines", "text_lines")
    yield Rule("fineweb_max_repeated_line_characters", "repeated_text_characters", "ink")
    yield Rule("fineweb_max_newlines", "newlines", "words")


RULES = tuple(_rules())


def failures(found: Numbers, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Whether each document fails each rule, (n, len(RULES)), of a matrix of measures."""
    return np.column_stack([rule.fails(found, getattr(thresholds, rule.name)) for rule in RULES])


def as_json(thresholds: Thresholds) -> dict[str, Any]:
    """The thresholds as JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in _fields(thresholds).items()}


def _fields(thresholds: Thresholds) -> dict[str, Any]:
    """The values by the names of the fields."""
    return {field.name: getattr(thresholds, field.name) for field in dataclasses.fields(thresholds)}
