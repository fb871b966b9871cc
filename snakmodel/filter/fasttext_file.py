"""Reads the model files of fastText (`.bin`, and the quantised `.ftz`) into arrays for the compiled kernel.

A file holds, one after another and little-endian: a magic number and the version; the options of the training; the
dictionary (words, then labels, with their counts, and the n-grams that pruning left); the matrix of the inputs; the
matrix of the outputs. The format is that of fastText 0.9 (versions 11 and 12 of the file).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from run_contract.errors import InputsMissing, UserError

MAGIC = 793712314
PREFIX = "__label__"
"""What the names of labels begin with in a file."""
HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL = 1, 2, 3, 4
"""The losses, which say how scores become probabilities."""
SUPERVISED = 3
_OPTIONS = "<12id"
_CENTROIDS = 256
"""Number of centroids that one byte of a quantised matrix chooses from."""


@dataclass(frozen=True)
class ModelFile:
    """What a model file holds. Quantised matrices are expanded; the values are those that fastText computes with."""

    labels: list[str]
    """The names of the labels without their prefix, in the order of the file."""
    label_counts: NDArray[np.int64]
    """How often each label was seen in training."""
    words: list[bytes]
    """The words of the dictionary as UTF-8, and after them the labels with their prefix."""
    inputs: NDArray[np.float32]
    """A vector for each word and then for each bucket of n-grams, (rows, dim)."""
    outputs: NDArray[np.float32]
    """A vector for each label, or for each inner node of the tree of labels, (labels, dim)."""
    output_norms: NDArray[np.float32]
    """What the product with each output vector is multiplied by, (labels,)."""
    loss: int
    buckets: int
    """The number of buckets that n-grams are hashed into."""
    word_ngrams: int
    """The longest n-gram of words."""
    shortest: int
    longest: int
    """The numbers of characters of the n-grams inside a word; no such n-grams are used if `longest` is 0."""
    bucket_rows: NDArray[np.int32] | None
    """The row of each bucket, counted from the first bucket's, or -1 where pruning took it; None: no pruning."""

    @property
    def n_words(self) -> int:
        """The number of words in the dictionary, without labels."""
        return len(self.words) - len(self.labels)


class _Reader:
    """Reads values one after another. Raises UserError at the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def values(self, form: str) -> tuple[Any, ...]:
        """Read values in a form of the module `struct`."""
        self._need(size := struct.calcsize(form))
        found = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return found

    def array(self, kind: Any, count: int) -> NDArray[Any]:
        """Read so many numbers of one type; they are copied."""
        kind = np.dtype(kind)
        self._need(size := kind.itemsize * count)
        found: NDArray[Any] = np.frombuffer(self.data, kind, count, self.at).copy()
        self.at += size
        return found

    def word(self) -> bytes:
        """Read a string up to its NUL."""
        if (end := self.data.find(b"\0", self.at)) < 0:
            self._need(len(self.data))
        found = self.data[self.at : end]
        self.at = end + 1
        return found

    def _need(self, size: int) -> None:
        if size < 0 or self.at + size > len(self.data):
            raise UserError(
                f"{self.path} ({len(self.data)} bytes) is cut off or damaged: the fastText model goes on "
                "after its end. Fetch it again"
            )


def read_model(path: Path) -> ModelFile:
    """Read a model file of a classifier.

    Raises InputsMissing if there is no such file, and UserError if it is no fastText model, is cut off, or has no
    labels.
    """
    if not path.is_file():
        raise InputsMissing(f"{path} does not exist, or is no file; --model takes a fastText model (.bin or .ftz)")
    if path.stat().st_size < 64:
        raise UserError(f"{path} ({path.stat().st_size} bytes) is no fastText model; name a .bin or .ftz file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read(_Reader(data, path))


def _read(reader: _Reader) -> ModelFile:
    magic, version = reader.values("<2i")
    if magic != MAGIC or version not in (11, 12):
        begin = bytes(reader.data[:8])
        raise UserError(
            f"{reader.path} is no fastText model of a known version (it begins with {begin!r}); name a .bin or .ftz "
            "file as fastText writes it"
        )
    dim, _, _, _, _, word_ngrams, loss, model, buckets, shortest, longest, _, _ = reader.values(_OPTIONS)
    if model != SUPERVISED:
        raise UserError(
            f"{reader.path} holds word vectors and no labels; a model that was trained to classify is needed"
        )
    if dim <= 0 or loss not in (HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL):
        raise UserError(f"{reader.path} is damaged: dimension {dim}, loss {loss}; fetch it again")
    words, labels, counts, rows = _dictionary(reader, buckets)
    (quantised,) = reader.values("<?")
    inputs = _quantised(reader, scaled=True)[0] if quantised else _dense(reader)
    (both,) = reader.values("<?")
    outputs, norms = _quantised(reader, scaled=False) if quantised and both else (_dense(reader), None)
    if inputs.shape[1] != dim or outputs.shape != (len(labels), dim):
        raise UserError(f"{reader.path} is damaged: its matrices do not fit its {len(labels)} labels; fetch it again")
    hashed = longest > 0 or word_ngrams > 1
    needed = len(words) - len(labels) + (0 if not hashed else buckets if rows is None else int(rows.max()) + 1)
    if len(inputs) < needed or (hashed and buckets <= 0):
        raise UserError(f"{reader.path} is damaged: {len(inputs)} input vectors, {needed} are needed; fetch it again")
    return ModelFile(
        labels=labels,
        label_counts=counts,
        words=words,
        inputs=inputs,
        outputs=outputs,
        output_norms=np.ones(len(labels), np.float32) if norms is None else norms,
        loss=loss,
        buckets=buckets,
        word_ngrams=word_ngrams,
        shortest=shortest,
        longest=0 if version == 11 else longest,
        bucket_rows=rows,
    )


def _dictionary(
    reader: _Reader, buckets: int
) -> tuple[list[bytes], list[str], NDArray[np.int64], NDArray[np.int32] | None]:
    """The words and labels, the names of the labels, their counts, and the rows of buckets as in ModelFile."""
    size, n_words, n_labels, _, n_pruned = reader.values("<3i2q")
    if n_words < 0 or n_labels <= 0 or size != n_words + n_labels:
        raise UserError(f"{reader.path} is damaged: {n_words} words and {n_labels} labels; fetch it again")
    words, counts = [], np.zeros(size, np.int64)
    for entry in range(size):
        words.append(reader.word())
        counts[entry], kind = reader.values("<qb")
        if kind != (entry >= n_words):
            raise UserError(f"{reader.path} is damaged: entry {entry} of its dictionary; fetch it again")
    rows = None
    if n_pruned >= 0:
        pairs = reader.array("<i4", 2 * n_pruned).reshape(-1, 2)
        if len(pairs) and (pairs.min() < 0 or pairs[:, 0].max() >= buckets):
            raise UserError(f"{reader.path} is damaged: its list of n-grams; fetch it again")
        rows = np.full(max(buckets, 1), -1, np.int32)
        rows[pairs[:, 0]] = pairs[:, 1]
    labels = [word.decode(errors="backslashreplace").removeprefix(PREFIX) for word in words[n_words:]]
    return words, labels, counts[n_words:], rows


def _dense(reader: _Reader) -> NDArray[np.float32]:
    rows, columns = reader.values("<2q")
    if rows < 0 or columns <= 0:
        raise UserError(f"{reader.path} is damaged: a matrix of {rows} x {columns}; fetch it again")
    return reader.array("<f4", rows * columns).reshape(rows, columns)


def _quantised(reader: _Reader, scaled: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A matrix of product quantisation, expanded, and the norm of each row.

    The rows are multiplied by their norms if `scaled`; the norms are 1 if the file has none.
    """
    with_norms, rows, columns, size = reader.values("<?2qi")
    codes = reader.array(np.uint8, size)
    centroids, width = _quantiser(reader)
    parts = -(-columns // max(width, 1))
    if rows < 0 or columns <= 0 or width <= 0 or size != rows * parts or len(centroids) != columns * _CENTROIDS:
        raise UserError(f"{reader.path} is damaged: a quantised matrix of {rows} x {columns}; fetch it again")
    norms = np.ones(rows, np.float32)
    if with_norms:
        chosen = reader.array(np.uint8, rows)
        table, _ = _quantiser(reader)
        norms = table[chosen]
    values = np.empty((rows, columns), np.float32)
    codes = codes.reshape(rows, parts)
    for part in range(parts):
        first = part * width
        last = min(first + width, columns)
        table = centroids[first * _CENTROIDS : last * _CENTROIDS].reshape(_CENTROIDS, last - first)
        values[:, first:last] = table[codes[:, part]]
    if scaled:
        values *= norms[:, None]
    return values, norms


def _quantiser(reader: _Reader) -> tuple[NDArray[np.float32], int]:
    """The centroids of a quantiser, and the number of columns that one byte stands for."""
    columns, _, width, _ = reader.values("<4i")
    return reader.array("<f4", max(columns, 0) * _CENTROIDS), width
