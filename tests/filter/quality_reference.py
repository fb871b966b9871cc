"""The rules of quality in plain Python, one document at a time, for comparison with the compiled kernel."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from snakmodel.filter.quality.characters import stops
from snakmodel.filter.quality.rules import Thresholds

STOPS = frozenset(stops())


def is_symbol(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "PS" or category == "Cc"


def repeated(pieces: list[str]) -> list[str]:
    """The pieces that occurred before."""
    return [piece for place, piece in enumerate(pieces) if piece in set(pieces[:place])]


def sentences(line: str) -> int:
    """Words that end a sentence, and one if others follow the last of them."""
    closers = {character for character in line if unicodedata.category(character) in ("Pe", "Pf", "Pi")} | set("\"'")
    ends = [word.rstrip("".join(closers))[-1:] for word in line.split()]
    stopped = [end != "" and (end in STOPS or end == "…") for end in ends]
    return sum(stopped) + bool(stopped and not stopped[-1])


def top_gram(words: list[str], n: int) -> int:
    grams = Counter(" ".join(words[first : first + n]) for first in range(len(words) - n + 1))
    if not grams:
        return 0
    most = max(grams.values())
    return next(len(gram) * count for gram, count in grams.items() if count == most)


def repeated_grams(words: list[str], n: int) -> int:
    seen: set[str] = set()
    characters = first = 0
    while first + n <= len(words):
        gram = "".join(words[first : first + n])
        if gram in seen:
            characters, first = characters + len(gram), first + n
        else:
            seen.add(gram)
            first += 1
    return characters


def kept_lines(text: str, thresholds: Thresholds) -> tuple[dict[str, int], dict[str, int], str]:
    """The measures of C4, the lines by what became of them, and the text of the kept lines."""
    found = {"sentences": 0, "lorem_ipsum_lines": 0, "curly_bracket_lines": 0}
    lines = dict.fromkeys(("seen", "long_word", "not_stopped", "few_words", "javascript", "policy", "kept"), 0)
    kept = []
    longest, fewest = thresholds.c4_line_max_word_length, thresholds.c4_line_min_words
    for raw in text.splitlines():
        line, words = raw.strip(), raw.split()
        lines["seen"] += 1
        if thresholds.c4_line_citations:
            line = re.sub(r"\[(\d*|edit|citation needed)\]", "", line)
        low = line.lower()
        late = True
        if longest is not None and max(map(len, words), default=0) > longest:
            lines["long_word"] += 1
        elif thresholds.c4_line_stopped and (line[-1:] not in (*".?!\"'",) or line.endswith("...")):
            lines["not_stopped"] += 1
        elif fewest is not None and len(words) < fewest:
            lines["few_words"] += 1
        else:
            late = False
        if late:
            continue
        found["lorem_ipsum_lines"] += "lorem ipsum" in low
        if thresholds.c4_line_javascript and "javascript" in low:
            lines["javascript"] += 1
            continue
        found["curly_bracket_lines"] += "{" in line
        if any(phrase in low for phrase in thresholds.c4_line_policy):
            lines["policy"] += 1
            continue
        lines["kept"] += 1
        found["sentences"] += sentences(line)
        kept.append(line)
    return found, lines, "\n".join(kept).strip()


def measures(text: str, thresholds: Thresholds) -> dict[str, int]:
    """All measures of a document."""
    words, lines = text.split(), text.splitlines()
    content = [word for word in words if not all(map(is_symbol, word))]
    texts = [piece for piece in text.split("\n") if piece.strip()]
    pieces = re.split("\n+", text) if text else []
    paragraphs = re.split("\n{2,}", text.strip())
    found = {
        "characters": len(text),
        "words": len(words),
        "content_words": len(content),
        "content_characters": sum(map(len, content)),
        "alphabetic_words": sum(any(map(str.isalpha, word)) for word in words),
        "stop_words": len(set(words) & set(thresholds.stop_words)),
        "hashes": text.count("#"),
        "ellipses": text.count("...") + text.count("…"),
        "lines": len(lines),
        "bullet_lines": sum(line.lstrip().startswith(("•", "-")) for line in lines),
        "ellipsis_lines": sum(line.rstrip().endswith(("...", "…")) for line in lines),
        "newlines": text.count("\n"),
        "ink": len(text.replace("\n", "")),
        "text_lines": len(texts),
        "stopped_lines": sum(piece[-1] in STOPS for piece in texts),
        "short_lines": sum(len(piece) <= thresholds.fineweb_short_line for piece in texts),
        "repeated_text_characters": sum(map(len, repeated(texts))),
        "pieces": len(pieces),
        "repeated_pieces": len(repeated(pieces)),
        "repeated_piece_characters": sum(map(len, repeated(pieces))),
        "paragraphs": len(paragraphs),
        "repeated_paragraphs": len(repeated(paragraphs)),
        "repeated_paragraph_characters": sum(map(len, repeated(paragraphs))),
    }
    found |= {f"top_{n}_gram": top_gram(words, n) for n in range(2, 5)}
    found |= {f"repeated_{n}_grams": repeated_grams(words, n) for n in range(5, 11)}
    return found | kept_lines(text, thresholds)[0]
