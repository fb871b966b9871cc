"""PREFIX.columns.arrow: what is known of each document of a tokenised dataset, beside its tokens.

The file is an Arrow stream with one row per sequence of the .idx, in the same order: all columns of the tokenised
shards but the text, and the number of tokens. So one can tell where any sequence of a training came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from run_contract.errors import UserError

SUFFIX = ".columns.arrow"
TOKENS = "tokens"
"""The column with the number of tokens of a sequence."""
_ROWS = 1 << 14


class ColumnsWriter:
    """Writes the columns of documents as the numbers of their tokens become known."""

    def __init__(self, inputs: Sequence[Path], left_out: Sequence[str], sink: Path) -> None:
        """`inputs` are the Arrow files in the order in which they are tokenised, `left_out` the columns of text.

        Raises UserError if one is no Arrow file, or if they have different columns.
        """
        self._batches = _batches(inputs, left_out)
        self._waiting = next(self._batches)
        self.schema = self._waiting.schema.append(pa.field(TOKENS, pa.int32()))
        self._sink = pa.OSFile(str(sink), "wb")
        self._writer = pa.ipc.new_stream(self._sink, self.schema)

    def add(self, lengths: NDArray[np.int32]) -> None:
        """Write the rows of the next n documents; `lengths` are their numbers of tokens, (n,), 0 for no sequence."""
        start = 0
        while start < len(lengths):
            if not self._waiting.num_rows:
                self._waiting = next(self._batches)
                continue
            rows = self._waiting.slice(0, min(len(lengths) - start, self._waiting.num_rows))
            self._waiting = self._waiting.slice(rows.num_rows)
            some = lengths[start : start + rows.num_rows]
            start += rows.num_rows
            whole = rows.append_column(self.schema.field(TOKENS), pa.array(some)).filter(pa.array(some > 0))
            if whole.num_rows:
                self._writer.write_batch(whole)

    def close(self) -> None:
        """Write the end of the stream."""
        self._writer.close()
        self._sink.close()


@contextmanager
def columns_writer(inputs: Sequence[Path], left_out: Sequence[str], sink: Path) -> Iterator[ColumnsWriter]:
    """Open a `ColumnsWriter`, and close it whatever happens."""
    writer = ColumnsWriter(inputs, left_out, sink)
    try:
        yield writer
    finally:
        writer.close()


def _batches(inputs: Sequence[Path], left_out: Sequence[str]) -> Iterator[Any]:
    """Yield the columns of the files as record batches of bounded size; the first is there even if it has no rows."""
    schema = None
    for path in inputs:
        if path.suffix != ".arrow":
            raise UserError(f"--keep_columns: {path} is no .arrow file, and only these have columns to keep")
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            names = [name for name in reader.schema.names if name not in left_out]
            if TOKENS in names:
                raise UserError(f"--keep_columns: {path} has a column {TOKENS!r}, which is added here; rename it")
            mine = pa.schema([reader.schema.field(name) for name in names])
            _check_same(path, mine, inputs[0], schema)
            if schema is None:
                schema = mine
                yield pa.RecordBatch.from_pylist([], schema)
            for batch in reader:
                columns = batch.select(names)
                for start in range(0, batch.num_rows, _ROWS):
                    yield columns.slice(start, _ROWS)


def _check_same(path: Path, schema: Any, first: Path, expected: Any) -> None:
    """Raise UserError if the columns of two files differ."""
    if expected is not None and not schema.equals(expected):
        raise UserError(
            f"{path} has the columns {_said(schema)}, and {first} has {_said(expected)}; make the shards again with "
            "the same settings"
        )


def _said(schema: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def merge(parts: Sequence[Path], sink: Path) -> int:
    """Join the columns of several datasets, and return the number of rows. Raises UserError if their columns differ."""
    rows = 0
    with pa.ipc.open_stream(str(parts[0])) as reader:
        schema = reader.schema
    with pa.OSFile(str(sink), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for part in parts:
            with pa.memory_map(str(part)) as source, pa.ipc.open_stream(source) as reader:
                _check_same(part, reader.schema, parts[0], schema)
                for batch in reader:
                    writer.write_batch(batch)
                    rows += batch.num_rows
    return rows
