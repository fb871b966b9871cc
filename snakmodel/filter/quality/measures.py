"""The numbers that the rules of quality need of a document, and how they are computed for a whole Arrow array.

All of them are whole numbers; a rule compares one, or the quotient of two, with a threshold.

A word is a maximal run of characters that are not white space, as `str.split()` gives it. Characters are code points.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Bytes = NDArray[np.uint8]

NAMES = (
    "characters",
    "words",
    "content_words",  # words that hold a character which is not a SYMBOL
    "content_characters",  # the characters of these words
    "alphabetic_words",  # words that hold a LETTER
    "stop_words",  # how many different stop words occur
    "hashes",  # signs "#"
    "ellipses",  # "..." and "…"
    "lines",  # the lines of str.splitlines
    "bullet_lines",  # those whose first character but white space is "•" or "-"
    "ellipsis_lines",  # those that end in "..." or "…", white space aside
    "newlines",  # characters "\n"
    "ink",  # characters but "\n"
    "text_lines",  # the pieces between newlines which hold more than white space
    "stopped_lines",  # those of them whose last character is a STOP
    "short_lines",  # those of them with no more characters than `fineweb_short_line`
    "repeated_text_characters",  # the characters of those that occurred before in the document
    "pieces",  # what runs of newlines separate; a text that begins or ends with a newline has an empty piece there
    "repeated_pieces",  # those that occurred before
    "repeated_piece_characters",
    "paragraphs",  # what two or more newlines separate, once white space around the document is removed
    "repeated_paragraphs",
    "repeated_paragraph_characters",
    "top_2_gram",  # the characters of all occurrences of the most frequent 2-gram of words, joined by spaces
    "top_3_gram",
    "top_4_gram",
    "repeated_5_grams",  # the characters in 5-grams of words that occurred before, none counted twice
    "repeated_6_grams",
    "repeated_7_grams",
    "repeated_8_grams",
    "repeated_9_grams",
    "repeated_10_grams",
    "sentences",  # in the lines that the line rules of C4 keep
    "lorem_ipsum_lines",
    "curly_bracket_lines",
)
"""The columns of a matrix of measures."""
COLUMN = {name: column for column, name in enumerate(NAMES)}

LINE_NAMES = ("seen", "long_word", "not_stopped", "few_words", "javascript", "policy", "kept")
"""The lines that the line rules of C4 saw, removed for each reason (the first that applies), and kept."""


def buffers(texts: Any) -> tuple[Bytes, Numbers]:
    """The bytes of an Arrow array of strings without nulls, and the n + 1 offsets of its documents in them."""
    width = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    _, offsets, data = texts.buffers()
    if not len(texts):
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    ends = np.frombuffer(offsets, width, len(texts) + 1, texts.offset * np.dtype(width).itemsize)
    return np.frombuffer(data or b"", np.uint8), ends.astype(np.int64)


def strings(data: Bytes, offsets: Numbers) -> Any:
    """The `pyarrow.LargeStringArray` of these bytes and n + 1 offsets."""
    return pa.Array.from_buffers(pa.large_string(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
