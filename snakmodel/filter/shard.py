"""Passes an Arrow shard through the steps of a filter, in one pass over its documents, with counts of each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from run_contract.publish import publishing, write_json
from snakmodel.shards.arrow_stream import check_strings, column_index, documents_by_source, open_stream, stream_writer
from snakmodel.shards.counts import bounded, merged


class Step(Protocol):
    """One step of a filter: what it makes of a batch of documents."""

    @property
    def name(self) -> str:
        """The name of the step in the counts."""
        ...

    def schema(self, schema: Any) -> Any:
        """The `pyarrow.Schema` of the batches that the step makes of batches with this schema.

        Raises UserError if the step cannot work on such batches.
        """
        ...

    def run(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """The batch that the step makes of a `pyarrow.RecordBatch`, and the step's own counts. It may have fewer rows.

        The counts are numbers, or dictionaries of numbers; those of all batches are added. The column `text` holds
        valid UTF-8 without nulls.
        """
        ...


@dataclass
class StepCounts:
    """The counts of one step over a whole shard."""

    documents: int = 0
    """The number of documents that came in."""
    kept: int = 0
    """The number of documents that went on."""
    sources: dict[str, Any] = field(default_factory=dict)
    """Maps each source to its numbers of documents and kept documents; see `bounded`."""
    counts: dict[str, Any] = field(default_factory=dict)
    """The step's own counts."""

    def add(self, before: Any, after: Any, counts: dict[str, Any]) -> None:
        """Add a batch before and after the step, and the step's own counts."""
        self.documents += before.num_rows
        self.kept += after.num_rows
        kept = documents_by_source(after)
        found = {
            name: {"documents": count, "kept": kept.get(name, 0)} for name, count in documents_by_source(before).items()
        }
        self.sources = bounded(merged(self.sources, found))
        self.counts = merged(self.counts, counts)

    def as_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {"documents": self.documents, "kept": self.kept, "sources": self.sources, **self.counts}


def filter_shard(source: Path, output: Path, steps: Sequence[Step]) -> dict[str, Any]:
    """Write what the steps make of a shard as `output`.arrow, and the counts as `output`.json; returns the counts.

    Nothing is published if a step raises. Raises UserError if the shard's documents are not valid text.
    """
    found = [StepCounts() for _ in steps]
    with open_stream(source) as reader, publishing(Path(f"{output}.arrow"), Path(f"{output}.json")) as (arrow, report):
        column_index(reader, "text", source)
        schema = reader.schema
        for step in steps:
            schema = step.schema(schema)
        with stream_writer(arrow, schema) as writer:
            for batch in checked(reader, source):
                for step, counts in zip(steps, found, strict=True):
                    after, own = step.run(batch)
                    counts.add(batch, after, own)
                    batch = after
                if batch.num_rows:
                    writer.write_batch(batch)
        total = {
            "documents": found[-1].kept,
            "steps": {step.name: counts.as_json() for step, counts in zip(steps, found, strict=True)},
        }
        write_json(report, total)
    return total


def checked(reader: Any, source: Path) -> Iterator[Any]:
    """Yield the record batches of a stream that are not empty. Raises UserError on a document that is no valid text."""
    first = 0
    for batch in reader:
        check_strings(batch.column(batch.schema.get_field_index("text")), source, "text", first)
        first += batch.num_rows
        if batch.num_rows:
            yield batch
