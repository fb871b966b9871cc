"""Checks whether the tokenizer of a Hugging Face folder gives the ids of the library that defines the tokenizer.

There are two known differences. The literal text of a control piece (`<s>`, `</s>`, `<unk>`) or of a user-defined
symbol is matched as that token by Hugging Face, while it is plain text to sentencepiece. And Transformers 5's
`LlamaTokenizer` builds itself anew, whatever tokenizer.json says, and leaves out the dummy prefix of a text that begins
with a space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llm.tokenizer.files import SPACE, file_of, model_proto, read_json, read_sentencepiece

PROBES = (
    "Rødgrød med fløde, æblekage og en kop kaffe.",
    "  to mellemrum  foran,   tre inde i, og to bagefter  ",
    " \t fane\tog\nlinjeskift\r\n",
    "år 1999: 3,14 kr. / 50 % – «citat» “quote” …",
    "smil 😀 👩‍👩‍👧 🇩🇰 ☕",
    "日本語 العربية Ελληνικά русский",
    "e\u0301 e\u0301\u0300 \ufeff\u00a0\u3000\u200b ﬁ ½",
    "\x01\x1f\x7f\u0085\u2028 \U000e0001",
    "",
    " ",
)
"""Texts on which the two tokenizers are compared, besides the vocabulary itself."""
SHOWN = 10
"""Number of pieces that a message names at most."""
Encode = Callable[[str], list[int]]


def probes(vocab_file: Path) -> Iterator[str]:
    """Yield awkward texts, then every plain piece of the vocabulary, 16 per line.

    A line that contains the text of a control piece or symbol is left out.
    """
    yield from PROBES
    pieces = model_proto(vocab_file).pieces
    kinds = type(pieces[0])
    plain = [piece.piece.replace(SPACE, " ") for piece in pieces if piece.type == kinds.NORMAL]
    matched = [piece.piece for piece in pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)]
    for start in range(0, len(plain), 16):
        line = "".join(plain[start : start + 16])
        if not any(text in line for text in matched):
            yield line


def difference(folder: Path, vocab_file: Path) -> str | None:
    """The first difference on the probes between AutoTokenizer, loaded from `folder`, and sentencepiece; or None.

    The ids of sentencepiece are preceded by its <s>.
    """
    from transformers import AutoTokenizer

    processor, loaded = read_sentencepiece(vocab_file), AutoTokenizer.from_pretrained(str(folder))
    start = [processor.bos_id()] if processor.bos_id() >= 0 else []
    for text in probes(vocab_file):
        expected, found = start + processor.encode(text), loaded(text, verbose=False)["input_ids"]
        if expected != found:
            return f"on {text[:60]!r}: sentencepiece {expected[:12]}, Hugging Face {found[:12]}"
    return None


@dataclass(frozen=True)
class TextComparison:
    """The comparison of the ids of a folder's tokenizer with those of sentencepiece over real texts."""

    texts: int
    tokens: int
    control_text: int
    """Number of texts with the literal text of a control piece, the known difference; their ids are not compared."""
    first_difference: str | None
    """The beginning of the first text whose ids differ."""
    tokenizer_class: str
    """The class that AutoTokenizer has loaded."""
    known_differences: list[str]
    """Known differences elsewhere."""


def compare_texts(folder: Path, vocab_file: Path, texts: Iterable[str]) -> TextComparison:
    """Compare AutoTokenizer, loaded from `folder`, with the library of `vocab_file` on the given texts."""
    from transformers import AutoTokenizer

    vocab_file = file_of(vocab_file)
    encode, matched = _plain_encoder(vocab_file)
    loaded = AutoTokenizer.from_pretrained(str(folder))
    count = tokens = control = 0
    first = None
    for text in texts:
        count += 1
        if any(piece in text for piece in matched):
            control += 1
            continue
        expected = encode(text)
        tokens += len(expected)
        if first is None and _ids(loaded, text) != expected:
            first = text[:80]
    known = _known_differences(folder, vocab_file, matched)
    return TextComparison(count, tokens, control, first, type(loaded).__name__, known)


def _ids(loaded: Any, text: str) -> list[int]:
    ids: list[int] = loaded(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _known_differences(folder: Path, vocab_file: Path, matched: list[str]) -> list[str]:
    """The known differences: pieces that Hugging Face matches in text, and texts on which `LlamaTokenizer` differs.

    The latter are found by trial.
    """
    shown = " ".join(matched[:SHOWN]) + (f" … ({len(matched)} in all)" if len(matched) > SHOWN else "")
    known = [f"in a document, the text of these pieces becomes the piece itself: {shown}"] if matched else []
    if vocab_file.suffix == ".json":
        return known
    from transformers import LlamaTokenizer

    encode, loaded = read_sentencepiece(vocab_file).encode, LlamaTokenizer.from_pretrained(str(folder))
    differing = [text for text in PROBES if _ids(loaded, text) != encode(text)]
    return known + [
        f"loaded by LlamaTokenizer instead of AutoTokenizer, {text!r} has different ids" for text in differing
    ]


def _plain_encoder(vocab_file: Path) -> tuple[Encode, list[str]]:
    """The function that gives the ids of a text, and the pieces whose literal text it may treat differently."""
    if vocab_file.suffix == ".json":
        tokenizer = read_json(vocab_file)
        tokenizer.no_truncation()
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), added
    pieces = model_proto(vocab_file).pieces
    plain = (type(pieces[0]).NORMAL, type(pieces[0]).BYTE)
    return read_sentencepiece(vocab_file).encode, [piece.piece for piece in pieces if piece.type not in plain]
