"""python benchmarks/train.py [--sizes tiny,100m] [--rounds 5] [--peers FOLDER] [--parts speed,restart]

Training on the CPU against transformers' Trainer and litgpt's pretrain (each in an environment of its own, made in
--peers unless it is there): the same geometry, tokens, batch, precision (fp32) and threads; tokens a second from the
line of one update to that of a later one, in turns, and the ratio of medians. litgpt compiles the model, the Trainer
does not: each is compared with what is like it. Then the time from the start of the
command to its first update after a restart. Saves have a benchmark of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_llm.data.indexed_dataset import IndexedDatasetWriter
from megatron_llm.data.manifest import Manifest, beside

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "hf_trainer": ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0"),
    "litgpt_pretrain": ("torch==2.13.0", "litgpt==0.5.13", "requests"),
}
FINETUNE = PROJECT / "Megatron-LLM" / "finetune.py"
THREADS = 2
LINE = {
    "ours": re.compile(r" iteration +(\d+)/"),
    "hf_trainer": re.compile(r"step (\d+)$"),
    "litgpt_pretrain": re.compile(r"Epoch .* step (\d+) \|.*\(step\)"),
}
"""What each prints after an update."""
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "ffn_hidden_size": 688,
        "num_layers": 4,
        "num_attention_heads": 4,
        "seq_length": 256,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "steps": 30,
        "warm": 6,
    },
    "100m": {
        "vocab_size": 16000,
        "hidden_size": 768,
        "ffn_hidden_size": 2048,
        "num_layers": 12,
        "num_attention_heads": 12,
        "seq_length": 256,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "steps": 10,
        "warm": 2,
    },
}
CONTESTANTS = {
    "ours": ("ours", False),
    "ours, compiled": ("ours", True),
    "Trainer": ("hf_trainer", False),
    "litgpt": ("litgpt_pretrain", True),
}
"""Which program, and whether the model is compiled."""
LIKE = {"Trainer": "ours", "litgpt": "ours, compiled"}
"""Which of ours each peer is compared with."""


def corpus(prefix: Path, vocab_size: int, samples: int, length: int) -> None:
    """Documents of random tokens, with a manifest that tells the vocabulary."""
    sizes = np.full(samples, length, dtype=np.int32)
    tokens = np.random.default_rng(0).integers(0, vocab_size, int(sizes.sum()), dtype=np.uint16)
    with IndexedDatasetWriter(beside(prefix, ".bin"), beside(prefix, ".idx"), tokens.dtype) as writer:
        writer.add(tokens, sizes)
    manifest = Manifest(
        documents=samples,
        empty_documents=0,
        characters=len(tokens),
        bytes=len(tokens),
        tokens=len(tokens),
        sequences=samples,
        vocab_size=vocab_size,
        tokenizer_fingerprint="benchmark",
        tokenizer_type="SentencePieceTokenizer",
        append_eod=False,
        eod=2,
        dtype="uint16",
    )
    beside(prefix, ".json").write_text(json.dumps(manifest.as_dict()))


def python_of(program: str, peers: Path) -> str:
    """The Python that runs a program; a peer's is made when it is not there."""
    if program == "ours":
        return sys.executable
    folder = peers / program
    if not (folder / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "-q", *PACKAGES[program]], check=True)
        (folder / "done").touch()
    return str(folder / "bin" / "python")


def our_flags(settings: dict[str, Any]) -> list[str]:
    """The command line of finetune.py."""
    same = (
        "hidden_size",
        "ffn_hidden_size",
        "num_layers",
        "num_attention_heads",
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "threads",
    )
    flags = {name: settings[name] for name in same} | {
        "max_position_embeddings": settings["seq_length"],
        "num_workers": settings["workers"],
        "train_iters": settings["steps"],
        "save": settings["folder"],
        "data_path": settings["data"].removesuffix(".bin"),
        "lr": 1e-4,
        "lr_decay_style": "cosine",
        "split": "100,0,0",
        "eval_iters": 0,
        "log_interval": 1,
    }
    compiled = ["--torch_compile"] if settings["compile"] else []
    return [
        *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
        "--no_tie_embed_logits",
        *compiled,
    ]


def timed(command: list[str], pattern: re.Pattern[str]) -> tuple[dict[int, float], str]:
    """Run to the end: seconds after the start at which each update's line came, by its number; and the output."""
    began, seen, output = time.perf_counter(), {}, []
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout
        for line in process.stdout:
            output.append(line)
            if match := pattern.search(line.rstrip()):
                seen[int(match[1])] = time.perf_counter() - began
    text = "".join(output)
    if process.returncode not in (0, 75):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{text[-4000:]}")
    return seen, text


def settings_of(size: dict[str, int], folder: Path, *, compiled: bool) -> dict[str, Any]:
    """What a run is told; its data is made when it is not there."""
    data = folder / f"{size['vocab_size']}.bin"
    if not data.exists():
        samples = size["steps"] * size["global_batch_size"] + 8
        corpus(data.with_suffix(""), size["vocab_size"], samples, size["seq_length"])
    shape = {name: value for name, value in size.items() if name != "warm"}
    more = {"threads": THREADS, "workers": 1, "folder": str(folder / "save"), "data": str(data), "compile": compiled}
    return shape | more


def speed(size: dict[str, int], program: str, compiled: bool, folder: Path, peers: Path) -> dict[str, float]:
    """One run: tokens a second after the warm-up, and seconds from the start of the command to its first update."""
    save, path = folder / "save", folder / "settings.json"
    shutil.rmtree(save, ignore_errors=True)
    settings = settings_of(size, folder, compiled=compiled)
    path.write_text(json.dumps(settings))
    script = Path(__file__).parent / "peers" / f"{program}.py"
    command = [sys.executable, str(FINETUNE), *our_flags(settings)]
    if program != "ours":
        command = [python_of(program, peers), str(script), str(path)]
    seen, _ = timed(command, LINE[program])
    first, last = size["warm"], size["steps"]
    tokens = (last - first) * size["global_batch_size"] * size["seq_length"]
    found = {"tokens_per_second": tokens / (seen[last] - seen[first]), "seconds_to_first_update": seen[min(seen)]}
    if program == "ours":
        waits = [record["data_wait"] for record in metrics(save) if record["iteration"] > first]
        found["data_wait"] = statistics.mean(waits)
    return found


def metrics(save: Path) -> list[dict[str, float]]:
    """What our run recorded of its intervals, which are single iterations here."""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def contest(name: str, rounds: int, folder: Path, peers: Path) -> dict[str, Any]:
    """All contestants in turns: their medians and the ratios of like to like."""
    size = SIZES[name]
    runs: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in CONTESTANTS}
    for number in range(rounds):
        for contestant, what in CONTESTANTS.items():
            runs[contestant].append(speed(size, *what, folder, peers))
            rate = runs[contestant][-1]["tokens_per_second"]
            print(f"{name}, round {number + 1} of {rounds}: {contestant} {rate:.0f} tokens/s", flush=True)
    medians = {
        contestant: {key: round(statistics.median(run[key] for run in found), 4) for key in found[0]}
        for contestant, found in runs.items()
    }
    ratios = {peer: ratio(runs[own], runs[peer]) for peer, own in LIKE.items()}
    return {"shape": size, "medians": medians, "ours_to": ratios}


def ratio(ours: list[dict[str, float]], peers: list[dict[str, float]]) -> dict[str, Any]:
    """Of the medians, and of each round."""
    own, other = ([run["tokens_per_second"] for run in runs] for runs in (ours, peers))
    rounds = [round(mine / theirs, 3) for mine, theirs in zip(own, other, strict=True)]
    return {"medians": round(statistics.median(own) / statistics.median(other), 3), "rounds": rounds}


def restart(name: str, rounds: int, folder: Path) -> dict[str, float]:
    """Seconds from the start of the command to the first update after a checkpoint was found."""
    size = SIZES[name]
    save = folder / "save"
    shutil.rmtree(save, ignore_errors=True)
    command = [sys.executable, str(FINETUNE), *our_flags(settings_of(size, folder, compiled=False))]
    first = size["warm"]
    timed([*command, "--exit_interval", str(first)], LINE["ours"])
    found = []
    for _ in range(rounds):
        seen, _text = timed([*command, "--exit_interval", str(first + 1)], LINE["ours"])
        found.append(seen[first + 1])
        shutil.rmtree(save / f"iter_{first + 1:07d}")
    return {"seconds_to_first_update": round(statistics.median(found), 2)}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    load, python = round(os.getloadavg()[0], 1), platform.python_version()
    return {"load": load, "cpu": model, "cores": os.cpu_count(), "python": python, "torch": torch.__version__}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,100m", help="comma-separated")
    parser.add_argument("--parts", default="speed,restart", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="folder for the peers' environments; default: a temporary one")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "train.json")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="train-"))
    found: dict[str, Any] = {"threads": THREADS}
    try:
        for name in args.sizes.split(","):
            found[name] = {}
            if "speed" in args.parts:
                found[name] |= contest(name, args.rounds, folder, args.peers or folder / "peers")
            if "restart" in args.parts:
                found[name]["restart"] = restart(name, args.rounds, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found |= {"machine": machine(), "date": time.strftime("%F")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
