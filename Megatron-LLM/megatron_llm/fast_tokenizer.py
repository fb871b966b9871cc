"""gigatoken as a fast stand-in for a tokenizer's own library, used only while it agrees with it.

`open_fast` refuses tokenizers whose rules it is not known to follow and compares the ids on awkward text, on every
piece of the vocabulary and on random strings; `Fast.check` compares them on samples of the documents.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_llm.documents import offsets
from megatron_llm.json_tokenizer import HuggingFaceTokenizer
from megatron_llm.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_llm.vocabulary import SPACE, Tokenizer

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


class Unfit(Exception):
    """Why gigatoken is not used, a clause for messages."""


class Fast:
    """gigatoken with a tokenizer's vocabulary. Not for texts that hold one of the tokenizer's `matched` strings."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises Unfit."""
        self._tokenizer = tokenizer
        with unfit(f"it does not take {tokenizer.vocab_file.name}"):
            self._backend = load(tokenizer)

    def __call__(self, texts: Any) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Ids back to back (uint32), and how many of them each text of a large_string array (n,) has (int64).

        Raises Unfit.
        """
        with unfit("it failed"):
            layout = self._backend.encode_batch(borrowed(texts), parallel=False).layout
        ends = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[ends[0] : ends[-1]], np.diff(ends)

    def check(self, texts: Iterable[str]) -> None:
        """Raise Unfit unless both encoders give the same ids for the texts."""
        matched = re.compile("|".join(map(re.escape, self._tokenizer.matched)) or "(?!)")
        plain = [text for text in texts if not matched.search(text)]
        expected = self._tokenizer.encode_plain(plain)
        ids, sizes = self(pa.array(plain, pa.large_string()))
        borders = np.cumsum(sizes)[:-1]
        for text, wanted, found in zip(plain, expected, np.split(ids, borders), strict=True):
            if found.tolist() != wanted:
                raise Unfit(f"its ids differ from {self._tokenizer.reference}'s on {text[:60]!r}")


@contextmanager
def unfit(what: str) -> Iterator[None]:
    """Turn whatever gigatoken raises into Unfit; a panic in Rust is no Exception."""
    try:
        yield
    except (Unfit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        said = str(error).strip() or repr(error)
        raise Unfit(f"{what}: {said.splitlines()[0]}") from error


def load(tokenizer: Tokenizer) -> Any:
    """gigatoken's tokenizer with the same vocabulary."""
    import gigatoken

    if isinstance(tokenizer, SentencePieceTokenizer):
        check_rules(tokenizer)
        return gigatoken.Tokenizer.from_sentencepiece(tokenizer.model.SerializeToString())
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    if not tokenizer.keeps_text() and any(token["normalized"] for token in tokenizer.added):
        raise Unfit("its added tokens are looked for in normalised text")
    around = {"post_processor": None, "truncation": None, "padding": None}
    return gigatoken.Tokenizer.from_json(json.dumps({**tokenizer.settings, **around}))


def open_fast(tokenizer: Tokenizer) -> Fast:
    """The fast encoder, after its self-test. Raises Unfit."""
    fast = Fast(tokenizer)
    fast.check([*PROBES, *vocabulary_lines(tokenizer), *random_texts(2000)])
    return fast


def check_rules(tokenizer: SentencePieceTokenizer) -> None:
    """Raise Unfit for rules of SentencePiece that a list of merges cannot express."""
    if tokenizer.pieces("UNUSED"):
        raise Unfit("the model has unused pieces")
    scores = [piece.score for piece in tokenizer.pieces("NORMAL") if len(piece.piece) > 1]
    if len(set(scores)) < len(scores):
        raise Unfit("pieces of the model share a score, so that their order of merging is the text's")


def borrowed(texts: Any) -> Any:
    """A large_string array as an awkward array over the same memory."""
    import awkward

    data = texts.buffers()[2]
    characters = awkward.contents.NumpyArray(
        np.frombuffer(data, dtype=np.uint8) if data else np.empty(0, dtype=np.uint8), parameters={"__array__": "char"}
    )
    index = awkward.index.Index64(offsets(texts))
    return awkward.Array(awkward.contents.ListOffsetArray(index, characters, parameters={"__array__": "string"}))


def vocabulary_lines(tokenizer: Tokenizer) -> Iterator[str]:
    """Every ordinary piece of the vocabulary, 16 a line."""
    pieces = tokenizer.plain_pieces()
    for start in range(0, len(pieces), 16):
        yield "".join(pieces[start : start + 16])


def random_texts(count: int) -> Iterator[str]:
    """Short strings of letters, controls, emoji, CJK, unassigned code points and runs of spaces; always the same."""
    source = random.Random(0)
    for _ in range(count):
        alphabet = "".join(source.choices(ALPHABETS, k=3))
        text = "".join(source.choices(alphabet, k=source.randrange(1, 40)))
        yield text if source.random() < 0.7 else unicodedata.normalize("NFD", text)
