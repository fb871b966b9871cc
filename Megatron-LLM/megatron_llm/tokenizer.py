"""Text -> token ids, with the ids that Megatron's tokenizer of the same name gives.

Raw text is always plain text: `<s>`, `</s>`, `<unk>` or `<EOD>` written in a document never become control ids. Only
the tokens that --vocab_extra_ids_list names are matched in text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import xxhash

from megatron_llm.files import InputsMissing, UserError

NEW_TOKENS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
"""Added, in this order, to a vocabulary that lacks them; then padding, beginning and end of sentence."""


class Tokenizer(Protocol):
    """What preprocessing and training use of a tokenizer."""

    vocab_size: int
    """True vocabulary with the added tokens, unpadded."""
    eod: int
    bos: int | None
    fingerprint: str
    """Equal for two tokenizers that give the same ids."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


def build(
    tokenizer_type: str, vocab_file: Path | str, *, no_new_tokens: bool = False, vocab_extra_ids_list: str | None = None
) -> Tokenizer:
    """The tokenizer of --tokenizer_type; UserError for an unknown type or an unusable file, InputsMissing for none."""
    types = {"SentencePieceTokenizer": SentencePieceTokenizer}
    if tokenizer_type not in types:
        raise UserError(f"--tokenizer_type {tokenizer_type} is unknown; valid: {', '.join(types)}")
    extra = [token for token in (vocab_extra_ids_list or "").split(",") if token]
    return types[tokenizer_type](Path(vocab_file), new_tokens=not no_new_tokens, extra=extra)


class SentencePieceTokenizer:
    """A SentencePiece model with Megatron's special tokens.

    `extra` tokens are matched in text, the leftmost first, and the text between them is encoded piece by piece.
    """

    def __init__(self, vocab_file: Path, *, new_tokens: bool, extra: Sequence[str]) -> None:
        model = read_model(vocab_file)
        self._processor = load_model(model, vocab_file)
        self._ids = {self._processor.id_to_piece(i): i for i in range(len(self._processor))}
        special = [*NEW_TOKENS, *self._sentence_tokens()]
        for token in [*special, *extra]:
            if new_tokens:
                self._ids.setdefault(token, len(self._ids))
            elif token in extra and token not in self._ids:
                raise UserError(
                    f"--vocab_extra_ids_list names {token!r}, which {vocab_file} lacks, and --no_new_tokens forbids "
                    "adding it; leave out one of the two"
                )
        eod = self._ids.get("<EOD>", self._ids.get(special[-1]))
        if eod is None:
            raise UserError(f"{vocab_file} has neither <EOD> nor an end-of-sentence piece; leave out --no_new_tokens")
        self.eod: int = eod
        self.bos: int | None = self._ids.get(special[-2])
        self.vocab_size = len(self._ids)
        self._extra = re.compile("|".join(map(re.escape, extra))) if extra else None
        self._hide_from_text([token for token in special if token not in extra], vocab_file)
        options = json.dumps(["SentencePieceTokenizer", new_tokens, list(extra)])
        self.fingerprint = xxhash.xxh3_128(model + options.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without BOS or EOD."""
        if self._extra is None:
            return self._plain(text)
        ids, start = [], 0
        for match in self._extra.finditer(text):
            ids += [*self._plain(text[start : match.start()]), self._ids[match.group()]]
            start = match.end()
        return ids + self._plain(text[start:])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on the calling thread alone."""
        if self._extra is not None:
            return [self.encode(text) for text in texts]
        batch: list[list[int]] = self._processor.encode(texts, num_threads=1)
        return batch

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def _sentence_tokens(self) -> list[str]:
        """The model's own padding, beginning and end of sentence, or the names they get when it has none."""
        model = self._processor
        named = [(model.pad_id(), "<PAD>"), (model.bos_id(), "<BOS>"), (model.eos_id(), "<EOS>")]
        return [name if i < 0 else model.id_to_piece(i) for i, name in named]

    def _hide_from_text(self, special: list[str], vocab_file: Path) -> None:
        """Keep special tokens from being matched in raw text; a user-defined symbol would be."""
        stored = self._processor.serialized_model_proto()
        hidden = as_control(stored, special)
        if hidden != stored:
            self._processor = load_model(hidden, vocab_file)
        for token in special:
            if token in self._ids and self._ids[token] in self._plain(token):
                raise UserError(
                    f"{vocab_file}: {token!r} is an ordinary piece, so raw text could forge it; train the model with "
                    f"--control_symbols={token}, or name it in --vocab_extra_ids_list if text may contain it"
                )


def read_model(vocab_file: Path) -> bytes:
    """The bytes of a vocabulary file."""
    try:
        return vocab_file.read_bytes()
    except OSError as error:
        raise InputsMissing(f"--vocab_file {vocab_file} cannot be read: {error.strerror}") from error


def load_model(model: bytes, vocab_file: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece processor; UserError when the bytes are no model."""
    try:
        if model:
            return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        pass  # the same message as for an empty file
    raise UserError(
        f"--vocab_file {vocab_file} is not a SentencePiece model ({len(model)} bytes, starting {model[:16]!r}); "
        "give the tokenizer.model of the base model"
    )


def as_control(model: bytes, pieces: list[str]) -> bytes:
    """A serialised model in which user-defined `pieces` are control symbols: same ids, but never matched in text.

    A piece is stored as field 1 (the string), field 2 (score, 4 bytes) and field 3 (type: 4 user-defined, 3 control).
    """
    for piece in pieces:
        name = piece.encode()
        stored = re.escape(b"\x0a" + bytes([len(name)]) + name + b"\x15")
        model = re.sub(b"(" + stored + rb".{4}\x18)\x04", b"\\1\x03", model, flags=re.DOTALL)
    return model
