"""Draws what each rule of quality would remove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snakmodel.filter.quality.rules import RULES

_COLOURS = {"published": "#e07a3f", "calibrated": "#2a6f97"}


def draw(found: dict[tuple[str, str], NDArray[np.float64]], documents: dict[str, int], path: Path) -> None:
    """Draw the shares that `calibrate.shares` found, one panel per corpus, as a PNG whose bytes depend on them only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    names = [*(rule.name for rule in RULES), "any rule"]
    figure = Figure(figsize=(6 + 5 * len(documents), 12), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    FigureCanvasAgg(figure)
    figure.suptitle("What each rule of quality would remove", fontsize=15, weight="bold")
    for place, (corpus, count) in enumerate(documents.items()):
        axes = figure.add_subplot(1, len(documents), place + 1)
        axes.set_title(f"{corpus}, {count:,} documents")
        panel(axes, {name: share for (of, name), share in found.items() if of == corpus}, names if not place else None)
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def panel(axes: Any, shares: dict[str, NDArray[np.float64]], names: list[str] | None) -> None:
    """Draw the shares of one corpus, a bar per rule and set of thresholds, labelled with names if these are given."""
    places = np.arange(len(RULES) + 1)
    height = 0.8 / len(shares)
    for row, (name, share) in enumerate(shares.items()):
        centres = places - 0.4 + (row + 0.5) * height
        axes.barh(centres, 100 * share, height, color=_COLOURS[name], label=name)
        for centre, value in zip(centres, 100 * share, strict=True):
            axes.text(value, centre, f" {value:.2f}" if value else "", va="center", fontsize=7)
    axes.set_yticks(places, names or [""] * len(places))
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.set_xlabel("documents that fail, per cent")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.03))
    axes.spines[["top", "right"]].set_visible(False)
