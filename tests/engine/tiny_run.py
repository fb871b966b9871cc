"""The tiny run that the tests of training share: its command line, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llm.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megatron_llm.data.manifest import Manifest, beside
from megatron_llm.flags import parser as flags_parser
from megatron_llm.flags.arguments import Arguments

DOCUMENTS = 200
EOD = 2
GEOMETRY = (
    "--num_layers 4 --hidden_size 32 --num_attention_heads 4 --num_attention_heads_kv 2 --ffn_hidden_size 48 "
    "--max_position_embeddings 64 --no_tie_embed_logits"
)
RUN = (
    "--seq_length 32 --micro_batch_size 2 --global_batch_size 8 --train_iters 40 --lr 1e-3 --lr_warmup_iters 4 "
    "--lr_decay_style cosine --log_interval 1 --eval_interval 10 --eval_iters 2 --split 90,10,0 --num_workers 0"
)


FALCON = (
    "--model_name falcon --num_layers 4 --hidden_size 32 --num_attention_heads 4 --num_attention_heads_kv 1 "
    "--ffn_hidden_size 128 --max_position_embeddings 64"
)


MEASURED = {
    "tokens_per_second",
    "tflops_per_rank",
    "mfu",
    "data_wait",
    "checkpoint_stall",
    "memory_gb",
    "memory_reserved_gb",
}


def write_data(folder: Path, vocab_size: int, *, append_eod: bool = False, uneven: bool = False) -> Path:
    """Prefix of 200 documents of 5 to 39 random tokens, or, uneven, of 2 or 60; with a manifest."""
    prefix, random = folder / "tiny_text_document", np.random.RandomState(0)
    sizes = random.randint(5, 40, DOCUMENTS).astype(np.int32)
    if uneven:
        sizes = np.where(random.rand(DOCUMENTS) < 0.8, 2, 60).astype(np.int32)
    tokens = random.randint(0, vocab_size, sizes.sum()).astype(token_dtype(vocab_size))
    if append_eod:
        tokens[tokens == EOD] = EOD + 1
        tokens[sizes.cumsum() - 1] = EOD
    with IndexedDatasetWriter(beside(prefix, ".bin"), beside(prefix, ".idx"), tokens.dtype) as writer:
        writer.add(tokens, sizes)
    manifest = Manifest(
        documents=DOCUMENTS,
        empty_documents=0,
        characters=1,
        bytes=1,
        tokens=len(tokens),
        sequences=DOCUMENTS,
        vocab_size=vocab_size,
        tokenizer_fingerprint="tiny",
        tokenizer_type="SentencePieceTokenizer",
        append_eod=append_eod,
        eod=EOD,
        dtype="uint16",
    )
    beside(prefix, ".json").write_text(json.dumps(manifest.as_dict()))
    return prefix


def flags(data: Path, save: Path, *more: object, geometry: str = GEOMETRY) -> list[object]:
    """The command line of the tiny run."""
    return [*geometry.split(), *RUN.split(), "--data_path", data, "--save", save, *more]


def save_arguments(save: Path, *more: object) -> Arguments:
    """Flags that say where and how checkpoints are saved."""
    return flags_parser.parse([str(flag) for flag in flags(Path("data"), save, *more)])


def metrics(save: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory, which differ from run to run."""
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in records]


def tensors(save: Path, iteration: int) -> dict[str, bytes]:
    """The bytes of a checkpoint's tensor files and metadata."""
    folder = save / f"iter_{iteration:07d}"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "state.json"}
