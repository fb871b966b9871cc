"""Writes small model files in fastText's format, with random weights."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

WORDS = ("</s>", "og", "det", "æble", "the", "日本", "a", "hus-båd", "ord")


def quantised(random: np.random.Generator, rows: int, columns: int, width: int, norms: bool) -> bytes:
    """A matrix of product quantisation in which `width` columns have one byte."""

    def quantiser(columns: int, width: int) -> bytes:
        parts = -(-columns // width)
        head = struct.pack("<4i", columns, parts, width, columns - (parts - 1) * width)
        return head + random.normal(size=256 * columns).astype("<f4").tobytes()

    size = rows * -(-columns // width)
    found = struct.pack("<?2qi", norms, rows, columns, size) + random.bytes(size) + quantiser(columns, width)
    return found + (random.bytes(rows) + quantiser(1, 1) if norms else b"")


def dense(random: np.random.Generator, rows: int, columns: int) -> bytes:
    """A matrix of single-precision numbers."""
    return struct.pack("<2q", rows, columns) + random.normal(size=(rows, columns)).astype("<f4").tobytes()


def write_model(
    path: Path,
    labels: tuple[str, ...] = ("da", "en", "de", "sv"),
    *,
    loss: int = 3,
    dim: int = 16,
    grams: tuple[int, int] = (2, 4),
    word_ngrams: int = 1,
    buckets: int = 500,
    pruned: bool = False,
    quantise: str = "",
    model: int = 3,
    words: tuple[str, ...] = WORDS,
) -> Path:
    """Write a model; `quantise` has `i` for the inputs, `o` for the outputs too, `n` for norms."""
    random = np.random.default_rng(15)
    data = struct.pack("<2i", 793712314, 12)
    data += struct.pack("<12id", dim, 5, 1, 1, 5, word_ngrams, loss, model, buckets, *grams, 100, 1e-4)
    left = random.choice(buckets, buckets // 3, replace=False) if pruned else None
    n_left = -1 if left is None else len(left)
    data += struct.pack("<3i2q", len(words) + len(labels), len(words), len(labels), 1000, n_left)
    for kind, entries in enumerate((words, [f"__label__{label}" for label in labels])):
        for place, entry in enumerate(entries):
            data += entry.encode() + b"\0" + struct.pack("<qb", 100 - 7 * place // 2, kind)
    for row, bucket in enumerate([] if left is None else left.tolist()):
        data += struct.pack("<2i", bucket, row)
    rows = len(words) + (buckets if left is None else len(left))
    data += struct.pack("<?", "i" in quantise)
    data += quantised(random, rows, dim, 2, "n" in quantise) if "i" in quantise else dense(random, rows, dim)
    data += struct.pack("<?", "o" in quantise)
    many = len(labels)
    data += quantised(random, many, dim, 3, "n" in quantise) if "o" in quantise else dense(random, many, dim)
    path.write_bytes(data)
    return path
