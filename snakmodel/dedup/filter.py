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


def filter_shard(source: Rows, removed: Path, output: Path) -> dict[str, Any]:
    """Write the documents that are kept, with all columns, as `output`.arrow, and their counts as `output`.json."""
    with open_stream(source.path) as reader:
        rows = removal_list(removed, source)
        documents, sources = 0, dict[str, int]()
        with publishing(Path(f"{output}.arrow"), Path(f"{output}.json")) as (arrow, report):
            with stream_writer(arrow, reader.schema) as writer:
                for batch in kept_batches(batches(reader, source), rows):
                    if batch.num_rows:
                        writer.write_batch(batch)
                    documents += batch.num_rows
                    sources = bounded(merged(sources, documents_by_source(batch)))
            counts = {"documents": documents, "removed": len(rows), "sources": sources}
            write_json(report, counts)
    return counts


def removal_list(path: Path, source: Rows) -> NDArray[Any]:
    """The rows to remove from a shard. Raises InputsMissing if there is no list, UserError if it is of other texts."""
    rows, about = read_array(path)
    if about.get("input") != source.identity():
        raise UserError(f"{path} was made for other texts than {source.path}; run dedup again from signatures on")
    if len(rows) != about["removed"] or (rows >= about["documents"]).any():
        raise UserError(f"{path} does not agree with the .json beside it; run dedup components again")
    return rows


def kept_batches(found: Iterator[Any], rows: NDArray[Any]) -> Iterator[Any]:
    """Yield each record batch without the rows to remove; it may then be empty."""
    first = 0
    for batch in found:
        low, high = np.searchsorted(rows, [first, first + batch.num_rows])
        keep = np.ones(batch.num_rows, bool)
        keep[rows[low:high].astype(np.int64) - first] = False
        first += batch.num_rows
        yield batch.filter(mask(keep))


def mask(keep: NDArray[np.bool_]) -> Any:
    """The mask as a `pyarrow.BooleanArray`.

    `pyarrow.array` would make it too, but it loads pandas, which takes 40 MB and half a second.
    """
    bits = pa.py_buffer(np.packbits(keep, bitorder="little"))
    return pa.BooleanArray.from_buffers(pa.bool_(), len(keep), [None, bits])
