"""Computes the band keys of a shard's documents, sorted and cut into P ranges of the key space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from run_contract.errors import UserError
from run_contract.publish import publishing, write_json
from snakmodel.dedup.minhash.hasher import BandHasher
from snakmodel.dedup.minhash.parameters import Parameters
from snakmodel.dedup.signature_file import SignatureWriter
from snakmodel.shards.arrow_stream import Rows, arrays, open_stream
from snakmodel.shards.progress import progress


def signatures(source: Rows, output: Path, column: str, ranges: int, parameters: Parameters) -> dict[str, Any]:
    """Write `output`.sig and its counts `output`.json, and return the counts.

    Holds one batch of documents and `signature_file.RUN` records in memory, however large the shard is.
    """
    if ranges < 1:
        raise UserError(f"--ranges {ranges}: must be 1 or more")
    drop = parameters.short_docs == "drop"
    documents = shorts = 0
    hasher = BandHasher(parameters)
    with publishing(Path(f"{output}.sig"), Path(f"{output}.json")) as (path, report), path.open("wb") as file:
        writer = SignatureWriter(file, ranges)
        with progress("signatures", count_rows(source), "documents") as advance:
            for values in arrays(source, column):
                records, short = hasher.records(values, documents)
                writer.add(records, short if drop else short[:0])
                documents += len(values)
                shorts += len(short)
                advance(len(values))
        counts = {"documents": documents, "short_documents": shorts, "dropped": shorts if drop else 0}
        about = {"parameters": parameters.described(), "fingerprint": parameters.fingerprint()}
        writer.finish({**about, **counts, "input": source.identity()})
        write_json(report, {**counts, "records": writer.total})
    return counts


def count_rows(source: Rows) -> int:
    """The number of rows; for a whole file, it is read from the headers of its batches."""
    if source.stop is not None:
        return source.stop - source.start
    with open_stream(source.path) as reader:
        return sum(batch.num_rows for batch in reader)
