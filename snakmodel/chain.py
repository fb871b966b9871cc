"""The chain of a run: every stage, its commands and what each reads and writes, declared in order.

prepare -> dedup-signatures -> dedup-buckets -> dedup-components -> dedup-filter -> export-text -> join-text
                                                     \\-> dedup-report   \\-> tokenize -> merge-tokens -> index --\\
convert -> verify -> shard --------------------------------------------------------------------------------> train
train -> merge -> export-hf -> verify-export -> push, one task an exported iteration

export-text and join-text are left out where the recipe says `text: {export: false}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snakmodel.chain_context import Context
from snakmodel.chain_data import data_stages
from snakmodel.chain_model import export_stages, train_stage, weight_stages
from snakmodel.config import Config
from snakmodel.inputs import Inputs
from snakmodel.sources import Part
from snakmodel.stage import Chain

STAGES = [
    "prepare",
    "dedup-signatures",
    "dedup-buckets",
    "dedup-components",
    "dedup-filter",
    "dedup-report",
    "export-text",
    "join-text",
    "tokenize",
    "merge-tokens",
    "index",
    "convert",
    "verify",
    "shard",
    "train",
    "merge",
    "export-hf",
    "verify-export",
    "push",
]


def build(config: Config, root: Path, shards: Sequence[Sequence[Part]], inputs: Inputs) -> Chain:
    """Declare every stage of a run. Raises UserError when the base model or the tokenizer is not what it should be."""
    c = Context(config, root, shards, inputs)
    return Chain.of(root, [*data_stages(c), *weight_stages(c), train_stage(c), *export_stages(c)])
