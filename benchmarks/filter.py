"""python benchmarks/filter.py [--megabytes 8] [--parts quality] [--datatrove-python PYTHON]

The steps of the filter against datatrove's filters on the same documents and thresholds (deterministic):
  quality   MB per second of processor time, rounds of both in turns; what each rule says of each document, and the text
            of the lines that C4's rules keep, are compared
datatrove and spaCy are installed into an environment of their own unless one is given. Writes the numbers with the
machine they were measured on; parts that are not run keep their earlier numbers.
"""

from __future__ import annotations

import argparse
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
from dedup import lines
from submit import machine

from run_contract.entry_point import run_main
from snakmodel.config.sections import PROJECT
from snakmodel.filter.quality.characters import SYMBOL, stops, table
from snakmodel.filter.quality.rules import RULES, Thresholds, as_json
from snakmodel.filter.quality.step import QualityStep
from snakmodel.filter.quality.threshold_file import defaults

PACKAGES = ("datatrove[io,processing]==0.10.1", "spacy")
ROUNDS = 7
COMPARED, WITH_SPACY = 2000, 300
"""How many documents are compared rule by rule, and how many of them with datatrove's own words and symbols as well."""
SAMPLE = 150
"""How many documents datatrove works on in each round."""
FIRST_REASONS = {"gopher_max_hashes": "gopher_too_many_hashes"}
"""datatrove has one threshold for two rules of symbols; with it alone, only this reason is the rule's own."""
ODD = ("lorem ipsum og mere.", "{ er her.", "Aktiver JavaScript her.", "- et punkt", "• et punkt", "læs mere ...", "#")


def documents(megabytes: float) -> list[str]:
    """Documents of real lines, with now and then repeated lines, paragraphs, lists and what the rules look for."""
    source, generator = lines(), random.Random(15)
    made, size = [], 0.0
    while size < megabytes * 1e6:
        first, count = generator.randrange(len(source)), min(60, int(generator.expovariate(1 / 15)) + 1)
        chosen = source[first : first + count]
        kind = generator.randrange(8)
        if kind == 0:
            chosen = chosen + generator.choices(chosen, k=len(chosen) // 2 + 1)
        elif kind == 1:
            chosen = [part for line in chosen for part in (line, generator.choice(ODD))]
        elif kind == 2:
            chosen = [line[:25] for line in chosen]
        text = generator.choice(("\n", "\n", "\n\n")).join(chosen)
        made.append(text)
        size += len(text.encode())
    return made


class Datatrove:
    """A process that answers the requests of `peers/datatrove_quality.py`."""

    def __init__(self, python: str, folder: Path, given: dict[str, Any]) -> None:
        path = folder / "given.json"
        path.write_text(json.dumps(given))
        script = Path(__file__).parent / "peers" / "datatrove_quality.py"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([python, str(script), str(path)], **pipes)

    def ask(self, **request: Any) -> Any:
        """The answer to a request."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin
        assert stdout
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            sys.exit("datatrove's process ended; see its message above")
        return json.loads(answer)

    def end(self) -> None:
        """End the process."""
        self._process.communicate()


def installed(folder: Path) -> str:
    """A Python in which datatrove and spaCy are installed."""
    python = str(folder / "venv" / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def quality(texts: list[str], folder: Path, python: str) -> dict[str, Any]:
    """The step `quality` against datatrove's Gopher, C4 and FineWeb filters."""
    thresholds = defaults("da")
    symbols = "".join(chr(point) for point in np.flatnonzero(table() & SYMBOL).tolist())
    given = {"texts": texts, "thresholds": as_json(thresholds), "symbols": symbols, "stops": "".join(stops())}
    compared = [*texts[:COMPARED], "", " \n\n ", "ord", "\n\n"]
    other = Datatrove(python, folder, {**given, "texts": compared})
    found: dict[str, Any] = {"documents_compared": len(compared), "failed": compare(other, thresholds, compared)}
    other.end()
    few = Datatrove(python, folder, {**given, "texts": texts[:WITH_SPACY]})
    found["differ_with_datatroves_words"] = {"of": WITH_SPACY, **differences(few, thresholds, texts[:WITH_SPACY])}
    few.end()
    other = Datatrove(python, folder, given)
    found |= speeds(other, QualityStep(thresholds), texts)
    other.end()
    version = "import importlib.metadata as m; print(m.version('datatrove'))"
    asked = subprocess.run([python, "-c", version], check=True, capture_output=True, text=True)
    return {**found, "datatrove": asked.stdout.strip()}


def compare(other: Datatrove, thresholds: Thresholds, texts: list[str]) -> dict[str, int]:
    """Check that datatrove decides the same by each rule, and keeps the same lines; the documents that fail each."""
    step = QualityStep(thresholds, clean_lines=True)
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string())})
    after, counts = step.run(batch)
    ours = after.column("quality").to_pylist()
    answers = other.ask(rules=True)
    assert set(answers) == {rule.name for rule in RULES}
    for name, reasons in answers.items():
        for text, failed, reason in zip(texts, ours, reasons, strict=True):
            theirs = reason is not None
            if name in FIRST_REASONS:
                theirs = reason == FIRST_REASONS[name]
            elif name == "gopher_max_ellipses":
                continue
            if reason == "empty":
                assert "fineweb_min_lines" in failed
                continue
            assert (name in failed) == theirs, (name, text, failed, reason)
        if name == "gopher_max_hashes":
            for failed, reason in zip(ours, reasons, strict=True):
                expected = "gopher_max_ellipses" in failed and "gopher_max_hashes" not in failed
                assert expected == (reason == "gopher_too_many_ellipsis")
    assert after.column("text").to_pylist() == other.ask(clean=True)
    return {name: int(count) for name, count in counts["rules"].items()}


def differences(other: Datatrove, thresholds: Thresholds, texts: list[str]) -> dict[str, int]:
    """Of how many documents a rule decides otherwise if words, sentences and symbols are those of datatrove."""
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string())})
    ours = QualityStep(thresholds).run(batch)[0].column("quality").to_pylist()
    found = {}
    for name, reasons in other.ask(rules=True, own=True).items():
        wanted = FIRST_REASONS.get(name)
        if name != "gopher_max_ellipses":
            theirs = [reason is not None if wanted is None else reason == wanted for reason in reasons]
            found[name] = sum((name in failed) != their for failed, their in zip(ours, theirs, strict=True))
    return {name: count for name, count in found.items() if count}


def speeds(other: Datatrove, step: QualityStep, texts: list[str]) -> dict[str, Any]:
    """MB per second of processor time, median of rounds in turns."""
    size = len(texts) // ROUNDS
    rates: dict[str, list[float]] = {}
    step.run(pa.record_batch({"text": pa.array(texts[:10], pa.large_string())}))
    other.ask(time=[0, 2], own=True)
    for round_ in range(ROUNDS):
        first = round_ * size
        sample = texts[first : first + SAMPLE]
        batches = [
            pa.record_batch({"text": pa.array(texts[at : min(at + 1000, first + size)], pa.large_string())})
            for at in range(first, first + size, 1000)
        ]
        started = time.process_time()
        for batch in batches:
            step.run(batch)
        used = {"ours": (texts[first : first + size], time.process_time() - started)}
        theirs = other.ask(time=[first, first + SAMPLE])
        used |= {"datatrove": (sample, theirs["all"]), "datatrove_in_turn": (sample, theirs["in_turn"])}
        used["datatrove_with_spacy"] = (sample, other.ask(time=[first, first + SAMPLE], own=True)["all"])
        for name, (part, seconds) in used.items():
            rates.setdefault(name, []).append(sum(len(text.encode()) for text in part) / 1e6 / seconds)
    found: dict[str, Any] = {f"{name}_mb_per_core_second": round(median(values), 2) for name, values in rates.items()}
    for name in list(rates)[1:]:
        ratios = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
        found[f"ratio_to_{name}"] = round(median(ratios), 1)
        found[f"ratios_to_{name}"] = [round(ratio, 1) for ratio in ratios]
    return {**found, "rounds": ROUNDS, "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 1)}


PARTS: dict[str, Callable[[list[str], Path, str], dict[str, Any]]] = {"quality": quality}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8, help="text to measure on (default: %(default)g)")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--datatrove-python", help="a Python that has datatrove and spacy (default: install them)")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "filter.json")
    args = parser.parse_args()
    if wrong := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(wrong))} is not among {', '.join(PARTS)}")
    texts = documents(args.megabytes)
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    with tempfile.TemporaryDirectory(prefix="snak-filter-") as name:
        python = args.datatrove_python or installed(Path(name))
        for part in args.parts.split(","):
            result = PARTS[part](texts, Path(name), python)
            found[part] = {**result, "machine": machine(), "date": time.strftime("%F")}
            print(part, json.dumps(found[part], indent=1), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
