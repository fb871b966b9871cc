"""Fixtures of the engine's tests: a tiny model, tiny tokenised data, and one process as a world of its own."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_llm.indexed_dataset import IndexedDatasetWriter, token_dtype
from megatron_llm.manifest import Manifest, beside
from megatron_llm.model_config import ModelConfig
from megatron_llm.parallel import World, start

DOCUMENTS = 200


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """A four-layer GQA model whose vocabulary is odd, so that its shards are uneven."""
    return ModelConfig(
        vocab_size=131,
        hidden_size=32,
        num_layers=4,
        num_attention_heads=4,
        num_attention_heads_kv=2,
        ffn_hidden_size=48,
        max_position_embeddings=64,
        kv_channels=8,
    )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig) -> Path:
    """Prefix of 200 random documents of the tiny model's vocabulary, with a manifest."""
    prefix = tmp_path_factory.mktemp("data") / "tiny_text_document"
    random = np.random.RandomState(0)
    sizes = random.randint(5, 40, DOCUMENTS).astype(np.int32)
    tokens = random.randint(0, tiny_config.vocab_size, sizes.sum()).astype(token_dtype(tiny_config.vocab_size))
    with IndexedDatasetWriter(beside(prefix, ".bin"), beside(prefix, ".idx"), tokens.dtype) as writer:
        writer.add(tokens, sizes)
    manifest = Manifest(
        documents=DOCUMENTS,
        empty_documents=0,
        characters=1,
        bytes=1,
        tokens=len(tokens),
        sequences=DOCUMENTS,
        vocab_size=tiny_config.vocab_size,
        tokenizer_fingerprint="tiny",
        tokenizer_type="SentencePieceTokenizer",
        append_eod=False,
        eod=2,
        dtype="uint16",
    )
    beside(prefix, ".json").write_text(json.dumps(manifest.as_dict()))
    return prefix


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process as a world of one rank."""
    torch.set_num_threads(1)
    yield start()
    dist.destroy_process_group()
