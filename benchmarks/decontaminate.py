"""python benchmarks/decontaminate.py [--megabytes 30] [--parts decontaminate,lines,memory] [--datatrove-python PYTHON]

The steps that compare documents with other texts, on real text (deterministic):
  decontaminate   `python -m snakmodel.filter decontaminate` against a set of n-grams in plain Python and against
                  datatrove's NGramsDecontFilter, rounds of all in turns; which documents are hit is compared
  lines           the commands `dedup lines count` and `frequent`, and the step `lines`, against a Counter in Python
  memory          the peak of memory of `count` and `frequent` on synthetic shards of several sizes
Rates are megabytes of text per second of processor time. Ours reads and writes Arrow shards; the others have their
texts in memory. datatrove and spaCy are installed into an environment of their own unless one is given. Writes the
numbers with the machine they were measured on; parts that are not run keep their earlier numbers.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
from dedup import lines
from submit import machine

from run_contract.entry_point import run_main
from snakmodel.config.sections import PROJECT
from snakmodel.dedup.lines.count import count
from snakmodel.dedup.lines.frequent import frequent
from snakmodel.filter.decontaminate.items import Evaluation
from snakmodel.filter.decontaminate.step import Decontaminate
from snakmodel.filter.lines import FrequentLines, LinesStep
from snakmodel.filter.shard import filter_shard
from snakmodel.shards.arrow_stream import SCHEMA, Rows, open_stream, write_stream

PACKAGES = ("datatrove[io,processing]==0.10.1", "spacy")
ROUNDS = 5
NGRAM, ITEMS, LEAKED = 13, 5000, 100
"""The words of a gram, the items, and how many of these are lines of the documents; the others are shuffled lines."""
SAMPLE, SPACY_SAMPLE = 1500, 60
"""How many documents the others work on in each round."""
WORD = re.compile(r"[^\W_]+")
MEASURED = """
import re, sys, threading, time
from pathlib import Path
from snakmodel.dedup.lines.commands import run

peak, status = [0], Path("/proc/self/status")
def watch():
    while True:
        peak[0] = max(peak[0], int(re.search(r"RssAnon:\\s+(\\d+)", status.read_text())[1]))
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.05)
run(sys.argv[1:])
print(peak[0])
"""
"""Runs a command, and prints the peak of its anonymous memory in kB, which leaves out the mapped input."""


def documents(megabytes: float) -> list[str]:
    """Documents of 1 to 40 real lines."""
    random_, source = random.Random(21), lines()
    made, size = [], 0
    while size < megabytes * 1e6:
        made.append("\n".join(random_.choices(source, k=random_.randint(1, 40))))
        size += len(made[-1].encode())
    return made


def items() -> list[str]:
    """Items of at least NGRAM words: a few lines as they are, and others with their words in another order."""
    random_ = random.Random(22)
    long = sorted({line for line in lines() if len(WORD.findall(line)) >= NGRAM})
    chosen = random_.choices(long, k=ITEMS)
    return [
        line if place < LEAKED else " ".join(random_.sample(line.split(), len(line.split())))
        for place, line in enumerate(chosen)
    ]


def write(path: Path, texts: list[str]) -> Path:
    """Write a shard."""
    columns = [pa.array(texts, pa.large_string()), pa.array(["a"] * len(texts))]
    write_stream(path, SCHEMA, pa.table(columns, schema=SCHEMA).to_batches(max_chunksize=1000))
    return path


def megabytes_of(texts: list[str]) -> float:
    """The size of texts."""
    return sum(len(text.encode()) for text in texts) / 1e6


def plain_grams(text: str) -> set[str]:
    """The n-grams of a text in plain Python."""
    words = WORD.findall(text.lower())
    return {" ".join(words[first : first + NGRAM]) for first in range(len(words) - NGRAM + 1)}


def plain_hits(texts: list[str], grams: set[str]) -> list[bool]:
    """Which texts have one of the n-grams, in plain Python."""
    found = []
    for text in texts:
        words = WORD.findall(text.lower())
        found.append(any(" ".join(words[at : at + NGRAM]) in grams for at in range(len(words) - NGRAM + 1)))
    return found


def rates(runs: dict[str, Callable[[int], tuple[float, float]]], ours: str, others: Sequence[str]) -> dict[str, Any]:
    """Megabytes per second of processor time, the median of rounds in turns, and how many times as fast ours is."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS):
        for name, run in runs.items():
            megabytes, seconds = run(round_)
            found[name].append(megabytes / seconds)
    result: dict[str, Any] = {"mb_per_second": {name: round(median(values), 2) for name, values in found.items()}}
    for name in others:
        ratios = [one / other for one, other in zip(found[ours], found[name], strict=True)]
        result[f"ratio_to_{name}"] = [round(number, 1) for number in (median(ratios), min(ratios), max(ratios))]
    return result


def timed(work: Callable[[], Any], megabytes: float) -> tuple[float, float]:
    """The megabytes, and the seconds of processor time that the work took."""
    started = time.process_time()
    work()
    return megabytes, time.process_time() - started


def decontaminate(texts: list[str], folder: Path, python: str) -> dict[str, Any]:
    """The step in its three modes against a set of n-grams and datatrove."""
    chosen = items()
    shard, size = write(folder / "in.arrow", texts), megabytes_of(texts)
    files = [Evaluation("items.jsonl", list(range(1, ITEMS + 1)), chosen)]
    steps = {mode: Decontaminate(files, NGRAM, mode) for mode in ("mark", "remove", "cut")}
    grams = set().union(*map(plain_grams, chosen))
    given = folder / "given.json"
    given.write_text(json.dumps({"items": chosen, "texts": texts, "ngram": NGRAM}))
    script = Path(__file__).parent / "peers" / "datatrove_decontaminate.py"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    peer = subprocess.Popen([python, str(script), str(given)], **pipes)

    def ask(own: bool, first: int, stop: int) -> tuple[float, list[bool]]:
        assert peer.stdin
        assert peer.stdout
        peer.stdin.write(json.dumps([own, first, stop]) + "\n")
        peer.stdin.flush()
        seconds, removed = json.loads(peer.stdout.readline())
        return seconds, removed

    def datatrove(own: bool, sample: int) -> Callable[[int], tuple[float, float]]:
        def run(round_: int) -> tuple[float, float]:
            first = round_ * sample
            return megabytes_of(texts[first : first + sample]), ask(own, first, first + sample)[0]

        return run

    def ours(mode: str) -> Callable[[int], tuple[float, float]]:
        return lambda _: timed(lambda: filter_shard(shard, folder / mode, [steps[mode]]), size)

    def plain(round_: int) -> tuple[float, float]:
        part = texts[round_ * SAMPLE : (round_ + 1) * SAMPLE]
        return timed(lambda: plain_hits(part, grams), megabytes_of(part))

    ours("mark")(0)
    ask(True, 0, 1)
    found = rates(
        {
            "mark": ours("mark"),
            "remove": ours("remove"),
            "cut": ours("cut"),
            "plain_python": plain,
            "datatrove_split": datatrove(False, SAMPLE),
            "datatrove_spacy": datatrove(True, SPACY_SAMPLE),
        },
        "remove",
        ("plain_python", "datatrove_split", "datatrove_spacy"),
    )
    with open_stream(folder / "mark.arrow") as reader:
        marked = [bool(names) for names in reader.read_all().column("contaminated").to_pylist()]
    expected = plain_hits(texts, grams)
    _, removed = ask(False, 0, SAMPLE)
    peer.communicate()
    return {
        "documents": len(texts),
        "megabytes": round(size, 1),
        "grams": len(grams),
        "hit": sum(marked),
        "differ_from_plain_python": sum(one != other for one, other in zip(marked, expected, strict=True)),
        "differ_from_datatrove_split": sum(one != other for one, other in zip(marked, removed, strict=False)),
        "of": SAMPLE,
        **found,
    }


def remove_lines(texts: list[str], folder: Path, python: str) -> dict[str, Any]:
    """The three commands on one shard, and what a Counter in plain Python takes to count the same lines."""
    shard, size = write(folder / "shard-00000.arrow", texts), megabytes_of(texts)
    counts, often = folder / "counts", folder / "frequent"

    def work() -> None:
        count(Rows(shard), counts / "shard-00000", 1)

    def find() -> None:
        frequent(counts, 1, 0, 100, often / "range-00000")

    def filtered() -> None:
        filter_shard(shard, folder / "out", [LinesStep(FrequentLines(often, 1))])

    def plain() -> None:
        found = Counter(line.strip() for text in texts for line in text.split("\n") if line.strip())
        assert (
            sum(number >= 100 for number in found.values())
            == json.loads((often / "range-00000.json").read_text())["records"]
        )

    for one in (work, find, filtered):
        one()
    runs = {"count": work, "frequent": find, "step": filtered, "counter_in_python": plain}
    timers = {name: lambda _, run=run: timed(run, size) for name, run in runs.items()}  # type: ignore[misc]
    found = rates(timers, "count", ["counter_in_python"])
    told = json.loads((folder / "out.json").read_text())["steps"]["lines"]
    return {
        "megabytes": round(size, 1),
        "lines": json.loads((counts / "shard-00000.json").read_text())["lines"],
        **{f"removed_{key}": told[key] for key in ("lines", "bytes", "emptied")},
        **found,
    }


def memory(texts: list[str], folder: Path, python: str) -> dict[str, Any]:
    """The peak of memory of `count` and `frequent` in megabytes, without mapped files, by the number of lines."""

    def peak(*words: str) -> float:
        done = subprocess.run([sys.executable, "-c", MEASURED, *words], check=True, capture_output=True, text=True)
        return round(int(done.stdout.split()[-1]) / 1024)

    found: dict[str, dict[str, float]] = {"count_mb_by_lines": {}, "frequent_mb_by_lines": {}}
    for million in (1, 4, 12):
        path, counts = folder / "in.arrow", folder / f"counts-{million}"
        made = ("\n".join(f"linje {number}" for number in range(at, at + 100)) for at in range(0, million * 10**6, 100))
        write(path, list(made))
        flags = ("--input", str(path), "--ranges", "1", "--output", f"{counts}/shard-00000")
        found["count_mb_by_lines"][f"{million}M"] = peak("count", *flags)
        flags = ("--counts", str(counts), "--shards", "1", "--range", "0", "--min", "2")
        found["frequent_mb_by_lines"][f"{million}M"] = peak("frequent", *flags, "--output", f"{folder}/range-00000")
    (one,) = (folder / "counts-1").glob("*.lines")
    for shard in range(1, 50):
        for suffix in (".lines", ".json"):
            one.with_name(f"shard-{shard:05d}{suffix}").hardlink_to(one.with_suffix(suffix))
    flags = ("--counts", str(one.parent), "--shards", "50", "--range", "0", "--min", "51")
    found["frequent_mb_by_lines"]["50 shards of 1M"] = peak("frequent", *flags, "--output", f"{folder}/range-00000")
    return found


PARTS: dict[str, Callable[[list[str], Path, str], dict[str, Any]]] = {
    "decontaminate": decontaminate,
    "lines": remove_lines,
    "memory": memory,
}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=30, help="text to measure on (default: %(default)g)")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--datatrove-python", help="a Python that has datatrove and spacy (default: install them)")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "decontaminate.json")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if wrong := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(wrong))} is not among {', '.join(PARTS)}")
    texts = documents(args.megabytes)
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    with tempfile.TemporaryDirectory(prefix="snak-decontaminate-") as name:
        python = args.datatrove_python
        if python is None and "decontaminate" in parts:
            python = str(Path(name) / "venv" / "bin" / "python")
            subprocess.run([sys.executable, "-m", "venv", str(Path(name) / "venv")], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        for part in parts:
            folder = Path(name) / part
            folder.mkdir()
            found[part] = {**PARTS[part](texts, folder, python), "machine": machine(), "date": time.strftime("%F")}
            print(part, json.dumps(found[part], indent=1), flush=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
