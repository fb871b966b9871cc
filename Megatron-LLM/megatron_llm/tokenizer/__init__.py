"""Tokenizers: SentencePiece models and tokenizer.json, the fast path, and the export of tokenizers."""
