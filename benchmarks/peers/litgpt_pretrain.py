"""python litgpt_pretrain.py SETTINGS.json: the benchmark's training run by litgpt's pretrain; it prints each iteration.

Run by benchmarks/train.py with a Python that has litgpt, which always compiles the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt import Config, pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from torch.utils.data import DataLoader, Dataset


class Tokens(Dataset):
    """Samples of `length` + 1 tokens from a .bin file of uint16."""

    def __init__(self, path: str, length: int) -> None:
        self.tokens, self.length = np.memmap(path, dtype=np.uint16, mode="r"), length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, number: int) -> torch.Tensor:
        part = self.tokens[number * self.length : (number + 1) * self.length + 1]
        return torch.from_numpy(part.astype(np.int64))


class Data(DataModule):
    """The same tokens for training and for litgpt's check of the validation."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    def connect(self, *_: Any, **__: Any) -> None:
        """All is known already."""

    def train_dataloader(self) -> DataLoader:
        """Shuffled micro-batches."""
        data = Tokens(self.settings["data"], self.settings["seq_length"])
        return DataLoader(data, self.settings["micro_batch_size"], shuffle=True, num_workers=self.settings["workers"])

    val_dataloader = train_dataloader


def main() -> None:
    """See the module's docstring."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    config = Config(
        name="benchmark",
        vocab_size=settings["vocab_size"],
        padded_vocab_size=settings["vocab_size"],
        block_size=settings["seq_length"],
        n_layer=settings["num_layers"],
        n_head=settings["num_attention_heads"],
        n_embd=settings["hidden_size"],
        intermediate_size=settings["ffn_hidden_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    tokens = settings["steps"] * settings["global_batch_size"] * settings["seq_length"]
    pretrain.setup(
        "benchmark",
        model_config=config,
        out_dir=Path(settings["folder"]),
        precision="32-true",
        data=Data(settings),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=settings["global_batch_size"],
            micro_batch_size=settings["micro_batch_size"],
            max_tokens=tokens,
            max_norm=1.0,
            lr_warmup_steps=1,
            tie_embeddings=False,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
        devices=1,
        logger_name="csv",
    )


if __name__ == "__main__":
    main()
