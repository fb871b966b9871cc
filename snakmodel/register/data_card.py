"""Writes data-card.md: where the text of a run came from, and what every stage kept of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.filesize import decimal

from snakmodel.config.recipe import Recipe
from snakmodel.register.funnel import Flow
from snakmodel.register.sources import SourceFacts
from snakmodel.shards.counts import MANY_SOURCES, MOST_SOURCES

_MOST_ROWS = 40
"""The number of sources, or of counts of one kind, that a table shows at most."""


def data_card(recipe: Recipe, facts: Sequence[SourceFacts], flows: Sequence[Flow]) -> str:
    """The text of the card."""
    about = recipe.data_card
    title = (about and about.title) or recipe.name
    last = flows[-1]
    summary = (
        f"{last.kept:,} documents, {sum((last.bytes or {}).values()):,} bytes of text and "
        f"{sum((last.tokens or {}).values()):,} tokens, from {_number(facts)} source(s)."
    )
    parts = [
        f"# Data card: {title}",
        *([about.description] if about and about.description else []),
        summary,
        "## Sources",
        _sources(facts, flows),
        _citations(facts),
        "## What each stage kept",
        _funnel(flows),
        "## Why documents were left out, and what was changed",
        _details(flows),
        "## Settings",
        "The parts of the recipe that decide about the documents:",
        f"```yaml\n{_settings(recipe)}```",
        _limits(recipe),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _number(facts: Sequence[SourceFacts]) -> str:
    """The number of sources in words; they are not told apart if there are too many."""
    return f"more than {MOST_SOURCES}" if MANY_SOURCES in {one.name for one in facts} else str(len(facts))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> str:
    """A Markdown table; the columns whose places are in `numbers` are aligned to the right."""
    right = set(numbers)
    marks = ["---:" if place in right else "---" for place in range(len(columns))]
    lines = [columns, marks, *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _sources(facts: Sequence[SourceFacts], flows: Sequence[Flow]) -> str:
    first, last = flows[0], flows[-1]
    rows = [
        (
            f"[{one.title or one.name}]({one.url})" if one.url else one.title or one.name,
            one.licence,
            one.version,
            one.retrieved,
            first.sources.get(one.name, 0),
            last.sources.get(one.name, 0),
            decimal((last.bytes or {}).get(one.name, 0)),
            (last.tokens or {}).get(one.name, 0),
        )
        for one in facts
    ]
    columns = ("source", "licence", "version", "retrieved", "documents read", "documents kept", "text", "tokens")
    return table(columns, _some(rows), (4, 5, 6, 7))


def _citations(facts: Sequence[SourceFacts]) -> str:
    return "\n".join(f"- {one.name}: {one.cite}" for one in facts if one.cite)


def _funnel(flows: Sequence[Flow]) -> str:
    rows = [
        (
            flow.name,
            flow.documents,
            flow.kept,
            f"{100 * flow.kept / max(1, flow.documents):.1f} %",
            decimal(sum(flow.bytes.values())) if flow.bytes else "",
            sum(flow.tokens.values()) if flow.tokens else "",
        )
        for flow in flows
    ]
    return table(("stage", "documents in", "documents out", "kept", "text", "tokens"), rows, range(1, 6))


def _details(flows: Sequence[Flow]) -> str:
    rows = [(flow.name, name, value) for flow in flows for name, value in _flat(flow.details)]
    return table(("stage", "what", "count"), rows, (2,)) if rows else "No document was left out or changed."


_NOT_SHOWN = ("probabilities", "samples", "found_by_source")
"""Counts that are in the JSON beside the shards, but would fill pages."""


def _flat(counts: Mapping[str, Any], above: str = "") -> list[tuple[str, int]]:
    """The counts and those inside them, each with its full name; of each group the largest ones."""
    found: list[tuple[str, int]] = []
    numbers = {name: value for name, value in counts.items() if isinstance(value, int) and (value or not above)}
    largest = sorted(numbers, key=lambda name: -numbers[name])[:_MOST_ROWS] if above else list(numbers)
    found += [(f"{above}{name.replace('_', ' ') if not above else name}", numbers[name]) for name in largest]
    for name, value in counts.items():
        if isinstance(value, dict) and name not in _NOT_SHOWN:
            found += _flat(value, f"{above}{name}: ")
    return found


def _some(rows: Sequence[Sequence[object]]) -> Sequence[Sequence[object]]:
    left = len(rows) - _MOST_ROWS
    return rows if left <= 0 else [*rows[:_MOST_ROWS], (f"and {left} more", *[""] * (len(rows[0]) - 1))]


def _settings(recipe: Recipe) -> str:
    """The sections of the recipe that decide about documents, as YAML, with only the last part of each path.

    The thresholds of the rules of quality are those in their file.
    """
    shown = recipe.model_dump(include=dict.fromkeys(("data", "filter", "dedup", "decontaminate"), True))
    shown["data"].pop("path")
    if (quality := recipe.filter.quality) and quality.thresholds and quality.thresholds.is_file():
        shown["filter"]["quality"]["thresholds"] = yaml.safe_load(quality.thresholds.read_text(encoding="utf-8"))
    return yaml.safe_dump({key: _set(value) for key, value in shown.items()}, sort_keys=False, allow_unicode=True)


_ABSOLUTE = re.compile(r"""(?<![^\s='"(,])/(?:[^\s'"]*/)?([^\s'"/]+)""")
"""A path of this machine within a text, such as a command line; its last part is the group."""


def _set(value: Any) -> Any:
    """The settings without those that are not set, and without the folders of this machine."""
    if isinstance(value, dict):
        return {key: _set(one) for key, one in value.items() if one not in (None, [], (), {})}
    if isinstance(value, (list, tuple)):
        return [_set(one) for one in value]
    if isinstance(value, Path):
        return value.name
    return _ABSOLUTE.sub(r"\1", value) if isinstance(value, str) else value


def _limits(recipe: Recipe) -> str:
    """What a reader must not conclude from the card."""
    lines = []
    if recipe.filter.pii is None:
        lines.append("Personal data was not looked for.")
    else:
        lines.append("Personal data was replaced where it was recognised by its form; names and addresses were not.")
    if recipe.filter.language is None:
        lines.append("The language of the documents was not checked.")
    lines.append("Licences are as the recipe and the records of collection name them; nobody has checked them here.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
