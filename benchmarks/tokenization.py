"""python benchmarks/tokenization.py [--megabytes 1000] [--workers 2] [--text demo/text] [--output …/tokenize.json]

Tokenising JSON lines: the whole command against a multiprocessing `imap` over sentencepiece that writes document by
document (what upstream's tool does), against datatrove's tokenizer stage with the same vocabulary, and under the
ceiling of the bare encoder with its own JSON reader. Each runs on a tenth of the corpus and on all of it; the
difference is the steady state, without start-up. Tiny tasks, of 200,000 documents of a few words and of one document,
run against sentencepiece itself on all documents in one call. The corpus is sampled from --text, with so many words
changed that some are always new; a 32,000-piece Llama-style model is trained on it. Writes the numbers and the machine.

Not named tokenize.py, which would hide Python's own module of that name from everything started in this folder.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

PROJECT = Path(__file__).resolve().parent.parent
LETTERS = "abcdefghijklmnoprstuvyæøå"
CHANGED_WORDS = 0.05
UPSTREAM = """
import json, multiprocessing, struct, sys
import numpy as np, sentencepiece

def start(model):
    global processor
    processor = sentencepiece.SentencePieceProcessor(model_file=model)

def encode(line):
    return processor.encode(json.loads(line)["text"])

if __name__ == "__main__":
    model, prefix, workers, *parts = sys.argv[1:]
    lines = (line for part in parts for line in open(part, encoding="utf-8"))
    sizes = []
    with multiprocessing.Pool(int(workers), start, [model]) as pool, open(prefix + ".bin", "wb") as file:
        for ids in pool.imap(encode, lines, 64):
            ids.append(2)
            array = np.array(ids, dtype=np.uint16)
            file.write(array.tobytes(order="C"))
            sizes.append(len(ids))
    ends = np.cumsum(sizes, dtype=np.int64)
    with open(prefix + ".idx", "wb") as file:
        file.write(b"MMIDIDX\\0\\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1))
        file.write(np.array(sizes, dtype=np.int32).tobytes())
        file.write(((ends - sizes) * 2).tobytes())
        file.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())
    print(json.dumps({"tokens": int(ends[-1])}))
"""
"""Upstream's way: a line to a worker, ids back by pickle, an array and a write a document."""
DATATROVE = """
import json, pathlib, sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    model, folder, workers, parts = sys.argv[1:]
    LocalPipelineExecutor(
        [JsonlReader(parts), DocumentTokenizer(folder + "/tokens", model, eos_token="</s>", shuffle_documents=False)],
        tasks=int(workers), workers=int(workers), logging_dir=folder + "/logs",
    ).run()
    print(json.dumps({"tokens": sum(path.stat().st_size for path in pathlib.Path(folder, "tokens").glob("*.ds")) // 2}))
"""
PLAIN = """
import json, sys
import numpy as np, sentencepiece

model, prefix, workers, part = sys.argv[1:]
processor = sentencepiece.SentencePieceProcessor(model_file=model)
texts = [json.loads(line)["text"] for line in open(part, encoding="utf-8")]
documents = processor.encode(texts, num_threads=int(workers))
ids = np.array([token for document in documents for token in (*document, 2)], dtype=np.uint16)
ids.tofile(prefix + ".bin")
print(json.dumps({"tokens": len(ids)}))
"""
"""The plain library: everything in memory, one call, one write."""
CEILING = """
import json, sys, time
import gigatoken
import numpy as np

model, *parts = sys.argv[1:]
tokenizer = gigatoken.Tokenizer.from_sentencepiece(model)
seconds = []
for _ in "cold", "warm":
    started = time.perf_counter()
    layout = tokenizer.encode_files(gigatoken.JsonlFileSource(parts, "text")).layout
    seconds.append(time.perf_counter() - started)
ends = np.asarray(layout.offsets.data)
print(json.dumps({"tokens": int(ends[-1] - ends[0]) + len(ends) - 1, "cold": seconds[0], "warm": seconds[1]}))
"""


def read_text(source: Path) -> list[str]:
    """The lines of a .txt or .txt.gz file, or of the .txt files of a folder."""
    paths = sorted(source.rglob("*.txt")) if source.is_dir() else [source]
    lines = []
    for path in paths:
        content = path.read_bytes()
        lines += (gzip.decompress(content) if path.suffix == ".gz" else content).decode().split("\n")
    return [line for line in lines if line.strip()]


def documents(lines: list[str], size: int) -> Iterator[str]:
    """Documents of one to eight lines, `size` bytes in all, with one word in twenty changed to one not seen before."""
    source = random.Random(8446)
    made = 0
    while made < size:
        words = " ".join(source.choices(lines, k=source.randrange(1, 9))).split(" ")
        for _ in range(round(len(words) * CHANGED_WORDS + source.random())):
            place = source.randrange(len(words))
            cut = source.randrange(len(words[place]) + 1)
            words[place] = words[place][:cut] + "".join(source.choices(LETTERS, k=5)) + words[place][cut:]
        text = " ".join(words)
        made += len(text.encode())
        yield text


def write_parts(texts: Iterator[str], folder: Path, parts: int) -> dict[str, Any]:
    """Deal the documents to `parts` files of JSON lines; their bytes of text and the share of words new at the end."""
    folder.mkdir()
    size = count = 0
    seen: set[int] = set()
    new = recent = 0
    files = [(folder / f"part-{i:05d}.jsonl").open("w", encoding="utf-8") for i in range(parts)]
    for count, text in enumerate(texts, 1):
        files[count % parts].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        size += len(text.encode())
        if size < 100_000_000:  # enough to see the share settle, and little enough to hold
            hashes = set(map(hash, text.split(" ")))
            new, recent = (new, recent) if size % 2 else (new + len(hashes - seen), recent + len(text.split(" ")))
            seen |= hashes
    for file in files:
        file.close()
    return {"documents": count, "megabytes": round(size / 1e6, 1), "new_words_share": round(new / recent, 4)}


def train(lines: Iterator[str], path: Path) -> None:
    """A Llama-style BPE model of 32,000 pieces, or as many as the text gives."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, vocab_size=32000, hard_vocab_limit=False, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2,
        )  # fmt: skip


def forget(parts: list[Path]) -> None:
    """Drop the files from the page cache."""
    for part in parts:
        descriptor = os.open(part, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


ROUNDS = 5
"""Rounds in which the steady rate is held against the ceiling, since one of either swings by a tenth and more."""


def measure(name: str, argv: list[str], **environment: str) -> dict[str, Any]:
    """Run a command to its end: wall-clock and processor seconds, and what its last line of output says."""
    print(f"{name} …", file=sys.stderr, flush=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    return {"seconds": seconds, "processor_seconds": processor, **said}


def steady(
    small: dict[str, Any], large: dict[str, Any], megabytes: tuple[float, float], workers: int
) -> dict[str, Any]:
    """Rates on the whole corpus, and on what it has more than the small one."""
    more = megabytes[1] - megabytes[0]
    rate, cost = more / (large["seconds"] - small["seconds"]), large["processor_seconds"] - small["processor_seconds"]
    return {
        "seconds": round(large["seconds"], 2),
        "tokens": large["tokens"],
        "tokens_per_second": round(large["tokens"] / large["seconds"]),
        "mb_per_second": round(megabytes[1] / large["seconds"], 2),
        "mb_per_second_and_core": round(megabytes[1] / large["seconds"] / workers, 2),
        "steady_mb_per_second": round(rate, 2),
        "steady_mb_per_processor_second": round(more / cost, 2),
    }


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two files are equal."""
    return subprocess.run(["cmp", "--silent", str(a), str(b)]).returncode == 0


def datatrove(folder: Path) -> str:
    """A Python with datatrove, in an environment of its own, and its version."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    packages = ["datatrove[io,processing]", "tokenizers", "orjson"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
    return python


def commands(folder: Path, model: Path, corpus: Path, workers: int, peer: str) -> dict[str, list[str]]:
    """The command line of each contestant on one corpus."""
    name, parts = corpus.name, [str(path) for path in sorted(corpus.iterdir())]
    for script, text in (("upstream.py", UPSTREAM), ("datatrove_stage.py", DATATROVE), ("ceiling.py", CEILING)):
        (folder / script).write_text(text)
    tool = str(PROJECT / "Megatron-LLM" / "tools" / "preprocess_data.py")
    ours = [sys.executable, tool, "--input", f"{corpus}/*.jsonl", "--output_prefix", str(folder / f"ours-{name}")]
    ours += ["--tokenizer_type", "SentencePieceTokenizer", "--vocab_file", str(model), "--no_new_tokens"]
    ours += ["--append_eod", "--workers", str(workers), "--tokenizer_backend", "gigatoken"]
    trove = [peer, str(folder / "datatrove_stage.py"), str(folder / "hf" / "tokenizer.json")]
    upstream = [sys.executable, str(folder / "upstream.py"), str(model)]
    return {
        "ours": ours,
        "upstream": [*upstream, str(folder / f"up-{name}"), str(workers), *parts],
        "datatrove": [*trove, str(folder / f"trove-{name}"), str(workers), str(corpus)],
        "ceiling": [sys.executable, str(folder / "ceiling.py"), str(model), *parts],
    }


def tiny(folder: Path, model: Path, lines: list[str], workers: int) -> dict[str, Any]:
    """Seconds and processor seconds (median of five runs in turns) of tiny tasks, here and in sentencepiece itself."""
    script, source = folder / "plain.py", random.Random(1)
    script.write_text(PLAIN)
    words = " ".join(lines).split(" ")
    tool = [sys.executable, str(PROJECT / "Megatron-LLM" / "tools" / "preprocess_data.py")]
    found: dict[str, Any] = {}
    for count in (200_000, 1):
        part, name = folder / f"tiny-{count}.jsonl", f"{count}_documents"
        texts = (" ".join(source.choices(words, k=source.randrange(1, 5))) for _ in range(count))
        part.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
        ours = [*tool, "--input", str(part), "--output_prefix", str(folder / name), "--vocab_file", str(model)]
        ours += ["--tokenizer_type", "SentencePieceTokenizer", "--no_new_tokens", "--append_eod"]
        ours += ["--workers", str(workers)]
        plain = [sys.executable, str(script), str(model), str(folder / f"plain-{count}"), str(workers), str(part)]
        runs = [(measure(name, ours), measure(f"{name}, plain", plain)) for _ in range(5)]
        assert same_bytes(folder / f"{name}_text_document.bin", folder / f"plain-{count}.bin"), "bytes differ"
        found[name] = {who: middle([pair[k] for pair in runs]) for k, who in enumerate(("ours", "plain"))}
    imports = [sys.executable, "-c", "import numpy, pyarrow.compute, pyarrow.json, sentencepiece, tokenizers"]
    found["imports"] = middle([measure("imports", imports) for _ in range(5)])
    return found


def middle(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The median of what runs took."""
    return {name: round(float(np.median([run[name] for run in runs])), 2) for name in ("seconds", "processor_seconds")}


def contest(folder: Path, megabytes: int, workers: int, text: Path) -> dict[str, Any]:
    """Everything, below a folder that the caller removes."""
    lines, model = read_text(text), folder / "tokenizer.model"
    corpora = [write_parts(documents(lines, megabytes * 10**5 * k), folder / f"x{k}", workers) for k in (1, 10)]
    train(documents(lines, min(10**7, megabytes * 10**5)), model)
    from megatron_llm.tokenizer import hf_export

    (folder / "hf").mkdir()
    hf_export.save(folder / "hf", model, 4096)
    peer = datatrove(folder / "venv")
    small, large = (commands(folder, model, folder / name, workers, peer) for name in ("x1", "x10"))
    sizes = corpora[0]["megabytes"], corpora[1]["megabytes"]
    forget(sorted((folder / "x10").iterdir()))
    cold = measure("ours, corpus not in memory", large["ours"])
    threads = {"RAYON_NUM_THREADS": str(workers)}
    found = {name: (measure(name, small[name], **threads), measure(name, large[name], **threads)) for name in large}
    for run, name in zip(found["ours"], ("x1", "x10"), strict=True):
        run["tokens"] = json.loads((folder / f"ours-{name}_text_document.json").read_text())["tokens"]
    for suffix in ("bin", "idx"):
        assert same_bytes(folder / f"ours-x10_text_document.{suffix}", folder / f"up-x10.{suffix}"), "bytes differ"
    rates = {name: steady(*runs, sizes, workers) for name, runs in found.items() if name != "ceiling"}
    del rates["datatrove"]["steady_mb_per_processor_second"]  # its fork server's children are not counted
    ceiling = found["ceiling"][1]
    shares = [share_of_ceiling(small, large, sizes, threads) for _ in range(ROUNDS)]
    return {
        "corpus": {
            **corpora[1],
            "vocabulary": sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size(),
        },
        "workers": workers,
        **rates,
        "tiny": tiny(folder, model, lines, workers),
        "ours_cold_disk_seconds": round(cold["seconds"], 2),
        "ceiling": {
            "tokens": ceiling["tokens"],
            "cold_mb_per_second": round(sizes[1] / ceiling["cold"], 2),
            "warm_mb_per_second": round(sizes[1] / ceiling["warm"], 2),
        },
        "same_bytes_as_upstream": True,
        "same_tokens_as_datatrove": rates["datatrove"]["tokens"] == rates["ours"]["tokens"],
        "ratio_to_upstream": round(rates["upstream"]["seconds"] / rates["ours"]["seconds"], 2),
        "ratio_to_upstream_steady": ratio(rates, "upstream"),
        "ratio_to_datatrove": round(rates["datatrove"]["seconds"] / rates["ours"]["seconds"], 2),
        "ratio_to_datatrove_steady": ratio(rates, "datatrove"),
        "part_of_ceiling": round(float(np.median(shares)), 2),
        "parts_of_ceiling": [round(share, 2) for share in shares],
    }


def share_of_ceiling(
    small: dict[str, list[str]],
    large: dict[str, list[str]],
    sizes: tuple[float, float],
    threads: dict[str, str],
) -> float:
    """Our steady rate as a share of the bare encoder's, both measured in turn."""
    few, many = (measure("ours", one["ours"], **threads) for one in (small, large))
    bare = measure("ceiling", large["ceiling"], **threads)
    rate = (sizes[1] - sizes[0]) / (many["seconds"] - few["seconds"])
    return rate / (sizes[1] / bare["cold"])


def ratio(rates: dict[str, dict[str, Any]], name: str) -> float:
    """How many times our steady rate is another's."""
    return round(rates["ours"]["steady_mb_per_second"] / rates[name]["steady_mb_per_second"], 2)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "sentencepiece": sentencepiece.__version__,
    }
    return {"load": round(os.getloadavg()[0], 1), "cpu": model, "cores": os.cpu_count(), **versions}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="text in the whole corpus")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--text", type=Path, default=PROJECT / "demo" / "text", help="folder, .txt or .txt.gz")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "tokenize.json")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tokens-", dir="/tmp"))
    try:
        before = machine()
        found = contest(folder, args.megabytes, args.workers, args.text)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found |= {"machine": before, "date": time.strftime("%F")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
