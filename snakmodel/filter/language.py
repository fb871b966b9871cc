"""The step `language`: keeps documents, or lines of documents, whose language is one that the user asks for.

The rule is that of the published run: the text is trimmed, the model is asked for its first label, and the text passes
if the label is a language to keep and its probability is *greater* than the least one (0.6). fastText predicts for one
line, so that line ends within a document count as spaces. A text is never cut.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from run_contract.errors import UserError
from snakmodel.filter.language_codes import known_labels
from snakmodel.filter.language_models import DEFAULT, HELIPORT, Model, labels_of, open_model
from snakmodel.filter.shard import with_columns
from snakmodel.shards.arrow_stream import NO_SOURCE, source_names

HELP = "Keeps documents or lines of some languages."
LEAST = 0.6
"""The probability of the published rule."""
WHITE_SPACE = "".join(character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace())
"""What is trimmed from both ends of a text: all that Python's `str.strip` takes."""
BINS = 20
SAMPLES, SAMPLE_CHARACTERS, SAMPLE_SOURCES = 3, 80, 100
"""The number of samples per source, their length, and the number of sources that have samples."""
COLUMNS = (pa.field("language", pa.string()), pa.field("language_probability", pa.float32()))
"""The columns that marking adds."""


@dataclass
class Judged:
    """What the rule says about some texts (documents or lines)."""

    texts: Any
    """The trimmed texts, a `pyarrow.LargeStringArray` of length n."""
    labels: NDArray[np.int32]
    """The position of each label in the model's list, or -1, (n,)."""
    probabilities: NDArray[np.float32]
    """(n,)"""
    passed: NDArray[np.bool_]
    """(n,)"""


@dataclass(eq=False)
class LanguageStep:
    """A `RejectingStep` that keeps texts of some languages; it also counts labels and probabilities."""

    model: Model
    keep: frozenset[str]
    """The labels to keep, all known to the model."""
    min_probability: float = LEAST
    unit: str = "document"
    """`document`, or `line`: lines that fail are removed, and documents that have no line left."""
    mark: bool = False
    """Keep all documents, and add the columns of COLUMNS."""
    rejected_path: Path | None = None
    """See `RejectingStep`."""
    name: str = "language"
    _sampled: dict[str, int] = field(default_factory=dict)
    """The number of samples that each source has so far."""
    _rejected: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_probability < 1:
            raise UserError(f"--min_probability {self.min_probability}: must be at least 0 and less than 1")
        if self.mark and (self.unit == "line" or self.rejected_path):
            raise UserError("--mark keeps whole documents, and rejects none: leave out --unit line and --rejected")
        self._wanted = np.array([label in self.keep for label in self.model.labels] + [False])

    def schema(self, schema: Any) -> Any:
        """See `Step`."""
        self._sampled = {}
        return with_columns(schema, *COLUMNS) if self.mark else schema

    def run(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """See `Step`."""
        texts = batch.column("text").cast(pa.large_string())
        return self._run_lines(batch, texts) if self.unit == "line" else self._run_documents(batch, texts)

    def rejected(self) -> Any:
        """See `RejectingStep`."""
        return self._rejected

    def _run_documents(self, batch: Any, texts: Any) -> tuple[Any, dict[str, Any]]:
        judged = self._judge(texts)
        counts = self._counts(judged, source_names(batch))
        if self.mark:
            labels = pa.array([*self.model.labels, None], pa.string()).take(pa.array(judged.labels % len(self._wanted)))
            columns = [*batch.columns, labels, pa.array(judged.probabilities)]
            return pa.RecordBatch.from_arrays(columns, schema=with_columns(batch.schema, *COLUMNS)), counts
        self._rejected = batch.filter(pa.array(~judged.passed))
        return batch.filter(pa.array(judged.passed)), counts

    def _run_lines(self, batch: Any, texts: Any) -> tuple[Any, dict[str, Any]]:
        lists = pc.split_pattern(texts, "\n")
        lines, offsets = lists.flatten(), lists.offsets.to_numpy().astype(np.int64)
        offsets -= offsets[0]
        judged = self._judge(lines)
        sources = source_names(batch)
        if sources is not None:
            sources = sources[0], np.repeat(sources[1], np.diff(offsets))
        self._rejected = _with_lines(batch, lines, offsets, ~judged.passed)
        return _with_lines(batch, lines, offsets, judged.passed), self._counts(judged, sources)

    def _judge(self, texts: Any) -> Judged:
        texts = pc.utf8_trim(texts, characters=WHITE_SPACE)
        labels, probabilities = self.model.predict(texts)
        passed = self._wanted[labels] & (probabilities.astype(np.float64) > self.min_probability)
        return Judged(texts, labels, probabilities, passed)

    def _counts(self, judged: Judged, sources: tuple[list[str], NDArray[np.int64]] | None) -> dict[str, Any]:
        """The counts of some documents or lines; those without any text are no part of labels and histograms."""
        filled = pc.binary_length(judged.texts).to_numpy(zero_copy_only=False) > 0
        labels, wanted = judged.labels[filled], self._wanted[judged.labels[filled]]
        numbers = np.bincount(labels % len(self._wanted), minlength=len(self._wanted)).tolist()
        order = sorted(range(len(numbers)), key=lambda place: -numbers[place])
        names = [*self.model.labels, "(none)"]
        bins = np.minimum((judged.probabilities[filled].astype(np.float64) * BINS).astype(np.int64), BINS - 1)
        return {
            "judged": len(filled),
            "passed": int(judged.passed.sum()),
            "empty": int((~filled).sum()),
            "labels": {names[place]: numbers[place] for place in order if numbers[place]},
            "probabilities": {"kept_languages": _histogram(bins[wanted]), "other_languages": _histogram(bins[~wanted])},
            "samples": self._samples(judged, np.flatnonzero(filled & ~judged.passed), sources),
        }

    def _samples(
        self, judged: Judged, rows: NDArray[np.int64], sources: tuple[list[str], NDArray[np.int64]] | None
    ) -> dict[str, list[dict[str, Any]]]:
        """Samples of the rejected rows, by source: the first ones of the shard, whatever its batches."""
        names, codes = sources or ([NO_SOURCE], np.zeros(len(judged.labels), np.int64))
        found: dict[str, list[dict[str, Any]]] = {}
        for row in _first_of_each(rows, codes):
            name = names[codes[row]]
            taken = self._sampled.get(name, 0)
            if taken >= SAMPLES or (not taken and len(self._sampled) >= SAMPLE_SOURCES):
                continue
            self._sampled[name] = taken + 1
            place = int(judged.labels[row])
            sample = {
                "text": judged.texts[row].as_py()[:SAMPLE_CHARACTERS],
                "language": self.model.labels[place] if place >= 0 else None,
                "probability": round(float(judged.probabilities[row]), 4),
            }
            found.setdefault(name, []).append(sample)
        return found


def _first_of_each(rows: NDArray[np.int64], codes: NDArray[np.int64]) -> Iterable[int]:
    """The first SAMPLES rows of each source, in rising order."""
    order = np.argsort(codes[rows], kind="stable")
    ordered = codes[rows][order]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    chosen: list[int] = np.sort(rows[order[rank < SAMPLES]]).tolist()
    return chosen


def _histogram(bins: NDArray[np.int64]) -> dict[str, int]:
    """Maps the lower bound of each bin to its number of texts."""
    return {f"{place / BINS:.2f}": int(n) for place, n in enumerate(np.bincount(bins, minlength=BINS))}


def _with_lines(batch: Any, lines: Any, offsets: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Any:
    """The documents of a batch with only the chosen lines, without documents that have none.

    Document d has the lines offsets[d] … offsets[d + 1] - 1.
    """
    ends = np.concatenate([[0], np.cumsum(chosen)])[offsets]
    lists = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), lines.filter(pa.array(chosen)))
    place = batch.schema.get_field_index("text")
    column = batch.schema.field(place)
    texts = pc.binary_join(lists, pa.scalar("\n", pa.large_string())).cast(column.type)
    return batch.set_column(place, column, texts).filter(pa.array(np.diff(ends) > 0))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the step."""
    parser.add_argument("--keep", nargs="+", required=True, metavar="LABEL", help="the languages to keep, such as da")
    parser.add_argument(
        "--model",
        default=DEFAULT,
        metavar="MODEL",
        help=f"{DEFAULT} (default), {HELIPORT}, or a .bin or .ftz file of fastText, such as GlotLID's",
    )
    parser.add_argument(
        "--min_probability",
        type=float,
        help=f"a text passes if its probability is greater (default: {LEAST}; {HELIPORT} has thresholds of its own)",
    )
    parser.add_argument(
        "--unit", choices=("document", "line"), default="document", help="what is kept or removed (default: document)"
    )
    parser.add_argument(
        "--mark", action="store_true", help="keep all documents, and add the columns language and language_probability"
    )
    parser.add_argument("--rejected", type=Path, metavar="PATH", help="write what is rejected as PATH.arrow")


def check(args: argparse.Namespace, schema: Any) -> Any:
    """See `StepKind.check`."""
    known_labels(args.keep, labels_of(args.model), args.model)
    _refuse_probability(args, gives_probability=args.model != HELIPORT)
    return with_columns(schema, *COLUMNS) if args.mark else schema


def _refuse_probability(args: argparse.Namespace, *, gives_probability: bool) -> None:
    if args.min_probability is not None and not gives_probability:
        raise UserError(
            f"--min_probability {args.min_probability}: {args.model} gives a confidence, which is no probability, and "
            "has a threshold for each language; leave the flag out"
        )


def make_step(args: argparse.Namespace) -> LanguageStep:
    """The step of the parsed flags."""
    model = open_model(args.model)
    _refuse_probability(args, gives_probability=model.gives_probability)
    least = args.min_probability if model.gives_probability else 0.0
    return LanguageStep(
        model=model,
        keep=known_labels(args.keep, model.labels, args.model),
        min_probability=LEAST if least is None else least,
        unit=args.unit,
        mark=args.mark,
        rejected_path=args.rejected,
    )
