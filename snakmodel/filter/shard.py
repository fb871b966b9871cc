"""Passes an Arrow shard through the steps of a filter, in one pass over its documents, with counts of each step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from run_contract.errors import UserError
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


@runtime_checkable
class RejectingStep(Step, Protocol):
    """A step that can also write what it rejects, as a shard of its own."""

    @property
    def rejected_path(self) -> Path | None:
        """The path without suffix of the shard of what is rejected; None if it is not written."""
        ...

    def rejected(self) -> Any:
        """The rows that the last call of `run` rejected, a `pyarrow.RecordBatch` in the schema of its input."""
        ...


@runtime_checkable
class FinishingStep(Step, Protocol):
    """A step that gives its own counts their last form, once those of all batches of a shard have been added."""

    def finished(self, counts: dict[str, Any]) -> dict[str, Any]:
        """The counts of a shard in their last form; they are empty if the shard has no documents."""
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

    What a `RejectingStep` rejects is written as its `rejected_path`.arrow. Nothing is published if a step raises.
    Raises UserError if the shard's documents are not valid text, or if two outputs have the same path.
    """
    found = [StepCounts() for _ in steps]
    if repeated := [step.name for step in steps if [other.name for other in steps].count(step.name) > 1]:
        raise UserError(f"the step {repeated[0]} is there twice; its counts could not be told apart")
    rejected_paths = [step.rejected_path for step in steps if isinstance(step, RejectingStep) and step.rejected_path]
    shards = [Path(f"{path}.arrow") for path in (output, *rejected_paths)]
    if len({path.resolve() for path in shards}) < len(shards):
        raise UserError(f"{output}: what is kept and what is rejected must be written to different paths")
    with open_stream(source) as reader, publishing(*shards, Path(f"{output}.json")) as (arrow, *others, report):
        column_index(reader, "text", source)
        schema = reader.schema
        with ExitStack() as files:
            rejects: dict[int, tuple[RejectingStep, Any]] = {}
            for place, step in enumerate(steps):
                if isinstance(step, RejectingStep) and step.rejected_path:
                    rejects[place] = step, files.enter_context(stream_writer(others[len(rejects)], schema))
                schema = step.schema(schema)
            writer = files.enter_context(stream_writer(arrow, schema))
            for batch in checked(reader, source):
                for place, (step, counts) in enumerate(zip(steps, found, strict=True)):
                    after, own = step.run(batch)
                    counts.add(batch, after, own)
                    if place in rejects and (rejected := rejects[place][0].rejected()).num_rows:
                        rejects[place][1].write_batch(rejected)
                    batch = after
                if batch.num_rows:
                    writer.write_batch(batch)
        for step, counts in zip(steps, found, strict=True):
            if isinstance(step, FinishingStep):
                counts.counts = step.finished(counts.counts)
        total = {
            "documents": found[-1].kept,
            "steps": {step.name: counts.as_json() for step, counts in zip(steps, found, strict=True)},
        }
        check_inflow(source, found[0].documents)
        check_funnel(source, found)
        write_json(report, total)
    return total


def with_columns(schema: Any, *columns: Any) -> Any:
    """A `pyarrow.Schema` with further columns, which a step adds. Raises UserError if it has one of them already."""
    for column in columns:
        if column.name in schema.names:
            raise UserError(
                f"the input has a column {column.name!r} already, which this step would add; give it a shard from "
                "before the step, or rename the column"
            )
        schema = schema.append(column)
    about = {key: value for key, value in (schema.metadata or {}).items() if key != b"huggingface"}
    return schema.with_metadata(about or None)  # the key lists the columns that there were before


def check_inflow(source: Path, documents: int) -> None:
    """Raise UserError if a shard holds another number of documents than the counts that were written beside it."""
    report = source.with_suffix(".json")
    if not report.is_file():
        return
    try:
        written = int(json.loads(report.read_text(encoding="utf-8"))["documents"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{report} does not hold the counts of {source.name} ({error!r}); make the shard again"
        ) from error
    if written != documents:
        raise UserError(f"{source} holds {documents} documents, but {report.name} says {written}; make the shard again")


def check_funnel(source: Path, found: Sequence[StepCounts]) -> None:
    """Raise RuntimeError unless each step was given what the one before it kept, and the sources add up."""
    for number, counts in enumerate(found):
        given = found[number - 1].kept if number else counts.documents
        sums = [sum(one[name] for one in counts.sources.values()) for name in ("documents", "kept")]
        if counts.documents != given or (counts.sources and sums != [counts.documents, counts.kept]):
            raise RuntimeError(
                f"{source}: the counts of step {number + 1} do not add up: {counts.documents} documents came in, the "
                f"step before kept {given}, {counts.kept} went on, and by source they are {sums}"
            )


def checked(reader: Any, source: Path) -> Iterator[Any]:
    """Yield the record batches of a stream that are not empty.

    Raises UserError on a document that is no valid text, and if the file is damaged.
    """
    first = 0
    try:
        for batch in reader:
            check_strings(batch.column(batch.schema.get_field_index("text")), source, "text", first)
            first += batch.num_rows
            if batch.num_rows:
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source} is damaged near row {first} ({error}); run the step that writes it again") from error
