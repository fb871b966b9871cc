"""Fixtures of the engine's tests: a tiny model, tiny tokenised data, and one process as a world of its own."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_llm.model.config import ModelConfig
from megatron_llm.parallel.world import World, start
from tests.engine import tiny_run


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
    return tiny_run.write_data(tmp_path_factory.mktemp("data"), tiny_config.vocab_size)


@pytest.fixture(scope="session")
def separated_data(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig) -> Path:
    """The same, each document with an EOD at its end and none within."""
    return tiny_run.write_data(tmp_path_factory.mktemp("separated"), tiny_config.vocab_size, append_eod=True)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process as a world of one rank."""
    torch.set_num_threads(1)
    yield start()
    dist.destroy_process_group()
