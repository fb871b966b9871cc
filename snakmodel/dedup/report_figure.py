"""Draws the picture of a deduplication report."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np

_SOURCES = 20
"""The number of bars for sources. The sources with the most documents have one each, and the others are summed up."""
_OTHERS = "all others"
_KEPT, _REMOVED = "#2a6f97", "#e07a3f"
_CLUSTERS = 8


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw what `report.report` found, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    sources, pairs = shown(found["sources"], found["duplicates_of"])
    names = list(sources)
    heights = [1.2 + 0.3 * len(names), max(3.6, 1.2 + 0.36 * len(names)), 0.5 + 0.27 * _CLUSTERS]
    figure = Figure(figsize=(13, sum(heights) + 1), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2, height_ratios=heights)
    kept, documents = found["kept"], found["documents"]
    share = 100 * (documents - kept) / max(1, documents)
    figure.suptitle(
        f"Near-deduplication: {kept:,} of {documents:,} documents kept, {share:.1f} % removed",
        fontsize=15,
        weight="bold",
    )
    bars(figure.add_subplot(grid[0, 0]), sources, "documents", "documents", 1)
    most = max((sums["bytes"] for sums in sources.values()), default=0)
    unit, size = next(((unit, size) for unit, size in (("GB", 10**9), ("MB", 10**6)) if most >= size), ("kB", 10**3))
    bars(figure.add_subplot(grid[0, 1]), sources, "bytes", f"text, {unit}", size)
    histogram(figure.add_subplot(grid[1, 0]), found["sizes"])
    heat(figure.add_subplot(grid[1, 1]), names, pairs)
    largest(figure.add_subplot(grid[2, :]), found["largest_clusters"][:_CLUSTERS])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # an excerpt may hold any character of Unicode
        figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def shown(
    sources: dict[str, dict[str, int]], pairs: dict[str, dict[str, int]]
) -> tuple[dict[str, dict[str, int]], dict[tuple[str, str], int]]:
    """The sums by source and the duplicates between sources, with the smaller sources taken together."""
    ordered = sorted(sources, key=lambda name: (-sources[name]["documents"], name))
    named = ordered if len(ordered) <= _SOURCES else ordered[: _SOURCES - 1]
    place = {name: name if name in named else _OTHERS for name in ordered}
    sums: dict[str, dict[str, int]] = {}
    for name in ordered:
        total = sums.setdefault(place[name], dict.fromkeys(sources[name], 0))
        for key, value in sources[name].items():
            total[key] += value
    between: dict[tuple[str, str], int] = {}
    for survivor, row in pairs.items():
        for removed, count in row.items():
            key_ = (place.get(survivor, survivor), place[removed])  # a survivor may be of an earlier run
            between[key_] = between.get(key_, 0) + count
    return sums, between


def bars(axes: Any, sources: dict[str, dict[str, int]], key: str, label: str, unit: int) -> None:
    """Draw what was kept and removed of each source, one bar per source."""
    places = np.arange(len(sources))
    before = np.array([sums[key] for sums in sources.values()]) / unit
    kept = np.array([sums[f"kept_{key}"] for sums in sources.values()]) / unit
    axes.barh(places, kept, color=_KEPT, label="kept")
    axes.barh(places, before - kept, left=kept, color=_REMOVED, label="removed")
    for place, total, left in zip(places, before, kept, strict=True):
        axes.text(total, place, f" {100 * (total - left) / total:.1f} %" if total else "", va="center", fontsize=9)
    axes.set_yticks(places, [short(name) for name in sources])
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel(f"{label} (and the share removed)")
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=2, borderaxespad=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def histogram(axes: Any, sizes: list[list[int]]) -> None:
    """Draw the number of clusters of each size, in bins whose sizes double."""
    axes.set_title("Clusters by size")
    axes.spines[["top", "right"]].set_visible(False)
    if not sizes:
        axes.text(0.5, 0.5, "no duplicates", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    bins: dict[int, int] = {}
    for size, count in sizes:
        bins[size.bit_length() - 1] = bins.get(size.bit_length() - 1, 0) + count
    places = range(1, max(bins) + 1)
    drawn = axes.bar(places, [bins.get(place, 0) for place in places], color=_KEPT, width=0.85)
    axes.bar_label(drawn, [f"{bins[place]:,}" if place in bins else "" for place in places], fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 3 * max(bins.values()))
    axes.set_xticks(places, [edges(place) for place in places], rotation=0 if len(places) < 6 else 40)
    axes.set_xlabel("documents in the cluster")
    axes.set_ylabel("clusters")


def edges(place: int) -> str:
    """The smallest and the largest size in a bin, as a label."""
    low, high = 1 << place, (2 << place) - 1
    return f"{low:,}-{high:,}"


def heat(axes: Any, names: list[str], pairs: dict[tuple[str, str], int]) -> None:
    """Draw how many documents of each source were removed in favour of each source, and of earlier runs if any."""
    survivors = [*names, *sorted({survivor for survivor, _ in pairs} - set(names))]
    table = np.array([[pairs.get((survivor, removed), 0) for removed in names] for survivor in survivors], float)
    table = table.reshape(len(survivors), len(names))
    axes.set_title("Duplicates removed, by source")
    if not table.any():
        axes.text(0.5, 0.5, "no duplicates", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    shades = np.sqrt(table)
    axes.imshow(shades, cmap="Oranges", aspect="auto", vmin=0, vmax=1.3 * shades.max())
    if len(names) <= 12:
        for (row, column), count in np.ndenumerate(table):
            if count:
                axes.text(column, row, f"{count:,.0f}", ha="center", va="center", fontsize=9)
    places = range(len(names))
    axes.set_xticks(places, [short(name) for name in names], rotation=35 if len(names) <= 6 else 90, ha="right")
    axes.set_yticks(range(len(survivors)), [short(name) for name in survivors])
    axes.set_xlabel("source of the removed document")
    axes.set_ylabel("source of the one kept")


def largest(axes: Any, clusters: list[dict[str, Any]]) -> None:
    """Write the sizes of the largest clusters and the beginnings of their survivors."""
    axes.set_axis_off()
    axes.set_title("Largest clusters", loc="left")
    for place, cluster in enumerate(clusters):
        height = 1 - (place + 0.5) / _CLUSTERS
        line = cluster["excerpt"].replace("$", r"\$")
        axes.text(0.06, height, f"{cluster['size']:,} ×", ha="right", va="center", weight="bold", fontsize=10)
        axes.text(0.07, height, textwrap.shorten(line, 150, placeholder=" …"), va="center", fontsize=10)


def short(name: str) -> str:
    """A source's name, shortened so that it fits."""
    return name if len(name) <= 24 else f"{name[:23]}…"
