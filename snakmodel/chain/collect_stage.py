"""The stage that collects the raw text. Only when it is done can the rest of the chain be planned: it cuts the text.

As long as a source is not collected, the chain consists of this stage alone, and the launcher has to run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from run_contract.errors import InputsMissing, UserError
from snakmodel.chain.context import Context, flags
from snakmodel.chain.stage import Stage, Task
from snakmodel.collect.places import Place
from snakmodel.collect.record import has_files, read_record
from snakmodel.collect.sources import Source, read_sources
from snakmodel.config.recipe import Recipe
from snakmodel.config.sections import suggest

COLLECT = "collect"


def wanted_sources(recipe: Recipe) -> dict[str, Source]:
    """The sources to collect, by name: those of the file `data.collect` that the recipe takes.

    Raises UserError if the file is unfit, or if the recipe takes none of its sources.
    """
    if recipe.data.collect is None:
        return {}
    file = recipe.data.collect
    if not file.is_file():
        raise UserError(f"data.collect: there is no file {file}. Correct the path, or leave the key out.")
    every = read_sources(file)
    taken = recipe.data.shares
    unknown = [name for name in taken or () if name not in every and not (recipe.data.path / name).exists()]
    if unknown and set(taken or ()) & set(every):
        raise UserError(
            f"data.sources: there is no source {unknown[0]} in {file}, and no folder of that name in "
            f"{recipe.data.path}. {suggest(unknown[0], every)}"
        )
    found = {name: source for name, source in every.items() if taken is None or name in taken}
    if not found:
        raise UserError(
            f"data.collect: {recipe.data.collect} has none of the sources in data.sources ({', '.join(taken or ())}). "
            f"{suggest(next(iter(taken or ('',))), every)}"
        )
    return found


def uncollected(recipe: Recipe) -> dict[str, Source]:
    """The sources that are still to be collected: they have no record, another one, or not the files that it names."""
    folder = recipe.data.path
    return {name: source for name, source in wanted_sources(recipe).items() if not _is_collected(folder, name, source)}


def _is_collected(folder: Path, name: str, source: Source) -> bool:
    record = read_record(Place(folder, name).record)
    return record is not None and record["source"] == source.entry() and has_files(record, folder)


def refuse_what_is_not_there(folder: Path, sources: Mapping[str, Source]) -> None:
    """Raise InputsMissing if files of these sources have to be put in place by hand and are not there."""
    from snakmodel.collect.fetch import missing_none  # imports the HTTP library, so only when needed

    problems = []
    for name, source in sources.items():
        if source.ask:
            try:
                missing_none(Place(folder, name), source)
            except InputsMissing as error:
                problems.append(str(error))
    if problems:
        raise InputsMissing("data.collect: " + "\n  ".join(problems))


def collect(c: Context) -> Stage:
    """Declare the stage that collects the sources, with one task per source."""

    def task(name: str, source: Source) -> Task:
        output = f"{COLLECT}/{name}.json"
        argv = ("python", "-m", "snakmodel.collect", "fetch", "--source", name, "--copy_record", c.path(output))
        places = flags(sources=c.recipe.data.collect, output=c.recipe.data.path)
        entry: Any = source.entry()
        return Task(argv, (output,), unkeyed=places, outside=entry)

    return c.stage(COLLECT, [task(name, source) for name, source in wanted_sources(c.recipe).items()])
