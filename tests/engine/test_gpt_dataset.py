"""The order of training samples against a plain transcription of Megatron's rules, token by token."""

from __future__ import annotations

import math
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_llm import gpt_dataset
from megatron_llm.files import UserError
from megatron_llm.gpt_dataset import build, data_fingerprint, split_boundaries
from megatron_llm.indexed_dataset import IndexedDatasetWriter, token_dtype


def corpus(prefix: Path, documents: int, seed: int, longest: int = 40) -> list[list[int]]:
    """A dataset of documents of 0 to `longest` tokens; every token of it is different."""
    sizes = np.random.RandomState(seed).randint(0, longest + 1, documents).astype(np.int32)
    tokens = np.arange(sizes.sum()) + 100000 * seed
    bin_path, idx_path = prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
    with IndexedDatasetWriter(bin_path, idx_path, token_dtype(1 << 20)) as writer:
        writer.add(tokens, sizes)
    return [part.tolist() for part in np.split(tokens, np.cumsum(sizes)[:-1])]


def walk(documents: list[list[int]], doc_idx: list[int], total: int, length: int) -> list[list[int]]:
    """Read on through the documents, L + 1 tokens a sample, the last of them again as the first of the next."""
    rows, document, offset = [], 0, 0
    for _ in range(total):
        row: list[int] = []
        while len(row) < length + 1:
            rest = documents[doc_idx[document]][offset:]
            row += rest[: length + 1 - len(row)]
            if len(row) == length + 1:
                offset = documents[doc_idx[document]].index(row[-1])
            else:
                document, offset = document + 1, 0
        rows.append(row)
    return rows


def expected(documents: list[list[int]], first: int, last: int, wanted: int, length: int, seed: int) -> list[list[int]]:
    """All samples of a split in order, from the rules as they are written down."""
    tokens = sum(len(document) for document in documents[first:last])
    epochs = 1
    while (epochs * tokens - 1) // length < wanted:
        epochs += 1
    before_last = ((epochs - 1) * tokens - 1) // length
    separate = epochs > 1 and wanted - before_last < int(0.80 * ((tokens - 1) // length))
    random = np.random.RandomState(seed)

    def shuffled(epochs: int) -> list[int]:
        doc_idx = np.array(list(range(first, last)) * epochs, dtype=np.int32)
        random.shuffle(doc_idx)
        return doc_idx.tolist()

    doc_idx = shuffled(epochs - 1) + shuffled(1) if separate else shuffled(epochs)
    total = (epochs * tokens - 1) // length
    rows = walk(documents, doc_idx, total, length)
    order: list[int] = []
    for low, high in [(0, before_last), (before_last, total)] if separate else [(0, total)]:
        part = np.arange(low, high, dtype=np.uint32)
        random.shuffle(part)
        order += part.tolist()
    return [rows[i] for i in order]


@pytest.mark.parametrize(
    ("wanted", "epochs", "separate"), [(60, 1, False), (150, 2, True), (200, 2, False), (450, 5, True), (530, 5, False)]
)
def test_order_of_samples(tmp_path: Path, wanted: int, epochs: int, separate: bool) -> None:
    """One epoch, several, and the last one apart or not: every token of every sample is where Megatron has it."""
    documents = corpus(tmp_path / "x", 80, seed=3)
    train, _, _ = build([str(tmp_path / "x")], "1", 8446, 16, (wanted, 0, 0))
    assert isinstance(train, gpt_dataset.GPTDataset)
    assert len(train.doc_idx) == 80 * epochs
    assert (sorted(train.doc_idx[:-80].tolist()) == sorted([*range(80)] * (epochs - 1)) and epochs > 1) == separate
    assert [row.tolist() for row in train] == expected(documents, 0, 80, wanted, 16, 8446)
    assert len(train) >= wanted
    assert train[0].dtype == np.int64
    assert train[0].shape == (17,)


def test_splits_are_disjoint_and_ordered(tmp_path: Path) -> None:
    """Train, valid and test each follow the rules on their own range of documents, each from a fresh seed."""
    documents = corpus(tmp_path / "x", 100, seed=3)
    splits = build([str(tmp_path / "x")], "80,15,5", 7, 16, (70, 25, 4))
    for dataset, (first, last), wanted in zip(splits, [(0, 80), (80, 95), (95, 100)], [70, 25, 4], strict=True):
        assert dataset is not None
        assert [dataset[k].tolist() for k in range(len(dataset))] == expected(documents, first, last, wanted, 16, 7)


def test_blend(tmp_path: Path) -> None:
    """Samples alternate between datasets by their weights, and each dataset gives its own in its own order."""
    weights, wanted = [0.7, 0.2, 0.3], 120
    sources = [corpus(tmp_path / f"{i}", 60, seed=i + 1) for i in range(3)]
    path = [str(part) for i in range(3) for part in (weights[i], tmp_path / f"{i}")]
    train, valid, _ = build(path, "90,10,0", 5, 16, (wanted, 0, 0))
    assert train is not None
    assert valid is None
    shares = [weight / (weights[0] + weights[1] + weights[2]) for weight in weights]
    rows = [expected(sources[i], 0, 54, math.ceil(wanted * shares[i] * 1.005), 16, 5) for i in range(3)]
    assert len(train) == sum(len(part) for part in rows)
    taken, blended = [0, 0, 0], []
    for s in range(wanted):
        errors = [shares[i] * max(s, 1) - taken[i] for i in range(3)]
        source = errors.index(max(errors))
        blended.append(rows[source][taken[source]])
        taken[source] += 1
    assert [train[k].tolist() for k in range(wanted)] == blended
    again, _, _ = build(path, "90,10,0", 5, 16, (wanted, 0, 0))
    assert again is not None
    assert again[wanted - 1].tolist() == blended[-1]
    assert again[3].tolist() == blended[3]


def test_datasets_survive_pickling(tmp_path: Path) -> None:
    """A dataset sent to a spawned worker gives the same samples and does not carry the corpus."""
    corpus(tmp_path / "x", 8000, seed=3)
    train, _, _ = build([str(tmp_path / "x")], "1", 1, 1000, (10, 0, 0))
    assert train is not None
    pickled = pickle.dumps(train)
    assert len(pickled) < (tmp_path / "x.bin").stat().st_size / 10
    assert pickle.loads(pickled)[4].tolist() == train[4].tolist()


@pytest.mark.parametrize(
    ("split", "documents", "boundaries"),
    [
        ("969,30,1", 1000, [0, 969, 999, 1000]),
        ("969,30,1", 10, [0, 10, 10, 10]),
        ("969,30,1", 87586, [0, 84870, 87498, 87586]),
        ("1,1,1", 2, [0, 0, 1, 2]),
        ("98/2", 50, [0, 49, 50, 50]),
        ("5", 7, [0, 7, 7, 7]),
        ("0,1,1", 3, [0, 0, 1, 3]),
    ],
)
def test_split_boundaries(split: str, documents: int, boundaries: list[int]) -> None:
    """Rounded cumulative shares, with the overshoot taken off all but the first."""
    assert split_boundaries(split, documents) == boundaries


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan"])
def test_a_wrong_split_is_refused(split: str) -> None:
    """A split that is no list of proportions is named and a valid one shown."""
    with pytest.raises(UserError, match="one to three proportions"):
        split_boundaries(split, 10)


@pytest.mark.parametrize("path", [["1", "a", "2"], ["x", "a"], ["0", "a", "1", "b"], ["-1", "a"], ["nan", "a"], []])
def test_a_wrong_data_path_is_refused(path: list[str]) -> None:
    """Weights that are missing, not numbers or not positive are refused."""
    with pytest.raises(UserError, match="give one prefix, or pairs"):
        build(path, "1", 1, 8, (1, 0, 0))


def test_a_split_without_enough_tokens_says_what_it_got(tmp_path: Path) -> None:
    """The error gives the split's documents and tokens; asking for none of its samples is fine."""
    corpus(tmp_path / "x", 20, seed=3)
    with pytest.raises(UserError, match=r"--split 90,5,5 gives valid 1 of 20 documents .* one sample needs 65"):
        build([str(tmp_path / "x")], "90,5,5", 1, 64, (3, 2, 0))
    train, valid, test = build([str(tmp_path / "x")], "90,5,5", 1, 64, (3, 0, 0))
    assert train is not None
    assert (valid, test) == (None, None)


def test_fingerprint_of_the_data(tmp_path: Path) -> None:
    """Another corpus, weight or order is other data."""
    for i in (1, 2):
        corpus(tmp_path / f"{i}", 10, seed=i)
    one, two = str(tmp_path / "1"), str(tmp_path / "2")
    paths = [[one], [two], ["1", one, "2", two], ["2", one, "1", two], ["1", two, "2", one]]
    assert len({data_fingerprint(path) for path in paths}) == 5
    assert data_fingerprint(["1", one, "2", two]) == data_fingerprint(["5", one, "10", two])


def test_building_is_fast(tmp_path: Path) -> None:
    """The indices of 400,000 samples from 100,000 documents are built fast enough for every rank to do it."""
    corpus(tmp_path / "x", 100_000, seed=1, longest=64)
    start = time.perf_counter()
    train, _, _ = build([str(tmp_path / "x")], "1", 1, 16, (400_000, 0, 0))
    assert train is not None
    assert len(train) >= 400_000
    assert time.perf_counter() - start < 15
