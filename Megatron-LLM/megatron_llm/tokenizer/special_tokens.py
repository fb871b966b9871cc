"""Changes to an exported tokenizer: new tokens with their ids, and tokens that take another special role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from megatron_llm.tokenizer import build as tokenizer
from megatron_llm.tokenizer.files import file_of, read_json, read_sentencepiece, sentence_ids
from run_contract.errors import UserError

ROLES = ("bos", "cls", "eos", "mask", "pad", "sep", "unk")
"""The roles that --override_special_tokens can give to another token."""


@dataclass(frozen=True)
class SpecialTokens:
    """The changes to a tokenizer that is exported."""

    added: dict[str, int] = field(default_factory=dict)
    """New tokens -> the ids that they must get."""
    roles: dict[str, str] = field(default_factory=dict)
    """Role, such as `eos_token` -> the token that takes it."""

    @classmethod
    def of(cls, vocab_file: Path, extra: str | None, overrides: Sequence[str], vocab_size: int) -> SpecialTokens:
        """The changes of --vocab_extra_ids_list and --override_special_tokens.

        Raises UserError when the model lacks the ids.
        """
        roles = dict(_role(override) for override in overrides)
        if not extra:
            return cls({}, roles)
        path = file_of(vocab_file)
        kind = "HuggingFaceTokenizer" if path.suffix == ".json" else "SentencePieceTokenizer"
        added = tokenizer.build(kind, path, vocab_extra_ids_list=extra).new_ids
        if (size := max(added.values(), default=-1) + 1) > vocab_size:
            raise UserError(
                f"--vocab_extra_ids_list {extra}: with {', '.join(added)} there are {size} tokens, and in the model "
                f"only {vocab_size}; give the list that the data were tokenised with"
            )
        return cls(added, roles)

    def __bool__(self) -> bool:
        return bool(self.added or self.roles)

    def add_to(self, backend: Tokenizer) -> None:
        """Add the new tokens. Raises UserError when they get different ids, or when the token of a role is missing."""
        backend.add_special_tokens(list(self.added))
        for token, number in self.added.items():
            if backend.token_to_id(token) != number:
                raise UserError(
                    f"{token!r} gets the id {backend.token_to_id(token)} in the export, not {number}; this tokenizer's "
                    "settings are not supported"
                )
        for role, token in self.roles.items():
            if backend.token_to_id(token) is None:
                raise UserError(
                    f"--override_special_tokens {role.removesuffix('_token')}={token}: the tokenizer has no such "
                    "token; name one that it has, or add it with --vocab_extra_ids_list"
                )

    def sentence_ids(self, vocab_file: Path) -> tuple[int | None, int | None]:
        """The ids of the beginning and the end of a sentence, after the changes."""
        path = file_of(vocab_file)
        bos, eos = (
            self._id(path, self.roles[role]) if role in self.roles else number
            for role, number in zip(("bos_token", "eos_token"), sentence_ids(path), strict=True)
        )
        return bos, eos

    def _id(self, path: Path, token: str) -> int | None:
        """The id of a token; None if there is no such token, which `add_to` refuses."""
        if token in self.added:
            return self.added[token]
        find = read_json(path).token_to_id if path.suffix == ".json" else read_sentencepiece(path).piece_to_id
        return int(number) if (number := find(token)) is not None else None

    def check(self, folder: Path) -> str | None:
        """The first change that is missing in a folder's tokenizer as Transformers loads it; None if there is none."""
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(folder))
        for token, number in self.added.items():
            if (found := loaded.convert_tokens_to_ids(token)) != number:
                return f"at the new token {token!r}: {found} instead of {number}"
        for role, token in self.roles.items():
            if (name := getattr(loaded, role)) != token:
                return f"at its {role}: {name!r} instead of {token!r}"
        return None


NONE = SpecialTokens()


def _role(override: str) -> tuple[str, str]:
    role, separator, token = override.partition("=")
    if role not in ROLES or not separator or not token:
        raise UserError(
            f"--override_special_tokens {override}: give ROLE=TOKEN, such as eos=<|im_end|>; roles: {', '.join(ROLES)}"
        )
    return f"{role}_token", token
