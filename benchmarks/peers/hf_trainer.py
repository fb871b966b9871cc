"""python hf_trainer.py SETTINGS.json: the benchmark's run by transformers' Trainer; prints `step N` after each update.

Run by benchmarks/train.py with a Python that has transformers and accelerate.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Tokens(Dataset):
    """Samples of `length` tokens from a .bin file of uint16."""

    def __init__(self, path: str, length: int) -> None:
        self.tokens, self.length = np.memmap(path, dtype=np.uint16, mode="r"), length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        part = self.tokens[number * self.length : (number + 1) * self.length]
        ids = torch.from_numpy(part.astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class Steps(TrainerCallback):
    """Tells the parent of every update."""

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        print(f"step {state.global_step}", flush=True)


def main() -> None:
    """See the module's docstring."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings["vocab_size"],
            hidden_size=settings["hidden_size"],
            intermediate_size=settings["ffn_hidden_size"],
            num_hidden_layers=settings["num_layers"],
            num_attention_heads=settings["num_attention_heads"],
            max_position_embeddings=settings["seq_length"],
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    arguments = TrainingArguments(
        output_dir=settings["folder"],
        use_cpu=True,
        per_device_train_batch_size=settings["micro_batch_size"],
        gradient_accumulation_steps=settings["global_batch_size"] // settings["micro_batch_size"],
        max_steps=settings["steps"],
        learning_rate=1e-4,
        adam_epsilon=1e-8,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=settings["workers"],
        torch_compile=settings["compile"],
    )
    data = Tokens(settings["data"], settings["seq_length"])
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Steps()]).train()


if __name__ == "__main__":
    main()
