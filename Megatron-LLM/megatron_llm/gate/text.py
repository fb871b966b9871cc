"""Provides real tokens for the logits gate: text or a tokenised dataset -> rows of running text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_llm.data.document_blocks import columns, read_blocks
from megatron_llm.data.indexed_dataset import IndexedDataset
from megatron_llm.data.manifest import Manifest
from megatron_llm.tokenizer import build as tokenizer
from run_contract.errors import InputsMissing, UserError


@dataclass(frozen=True)
class Source:
    """The source of the tokens: text with its tokenizer, or the prefix of a tokenised dataset."""

    input: Path | None
    data_path: Path | None
    tokenizer_type: str
    vocab_file: Path | None

    def check_tokenizer(self) -> None:
        """Raise UserError when a tokenised dataset, according to its manifest, was not made with --vocab_file."""
        if self.data_path is None or self.vocab_file is None:
            return
        try:
            fingerprint = Manifest.read(self.data_path).tokenizer_fingerprint
        except InputsMissing:
            print(f"{self.data_path}.json is missing, so it is not checked that the data fits --vocab_file", flush=True)
            return
        built = (tokenizer.build(self.tokenizer_type, self.vocab_file, no_new_tokens=plain) for plain in (True, False))
        if all(one.fingerprint != fingerprint for one in built):
            raise UserError(
                f"--data_path {self.data_path} was not tokenised with --vocab_file {self.vocab_file}; give the data's "
                "tokenizer, or leave --vocab_file out: the tokens are compared as they are"
            )

    def documents(self) -> Iterator[Sequence[int]]:
        """Yield the token ids of one document after another. Raises UserError without a tokenizer."""
        if self.data_path:
            dataset = IndexedDataset(self.data_path)
            yield from (dataset.get(index).tolist() for index in range(len(dataset)))
            return
        if self.input is None or self.vocab_file is None:
            raise UserError("--input needs --vocab_file, the model's tokenizer.model or tokenizer.json")
        encoder = tokenizer.build(self.tokenizer_type, self.vocab_file, no_new_tokens=True, vocab_extra_ids_list=None)
        yield from (encoder.encode(text) for text in texts(self.input))


def texts(path: Path) -> Iterator[str]:
    """Yield the documents of an Arrow, jsonl or plain text file in order. Raises InputsMissing, UserError."""
    if not path.is_file():
        raise InputsMissing(f"{path} is missing; --input is a .arrow, .jsonl or .txt file")
    if path.suffix == ".arrow" or ".jsonl" in path.suffixes:
        for block in read_blocks(path, ["text"]):
            yield from columns(block, ["text"]).texts["text"].to_pylist()
        return
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}; convert it to UTF-8") from error


def batches(source: Source, *, rows: int, length: int, count: int, vocab_size: int) -> list[Tensor]:
    """At most `count` batches (rows, length + 1) int64 of running text, all of one size.

    They have fewer rows where the text is too short for one batch. Raises UserError when the text does not fill one
    row, or contains ids that the model does not have.
    """
    width = length + 1
    ids = _first(source.documents(), count * rows * width)
    where = source.input or source.data_path
    if len(ids) < width:
        raise UserError(
            f"{where} has {len(ids)} tokens, but one row needs {width}; give more text or a smaller --seq_length"
        )
    if ids.max() >= vocab_size:
        raise UserError(
            f"{where} has the token id {ids.max()}, but the model's vocabulary has only {vocab_size} tokens; give the "
            "model's own tokenizer as --vocab_file"
        )
    whole = torch.from_numpy(ids[: len(ids) // width * width]).view(-1, width)
    size = min(rows, len(whole))
    return list(whole[: len(whole) // size * size].view(-1, size, width))


def _first(documents: Iterable[Sequence[int]], wanted: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.fromiter(islice((token for document in documents for token in document), wanted), np.int64)
