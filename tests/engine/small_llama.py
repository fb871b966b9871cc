"""What the weight tests share: tiny random models, a tokenizer trained on a few Danish lines, and running a script."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import sentencepiece
import torch
from torch.distributed import checkpoint as dcp

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.model import canonical_state
from megatron_llm.model.config import ModelConfig
from megatron_llm.weights import hf as hf_weights
from run_contract.publish import checksum, write_json

ENGINE = Path(__file__).parents[2] / "Megatron-LLM"
LINES = (
    "Der var engang en fattig gåsepige, som boede ude på heden ved den store å.",
    "Hun sagde: «Jeg vil hellere spise rødgrød med fløde end gå til køs!»",
    "Kl. 7.30 om morgenen kørte toget fra Ølstykke, og prisen var 42,50 kr.",
    "Æblerne lå på græsset; børnene løb, råbte og lo 😀 hele eftermiddagen.",
    "Vejret i morgen: skiftende skydække, lidt regn og op til 12 grader.",
    "Den lille kat sov på sofaen, mens bedstemor læste avisen højt for os.",
    "  To mellemrum foran, og   tre i midten.",
    "På den anden side af søen ligger en gammel mølle, som ingen længere bruger.",
    "Kommunen har besluttet at bygge en ny skole ved siden af biblioteket.",
    "Hvis du klikker på knappen, åbnes et nyt vindue med alle indstillinger.",
)
VOCAB = 420


@cache
def _tokenizer_bytes() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def make_tokenizer(folder: Path) -> Path:
    """A Llama-style SentencePiece BPE model of 420 pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(_tokenizer_bytes())
    return path


def make_config(**changes: object) -> ModelConfig:
    """A four-layer GQA geometry whose head size times heads is not the hidden size."""
    values: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 4,
        "num_attention_heads": 8,
        "num_attention_heads_kv": 4,
        "ffn_hidden_size": 48,
        "max_position_embeddings": 64,
        "kv_channels": 6,
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def make_state(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> canonical_state.State:
    """Random canonical tensors, large enough in every one for a mistake to show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    state: canonical_state.State = {}
    for name, shape in canonical_state.expected_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        scale = 0.3 if len(shape) == 1 else 2.0 / shape[1] ** 0.5
        state[name] = ((1.0 if len(shape) == 1 else 0.0) + scale * noise).to(dtype)
    return state


def make_hf(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> canonical_state.State:
    """A random Hugging Face folder; returns its canonical state."""
    state = make_state(config, dtype)
    vocab_file = make_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    hf_weights.save(folder, config, state, dtype=dtype, vocab_file=vocab_file)
    return state


def make_training_checkpoint(root: Path, iteration: int, config: ModelConfig, state: canonical_state.State) -> None:
    """What training publishes, written without a process group."""
    folder = checkpoint.iteration_folder(root, iteration)
    folder.mkdir(parents=True)
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    dcp.save(tensors, storage_writer=checkpoint._Writer(folder), no_dist=True)
    written = {path.name: (path.stat().st_size, checksum(path)) for path in sorted(folder.iterdir())}
    progress = {"iteration": iteration, "consumed_train_samples": 16 * iteration, "consumed_valid_samples": 32}
    write_json(folder / "state.json", {**progress, "model_config": vars(config), "files": written})
    (root / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")


class Shell:
    """Unpickled naively, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def run(script: str, *flags: object) -> tuple[int, str, str]:
    """Run an engine script with these flags in this process: exit code, stdout, stderr."""
    path = ENGINE / script
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(path), *map(str, flags)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        runpy.run_path(str(path), run_name="__main__")
    return int(stopped.value.code or 0), out.getvalue(), err.getvalue()


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """The same names, dtypes and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
