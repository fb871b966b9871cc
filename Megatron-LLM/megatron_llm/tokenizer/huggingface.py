"""A Hugging Face tokenizer.json as a tokenizer for Megatron: --tokenizer_type HuggingFaceTokenizer.

The names of its beginning, end and padding tokens are read from the tokenizer_config.json beside it. Special added
tokens are plain text in documents; other added tokens are ordinary vocabulary and are matched, as in Hugging Face's
library.
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads that call the library do the work

from tokenizers import Tokenizer as Backend

from megatron_llm.tokenizer.base import SPACE, Tokenizer
from run_contract.errors import UserError


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, with the names of its sentence tokens taken from the tokenizer_config.json beside it."""

    reference = "tokenizers"

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def plain_pieces(self) -> list[str]:
        return self._backend.decode_batch([[i] for i in range(self._backend.get_vocab_size())])

    def _open(self) -> dict[str, int]:
        try:
            self.settings = json.loads(self.content)
            self._load(self.content)
            model = self.settings["model"]
            self.added: list[dict[str, Any]] = self.settings.get("added_tokens") or []
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"--vocab_file {self.vocab_file} is not a Hugging Face tokenizer.json ({error}); give the base "
                "model's, or --tokenizer_type SentencePieceTokenizer for a tokenizer.model"
            ) from error
        if model.get("dropout"):
            raise UserError(
                f"{self.vocab_file} has dropout {model['dropout']}, so its ids would be random; set it to null"
            )
        ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.uncut = "a tokenizer.json may join text across any border"
        self.unknown_id = ids.get(model.get("unk_token") or "")
        return ids

    def _load(self, content: bytes) -> None:
        self._backend = Backend.from_buffer(content)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # special tokens in a text are encoded as text

    def _sentence_tokens(self) -> list[str]:
        path = self.vocab_file.with_name("tokenizer_config.json")
        try:
            config = json.loads(path.read_bytes()) if path.is_file() else {}
            named = [config.get(f"{kind}_token") for kind in ("pad", "bos", "eos")]
            names = [token["content"] if isinstance(token, dict) else token for token in named]
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a tokenizer's configuration ({error}); give the base model's") from error
        return [name or default for name, default in zip(names, ("<PAD>", "<BOS>", "<EOS>"), strict=True)]

    def _hide_from_text(self, special: list[str]) -> None:
        hidden = [token for token in self.added if token["content"] in special and not token["special"]]
        for token in hidden:
            token["special"] = True
        if hidden:
            self._load(json.dumps(self.settings).encode())

    def _matched(self) -> list[str]:
        contents = [token["content"] for token in self.added]
        return [*contents, *(content.replace(SPACE, " ") for content in contents)]

    def other_normalisers(self, *known: str) -> list[str]:
        """The kinds of its normalisation steps that change more than spaces and are not among the known kinds."""
        steps, found = [self.settings.get("normalizer") or {"type": "Sequence", "normalizers": []}], []
        while steps:
            step = steps.pop(0)
            steps += step.get("normalizers", [])
            spaces = step["type"] == "Replace" and step["pattern"] == {"String": " "}
            if step["type"] not in ("Sequence", "Prepend", *known) and not spaces:
                found.append(step["type"])
        return found

    def _no_end(self) -> str:
        return f"an eos_token that {self.vocab_file.with_name('tokenizer_config.json')} names"

    def _more_options(self) -> list[str]:
        return self._sentence_tokens()
