"""python benchmarks/prepare.py [--megabytes 1200] [--rounds 3] [--output benchmarks/results/prepare.json]

Text to a Hugging Face dataset on disk: `python -m snakmodel.prepare --data_path … --dataset_names …` against
`datasets.load_dataset("text")` + `save_to_disk`, whole commands, in turns, each with all cores; beside them a copy of
the same bytes as a ceiling, and other formats. Ours waits for the disk (fsync), as the copy does; `datasets` does not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from megatron_llm.data.document_blocks import columns, read_blocks
from run_contract.entry_point import run_main
from run_contract.publish import fsync
from snakmodel.config.sections import PROJECT
from snakmodel.prepare.input_files import FilePart
from snakmodel.prepare.readers import Reading
from snakmodel.prepare.shard_writer import Cleaning, documents
from snakmodel.shards.append_file import append_file

FILES = 4
SMALL = 8
"""The other formats are measured on this part of the text."""
PEER = """
import sys, datasets
source, target, cores = sys.argv[1], sys.argv[2], int(sys.argv[3])
datasets.disable_progress_bars()
options = {"split": "train", "num_proc": cores, "cache_dir": target + "/cache"}
data = datasets.load_dataset("text", data_files=source + "/*.txt", **options)
data.save_to_disk(target + "/data", num_proc=cores)
"""


def make_text(folder: Path, size: int) -> list[Path]:
    """Files of the demonstration's text, again and again, every line numbered so that no two are the same."""
    lines = [
        line
        for path in sorted((PROJECT / "demo" / "text").rglob("*.txt"))
        for line in path.read_text(encoding="utf-8").split("\n")
        if line.strip()
    ]
    folder.mkdir(parents=True)
    paths = [folder / f"{number}.txt" for number in range(FILES)]
    for number, path in enumerate(paths):
        with path.open("w", encoding="utf-8") as file:
            turn = 0
            while file.tell() < size // FILES:
                file.write("".join(f"{line} {number}.{turn}\n" for line in lines))
                turn += 1
    return paths


def run(command: list[str]) -> dict[str, float]:
    """Wall-clock seconds and seconds of CPU of a command and its processes."""
    os.sync()
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}


def ours(source: Path, target: Path) -> dict[str, float]:
    """The whole command on a folder that is one dataset."""
    flags = ["--data_path", str(source.parent), "--dataset_names", source.name, "--output", str(target)]
    return run([sys.executable, "-m", "snakmodel.prepare", *flags])


def peer(source: Path, target: Path) -> dict[str, float]:
    """What a short script with `datasets` does."""
    return run([sys.executable, "-c", PEER, str(source), str(target), str(len(os.sched_getaffinity(0)))])


def copy(source: Path, target: Path) -> dict[str, float]:
    """Read and write all bytes once, and wait for the disk."""
    os.sync()
    started, cpu = time.perf_counter(), time.process_time()
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb") as file, (target / path.name).open("wb") as sink:
            shutil.copyfileobj(file, sink, 1 << 22)
        fsync(target / path.name)
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


def rows(folder: Path) -> int:
    """Rows of the Arrow files of a saved dataset."""
    total = 0
    for path in folder.rglob("*.arrow"):
        if "cache" not in path.parts:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                total += sum(batch.num_rows for batch in reader)
    return total


def in_turns(work: Path, source: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Each way `rounds` times, one after the other, so that a slow minute of the machine meets all of them."""
    ways: dict[str, Callable[[Path, Path], dict[str, float]]] = {"copy": copy, "datasets": peer, "prepare": ours}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    lines = sum(path.read_bytes().count(b"\n") for path in source.iterdir())
    for _ in range(rounds):
        for name, way in ways.items():
            target = work / name
            found[name].append(way(source, target))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
            if name != "copy" and (number := rows(target)) != lines:
                raise SystemExit(f"{name} made {number} documents of {lines} lines")
            shutil.rmtree(target)
    return found


def other_formats(work: Path, paths: list[Path], size: int) -> dict[str, dict[str, float]]:
    """The same text as one file of other formats: seconds, and MB/s of the text in it."""
    with (work / "part.txt").open("wb") as sink:
        append_file(sink, paths[0])
        sink.truncate(size)
    raw = (work / "part.txt").read_bytes()
    raw = raw[: raw.rindex(b"\n") + 1]
    lines = raw.decode().split("\n")[:-1]
    objects = [json.dumps({"id": number, "text": line}, ensure_ascii=False) for number, line in enumerate(lines)]
    for kind in ("jsonl", "gz", "parquet"):
        (work / "formats" / kind).mkdir(parents=True)
    (work / "formats/jsonl/a.jsonl").write_text("\n".join(objects) + "\n", encoding="utf-8")
    (work / "formats/gz/a.txt.gz").write_bytes(gzip.compress(raw, 6))
    pyarrow.parquet.write_table(pa.table({"text": lines}), work / "formats/parquet/a.parquet")
    found = {}
    for kind in ("jsonl", "gz", "parquet"):
        timed = ours(work / "formats" / kind, work / "made")
        found[kind] = {**timed, "MB_per_second": round(len(raw) / 1e6 / timed["seconds"], 1)}
    return found


def long_line(work: Path, size: int) -> dict[str, Any]:
    """Seconds of CPU to read one line of JSON, of half the size and of all of it: it must be twice as long, not four
    times. By prepare's reader and by the tokenizer's.
    """
    path = work / "line.jsonl"

    def prepares() -> int:
        part = FilePart(str(path), "line", 0, path.stat().st_size)
        return sum(len(columns[0]) for columns, _ in documents(part, Reading(), Cleaning()))

    def tokenizers() -> int:
        return sum(len(columns(block, ["text"]).texts["text"]) for block in read_blocks(path, ["text"]))

    found: dict[str, Any] = {"megabytes": [round(size / 2e6, 1), round(size / 1e6, 1)], "prepare": [], "tokenizer": []}
    for part in (size // 2, size):
        path.write_bytes(b'{"text": "' + (b"ord " * (part // 4)) + b'"}\n')
        for name, way in (("prepare", prepares), ("tokenizer", tokenizers)):
            started = time.process_time()
            assert way() == 1
            found[name].append(round(time.process_time() - started, 2))
    path.unlink()
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0))
    packages = {name: version(name) for name in ("datasets", "pyarrow", "numpy")}
    return {
        "load": round(os.getloadavg()[0], 1),
        "cpu": model,
        "cores": cores,
        "python": platform.python_version(),
        **packages,
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the data, on the disk to measure (default: the system's)")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "prepare.json")
    args = parser.parse_args()
    before = machine()
    work = Path(tempfile.mkdtemp(prefix="snak-bench-", dir=args.work))
    try:
        paths = make_text(work / "raw" / "text", args.megabytes * 10**6)
        size = sum(path.stat().st_size for path in paths)
        turns = in_turns(work, work / "raw" / "text", args.rounds)
        others = other_formats(work, paths, size // SMALL)
        line = long_line(work, size * 2 // 3)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = {name: statistics.median(one["seconds"] for one in each) for name, each in turns.items()}
    found = {
        "megabytes": round(size / 1e6, 1),
        "rounds": turns,
        "seconds": seconds,
        "MB_per_second": {name: round(size / 1e6 / value, 1) for name, value in seconds.items()},
        "ratio_to_datasets": round(seconds["datasets"] / seconds["prepare"], 2),
        "share_of_the_copy": round(seconds["copy"] / seconds["prepare"], 2),
        "other_formats": others,
        "cpu_seconds_of_one_long_line": line,
        "machine": before,
        "date": time.strftime("%F"),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_main(main)
