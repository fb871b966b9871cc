"""python benchmarks/index.py [--documents 20000000] [--epochs 1.3] [--output benchmarks/results/index.json]

The index stage on a synthetic corpus (random lengths of 57 tokens in the mean, as in the published run; a sparse .bin):
seconds and peak memory of tools/build_index.py, and seconds and memory of one rank of training that opens its index.
Measured at a quarter of the documents too, so that the line through both gives what 350 million documents take. Writes
the numbers with the machine they were measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llm.data.indexed_dataset import HEADER, MAGIC, pointers_after
from megatron_llm.flags.parser import parse
from megatron_llm.training import batches

BUILD = Path(__file__).parents[1] / "Megatron-LLM" / "tools" / "build_index.py"
BLOCK, MEAN, SEQ_LENGTH, GLOBAL_BATCH = 1 << 22, 57, 4096, 512
PUBLISHED = 350_000_000


def corpus(prefix: Path, documents: int) -> int:
    """Write an .idx of so many documents and a .bin of holes; gives the number of tokens."""
    random = np.random.default_rng(0)
    sizes = np.maximum(1, random.exponential(MEAN, documents)).astype("<i4")
    end = 0
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        sizes.tofile(file)
        for start in range(0, documents, BLOCK):
            pointers, end = pointers_after(end, sizes[start : start + BLOCK], 2)
            file.write(pointers.tobytes())
        for start in range(0, documents + 1, BLOCK):
            file.write(np.arange(start, min(start + BLOCK, documents + 1), dtype="<i8").tobytes())
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(end)
    return end // 2


def build(argv: list[str]) -> dict[str, float]:
    """Seconds (wall clock, CPU) and peak resident memory of the script."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(BUILD), *argv])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"build_index.py failed with status {status}")
    seconds = round(time.perf_counter() - began, 2)
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak_gb": usage.ru_maxrss / 1e6}


def open_index(argv: list[str]) -> dict[str, float]:
    """Seconds to find and to open the index in this process, and the memory of its own that this took."""
    args = parse([*argv, "--save", "unused", "--lr", "1", "--micro_batch_size", "1"])
    before, began = own_memory(), time.perf_counter()
    found = batches.find_indices(args, GLOBAL_BATCH)
    verified = time.perf_counter()
    train, _ = batches.datasets(args, GLOBAL_BATCH, found)
    opened = time.perf_counter()
    assert len(train[0]) == SEQ_LENGTH + 1
    own = (own_memory() - before) / 1e6
    return {"find_seconds": round(verified - began, 2), "open_seconds": round(opened - verified, 2), "own_mb": own}


def own_memory() -> int:
    """Bytes of resident memory that are no mapped file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def measure(documents: int, epochs: float) -> dict[str, Any]:
    """Build and open, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        tokens = corpus(prefix, documents)
        iterations = max(1, int(epochs * tokens) // (SEQ_LENGTH * GLOBAL_BATCH))
        argv = ["--data_path", str(prefix), "--index_path", f"{folder}/index", "--split", "1", "--eval_iters", "0"]
        argv += ["--seq_length", str(SEQ_LENGTH), "--global_batch_size", str(GLOBAL_BATCH)]
        argv += ["--train_iters", str(iterations)]
        return {"documents": documents, "tokens": tokens, "build": build(argv), "rank": open_index(argv)}


def at_published(measured: list[dict[str, Any]], part: str, name: str) -> float:
    """A number on the line through the two measurements."""
    (n, low), (m, high) = ((one["documents"], one[part][name]) for one in measured)
    return round(float(low + (high - low) / (m - n) * (PUBLISHED - n)), 1)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--epochs", type=float, default=1.3, help="passes over the data")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "index.json")
    args = parser.parse_args()
    found: dict[str, Any] = {"epochs": args.epochs}
    found["measured"] = [measure(documents, args.epochs) for documents in (args.documents // 4, args.documents)]
    found["350 million documents"] = {
        "build_seconds": at_published(found["measured"], "build", "seconds"),
        "build_cpu_seconds": at_published(found["measured"], "build", "cpu"),
        "build_peak_gb": at_published(found["measured"], "build", "peak_gb"),
        "open_seconds": at_published(found["measured"], "rank", "open_seconds"),
    }
    found["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(found, indent=1))
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
