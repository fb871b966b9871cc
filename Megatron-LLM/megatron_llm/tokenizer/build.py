"""Builds the tokenizer of --tokenizer_type and --vocab_file."""

from __future__ import annotations

from pathlib import Path

from megatron_llm.tokenizer.base import Tokenizer
from megatron_llm.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_llm.tokenizer.sentencepiece import SentencePieceTokenizer
from run_contract.errors import UserError

TYPES: dict[str, type[Tokenizer]] = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
}


def build(
    tokenizer_type: str,
    vocab_file: Path | str,
    *,
    no_new_tokens: bool = False,
    vocab_extra_ids: int = 0,
    vocab_extra_ids_list: str | None = None,
) -> Tokenizer:
    """Build the tokenizer.

    Raises UserError for an unknown type or an unusable file, InputsMissing for a missing file.
    """
    if tokenizer_type not in TYPES:
        raise UserError(f"--tokenizer_type {tokenizer_type} is unknown; valid: {', '.join(TYPES)}")
    numbered = [f"<extra_id_{number}>" for number in range(vocab_extra_ids)]
    extra = [*numbered, *(token for token in (vocab_extra_ids_list or "").split(",") if token)]
    return TYPES[tokenizer_type](Path(vocab_file), new_tokens=not no_new_tokens, extra=extra)
