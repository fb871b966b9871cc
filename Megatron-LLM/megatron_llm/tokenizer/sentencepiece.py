"""A SentencePiece tokenizer.model with the ids of Megatron's SentencePieceTokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_llm.tokenizer.base import SPACE, Tokenizer
from run_contract.errors import UserError


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer made from a SentencePiece model, tokenizer.model."""

    reference = "sentencepiece"

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(texts, num_threads=1)
        return ids

    def _open(self) -> dict[str, int]:
        self._processor = load_model(self.content, self.vocab_file)
        self.model = sentencepiece_model_pb2.ModelProto()
        self.model.ParseFromString(self.content)
        self.uncut = self._why_uncut()
        self.unknown_id = self._processor.unk_id()
        return {piece.piece: i for i, piece in enumerate(self.model.pieces)}

    def plain_pieces(self) -> list[str]:
        return [piece.piece.replace(SPACE, " ") for piece in self.pieces("NORMAL")]

    def pieces(self, *kinds: str) -> list[Any]:
        """The pieces of some kinds: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE."""
        wanted = {self.model.SentencePiece.Type.Value(kind) for kind in kinds}
        return [piece for piece in self.model.pieces if piece.type in wanted]

    def _why_uncut(self) -> str | None:
        rules, trained = self.model.normalizer_spec, self.model.trainer_spec
        inner = re.compile(f"[^ {SPACE}][ {SPACE}]")
        joined = [p.piece for p in self.pieces("NORMAL", "USER_DEFINED", "UNUSED") if inner.search(p.piece)]
        if trained.model_type != trained.BPE:
            return "the model is not BPE"
        if rules.precompiled_charsmap or rules.remove_extra_whitespaces or not rules.escape_whitespaces:
            return "the model normalises text"
        if trained.treat_whitespace_as_suffix:
            return "the model puts spaces at the end of words"
        if not trained.byte_fallback:
            return "the model has no byte fallback"
        return f"its piece {joined[0]!r} has a space inside" if joined else None

    def _adds_space(self) -> bool:
        return bool(self.model.normalizer_spec.add_dummy_prefix)

    def _sentence_tokens(self) -> list[str]:
        model = self._processor
        named = [(model.pad_id(), "<PAD>"), (model.bos_id(), "<BOS>"), (model.eos_id(), "<EOS>")]
        return [name if i < 0 else model.id_to_piece(i) for i, name in named]

    def _hide_from_text(self, special: list[str]) -> None:
        """Turn special tokens from user-defined symbols, which are always matched in text, into control symbols.

        Control symbols are never matched.
        """
        changed = [piece for piece in self.pieces("USER_DEFINED") if piece.piece in special]
        for piece in changed:
            piece.type = piece.CONTROL
        if changed:
            self._processor = load_model(self.model.SerializeToString(), self.vocab_file)

    def _matched(self) -> list[str]:
        pieces = [piece.piece for piece in self.pieces("CONTROL", "UNKNOWN", "USER_DEFINED")]
        return [*pieces, *(piece.replace(SPACE, " ") for piece in pieces)]


def load_model(model: bytes, vocab_file: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece processor. Raises UserError when the bytes are not a model."""
    try:
        if model:
            return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        pass  # the same message as for an empty file
    raise UserError(
        f"--vocab_file {vocab_file} is not a SentencePiece model ({len(model)} bytes, starting {model[:16]!r}); "
        "give the tokenizer.model of the base model, or --tokenizer_type HuggingFaceTokenizer for a tokenizer.json"
    )
