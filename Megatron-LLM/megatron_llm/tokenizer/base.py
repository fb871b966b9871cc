"""The base class of tokenizers: Megatron's special tokens, raw text that stays text, and cuts in long documents.

Raw text is always plain text: `<s>`, `</s>`, `<unk>` or `<EOD>` written in a document never become control ids. Only
the tokens that --vocab_extra_ids_list names are matched in text.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import xxhash

from run_contract.errors import InputsMissing, UserError

NEW_TOKENS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
"""Tokens that are added, in this order, to a vocabulary that lacks them; then padding, beginning and end of
sentence."""
SPACE = "\u2581"
"""The character that SentencePiece writes for a space."""
LONG = 1 << 20
"""Number of characters above which a text is cut, so that memory does not grow with its length."""
BORDER = re.compile(f"(?<=[^ {SPACE}]) (?=.)", re.DOTALL)
"""A place to cut: a space after another character, with more text behind it."""
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer(ABC):
    """A vocabulary with Megatron's special tokens; subclasses implement the encoding of plain text.

    Tokens of `extra` are matched in text, the leftmost first, and the text between them is encoded piece by piece.
    """

    reference: str
    """The library that defines the ids."""
    vocab_size: int
    """Size of the true vocabulary with the added tokens, without padding."""
    new_ids: dict[str, int]
    """Tokens that the file lacks -> the ids given to them, in ascending order."""
    eod: int
    bos: int | None
    fingerprint: str
    """A digest that is equal for two tokenizers that give the same ids."""
    matched: frozenset[str]
    """All strings that some library would match in raw text as one token: control pieces, symbols, extra tokens."""
    extra: re.Pattern[str] | None
    fallback_ids: frozenset[int]
    """Ids of single bytes, which stand for text that no piece of the vocabulary covers."""
    unknown_id: int | None
    uncut: str | None
    """The reason why long texts cannot be cut; None if they can."""

    def __init__(self, vocab_file: Path, *, new_tokens: bool, extra: Sequence[str]) -> None:
        self.vocab_file, self.content = vocab_file, read_file(vocab_file)
        self._ids = self._open()
        first_new = max(self._ids.values()) + 1
        special = [*NEW_TOKENS, *self._sentence_tokens()]
        for token in [*special, *extra]:
            if new_tokens:
                self._ids.setdefault(token, max(self._ids.values()) + 1)
            elif token in extra and token not in self._ids:
                raise UserError(
                    f"--vocab_extra_ids_list names {token!r}, which {vocab_file} lacks, and --no_new_tokens forbids "
                    "adding it; leave out one of the two"
                )
        eod = self._ids.get("<EOD>", self._ids.get(special[-1]))
        if eod is None:
            raise UserError(
                f"{vocab_file} has neither <EOD> nor {self._no_end()} to end documents with; leave out "
                "--no_new_tokens, so that <EOD> is added"
            )
        self.eod, self.bos = eod, self._ids.get(special[-2])
        self.vocab_size = max(self._ids.values()) + 1
        self.new_ids = {token: number for token, number in self._ids.items() if number >= first_new}
        self.extra = re.compile("|".join(map(re.escape, extra))) if extra else None
        hidden = [token for token in special if token not in extra]
        self._hide_from_text(hidden)
        for token in hidden:
            if token in self._ids and self._ids[token] in self.encode_plain([token])[0]:
                raise UserError(f"{vocab_file}: {token!r} is an ordinary piece, so raw text could forge it; {REMEDY}")
        self.matched = frozenset([*self._matched(), *extra])
        self.fallback_ids = frozenset(i for piece, i in self._ids.items() if BYTE_PIECE.fullmatch(piece))
        options = json.dumps([type(self).__name__, new_tokens, list(extra), *self._more_options()])
        self.fingerprint = xxhash.xxh3_128(self.content + options.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without BOS or EOD."""
        ids: list[int] = []
        start = 0
        for match in self.extra.finditer(text) if self.extra else ():
            ids += [*self._long(text[start : match.start()]), self._ids[match.group()]]
            start = match.end()
        return ids + self._long(text[start:])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, computed on the calling thread alone."""
        if self.extra or any(len(text) > LONG for text in texts):
            return [self.encode(text) for text in texts]
        return self.encode_plain(texts)

    def cut(self, text: str) -> list[str]:
        """Cut a text longer than LONG into parts whose joined ids are those of the whole text; other texts stay whole.

        A cut is made before a space that follows a non-space. No piece of the vocabulary contains such a pair, so
        nothing merges across the border. If the tokenizer adds a dummy prefix, the space itself is dropped, because the
        prefix of the next part stands for it.
        """
        parts, start = [], 0
        while not self.uncut and (border := BORDER.search(text, start + LONG)):
            parts.append(text[start : border.start()])
            start = border.end() if self._adds_space() else border.start()
        return [*parts, text[start:]]

    def _long(self, text: str) -> list[int]:
        return [token for part in self.cut(text) for token in self.encode_plain([part])[0]]

    @abstractmethod
    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts in which no token is matched, computed on the calling thread alone."""

    @abstractmethod
    def plain_pieces(self) -> list[str]:
        """The texts of the vocabulary's ordinary pieces."""

    @abstractmethod
    def _open(self) -> dict[str, int]:
        """Open the file's `content` and return the id of each piece. Sets `uncut` and `unknown_id`."""

    @abstractmethod
    def _sentence_tokens(self) -> list[str]:
        """The tokens for padding, beginning and end of sentence, or the names that they get if the model has none."""

    @abstractmethod
    def _hide_from_text(self, special: list[str]) -> None:
        """Keep special tokens from being matched in raw text."""

    @abstractmethod
    def _matched(self) -> list[str]:
        """The texts of control pieces and symbols."""

    def _adds_space(self) -> bool:
        return False

    def _no_end(self) -> str:
        return "an end-of-sentence piece"

    def _more_options(self) -> list[str]:
        return []


REMEDY = "train the tokenizer with it as a control symbol, or name it in --vocab_extra_ids_list if text may contain it"


def read_file(vocab_file: Path) -> bytes:
    """The bytes of a vocabulary file."""
    try:
        return vocab_file.read_bytes()
    except OSError as error:
        raise InputsMissing(
            f"--vocab_file {vocab_file} cannot be read: {error.strerror}; give a readable file"
        ) from error
