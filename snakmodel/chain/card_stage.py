"""The stage that writes the data card, which checks that the counts of all stages add up."""

from __future__ import annotations

from typing import Any

from snakmodel.chain.context import Context, flags
from snakmodel.chain.stage import Input, Stage, Task
from snakmodel.collect.record import read_record
from snakmodel.register.sources import record_path

DATA_CARD = "data-card"
CARD = "card"
"""The folder of the card, below the run's folder."""
FILES = ("data-card.md", "croissant.json", "funnel.json")


def data_card(c: Context) -> Stage:
    """Declare the stage of the data card."""
    final, folder = c.final
    words = flags(run_dir=str(c.root), shards=len(c.shards), documents=folder, output=c.path(CARD))
    before = ("--before", *(folder for _, folder in c.passes)) if c.passes else ()
    after = ("--after", folder) if final != "dedup-filter" else ()
    stages = ("prepare", *(stage for stage, _ in c.passes), final, "dedup-report", "merge-tokens")
    reads = tuple(Input(stage, full=False) for stage in stages)
    outputs = tuple(f"{CARD}/{name}" for name in FILES)
    argv = ("python", "-m", "snakmodel.register", *words, *before, *after)
    return c.stage(DATA_CARD, [Task(argv, outputs, reads, f"{CARD}/funnel.json", outside=_told(c))])


def _told(c: Context) -> object:
    """What stands in the key for all that the card says and no other stage depends on."""
    recipe = c.recipe
    sources = dict.fromkeys(part.source for shard in c.shards for part in shard)
    records = [record for name in sources if (record := read_record(record_path(recipe.data.path, name)))]
    told = [recipe.name, recipe.data_card.model_dump(mode="json") if recipe.data_card else None]
    return [told, [_without_days(record) for record in records]]


_OF_THE_DOWNLOAD = ("retrieved", "etag", "last_modified")
"""What a record says of when and how a file came, which does not change what is in it."""


def _without_days(record: dict[str, Any]) -> dict[str, Any]:
    """What a record of `collect` says of a source, without what differs if the same files are collected again."""
    files = [{key: value for key, value in one.items() if key not in _OF_THE_DOWNLOAD} for one in record["downloads"]]
    return {key: value for key, value in record.items() if key != "collected"} | {"downloads": files}
