"""python benchmarks/dedup.py [--documents 1000000] [--synthetic 20000000] [--parts signatures,command,datatrove,scale]

Near-deduplication against the programs it replaces, on documents made by mutation of real text (deterministic):
  signatures   documents a second on one core, against text-dedup's embed_func, rounds of both interleaved
  command      the whole command against `python -m text_dedup.minhash`: seconds, memory, and the clusters compared
  datatrove    datatrove's four MinHash stages (installed into a venv of its own) at the same bands and rows
  scale        synthetic signatures through buckets and components: seconds and memory a task, and what 350 million
               documents would take
  verify       --verify_jaccard on copies of one form in one bucket: processor seconds at doubling numbers of documents
Memory of a program is the sum of the proportional set sizes (PSS) of its processes, sampled. Writes the numbers with
the machine they were measured on; parts that are not run keep their earlier numbers.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
from submit import machine

from run_contract.entry_point import run_main
from snakmodel.config.sections import PROJECT
from snakmodel.dedup.jaccard import Verifier
from snakmodel.dedup.minhash.hasher import BandHasher
from snakmodel.dedup.minhash.parameters import RECORD, Parameters
from snakmodel.dedup.signature_file import SignatureWriter

PARTS = ("signatures", "command", "datatrove", "scale", "verify")
CORES = len(os.sched_getaffinity(0))
RECIPE = Parameters(short_docs="drop")
BANDS, ROWS = RECIPE.banding()
FLAGS = "--split train --column text --seed 42 --batch_size 4096 --num_perm 64 --threshold 0.85"
GOAL = 350_000_000
SHARDS, RANGES = 16, 16
"""Of the synthetic signatures: a range of 20 million documents has as many keys as one of 350 million in 256."""


def lines() -> list[str]:
    """Real text: the shared corpus where it is there, else the demonstration's."""
    shared = PROJECT.parent / "shared" / "data" / "danish_help_text.txt.gz"
    if shared.is_file():
        with gzip.open(shared, "rt", encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    files = sorted((PROJECT / "demo" / "text").rglob("*.txt"))
    return [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def documents(count: int) -> list[str]:
    """Documents of a few lines with a word in ten replaced; a third are earlier ones, a few words changed or none."""
    random_, source = random.Random(8), lines()
    words = sorted({word for line in source for word in line.split()})
    made: list[str] = []
    while len(made) < count:
        if made and random_.random() < 1 / 3:
            chosen, changes = made[random_.randrange(len(made))].split(), random_.randint(0, 3)
        else:
            chosen = " ".join(random_.choices(source, k=random_.randint(1, 5))).split()
            changes = len(chosen) // 10
        for _ in range(changes):
            chosen[random_.randrange(len(chosen))] = random_.choice(words)
        made.append(" ".join(chosen))
    return made


class Memory(threading.Thread):
    """The peak of the summed PSS, in bytes, of the processes of a session."""

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self.session, self.peak, self.ended = session, 0, threading.Event()

    def run(self) -> None:
        """Sample until told to end."""
        while not self.ended.wait(0.1):
            self.peak = max(self.peak, sum(map(self.pss, Path("/proc").glob("[0-9]*"))))

    def pss(self, process: Path) -> int:
        """The PSS of one process, 0 if it is of another session or gone."""
        try:
            if int((process / "stat").read_text().rsplit(")", 1)[1].split()[3]) != self.session:
                return 0
            rollup = (process / "smaps_rollup").read_text()
            return 1024 * int(rollup.split("\nPss:", 1)[1].split(None, 1)[0])
        except (OSError, IndexError, ValueError):
            return 0


def program(argv: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a program to its end; its seconds and peak memory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(argv, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        memory = Memory(process.pid)
        memory.start()
        code = process.wait()
        seconds = time.perf_counter() - started
        memory.ended.set()
        memory.join()
    if code:
        sys.exit(f"{' '.join(argv)} failed:\n{(folder / 'log').read_text()[-2000:]}")
    return {"seconds": round(seconds, 2), "peak_mb": round(memory.peak / 1e6)}


def signatures(texts: list[str], rounds: int = 7) -> dict[str, Any]:
    """Documents a second on one core; the signatures of the same documents are compared."""
    from text_dedup import minhash as reference

    ours = BandHasher(RECIPE)
    theirs = BandHasherOfReference(reference)
    ours.signatures(pa.array(texts[:10]))
    speeds: dict[str, list[float]] = {"ours": [], "text_dedup": []}
    size = max(1, len(texts) // rounds)
    for first in range(0, rounds * size, size):
        batch = [text for text in texts[first : first + min(size, 40_000)] if len(text.split()) >= RECIPE.min_length]
        sample, array = batch[:1500], pa.array(batch)
        started = time.perf_counter()
        records, _ = ours.records(array, 0)
        middle = time.perf_counter()
        expected = [theirs(text) for text in sample]
        ended = time.perf_counter()
        assert len(records) == BANDS * len(batch)
        assert (ours.signatures(pa.array(sample))[:, : BANDS * ROWS] == np.array(expected)).all()
        speeds["ours"].append(len(batch) / (middle - started))
        speeds["text_dedup"].append(len(sample) / (ended - middle))
    found = {f"{name}_documents_a_second": round(median(values)) for name, values in speeds.items()}
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["text_dedup"], strict=True)]
    return {**found, "rounds": rounds, "ratio": round(median(ratios), 1), "ratios": [round(one, 1) for one in ratios]}


class BandHasherOfReference:
    """text-dedup's embed_func with the arguments that its command gives it."""

    def __init__(self, reference: Any) -> None:
        prime = np.uint64((1 << 61) - 1)
        random_ = np.random.RandomState(42)
        draw = {"size": RECIPE.num_perm, "dtype": np.uint64}
        self.embed = reference.embed_func
        self.arguments = {
            "num_perm": RECIPE.num_perm,
            "ngram_size": RECIPE.ngram,
            "min_length": RECIPE.min_length,
            "hashranges": [(band * ROWS, (band + 1) * ROWS) for band in range(BANDS)],
            "permutations": (random_.randint(1, prime, **draw), random_.randint(0, prime, **draw)),
            "hash_func": lambda data: reference.sha1_hash(data, d=32),
            "dtype": np.uint64,
            "max_hash": np.uint32((1 << 32) - 1),
            "modulo_prime": prime,
        }

    def __call__(self, text: str) -> np.ndarray:
        bands = self.embed(text, 0, **self.arguments)["__signatures__"]
        return np.concatenate([np.frombuffer(band, ">u8") for band in bands])


def command(texts: list[str], folder: Path) -> dict[str, Any]:
    """The published command line with our program and with text-dedup; both also write their clusters."""
    import datasets

    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "ours"))
    shutil.copytree(folder / "ours", folder / "theirs")
    found = {}
    for name, module in (("ours", "snakmodel.dedup"), ("theirs", "text_dedup.minhash")):
        words = f"--path {name} --local --output {name}-out {FLAGS} --num_proc {CORES} --debug".split()
        found[name] = program([sys.executable, "-m", module, *words], folder)
        print(name, found[name], flush=True)
    labels = pa.parquet.read_table(folder / "ours-out" / "clusters.parquet")["cluster"].to_pylist()
    sets = pickle.loads((folder / "theirs-out" / "uf.pkl").read_bytes())
    theirs = {number: sets.find(number) for number in list(sets.parent)}
    pairs = {(label, theirs.get(number, number)) for number, label in enumerate(labels) if label is not None}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}), "the clusters differ"
    kept = [len(datasets.load_from_disk(str(folder / f"{name}-out"))) for name in ("ours", "theirs")]
    assert kept[0] == kept[1] == len(pairs)
    ratios = {f"{key}_ratio": round(found["theirs"][key] / found["ours"][key], 1) for key in ("seconds", "peak_mb")}
    return {**found, **ratios, "documents": len(texts), "kept": kept[0], "processes": CORES}


DATATROVE = f"""
import sys
from datatrove.executor.local import LocalPipelineExecutor as Executor
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.typeshelper import Languages

def run(name, pipeline, tasks):
    Executor(pipeline=pipeline, tasks=tasks, workers={CORES}, logging_dir=f"logs/{{name}}").run()

if __name__ == "__main__":
    tasks = int(sys.argv[1])
    config = MinhashConfig(n_grams={RECIPE.ngram}, num_buckets={BANDS}, hashes_per_bucket={ROWS})
    signed = MinhashDedupSignature("signatures", config=config, language=Languages.danish)
    run("1", [JsonlReader("in"), signed], tasks)
    run("2", [MinhashDedupBuckets("signatures", "buckets", config=config)], {BANDS})
    run("3", [MinhashDedupCluster("buckets", "removed", config=config)], 1)
    run("4", [JsonlReader("in"), MinhashDedupFilter("removed"), JsonlWriter("out", compression=None)], tasks)
"""


def datatrove(texts: list[str], folder: Path, python: str | None) -> dict[str, Any]:
    """datatrove's stages with its local executor, and our command on the same documents."""
    import datasets

    if python is None:
        python = str(folder / "venv" / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        packages = ["datatrove[io,processing]==0.10.1", "spacy"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    version = "import importlib.metadata as m; print(m.version('datatrove'))"
    installed = subprocess.run([python, "-c", version], check=True, capture_output=True, text=True).stdout.strip()
    tasks = 2 * CORES
    (folder / "in").mkdir()
    for task in range(tasks):
        with (folder / "in" / f"{task:05d}.jsonl").open("w", encoding="utf-8") as file:
            for text in texts[len(texts) * task // tasks : len(texts) * (task + 1) // tasks]:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    (folder / "run.py").write_text(DATATROVE)
    theirs = program([python, "run.py", str(tasks)], folder)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "data"))
    words = f"--path data --local --output ours {FLAGS} --num_proc {CORES}".split()
    ours = program([sys.executable, "-m", "snakmodel.dedup", *words], folder)
    kept = {
        "ours": len(datasets.load_from_disk(str(folder / "ours"))),
        "theirs": sum(path.read_bytes().count(b"\n") for path in (folder / "out").glob("*.jsonl")),
    }
    ratios = {f"{key}_ratio": round(theirs[key] / ours[key], 1) for key in ("seconds", "peak_mb")}
    about = {"version": installed, "documents": len(texts), "kept": kept, "processes": CORES}
    return {**about, "bands": BANDS, "rows": ROWS, "ours": ours, "theirs": theirs, **ratios}


def mixed(values: np.ndarray) -> np.ndarray:
    """Different numbers for different uint64 (the finaliser of splitmix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


def synthetic(folder: Path, count: int) -> int:
    """Signature files of which a quarter of the documents share most bands with another; the number of components."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    generator = np.random.default_rng(9)
    numbers = np.arange(count)
    target = np.where(generator.random(count) < 0.25, generator.integers(0, count, count), numbers)
    agrees = generator.random((count, BANDS), np.float32) < 0.7
    for shard in range(SHARDS):
        rows = numbers[count * shard // SHARDS : count * (shard + 1) // SHARDS]
        source = np.where(agrees[rows], target[rows, None], rows[:, None]) * BANDS + np.arange(BANDS)
        records = np.empty(source.size, RECORD)
        records["hi"], records["lo"] = mixed(source.ravel().astype(np.uint64)), source.ravel()
        records["row"] = np.repeat(rows - rows[0], BANDS)
        with (folder / f"shard-{shard:05d}.sig").open("wb") as file:
            writer = SignatureWriter(file, RANGES)
            writer.add(records, np.empty(0, np.uint32))
            about = {"documents": len(rows), "short_documents": 0, "dropped": 0, "input": f"synthetic {shard}"}
            writer.finish({"parameters": RECIPE.described(), "fingerprint": RECIPE.fingerprint(), **about})
    # two documents are linked if in one band both take the keys of one and the same
    band_keys = [np.where(agrees[:, band], target, numbers) + count * (band + 1) for band in range(BANDS)]
    graph = coo_array(
        (np.ones(BANDS * count, bool), (np.tile(numbers, BANDS), np.concatenate(band_keys))),
        shape=(count * (BANDS + 1), count * (BANDS + 1)),
    )
    components, labels = connected_components(graph, directed=False)
    del graph, components
    return len(np.unique(labels[:count]))


def scale(folder: Path, count: int) -> dict[str, Any]:
    """Every task of buckets and components, one after the other; the result against SciPy's components."""
    (folder / "signatures").mkdir()
    expected = synthetic(folder / "signatures", count)
    step = [sys.executable, "-m", "snakmodel.dedup"]
    common = ["--signatures", str(folder / "signatures"), "--shards", str(SHARDS)]
    tasks = []
    for part in range(RANGES):
        output = str(folder / "buckets" / f"range-{part:05d}")
        tasks.append(program([*step, "buckets", *common, "--range", str(part), "--output", output], folder))
    links = sum(json.loads(path.read_text())["links"] for path in (folder / "buckets").glob("*.json"))
    words = ["--buckets", str(folder / "buckets"), "--ranges", str(RANGES), "--output", str(folder / "components")]
    joined = program([*step, "components", *common, *words], folder)
    assert json.loads((folder / "components" / "stats.json").read_text())["kept"] == expected
    slowest = {key: max(one[key] for one in tasks) for key in ("seconds", "peak_mb")}
    factor = GOAL / count
    ranges = round(RANGES * factor)
    extrapolated = {
        "documents": GOAL,
        "buckets": {"tasks": ranges, **slowest},
        "components": {
            "seconds": round(joined["seconds"] * factor),
            "memory_mb": round((GOAL - count) * 8 / 1e6 + joined["peak_mb"]),
        },
    }
    return {
        "documents": count,
        "keys": BANDS * count,
        "kept": expected,
        "links": links,
        "buckets": {"tasks": RANGES, "median_seconds": median(one["seconds"] for one in tasks), **slowest},
        "components": joined,
        "extrapolated": extrapolated,
    }


FORMS = {"filled in, similar": (2, 0), "filled in, not similar": (10, 0), "with more or less text": (5, 60)}
"""Of a form of 400 words: the places filled in, and the most words of a document's own after it."""


def verify(counts: Sequence[int] = (4000, 8000, 16_000)) -> dict[str, Any]:
    """What comparing the documents of a bucket takes beyond making their sets of n-grams."""
    found: dict[str, Any] = {}
    parameters = {"threshold": 0.85, "ngram": 5, "min_length": 5, "compat": "text-dedup-0.4.0"}
    for name, (places, tail) in FORMS.items():
        found[name] = {}
        for count in counts:
            texts = [form(number, places, tail) for number in range(count)]
            verifier = Verifier(texts, parameters)  # type: ignore[arg-type]
            started = time.process_time()
            for text in texts:
                verifier.grams(text)
            middle = time.process_time()
            links = verifier.links(np.arange(count))
            ended = time.process_time()
            seconds = {"all": round(ended - middle, 2), "comparing": round(ended - 2 * middle + started, 2)}
            found[name][str(count)] = {"seconds": seconds, "links": len(links)}
    return found


def form(number: int, places: int, tail: int) -> str:
    """One copy."""
    words = [f"ord{word}" for word in range(400)]
    for place in range(places):
        words[place * len(words) // places + 3] = f"nr{number}felt{place}"
    return " ".join([*words, *(f"nr{number}ord{word}" for word in range(number % (tail + 1)))])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--synthetic", type=int, default=20_000_000, help="documents of part scale")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--datatrove-python", help="a Python that has datatrove and spacy (default: install them)")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "dedup.json")
    args = parser.parse_args()
    if wrong := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(wrong))} is not among {', '.join(PARTS)}")
    texts = documents(args.documents) if set(args.parts.split(",")) - {"scale", "verify"} else []
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    for part in args.parts.split(","):
        with tempfile.TemporaryDirectory(prefix="snak-dedup-") as name:
            folder = Path(name)
            if part == "signatures":
                result = signatures(texts)
            elif part == "command":
                result = command(texts, folder)
            elif part == "datatrove":
                result = datatrove(texts, folder, args.datatrove_python)
            elif part == "scale":
                result = scale(folder, args.synthetic)
            else:
                result = verify()
        found[part] = {**result, "machine": machine(), "date": time.strftime("%F")}
        print(part, json.dumps(found[part], indent=1), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
