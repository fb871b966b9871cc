"""The stages that keep, mark or change documents: the steps of `filter`, and a user's own commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run_contract.errors import UserError
from snakmodel.chain.context import Context, flags, shard_task
from snakmodel.chain.stage import Input, Stage, Task
from snakmodel.config.filters import Custom
from snakmodel.config.recipe import Recipe
from snakmodel.run.paths import shard_name

if TYPE_CHECKING:
    from snakmodel.prepare.kept_columns import KeptColumn

FILTER = "filter"
COUNT_LINES, FREQUENT_LINES = "count-lines", "frequent-lines"
FINAL_FILTER, FINAL_FOLDER = "final-filter", "filtered"
CONTAMINATION = "contamination-report"
_COMMAND = ("python", "-m", "snakmodel.filter")
_LINES = ("python", "-m", "snakmodel.dedup", "lines")
LINE_KEYS = ".lines"
"""The suffix of the files with the keys of lines."""
_THEN = "+"
"""The word before each step in the command line of several steps."""


def filter_stages(c: Context) -> list[Stage]:
    """The optional stages between `prepare` and deduplication, in order.

    Each reads the shards of the one before it; `c.documents` then names the last one.
    """
    found = []
    if c.recipe.filter.any:
        found.append(filter_documents(c))
        c.documents = FILTER, "filter"
        c.passes.append(c.documents)
    for custom in c.recipe.data.custom:
        found.append(custom_command(c, custom))
        c.documents = custom.stage, f"custom/{custom.name}"
        c.passes.append(c.documents)
    return found


def filter_documents(c: Context) -> Stage:
    """Declare the stage that passes each shard through all steps of the recipe's `filter`, in one pass."""
    rejects = bool(c.recipe.filter.language and c.recipe.filter.language.rejected)
    outside = _files_of(c)

    def task(index: int) -> Task:
        name = shard_name(index)
        rejected = f"filter/rejected/{name}" if rejects else None
        steps = step_words(c.recipe, c.path(rejected) if rejected else None)
        return _task(c, index, "filter", (*_COMMAND, "steps"), steps, rejected, outside)

    return c.stage(FILTER, [task(i) for i in range(len(c.shards))], per_shard=True)


def custom_command(c: Context, custom: Custom) -> Stage:
    """Declare the stage that runs a user's own command over each shard.

    Files that the command line names, such as a script or a model, are inputs: if one changes, the stage is done again.
    """

    outside = [c.inputs.whole(path) for path in custom.paths if path.is_file()] or None

    def task(index: int) -> Task:
        words = ("--name", custom.name, "--command", custom.command)
        return _task(c, index, f"custom/{custom.name}", (*_COMMAND, "custom"), words, outside=outside)

    return c.stage(custom.stage, [task(i) for i in range(len(c.shards))], per_shard=True)


def _task(
    c: Context,
    index: int,
    folder: str,
    command: tuple[str, ...],
    words: Iterable[str],
    rejected: str | None = None,
    outside: Any = None,
) -> Task:
    """The task of one shard: a command that reads a shard of `c.documents` and writes the one of the same number."""
    name = shard_name(index)
    stage, source = c.documents
    prefix = f"{folder}/{name}"
    paths = flags(input=c.path(f"{source}/{name}.arrow"), output=c.path(prefix))
    task = shard_task((*command, *paths, *words), prefix, ".arrow", inputs=(Input(stage, index),), outside=outside)
    if rejected is None:
        return task
    return Task(task.argv, (*task.outputs, f"{rejected}.arrow"), task.inputs, task.counts, outside=outside)


def step_words(recipe: Recipe, rejected: str | None = None) -> tuple[str, ...]:
    """The steps of the recipe's `filter` in the words of the command line, each after a `+`.

    `rejected` is the path without suffix for what the step `language` rejects.
    """
    language, quality, pii, where = (getattr(recipe.filter, name) for name in ("language", "quality", "pii", "where"))
    words: list[str] = []
    if language:
        least = flags(min_probability=language.min_probability)
        model = flags(model=language.model if language.model != "lid.176" else None)
        unit = flags(unit=language.unit if language.unit != "document" else None)
        mark = flags(mark=language.mode == "mark", rejected=rejected)
        words += [_THEN, "language", "--keep", *language.keep, *model, *least, *unit, *mark]
    if quality:
        settings = flags(mode=quality.mode, language=quality.language, thresholds=quality.thresholds)
        words += [_THEN, "quality", *settings, *(("--clean-lines",) if quality.clean_lines else ())]
    if pii:
        lists = {"--kinds": pii.kinds or [], "--region": pii.region, "--national": pii.national}
        words += [_THEN, "pii", *(word for flag, values in lists.items() if values for word in (flag, *values))]
    if where:
        words += [_THEN, "where", f"--condition={where}"]  # in one word, because it may begin with a minus sign
    return tuple(words)


def check_custom(custom: Custom) -> None:
    """Raise UserError if a user's own command names a script that is not there."""
    if custom.missing_script:
        raise UserError(
            f"data.custom: the command of {custom.stage} is `{custom.command}`, but there is no file "
            f"{custom.missing_script}. Correct the path; relative ones start from the project's folder."
        )


def check_filter(recipe: Recipe, kept: Sequence[KeptColumn]) -> None:
    """Raise UserError if a step of the recipe could not be made, or could not work on the documents.

    `kept` are the columns that the shards have because of `data.keep`. Columns of whose type nothing is known yet are
    null.
    """
    from snakmodel.filter.steps import check_steps  # imports pyarrow, as the next module does
    from snakmodel.prepare.shard_writer import schema_of

    schema = schema_of(None if recipe.data.keep is None else kept)
    for key, words in (("filter", step_words(recipe)), ("decontaminate", decontaminate_words(recipe))):
        try:
            schema = check_steps(words, schema)
        except UserError as error:
            raise type(error)(f"{key}: {error}") from error


def final_stages(c: Context) -> list[Stage]:
    """The optional stages after deduplication, in order: frequent lines are found, and one pass takes all steps.

    `c.final` then names the last one.
    """
    if not has_final_filter(c.recipe):
        return []
    found = [count_lines(c), find_frequent_lines(c)] if c.recipe.dedup.lines else []
    found.append(final_filter(c))
    c.final = FINAL_FILTER, FINAL_FOLDER
    return [*found, *([contamination_report(c)] if c.recipe.decontaminate else [])]


def has_final_filter(recipe: Recipe) -> bool:
    """Whether there is a pass over the documents after deduplication."""
    return recipe.dedup.lines is not None or recipe.decontaminate is not None


def count_lines(c: Context) -> Stage:
    """Declare the stage that counts the lines of each deduplicated shard."""

    def task(index: int) -> Task:
        name = shard_name(index)
        prefix = f"dedup/lines/counts/{name}"
        paths = flags(input=c.path(f"dedup/kept/{name}.arrow"), ranges=c.recipe.dedup.ranges, output=c.path(prefix))
        argv = (*_LINES, "count", *paths)
        return shard_task(argv, prefix, LINE_KEYS, inputs=(Input("dedup-filter", index),))

    return c.stage(COUNT_LINES, [task(i) for i in range(len(c.shards))], per_shard=True)


def find_frequent_lines(c: Context) -> Stage:
    """Declare the stage that finds the frequent lines, with one task per range of the key space."""

    def task(index: int) -> Task:
        prefix = f"dedup/lines/frequent/range-{index:05d}"
        least = (c.recipe.dedup.lines or 0) + 1
        counts = flags(counts=c.path("dedup/lines/counts"), shards=len(c.shards), range=index, min=least)
        argv = (*_LINES, "frequent", *counts, "--output", c.path(prefix))
        return shard_task(argv, prefix, LINE_KEYS, inputs=(Input(COUNT_LINES, full=False),))

    return c.stage(FREQUENT_LINES, [task(i) for i in range(c.recipe.dedup.ranges)])


def final_filter(c: Context) -> Stage:
    """Declare the stage that passes each deduplicated shard through all steps after deduplication, in one pass."""
    recipe = c.recipe
    places = flags(frequent=c.path("dedup/lines/frequent"), ranges=recipe.dedup.ranges)
    lines = (_THEN, "lines", *places) if recipe.dedup.lines else ()
    outside = _evaluation_files(c)

    def task(index: int) -> Task:
        name = shard_name(index)
        prefix = f"{FINAL_FOLDER}/{name}"
        paths = flags(input=c.path(f"dedup/kept/{name}.arrow"), output=c.path(prefix))
        argv = (*_COMMAND, "steps", *paths, *lines, *decontaminate_words(recipe))
        reads = (Input("dedup-filter", index), *([Input(FREQUENT_LINES, full=False)] if recipe.dedup.lines else []))
        return shard_task(argv, prefix, ".arrow", inputs=reads, outside=outside)

    return c.stage(FINAL_FILTER, [task(i) for i in range(len(c.shards))], per_shard=True)


def contamination_report(c: Context) -> Stage:
    """Declare the stage that reports which evaluation items were found, in which source and how often."""
    counts = [c.path(f"{FINAL_FOLDER}/{shard_name(index)}.json") for index in range(len(c.shards))]
    argv = (*_COMMAND, "contamination", "--counts", *counts, "--output", c.path(f"{FINAL_FOLDER}/contamination"))
    task = shard_task(argv, f"{FINAL_FOLDER}/contamination", ".md", inputs=(Input(FINAL_FILTER, full=False),))
    return c.stage(CONTAMINATION, [task])


def decontaminate_words(recipe: Recipe) -> tuple[str, ...]:
    """The step `decontaminate` of a recipe in the words of the command line, after a `+`; nothing without it."""
    d = recipe.decontaminate
    if d is None:
        return ()
    fields = ("--fields", *d.fields) if d.fields else ()
    return (_THEN, "decontaminate", "--against", *map(str, d.against), *fields, *flags(ngram=d.ngram, mode=d.mode))


def _evaluation_files(c: Context) -> Any:
    """What stands in the keys for the evaluation files. Raises UserError if one is not there."""
    if c.recipe.decontaminate is None:
        return None
    for path in c.recipe.decontaminate.against:
        if not path.is_file():
            raise UserError(f"decontaminate.against: there is no file {path}. Correct the path, or leave it out.")
    return [c.inputs.whole(path) for path in c.recipe.decontaminate.against]


def _files_of(c: Context) -> Any:
    """What stands in the keys for the files from outside the run that the steps read; None if they read none.

    Raises UserError if one is not there.
    """
    files = step_files(c.recipe)
    for key, path in files:
        if not path.is_file():
            raise UserError(f"{key}: there is no file {path}. Correct the path, or leave the key out.")
    return [c.inputs.whole(path) for _, path in files] or None


def step_files(recipe: Recipe) -> list[tuple[str, Path]]:
    """The files from outside the run that the steps of `filter` read, each after its key in the recipe."""
    files = []
    if recipe.filter.language and recipe.filter.language.model.endswith((".bin", ".ftz")):
        files.append(("filter.language.model", Path(recipe.filter.language.model)))
    if recipe.filter.quality and recipe.filter.quality.thresholds:
        files.append(("filter.quality.thresholds", recipe.filter.quality.thresholds))
    return files
