"""Measures how far training moved a model from its base, tensor by tensor: a table (JSON) and a plot (PNG).

For every tensor the mean absolute change is reported, also relative to the base's mean absolute value. For every matrix
the principal angles are reported between the subspaces of its leading right singular vectors before and after (0
degrees: the same directions, 90: none in common). Formula: the cosines of the angles are the singular values of
V_base^T V_new (Björck, Golub 1973).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from run_contract.errors import UserError
from run_contract.publish import publishing, write_json

RANK = 16
"""Number of dimensions of the subspaces that are compared."""
ITERATIONS = 4
"""Number of power iterations of the randomised singular value decomposition."""


@dataclass(frozen=True)
class Divergence:
    """The divergence of one tensor; angles are in degrees, and None for vectors."""

    name: str
    mean_absolute_change: float
    relative_change: float
    mean_angle: float | None
    max_angle: float | None


def compare(name: str, base: Tensor, new: Tensor) -> Divergence:
    """Compare a tensor before and after training; of vocabularies of different sizes only the common rows.

    Raises UserError when the shapes do not match.
    """
    if base.shape[1:] != new.shape[1:] or (base.shape != new.shape and not name.startswith(("embedding", "lm_head"))):
        raise UserError(
            f"{name} has shape {tuple(new.shape)}, but the base model's has {tuple(base.shape)}; give the model that "
            "training began with as --base_model"
        )
    rows = min(len(base), len(new))
    base, new = base[:rows].float(), new[:rows].float()
    change = (new - base).abs().mean().item()
    angles = principal_angles(base, new) if base.dim() == 2 else None
    return Divergence(
        name=name,
        mean_absolute_change=change,
        relative_change=change / max(base.abs().mean().item(), 1e-30),
        mean_angle=None if angles is None else angles.mean().item(),
        max_angle=None if angles is None else angles.max().item(),
    )


def principal_angles(base: Tensor, new: Tensor) -> Tensor:
    """The angles in degrees between the leading right singular subspaces of two matrices (m, n) fp32."""
    rank = min(RANK, *base.shape)
    spaces = []
    for matrix in (base, new):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # equal matrices get equal subspaces
            spaces.append(torch.svd_lowrank(matrix, q=min(2 * rank, *base.shape), niter=ITERATIONS)[2][:, :rank])
    first, second = spaces
    cosines = torch.linalg.svdvals(first.T @ second).clamp(max=1.0)
    outside = second - first @ (first.T @ second)
    sines = torch.linalg.svdvals(outside).flip(0).clamp(max=1.0)  # exact at small angles, where cosines are not
    return torch.rad2deg(torch.where(cosines > 0.7, sines.asin(), cosines.acos()))


def report(base: Mapping[str, Tensor], new: Mapping[str, Tensor], table: Path) -> list[Divergence]:
    """Publish `table` (JSON) and the plot (.png) beside it. Raises UserError for models of different geometries."""
    if missing := sorted(new.keys() - base.keys()):
        raise UserError(
            f"the base model lacks the tensor {missing[0]}; give the model that training began with as --base_model"
        )
    found = [compare(name, base[name], new[name]) for name in new]
    write_json(table, [asdict(one) for one in found])
    with publishing(table.with_suffix(".png")) as (temporary,):
        draw(temporary, found)
    return found


def draw(path: Path, found: Sequence[Divergence]) -> None:
    """Draw change and angle over the layers, with one line per kind of tensor; tensors outside layers are dashed
    lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds: dict[str, list[Divergence]] = {}
    for one in found:
        inner = re.fullmatch(r"layers\.\d+\.(.+)\.weight", one.name)
        kinds.setdefault(inner[1] if inner else one.name.removesuffix(".weight"), []).append(one)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    change, angle = figure.subplots(1, 2)
    for number, (kind, members) in enumerate(kinds.items()):
        color = f"C{number % 10}"
        inside = members[0].name.startswith("layers.")
        style = {
            "color": color,
            "label": kind,
            "linewidth": 1.2,
            "marker": "o" if number < 10 else "x",
            "markersize": 3,
        }
        for axes, values in (
            (change, [one.mean_absolute_change for one in members]),
            (angle, [one.mean_angle for one in members if one.mean_angle is not None]),
        ):
            if values and inside:
                axes.plot(range(len(values)), values, **style)
            elif values:
                axes.axhline(values[0], color=color, linestyle="--" if number < 10 else ":", linewidth=1.2, label=kind)
    for axes, title in ((change, "mean absolute change"), (angle, "mean principal angle (degrees)")):
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*change.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120, format="png")
