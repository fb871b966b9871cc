"""python classify.py --weights weights.json --least 0.5 INPUT OUTPUT

A classifier of your own in a recipe: it scores each document, and leaves out those that score too low.

INPUT and OUTPUT are Arrow stream files. All columns are copied, and the score is a further one. The score is the mean
weight of a document's words; put your own model in the place of `score`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa


def score(text: str, weights: Mapping[str, float]) -> float:
    """The mean weight of the words of a text, and 0 for a text without words."""
    words = text.casefold().split()
    return sum(weights.get(word.strip(".,:;!?"), 0.0) for word in words) / max(1, len(words))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="a JSON file that maps words to weights")
    parser.add_argument("--least", type=float, required=True, help="the score below which a document is left out")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    weights = json.loads(args.weights.read_text(encoding="utf-8"))
    with pa.ipc.open_stream(args.input) as reader:
        schema = reader.schema.append(pa.field("score", pa.float64()))
        with pa.OSFile(str(args.output), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in reader:  # one batch at a time, so that the shard need not fit into memory
                scores = pa.array([score(text, weights) for text in batch["text"].to_pylist()], pa.float64())
                scored = pa.RecordBatch.from_arrays([*batch.columns, scores], schema=schema)
                writer.write_batch(scored.filter(pa.compute.greater_equal(scores, args.least)))


if __name__ == "__main__":
    main()
