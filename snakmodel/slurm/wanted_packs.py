"""Which packs of a plan are to be submitted now, and which are given up for this series of submissions."""

from __future__ import annotations

from collections.abc import Mapping

from snakmodel.chain.plan import RunPlan
from snakmodel.slurm.journal import read_lines


def tried_packs(plan: RunPlan, series: str | None) -> set[tuple[str, int]]:
    """The (stage, pack) of everything that was submitted in a series; an empty set if there is no series."""
    lines = read_lines(plan.paths.submissions) if series else []
    return {(line["stage"], pack) for line in lines if line.get("series") == series for pack in line["packs"]}


def wanted_packs(
    plan: RunPlan, queued: Mapping[str, Mapping[int, str]], tried: set[tuple[str, int]]
) -> tuple[dict[str, list[int]], dict[str, set[int]]]:
    """The packs to submit and the packs that are given up, both by stage.

    The packs to submit are missing and not queued. Those that were `tried` before (stage, pack) are given up, and so
    are the packs that wait for packs that are given up.
    """
    wanted: dict[str, list[int]] = {}
    given_up: dict[str, set[int]] = {}
    for name, packs in plan.missing.items():
        active = queued.get(name, {})
        bad = {pack for pack in packs if (name, pack) in tried and pack not in active}
        for other, kind in plan.chain[name].waits.items():
            lost = given_up.get(other, set())
            bad |= set(packs) if kind == "all" and lost else lost & set(packs)
        given_up[name] = bad
        wanted[name] = [pack for pack in packs if pack not in active and pack not in bad]
    return wanted, given_up
