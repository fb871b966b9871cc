"""Finds by trial, for every character, whether gigatoken gives the same ids as a tokenizer's own library.

The candidates are the assigned characters of Unicode's first plane, the mathematical letters and the emoji. Both
libraries encode each candidate alone and between letters, digits, spaces, line ends and punctuation, and also each pair
that normalisation composes. Characters whose ids differ anywhere are left out. Two kinds of characters are never
candidates: marks with a combining class, because normalisation reorders them, and characters that the Unicode version
of one of the libraries may not know. Finally the two libraries must agree on awkward text, on every piece of the
vocabulary and on random strings of the remaining characters.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator

import tokenizers

from megatron_llm.tokenizer.base import SPACE, Tokenizer
from megatron_llm.tokenizer.characters import Characters
from megatron_llm.tokenizer.gigatoken import Differs, Fast, texts_of

PLANES = 0x20000
"""The end of the two planes in which normalisation may compose a pair of candidates to one character."""
BLOCKS = ((0x0, 0x10000), (0x1D400, 0x1D800), (0x1F000, 0x1FB00))
"""Ranges of the candidates: the first plane, mathematical letters, and emoji.

Other characters are too rare to be worth the comparison.
"""
CONTEXTS = (" {}'s", "{}123", "\ta{}b", "!{}", "'{}", "{}\n{} ")
"""The contexts of a character. They are joined to one text unless that contains a string that is matched as a token."""
SYLLABLES = (0xAC00, 0xD7A4)
"""Korean syllables, which Unicode composes by a rule and not by a table."""
PROBES = (
    "Rødgrød med fløde, æblekage og en kop kaffe.",
    "  to mellemrum  foran,   tre inde i, og to bagefter  ",
    " \t fane\tog\nlinjeskift\r\n\n\n",
    "år 1999: 3,14 kr. / 50 % – «citat» “quote” … <0x0A> <0xFF> <|x|> [INST]",
    "smil 😀 👩‍👩‍👧 🇩🇰 ☕ 日本語 العربية Ελληνικά русский",
    "e\u0301 e\u0301\u0300 \ufeff\u00a0\u3000\u200b ﬁ ½ ①",
    "\x00\x01\x1f\x7f\u0085\u2028 \U000e0001 \ufffd \ue000 \U0010ffff \u0378",
    f"{SPACE} {SPACE}a{SPACE}{SPACE} b {SPACE}",
    "it's I'LL we've 12345678 x=1;\n\n  if (a) {\r\n\t}",
    "",
    " ",
    "\n",
)
ALPHABETS = ("abcdeæøåé", "   ", SPACE, "\t\n\r\x00\x1b\x7f", "0123456789", ".,:;!?'\"()<>/|_-", "日本語漢字", "😀👩‍🇩🇰",
             "\u0301\u200b\u00a0\u2028\ufeff", "\u0378\ue000\U000e0001\U0010ffff", "ßŁğжΩשع")  # fmt: skip


def establish(fast: Fast) -> Characters:
    """The characters on which a tokenizer's two libraries agree.

    Raises Differs if more than single characters differ.
    """
    agreed = candidates(fast.tokenizer)
    agreed = without(differing(fast, [(c, c) for c in agreed]), agreed)
    agreed = without(differing(fast, list(in_context(fast, agreed))), agreed)
    left = set(agreed)
    pairs = [pair for pair in composed() if left.issuperset(pair)]
    agreed = without(differing(fast, [(pair, f"a{pair}b") for pair in pairs]), agreed)
    characters = Characters(map(ord, agreed))
    whole = [*PROBES, *vocabulary_lines(fast.tokenizer), *random_texts(2000)]
    texts = [characters.keep(text) for text in whole]
    if numbers := fast.differing(texts):
        raise Differs(fast.tokenizer.reference, texts[numbers[0]], len(numbers))
    return characters


def candidates(tokenizer: Tokenizer) -> list[str]:
    """The characters on which the two libraries may agree: assigned ones that normalisation does not reorder."""
    every = [chr(point) for start, end in BLOCKS for point in range(start, end)]
    known = [c for c in every if unicodedata.category(c) not in ("Cn", "Co", "Cs") and not reordered(c)]
    if tokenizer.reference != "tokenizers":
        return known
    unassigned = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{Cn}"), "removed")
    return list("".join(part for part, _ in unassigned.pre_tokenize_str("".join(known))))


def reordered(character: str) -> bool:
    """Whether normalisation may move a mark before this character or, if it is a mark, move it before another one."""
    return unicodedata.combining(unicodedata.normalize("NFD", character)[0]) > 0


def in_context(fast: Fast, characters: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each character with a text of all contexts, or with one text per context if the joined text is refused.

    A text is refused if it contains a string that is matched as a token.
    """
    joined = ["".join(CONTEXTS).replace("{}", character) for character in characters]
    for character, text, refused in zip(characters, joined, fast.refuses(texts_of(joined)), strict=True):
        yield from [(character, one.replace("{}", character)) for one in CONTEXTS] if refused else [(character, text)]


def differing(fast: Fast, cases: list[tuple[str, str]]) -> set[str]:
    """The characters of those cases, each (characters, text), whose text gets different ids from the two libraries."""
    return {c for number in fast.differing([text for _, text in cases]) for c in cases[number][0]}


def without(left_out: set[str], characters: list[str]) -> list[str]:
    """The characters that are not left out."""
    return [character for character in characters if character not in left_out]


def composed() -> Iterator[str]:
    """Yield every sequence that canonical normalisation composes to one character."""
    for point in range(PLANES):
        parts = unicodedata.decomposition(chr(point)).split()
        if parts and not parts[0].startswith("<"):
            yield "".join(chr(int(part, 16)) for part in parts)
    for point in range(*SYLLABLES):
        yield unicodedata.normalize("NFD", chr(point))


def vocabulary_lines(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield every ordinary piece of the vocabulary, 16 per line."""
    pieces = tokenizer.plain_pieces()
    for start in range(0, len(pieces), 16):
        yield "".join(pieces[start : start + 16])


def random_texts(count: int) -> Iterator[str]:
    """Yield short random strings of letters, controls, emoji, CJK, unassigned code points and runs of spaces.

    The strings are the same at every call.
    """
    source = random.Random(0)
    for _ in range(count):
        alphabet = "".join(source.choices(ALPHABETS, k=3))
        text = "".join(source.choices(alphabet, k=source.randrange(1, 40)))
        yield text if source.random() < 0.7 else unicodedata.normalize("NFD", text)
