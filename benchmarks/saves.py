"""python benchmarks/saves.py [--hidden 640 --layers 12] [--rounds 5] [--folder DIR] [--output FILE]

Checkpoints of a Llama of some 100 million parameters in one process: seconds that training stands still for a save
that is waited for (--no_async_save) and for one beside training, in turns; and the steps of training beside the second
until it is published, against steps without one. --folder is where checkpoints go: the disk counts. Writes the numbers
with the machine they were measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from megatron_llm.checkpoint.saver import WRITTEN, Saver
from megatron_llm.flags import parser as flags_parser
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import Llama, initial_weights, shapes
from megatron_llm.optim.adamw import build_optimizer, update
from megatron_llm.parallel import world as parallel
from megatron_llm.parallel.sharding import fill, parameters_by_name, shard
from megatron_llm.training.steps import Direct

VOCAB, LENGTH = 32_000, 128
FLAGS = "--data_path none --seq_length 128 --micro_batch_size 1 --train_iters 1 --lr 1 --keep_last 1"


class Training:
    """A model in training on random tokens, with a saver of each kind."""

    def __init__(self, hidden: int, layers: int, folder: Path) -> None:
        world = parallel.start()
        self.config = ModelConfig(
            vocab_size=VOCAB,
            hidden_size=hidden,
            num_layers=layers,
            num_attention_heads=hidden // 64,
            num_attention_heads_kv=hidden // 64,
            ffn_hidden_size=hidden * 27 // 10,
            max_position_embeddings=LENGTH,
            kv_channels=64,
        )
        with torch.device("meta"):
            model = Llama(self.config)
        shard(model, world, bf16=False)
        self.parameters = parameters_by_name([model])
        fill(self.parameters, shapes(self.config), world, initial_weights(self.config, 1, 0.02))
        values = self.parameters.values()
        self.optimizer = build_optimizer(values, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01)
        self.steps, self.iterations = Direct(model, 1, world), count(1)
        argv = [*FLAGS.split(), "--save", str(folder)]
        self.beside, self.waiting = (
            Saver(flags_parser.parse([*argv, *more]).checkpoint, world, self.config)
            for more in ([], ["--no_async_save"])
        )

    def step(self) -> float:
        """Seconds of one update."""
        began = time.perf_counter()
        self.steps.train(random_tokens())
        update(self.optimizer, 1e-5)
        return time.perf_counter() - began

    def begin(self, saver: Saver) -> float:
        """Seconds in which a save holds up training."""
        began = time.perf_counter()
        saver.begin(self.parameters, self.optimizer, {"iteration": next(self.iterations)})
        return time.perf_counter() - began


def random_tokens() -> Iterator[Tensor]:
    """One sample."""
    yield torch.randint(0, VOCAB, (1, LENGTH + 1))


def measure(training: Training) -> dict[str, float]:
    """One round."""
    alone = statistics.median(training.step() for _ in range(5))
    waited = training.begin(training.waiting)
    training.waiting.finish()
    call, began, steps = training.begin(training.beside), time.perf_counter(), []
    while training.beside.status() != WRITTEN:
        steps.append(training.step())
    until, published = time.perf_counter() - began, time.perf_counter()
    training.beside.advance(WRITTEN)
    publish = time.perf_counter() - published
    training.beside.finish()
    beside = statistics.median(steps)
    return {"waited": waited, "call": call, "publish": publish, "until": until, "alone": alone, "beside": beside}


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    load, python = round(os.getloadavg()[0], 1), platform.python_version()
    return {"load": load, "cpu": model, "cores": os.cpu_count(), "python": python, "torch": torch.__version__}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "saves.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        training = Training(args.hidden, args.layers, Path(folder) / "save")
        measure(training)  # memory and files are touched for the first time
        rounds = [measure(training) for _ in range(args.rounds)]
    medians = {name: round(statistics.median(part[name] for part in rounds), 4) for name in rounds[0]}
    share = statistics.median((part["call"] + part["publish"]) / part["waited"] for part in rounds)
    slower = statistics.median(part["beside"] / part["alone"] for part in rounds)
    report = {
        "machine": machine(),
        "date": time.strftime("%F"),
        "parameters": sum(shape.numel() for shape in shapes(training.config).values()),
        "seconds": medians,
        "stands_still_share": round(share, 4),
        "steps_beside_take": round(slower, 3),
        "rounds": rounds,
    }
    print(json.dumps(report, indent=1))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    main()
    os._exit(0)  # no teardown of the process group
