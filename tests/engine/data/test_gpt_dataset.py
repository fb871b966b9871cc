"""The order of training samples against a plain transcription of Megatron's rules, token by token."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_llm.data import sample_order as sample_index
from megatron_llm.data.gpt_dataset import (
    Blend,
    DataPaths,
    GPTDataset,
    Samples,
    open_split,
    parse_data_path,
    plan,
    split_boundaries,
)
from megatron_llm.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megatron_llm.flags.parser import parse
from run_contract.errors import UserError
from tests.engine import sample_order


def corpus(prefix: Path, documents: int, seed: int, longest: int = 40) -> list[list[int]]:
    """A dataset of documents of 0 to `longest` tokens; every token of it is different."""
    sizes = np.random.RandomState(seed).randint(0, longest + 1, documents).astype(np.int32)
    tokens = np.arange(sizes.sum()) + 100000 * seed
    bin_path, idx_path = prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
    with IndexedDatasetWriter(bin_path, idx_path, token_dtype(1 << 20)) as writer:
        writer.add(tokens, sizes)
    return [part.tolist() for part in np.split(tokens, np.cumsum(sizes)[:-1])]


def one(path: list[str], split: str) -> DataPaths:
    """All three splits from one --data_path."""
    return DataPaths.of(path, (None, None, None), split)


def build(paths: DataPaths, seed: int, length: int, samples: tuple[int, int, int]) -> list[Samples | None]:
    """The three datasets, their indices in memory."""
    return [open_split(part, None) if part else None for part in plan(paths, seed, length, samples)]


def rows(dataset: Samples | None, count: int | None = None) -> list[list[int]]:
    """The tokens of the first `count` samples, or of all."""
    assert dataset is not None
    return [dataset[k].tolist() for k in range(len(dataset) if count is None else count)]


@pytest.mark.parametrize(
    ("wanted", "epochs", "separate"), [(60, 1, False), (150, 2, True), (200, 2, False), (450, 5, True), (530, 5, False)]
)
def test_order_of_samples(tmp_path: Path, wanted: int, epochs: int, separate: bool) -> None:
    """One epoch, several, and the last one apart or not: every token of every sample is where Megatron has it."""
    documents = corpus(tmp_path / "x", 80, seed=3)
    train, _, _ = build(one([str(tmp_path / "x")], "1"), 8446, 16, (wanted, 0, 0))
    assert isinstance(train, GPTDataset)
    assert len(train.doc_idx) == 80 * epochs
    assert (sorted(train.doc_idx[:-80].tolist()) == sorted([*range(80)] * (epochs - 1)) and epochs > 1) == separate
    assert rows(train) == sample_order.samples(documents, 0, 80, wanted, 16, 8446)
    assert len(train) >= wanted
    assert train[0].dtype == np.int64
    assert train[0].shape == (17,)


def test_splits_are_disjoint_and_ordered(tmp_path: Path) -> None:
    """Train, valid and test each follow the rules on their own range of documents, each from a fresh seed."""
    documents = corpus(tmp_path / "x", 100, seed=3)
    splits = build(one([str(tmp_path / "x")], "80,15,5"), 7, 16, (70, 25, 4))
    for dataset, (first, last), wanted in zip(splits, [(0, 80), (80, 95), (95, 100)], [70, 25, 4], strict=True):
        assert rows(dataset) == sample_order.samples(documents, first, last, wanted, 16, 7)


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.3], [0.7, 0.2, 0.1], [7, 2, 1], [1, 1, 1], [1e-9, 5, 5]])
def test_blend(tmp_path: Path, weights: list[float]) -> None:
    """Samples alternate between datasets by their weights, and each dataset gives its own in its own order."""
    wanted = 120
    sources = [corpus(tmp_path / f"{i}", 60, seed=i + 1) for i in range(3)]
    path = [str(part) for i in range(3) for part in (weights[i], tmp_path / f"{i}")]
    train, valid, _ = build(one(path, "90,10,0"), 5, 16, (wanted, 0, 0))
    assert isinstance(train, Blend)
    assert valid is None
    shares = sample_order.normalised(weights)
    assert parse_data_path(path)[0] == shares
    parts = [
        sample_order.samples(sources[i], 0, 54, sample_order.wanted_of(shares[i], wanted), 16, 5) for i in range(3)
    ]
    assert [len(dataset) for dataset in train.datasets] == [len(part) for part in parts]
    assert len(train) == sum(len(part) for part in parts)
    routes = sample_order.routes(shares, len(train))
    assert [*zip(train.dataset_index.tolist(), train.dataset_sample_index.tolist(), strict=True)] == routes
    assert rows(train, wanted) == [parts[source][number] for source, number in routes[:wanted]]


def test_a_blend_of_one_is_a_blend(tmp_path: Path) -> None:
    """`weight prefix` asks for half a percent more than `prefix`, as every blend does: here one more epoch."""
    documents = corpus(tmp_path / "x", 80, seed=3)
    wanted = (2 * sum(map(len, documents)) - 1) // 16
    plain, _, _ = build(one([str(tmp_path / "x")], "1"), 1, 16, (wanted, 0, 0))
    blend, _, _ = build(one(["3", str(tmp_path / "x")], "1"), 1, 16, (wanted, 0, 0))
    assert rows(plain) == sample_order.samples(documents, 0, 80, wanted, 16, 1)
    assert rows(blend) == sample_order.samples(documents, 0, 80, sample_order.wanted_of(1.0, wanted), 16, 1)
    assert len(rows(blend)) > len(rows(plain))


def test_separate_data_for_each_split(tmp_path: Path) -> None:
    """Data paths of their own are read whole, blends among them; one that is needed and not given is named."""
    sources = [corpus(tmp_path / f"{i}", 60, seed=i + 1) for i in range(3)]
    valid_path = ["1", str(tmp_path / "1"), "3", str(tmp_path / "2")]
    paths = DataPaths.of(None, ([str(tmp_path / "0")], valid_path, None), "969,30,1")
    train, valid, test = build(paths, 5, 16, (90, 40, 0))
    assert rows(train) == sample_order.samples(sources[0], 0, 60, 90, 16, 5)
    parts = [
        sample_order.samples(sources[i + 1], 0, 60, sample_order.wanted_of(share, 40), 16, 5)
        for i, share in enumerate([0.25, 0.75])
    ]
    assert rows(valid, 40) == [parts[source][number] for source, number in sample_order.routes([0.25, 0.75], 40)]
    assert test is None
    with pytest.raises(UserError, match="4 samples of test are asked for, but test has no data: give --test_data_path"):
        build(paths, 5, 16, (90, 40, 4))


@pytest.mark.parametrize("given", [(None, None, None, None), (["a"], ["b"], None, None), (["a"], None, None, ["b"])])
def test_data_paths_exclude_each_other(given: tuple[list[str] | None, ...]) -> None:
    """Either --data_path or the separate ones."""
    with pytest.raises(UserError, match="give either --data_path, which --split divides, or --train_data_path"):
        DataPaths.of(given[0], (given[1], given[2], given[3]), "1")


def test_how_many_samples_a_run_needs() -> None:
    """Training: all updates; validation: an evaluation more than the intervals that fit; test: one evaluation."""
    required = "--data_path d --save s --seq_length 32 --micro_batch_size 2 --lr 1e-3 --eval_interval 30 --eval_iters 7"
    args = parse([*required.split(), "--train_iters", "100"])
    assert args.samples(8) == (800, (100 // 30 + 1) * 7 * 8, 7 * 8)
    args = parse([*required.split(), "--train_samples", "805", "--global_batch_size", "8"])
    assert args.training.train_iters == 100
    assert args.samples(8) == (805, (100 // 30 + 1) * 7 * 8, 7 * 8)


def test_datasets_survive_pickling(tmp_path: Path) -> None:
    """A dataset sent to a spawned worker gives the same samples and does not carry the corpus."""
    corpus(tmp_path / "x", 8000, seed=3)
    train, _, _ = build(one([str(tmp_path / "x")], "1"), 1, 1000, (10, 0, 0))
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
        ("969,30,1", 3_000_000_000, [0, 2_907_000_000, 2_997_000_000, 3_000_000_000]),
    ],
)
def test_split_boundaries(split: str, documents: int, boundaries: list[int]) -> None:
    """Rounded cumulative shares, with the overshoot taken off all but the first."""
    assert split_boundaries(split, documents) == boundaries


@given(
    shares=st.lists(st.integers(0, 1000) | st.floats(0.001, 100), min_size=1, max_size=3).filter(any),
    documents=st.integers(0, 3_000_000),
)
def test_any_split_follows_the_rule(shares: list[float], documents: int) -> None:
    """For any proportions: the transcription's boundaries, which cover all documents once and never go back."""
    split = ",".join(repr(share) for share in shares)
    found = split_boundaries(split, documents)
    assert found == [max(0, bound) for bound in sample_order.boundaries(split, documents)]
    assert found[0] == 0
    assert found[3] == documents
    assert found == sorted(found)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan"])
def test_a_wrong_split_is_refused(split: str) -> None:
    """A split that is no list of proportions is named and a valid one shown."""
    with pytest.raises(UserError, match="one to three proportions"):
        split_boundaries(split, 10)


@pytest.mark.parametrize("path", [["1", "a", "2"], ["x", "a"], ["0", "a", "1", "b"], ["-1", "a"], ["nan", "a"]])
def test_a_wrong_data_path_is_refused(path: list[str]) -> None:
    """Weights that are missing, not numbers or not positive are refused."""
    with pytest.raises(UserError, match="give one prefix, or pairs"):
        build(one(path, "1"), 1, 8, (1, 0, 0))


def test_a_split_without_enough_tokens_says_what_it_got(tmp_path: Path) -> None:
    """The error gives the split's documents and tokens; asking for none of its samples is fine."""
    corpus(tmp_path / "x", 20, seed=3)
    paths = one([str(tmp_path / "x")], "90,5,5")
    with pytest.raises(UserError, match=r"--split 90,5,5 gives valid 1 of 20 documents .* one sample needs 65"):
        build(paths, 1, 64, (3, 2, 0))
    train, valid, test = build(paths, 1, 64, (3, 0, 0))
    assert train is not None
    assert (valid, test) == (None, None)


def test_fingerprint_of_the_data(tmp_path: Path) -> None:
    """Another corpus, weight or order is other data, and so is another split's."""
    for i in (1, 2):
        corpus(tmp_path / f"{i}", 10, seed=i)
    first, second = str(tmp_path / "1"), str(tmp_path / "2")
    blends = [["1", first, "2", second], ["2", first, "1", second], ["1", second, "2", first]]
    paths = [one(path, "1") for path in ([first], [second], *blends)]
    paths += [DataPaths.of(None, ([first], [second], None), "1"), DataPaths.of(None, ([first], None, [second]), "1")]
    assert len({path.fingerprint() for path in paths}) == 7
    assert one(["5", first, "10", second], "1").fingerprint() == one(blends[0], "1").fingerprint()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    data=st.data(),
    length=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_indices_of_any_documents(sizes: list[int], data: st.DataObject, length: int, seed: int) -> None:
    """For any documents, empty ones among them, any range of them and any number of samples: the three arrays."""
    first = data.draw(st.integers(0, len(sizes) - 1))
    last = data.draw(st.integers(first + 1, len(sizes)))
    assume(sum(sizes[first:last]) > length)
    wanted = data.draw(st.integers(1, 4 * sum(sizes[first:last]) // length + 1))
    array = np.array(sizes, dtype=np.int32)
    built = sample_index.build(array, sample_index.Order.of(array, first, last, wanted, length, seed))
    doc_idx, sample_idx, shuffle_idx = sample_order.indices(sizes, first, last, wanted, length, seed)
    assert built.doc_idx.tolist() == doc_idx
    assert [tuple(entry) for entry in built.sample_idx.tolist()] == sample_idx
    assert built.shuffle_idx.tolist() == shuffle_idx
    assert (built.doc_idx.dtype, built.sample_idx.dtype, built.shuffle_idx.dtype) == (np.int32, np.int64, np.uint32)


@given(weights=st.lists(st.integers(1, 1000) | st.floats(1e-6, 1e6), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_routes_of_any_weights(weights: list[float]) -> None:
    """For any weights the compiled routes are the transcription's, ties and near-ties included."""
    shares = sample_order.normalised(weights)
    built = sample_index.build_routes(shares, 300)
    found = [*zip(built.dataset_index.tolist(), built.dataset_sample_index.tolist(), strict=True)]
    assert found == sample_order.routes(shares, 300)


def test_past_two_to_the_31_tokens() -> None:
    """Nine documents of almost 2**31 tokens each: positions and offsets stay exact, twenty-one epochs on."""
    sizes = np.array([2**31 - 1 - i for i in range(9)], dtype=np.int32)
    length = 2**28 - 1
    wanted = 20 * sum(sizes.tolist()) // length + 1
    order = sample_index.Order.of(sizes, 0, 9, wanted, length, 3)
    built = sample_index.build(sizes, order)
    doc_idx, sample_idx, shuffle_idx = sample_order.indices(sizes.tolist(), 0, 9, wanted, length, 3)
    assert order.epochs == 21
    assert built.doc_idx.tolist() == doc_idx
    assert [tuple(entry) for entry in built.sample_idx.tolist()] == sample_idx
    assert built.shuffle_idx.tolist() == shuffle_idx
    assert max(offset for _, offset in sample_idx) > 2**31 - 2**28


def test_more_samples_than_uint32_holds() -> None:
    """From 2**32 - 2 samples on, the permutation is int64."""
    assert sample_index.shuffle_dtype(2**32 - 3) is np.uint32
    assert sample_index.shuffle_dtype(2**32 - 2) is np.int64
