"""Every function of the data stages that handles a subset of the documents, with the empty subset."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from snakmodel.dedup import components
from snakmodel.dedup.buckets import chained, forest, group
from snakmodel.dedup.components import cluster_sizes
from snakmodel.dedup.filter import kept_batches
from snakmodel.dedup.minhash.hasher import BandHasher
from snakmodel.dedup.minhash.parameters import Parameters
from snakmodel.dedup.report import Tally
from snakmodel.prepare.shard_writer import NO_DOCUMENTS, Cleaning, ShardCounts, clean, regrouped
from snakmodel.shards.arrow_stream import documents_by_source

NUMBERS = np.empty(0, np.int64)
KEYS = np.empty(0, np.uint64)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_no_two_documents_share_a_bucket(count: int) -> None:
    """Without documents, with one, and with two of different keys or of different halves of one: no bucket, no link."""
    keys, numbers = np.arange(count).astype(np.uint64), np.arange(count)
    for high, low in ((keys, keys), (np.zeros_like(keys), keys), (keys, np.zeros_like(keys))):
        documents, starts = group(high, low, numbers)
        assert (documents.tolist(), starts.tolist()) == ([], [])
        left, right = chained(documents, starts)
        assert forest(left, right).shape == (0, 2)


@pytest.mark.parametrize("labels", [[], [0, 1, 2], [components.DROPPED] * 3])
def test_no_document_is_in_a_cluster(labels: list[int]) -> None:
    """Without documents, with single ones, and with dropped ones: there is no cluster of any size."""
    assert cluster_sizes(np.array(labels, np.int64)) == ({}, [])


@pytest.mark.parametrize(("texts", "long"), [([], 0), (["en to", ""], 0), (["en to tre fire fem seks"], 1)])
def test_no_document_is_short_or_none_is_long(texts: list[str], long: int) -> None:
    """Records of the long documents and rows of the short ones, where one kind or both are missing."""
    parameters = Parameters(short_docs="keep")
    hasher = BandHasher(parameters)
    records, short = hasher.records(pa.array(texts, pa.string()), 7)
    assert len(records) == long * hasher.bands
    assert short.tolist() == list(range(7, 7 + len(texts) - long))
    assert hasher.signatures(pa.array(texts, pa.string())).shape == (len(texts), parameters.num_perm)


@pytest.mark.parametrize(("removed", "kept"), [([], [3, 2]), ([0, 1, 2], [2]), ([0, 1, 2, 3, 4], [])])
def test_no_document_of_a_batch_is_removed_or_kept(removed: list[int], kept: list[int]) -> None:
    """Batches of which everything or nothing is kept, and a batch without documents."""
    batches = [pa.record_batch({"text": ["x"] * size, "source": ["s"] * size}) for size in (3, 0, 2)]
    found = list(kept_batches(iter(batches), np.array(removed, np.uint32)))
    assert [one.num_rows for one in found if one.num_rows] == kept
    assert [documents_by_source(one) for one in found] == [{"s": one.num_rows} if one.num_rows else {} for one in found]


def test_no_document_is_left_after_cleaning() -> None:
    """Documents that are all too short, all of white space, or not there at all."""
    cleaning = Cleaning(trim=True, nfc=True, min_characters=5)
    for texts, trimmed in (([], 0), (["en", "to"], 0), ([" \n", "\t"], 2)):
        (found,), counts = clean([pa.array(texts, pa.large_string())], cleaning)
        assert found.to_pylist() == []
        assert (counts.short, counts.trimmed) == (len(texts), trimmed)
    for chunks in ([], [([NO_DOCUMENTS], ShardCounts(empty=3))]):
        assert list(regrouped(chunks)) == [([NO_DOCUMENTS], 0, ShardCounts(empty=3 * len(chunks)))]


def test_no_document_of_a_batch_is_counted() -> None:
    """The report's sums by source of a batch without documents, and of one without duplicates."""
    tally = Tally(np.arange(2))
    for sources in ([], ["a", "b"], []):
        tally.add(["a", "b"], np.array(["ab".index(name) for name in sources], np.int64), np.full(len(sources), 3))
    one = {"documents": 1, "bytes": 3, "kept_documents": 1, "kept_bytes": 3}
    assert tally.by_source() == {"a": one, "b": one}
    assert tally.matrix() == {}
