"""Declares the chain of a run: every stage, its commands, and what each command reads and writes, in order.

(collect) -> prepare -> (filter -> custom-…) -> dedup-signatures
dedup-signatures -> dedup-buckets -> dedup-components -> dedup-filter
dedup-filter -> (count-lines -> frequent-lines -> final-filter) -> export-text -> join-text
dedup-components -> dedup-report      (-> contamination-report)\\-> tokenize -> merge-tokens -> index ------------\\
convert -> verify -> shard --------------------------------------------------------------------------------> train
train -> merge -> export-hf -> verify-export -> push, with one task per exported iteration

merge-tokens -> (data-card) -> push

Stages in parentheses are there if the recipe asks for them. export-text and join-text are left out if the recipe says
`text: {export: false}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from run_contract.errors import UserError
from snakmodel.chain.card_stage import DATA_CARD
from snakmodel.chain.collect_stage import COLLECT, collect
from snakmodel.chain.context import Context
from snakmodel.chain.data_stages import TEXT_EXPORT, text_stages, token_stages
from snakmodel.chain.filter_stages import (
    CONTAMINATION,
    COUNT_LINES,
    FILTER,
    FINAL_FILTER,
    FREQUENT_LINES,
    has_final_filter,
)
from snakmodel.chain.inputs import Inputs
from snakmodel.chain.model_stages import export_stages, train_stages, weight_stages
from snakmodel.chain.stage import Chain
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.prepare.input_files import FilePart

if TYPE_CHECKING:
    from snakmodel.prepare.kept_columns import KeptColumn  # imports pyarrow

STAGES = [
    COLLECT,
    "prepare",
    FILTER,
    "dedup-signatures",
    "dedup-buckets",
    "dedup-components",
    "dedup-filter",
    "dedup-report",
    COUNT_LINES,
    FREQUENT_LINES,
    FINAL_FILTER,
    CONTAMINATION,
    "export-text",
    "join-text",
    "tokenize",
    "merge-tokens",
    DATA_CARD,
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
"""All stages that a chain can have, in order, but for those of a user's own commands; see `stages_of`."""


def stages_of(recipe: Recipe, stages: Sequence[str] = STAGES) -> list[str]:
    """These stages, with those of the recipe's own commands (`custom-…`) behind `filter` if that is among them."""
    own = [one.stage for one in recipe.data.custom]
    return [name for stage in stages for name in (stage, *(own if stage == FILTER else ()))]


def left_out(recipe: Recipe) -> dict[str, str]:
    """Maps the stages that a recipe leaves out of the chain to what it says for them to be there."""
    reasons = {} if recipe.text.export else dict.fromkeys(TEXT_EXPORT, "`text: {export: true}`")
    if recipe.data.collect is None:
        reasons[COLLECT] = "a key `data.collect`"
    if not recipe.filter.any:
        reasons[FILTER] = "a section `filter` with a step"
    if recipe.dedup.lines is None:
        reasons |= dict.fromkeys((COUNT_LINES, FREQUENT_LINES), "a key `dedup.lines`")
    if not has_final_filter(recipe):
        reasons[FINAL_FILTER] = "a key `dedup.lines` or a section `decontaminate`"
    if recipe.decontaminate is None:
        reasons[CONTAMINATION] = "a section `decontaminate`"
    if recipe.data_card is None:
        reasons[DATA_CARD] = "a section `data_card`"
    return reasons


def build(
    config: Config,
    root: Path,
    shards: Sequence[Sequence[FilePart]],
    inputs: Inputs,
    selected: Sequence[str] = STAGES,
    kept: Sequence[KeptColumn] = (),
) -> Chain:
    """Declare the stages of a run, whose shards keep the columns `kept` beside the text.

    Declaring stops before the first group of stages for which the base model or the tokenizer is not what it should be.
    Raises UserError in that case if a stage in `selected` belongs to that group or comes after it.
    """
    c = Context(config, root, shards, inputs, kept)
    stages = text_stages(c)
    asked = set(selected) - set(left_out(config.recipe))
    for declare in (token_stages, weight_stages, train_stages, export_stages):
        try:
            stages += declare(c)
        except UserError:
            if asked - {stage.name for stage in stages}:
                raise
            break
    return Chain.of(root, stages)


def build_collection(config: Config, root: Path, inputs: Inputs) -> Chain:
    """Declare the chain of a run as long as its text is not collected: the stage `collect` alone."""
    return Chain.of(root, [collect(Context(config, root, [], inputs))])
