"""Tokenizers: SentencePiece and tokenizer.json, the fast path, and their export."""
