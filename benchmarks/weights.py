"""python benchmarks/weights.py [--gb 1.5] [--work FOLDER]

Every conversion of a random bf16 model of the given size: seconds, GB/s (bytes read and written once each over the
time), and the peak of anonymous memory, against a plain copy of the same files. Each conversion is the command that
people run, started as a process; its RssAnon is read every few milliseconds. Memory-mapped files do not count: the
kernel drops their pages when others need the memory. Fails when a conversion needs more than 1.3 times its largest
output file + 0.5 GB. Writes results/weights.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "Megatron-LLM")]

from megatron_llm.model import canonical_state  # noqa: E402
from megatron_llm.model.config import ModelConfig  # noqa: E402
from megatron_llm.weights import hf as hf_weights  # noqa: E402  the path comes first

GB = 10**9
LIMIT_FACTOR, LIMIT_CONSTANT = 1.3, 0.5 * GB
VOCAB, HIDDEN, FFN, HEAD = 32000, 2048, 5632, 128


@dataclass(frozen=True)
class Result:
    """One conversion."""

    name: str
    seconds: float
    read_gb: float
    written_gb: float
    gb_per_second: float
    copy_seconds: float
    """Of a plain copy of the files that were written."""
    peak_anonymous_gb: float
    largest_file_gb: float
    allowed_gb: float


def geometry(gb: float) -> ModelConfig:
    """A model of Llama's proportions with as many layers as fill `gb` in bf16."""
    layer = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * FFN)
    layers = max(2, round((gb * GB - 4 * VOCAB * HIDDEN) / layer / 2) * 2)
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=layers,
        num_attention_heads=HIDDEN // HEAD,
        num_attention_heads_kv=HIDDEN // HEAD // 2,
        ffn_hidden_size=FFN,
        max_position_embeddings=4096,
        kv_channels=HEAD,
    )


def make_model(folder: Path, config: ModelConfig, text: Path) -> None:
    """A random Hugging Face folder with a SentencePiece tokenizer."""
    import sentencepiece

    prefix = folder.with_name("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=1000,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    shapes = canonical_state.expected_shapes(config)
    state = canonical_state.LazyState(shapes, lambda name: torch.randn(shapes[name]).to(torch.bfloat16))
    vocab_file = prefix.with_suffix(".model")
    hf_weights.save(folder, config, state, dtype=torch.bfloat16, vocab_file=vocab_file, max_shard_size="1GB")


def weights(folder: Path) -> list[Path]:
    """The weight files below a folder."""
    return [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt")]


def anonymous(pid: int) -> int:
    """Anonymous memory of a process in bytes; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def watch(argv: Sequence[str]) -> tuple[float, int]:
    """Run a command of the engine; (seconds, peak of anonymous memory)."""
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT}/Megatron-LLM", "OMP_NUM_THREADS": "1"}
    start, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, *argv], env=environment, cwd=PROJECT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} exited with {process.returncode}")
    return time.perf_counter() - start, peak


def plain_copy(files: Sequence[Path], folder: Path) -> float:
    """Seconds to copy the files and bring them to disk, as the conversions do."""
    folder.mkdir()
    start = time.perf_counter()
    for number, path in enumerate(files):
        target = folder / str(number)
        shutil.copyfile(path, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def measure(name: str, source: Path, target: Path, *argv: str) -> Result:
    """Run a conversion from `source` to `target` and the copy that it is compared with."""
    seconds, peak = watch(argv)
    written = weights(target)
    read_bytes, written_bytes = (sum(path.stat().st_size for path in files) for files in (weights(source), written))
    largest = max(path.stat().st_size for path in written)
    result = Result(
        name=name,
        seconds=round(seconds, 2),
        read_gb=round(read_bytes / GB, 3),
        written_gb=round(written_bytes / GB, 3),
        gb_per_second=round((read_bytes + written_bytes) / GB / seconds, 3),
        copy_seconds=round(plain_copy(written, target.with_name("copy")), 2),
        peak_anonymous_gb=round(peak / GB, 3),
        largest_file_gb=round(largest / GB, 3),
        allowed_gb=round((LIMIT_FACTOR * largest + LIMIT_CONSTANT) / GB, 3),
    )
    print(json.dumps(asdict(result)), flush=True)
    return result


def conversions(work: Path) -> list[Result]:
    """Every conversion of the chain, each reading what an earlier one wrote."""
    base, megatron, sharded, again, merged, exported, pushed = (
        work / name for name in ("base", "megatron", "sharded", "again", "merged", "hf", "pushed")
    )
    vocab_file = str(work / "tokenizer.model")

    def reshape(name: str, source: Path, target: Path, tp: int, pp: int) -> Result:
        sizes = (f"--target_tensor_parallel_size={tp}", f"--target_pipeline_parallel_size={pp}")
        folders = (f"--load_dir={source}", f"--save_dir={target}", "--model_type=llama2")
        return measure(name, source, target, "Megatron-LLM/tools/checkpoint_util.py", *sizes, *folders)

    results = [
        measure(
            "hf_to_megatron", base, megatron,
            "Megatron-LLM/weights_conversion/hf_to_megatron.py", "llama2", f"--model-path={base}", f"--out={megatron}",
        ),
        reshape("checkpoint_util to TP 4", megatron, sharded, 4, 1),
        reshape("checkpoint_util TP 4 to TP 2 x PP 2", sharded, again, 2, 2),
        reshape("checkpoint_util TP 2 x PP 2 to TP 1", again, merged, 1, 1),
    ]  # fmt: skip
    for done in (megatron, sharded, again):
        shutil.rmtree(done)
    flags = (f"--input_dir={merged}", f"--output_dir={exported}", f"--vocab_file={vocab_file}", "--max_shard_size=1GB")
    results.append(
        measure("megatron_to_hf", merged, exported, "Megatron-LLM/weights_conversion/megatron_to_hf.py", *flags)
    )
    copy = (str(exported), f"--output_folder={pushed}", "--max_shard_size=500MB")
    results.append(measure("push_to_hub, the copy", exported, pushed, "Megatron-LLM/tools/push_to_hub.py", *copy))
    return results


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gb",
        type=float,
        default=1.5,
        help="size of the model in bf16; 1 or more, or the vocabulary outweighs the rest",
    )
    parser.add_argument("--work", type=Path, help="folder for some four times as much; default a temporary one")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "weights.json")
    args = parser.parse_args()
    config = geometry(args.gb)
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        make_model(work / "base", config, PROJECT / "demo" / "text" / "tales" / "part1.txt")
        results = conversions(work)
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    machine = {"cpu": cpu, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "torch": torch.__version__}
    value = {
        "date": time.strftime("%F"),
        "machine": machine,
        "geometry": asdict(config),
        "results": [asdict(one) for one in results],
    }
    args.output.write_text(json.dumps(value, indent=1) + "\n")
    over = [one.name for one in results if one.peak_anonymous_gb > one.allowed_gb]
    print(f"over the allowed memory: {', '.join(over)}" if over else "all within the allowed memory")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
