"""Declares the chain of a run: every stage, its commands, and what each command reads and writes, in order.

prepare -> dedup-signatures -> dedup-buckets -> dedup-components -> dedup-filter -> export-text -> join-text
                                                     \\-> dedup-report   \\-> tokenize -> merge-tokens -> index --\\
convert -> verify -> shard --------------------------------------------------------------------------------> train
train -> merge -> export-hf -> verify-export -> push, with one task per exported iteration

export-text and join-text are left out if the recipe says `text: {export: false}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from run_contract.errors import UserError
from snakmodel.chain.context import Context
from snakmodel.chain.data_stages import TEXT_EXPORT, text_stages, token_stages
from snakmodel.chain.inputs import Inputs
from snakmodel.chain.model_stages import export_stages, train_stages, weight_stages
from snakmodel.chain.stage import Chain
from snakmodel.config.load import Config
from snakmodel.prepare.input_files import FilePart

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


def build(
    config: Config, root: Path, shards: Sequence[Sequence[FilePart]], inputs: Inputs, selected: Sequence[str] = STAGES
) -> Chain:
    """Declare the stages of a run.

    Declaring stops before the first group of stages for which the base model or the tokenizer is not what it should be.
    Raises UserError in that case if a stage in `selected` belongs to that group or comes after it.
    """
    c = Context(config, root, shards, inputs)
    stages = text_stages(c)
    asked = set(selected) - set(() if config.recipe.text.export else TEXT_EXPORT)
    for declare in (token_stages, weight_stages, train_stages, export_stages):
        try:
            stages += declare(c)
        except UserError:
            if asked - {stage.name for stage in stages}:
                raise
            break
    return Chain.of(root, stages)
