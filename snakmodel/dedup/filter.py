"""Writes the documents of a shard that are not on its removal list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from run_contract.errors import UserError
from run_contract.publish import publishing, write_json
from snakmodel.dedup.signature_file import read_array
from snakmodel.shards.arrow_stream import Rows, batches, documents_by_source, open_stream, stream_writer
from snakmodel.shards.counts import bounded, merged

CLUSTER_SIZE = pa.field("cluster_size", pa.int64())
"""The column for the number of documents in the cluster of a document that is kept; 1 if nothing resembles it."""


def filter_shard(source: Rows, removed: Path, output: Path, sizes: Path | None = None) -> dict[str, Any]:
    """Write the documents that are kept, with all columns, as `output`.arrow, and their counts as `output`.json.

    With `sizes`, the shard's cluster sizes as components wrote them, the column CLUSTER_SIZE is appended.
    """
    with open_stream(source.path) as reader:
        rows, kept = removal_list(removed, source)
        schema = reader.schema if sizes is None else with_sizes(reader.schema, source)
        column = None if sizes is None else size_list(sizes, source, kept)
        documents, sources = 0, dict[str, int]()
        with publishing(Path(f"{output}.arrow"), Path(f"{output}.json")) as (arrow, report):
            with stream_writer(arrow, schema) as writer:
                for batch in kept_batches(batches(reader, source), rows):
                    if batch.num_rows:
                        writer.write_batch(batch if column is None else appended(batch, schema, column, documents))
                    documents += batch.num_rows
                    sources = bounded(merged(sources, documents_by_source(batch)))
            counts = {"documents": documents, "removed": len(rows), "sources": sources}
            write_json(report, counts)
    return counts


def with_sizes(schema: Any, source: Rows) -> Any:
    """The schema with the column CLUSTER_SIZE. Raises UserError if there is a column of this name already."""
    if CLUSTER_SIZE.name in schema.names:
        raise UserError(
            f"{source.path} has a column {CLUSTER_SIZE.name!r} already, and dedup.cluster_size would add another; "
            "rename or remove the column, or leave out the key"
        )
    return schema.append(CLUSTER_SIZE)


def size_list(path: Path, source: Rows, kept: int) -> NDArray[Any]:
    """The cluster sizes of a shard's documents that are kept, (kept,) int64, in order.

    Raises InputsMissing if there is no such file, UserError if it is of other texts or another number of documents.
    """
    sizes, about = read_array(path)
    if about.get("input") != source.identity():
        raise UserError(f"{path} was made for other texts than {source.path}; run dedup again from signatures on")
    if len(sizes) != kept:
        raise UserError(f"{path} holds {len(sizes)} sizes for the {kept} documents kept; run dedup components again")
    return sizes


def appended(batch: Any, schema: Any, sizes: NDArray[Any], first: int) -> Any:
    """The record batch with the cluster sizes of its documents, of which the first has the number `first`."""
    here = sizes[first : first + batch.num_rows]
    column = pa.Array.from_buffers(pa.int64(), len(here), [None, pa.py_buffer(here)])
    return pa.RecordBatch.from_arrays([*batch.columns, column], schema=schema)


def removal_list(path: Path, source: Rows) -> tuple[NDArray[Any], int]:
    """The rows to remove from a shard, and the number of documents that are kept.

    Raises InputsMissing if there is no list, UserError if it is of other texts.
    """
    rows, about = read_array(path)
    if about.get("input") != source.identity():
        raise UserError(f"{path} was made for other texts than {source.path}; run dedup again from signatures on")
    if len(rows) != about["removed"] or (rows >= about["documents"]).any():
        raise UserError(f"{path} does not agree with the .json beside it; run dedup components again")
    return rows, about["documents"] - len(rows)


def kept_batches(found: Iterator[Any], rows: NDArray[Any]) -> Iterator[Any]:
    """Yield each record batch without the rows to remove; it may then be empty."""
    first = 0
    for batch in found:
        low, high = np.searchsorted(rows, [first, first + batch.num_rows])
        keep = np.ones(batch.num_rows, bool)
        keep[rows[low:high].astype(np.int64) - first] = False
        first += batch.num_rows
        yield selected(batch, keep)


def selected(batch: Any, keep: NDArray[np.bool_]) -> Any:
    """The rows of a record batch for which the mask holds, with all columns."""
    try:
        return batch.filter(mask(keep))
    except pa.ArrowNotImplementedError:  # as for columns of string views: pieces can be joined of any type
        if not keep.any():
            return batch.slice(0, 0)
        edges = np.flatnonzero(np.diff(keep, prepend=False, append=False)).reshape(-1, 2).tolist()
        pieces = [batch.slice(start, stop - start) for start, stop in edges]
        return pa.Table.from_batches(pieces).combine_chunks().to_batches()[0]


def mask(keep: NDArray[np.bool_]) -> Any:
    """The mask as a `pyarrow.BooleanArray`.

    `pyarrow.array` would make it too, but it loads pandas, which takes 40 MB and half a second.
    """
    bits = pa.py_buffer(np.packbits(keep, bitorder="little"))
    return pa.BooleanArray.from_buffers(pa.bool_(), len(keep), [None, bits])
