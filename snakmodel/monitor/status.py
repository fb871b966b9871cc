"""The status of a run: a plain table, the end of every failing task's log, and what to do next.

run_files.py reads the run's folder, slurm/jobs.py asks Slurm, and diagnosis.py judges every pack; this module puts the
result into words.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from snakmodel.chain import training_sum
from snakmodel.monitor.diagnosis import STATES, Diagnosis, Pack, StageState, diagnose
from snakmodel.monitor.run_files import RunFiles, find_run
from snakmodel.run import training_numbers
from snakmodel.run.log_file import tail
from snakmodel.run.paths import RunPaths
from snakmodel.slurm.jobs import CONTINUATION, array_ranges
from snakmodel.slurm.pending_reasons import NEVER

_TAIL = 15
_TAILS_SHOWN = 10
_NOTES_SHOWN = 10
_REASONS_SHOWN = 3
_NODES_SHOWN = 3
_WIDTH = 10_000
"""Lines are not folded: a terminal does that, and programs read whole lines."""
_KINDS = {
    "timeout": "its time limit",
    "preempted": "preemption",
    "requested": "a signal",
    "requeued": "scontrol requeue",
    "restarted": "preemption or scontrol requeue",
    "no-record": "an attempt that left no record although its node was not lost",
    "node-failure": "the loss",
    "crash": "a crash",
    "hung": "a hang",
    "saved": "saving its state",
}
"""Maps the kind of an attempt's end to words that say what the next attempt came after."""


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """The command jobs/status.py: show the status of one run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's folder or name (default: the newest run)")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    args = parser.parse_args(argv)
    found = diagnose(RunFiles.read(find_run(args.run)))
    print(json.dumps(as_json(found), ensure_ascii=False, indent=1) if args.json else text(found))
    return 0


def text(found: Diagnosis) -> str:
    """The whole status as text for a user."""
    name, holder = found.files.root.name, found.files.holder
    parts = [f"{name}: {found.files.root}", "", *table(found)]
    root = found.files.root
    trains = any(stage.name == "train" for stage in found.stages)
    training = training_sum.remembered(RunPaths(root)) if trains else []
    if numbers := training_numbers.sentence(training_numbers.newest(root), training_numbers.planned(root)):
        training = [*training, numbers]
    parts += ["", *training] if training else []
    notes = [*found.files.notes, *found.queue.notes]
    if holder:
        notes.append(f"a launcher works on this run: process {holder.get('pid')} on {holder.get('host')}")
    notes += [f"job {job.id} ({stage}) is {job.state.lower()} too" for stage, job in found.queue.others]
    parts += ["", *(f"note: {one}" for one in notes[:_NOTES_SHOWN])] if notes else []
    parts += [f"note: … and {len(notes) - _NOTES_SHOWN} more (--json shows all)"] if len(notes) > _NOTES_SHOWN else []
    failed = found.packs("failed")
    for number, (stage, pack) in enumerate(failed):
        parts += ["", *_failure(found, stage, pack, lines=_TAIL if number < _TAILS_SHOWN else 0)]
    return "\n".join([*parts, "", f"What to do next: {advice(found)}"])


def table(found: Diagnosis) -> list[str]:
    """The lines of the table, one per stage. The columns of rare states are shown only where a task is in one."""
    shown = [one for one in STATES if one not in ("unknown", "missing") or any(s.count(one) for s in found.stages)]
    rows = [["stage", "tasks", *shown, "attempts", "node", "why"]]
    for stage in found.stages:
        if stage.files.tasks is None:
            rows.append([stage.name, "?", *("" for _ in shown), "", "", "not planned or submitted yet"])
            continue
        counts = [str(stage.count(one) or "-") for one in shown]
        cells = [stage.name, str(stage.files.size), *counts, str(stage.attempts or "-"), nodes(stage)]
        rows.append([*cells, "; ".join(filter(None, [why(stage), history(stage)]))])
    shown_table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    left = {0, len(rows[0]) - 2, len(rows[0]) - 1}
    for column, name in enumerate(rows[0]):
        shown_table.add_column(Text(name), justify="left" if column in left else "right", no_wrap=True)
    for row in rows[1:]:
        shown_table.add_row(*map(Text, row))  # names of stages and words of Slurm are no markup
    lines = Console(width=_WIDTH, file=io.StringIO(), record=True, color_system=None)
    lines.print(shown_table)
    return [line.rstrip() for line in lines.export_text().splitlines()]


def why(stage: StageState) -> str:
    """The most frequent reasons why tasks of a stage are not done, those of the worst states first."""
    rank = {"failed": 0, "blocked": 1, "unknown": 2, "missing": 3, "pending": 4, "running": 5}
    reasons = Counter((rank[pack.state], pack.state, pack.why) for pack in stage.packs.values())
    every = sorted(reasons.items(), key=lambda one: (one[0][0], -one[1]))
    shown = [f"{state}: {reason}" for (_, state, reason), _ in every[:_REASONS_SHOWN] if state != "running"]
    more = len(every) - _REASONS_SHOWN
    return "; ".join([*shown, *([f"{more} more reasons (--json)"] if more > 0 else [])])


def history(stage: StageState) -> str:
    """What happened to a stage's jobs on the way, even if all of them are done by now."""
    after = [
        _KINDS.get(kind, kind)
        + (f" of {','.join(sorted(stage.lost))}" if kind == "node-failure" else "")
        + _times(count)
        for kind, count in stage.again.most_common()
    ]
    parts = [f"started again after {', '.join(after)}"] if after else []
    parts += [f"kept off {','.join(sorted(stage.avoided))} after repeated failures there"] if stage.avoided else []
    parts += ["a replaced attempt that still lived was refused" + _times(stage.superseded)] if stage.superseded else []
    return "; ".join(parts)


def _times(count: int) -> str:
    return f" ({count} times)" if count > 1 else ""


def nodes(stage: StageState) -> str:
    """The nodes on which tasks run, or else those on which they failed."""
    for state in ("running", "failed"):
        found = sorted({pack.node for pack in stage.packs.values() if pack.state == state and pack.node})
        if found:
            return ",".join(found[:_NODES_SHOWN]) + (f",+{len(found) - _NODES_SHOWN}" if found[_NODES_SHOWN:] else "")
    return "-"


def _failure(found: Diagnosis, stage: StageState, pack: Pack, lines: int) -> list[str]:
    """Lines on one failing pack: what happened, and the end of its log."""
    log = found.files.log(stage.files, pack.number)
    what = f"{stage.name}, task {array_ranges(pack.tasks)}: failed after {pack.attempts} attempt(s)"
    where = "".join([f" on {pack.node}" if pack.node else "", f", job {pack.job}" if pack.job else ""])
    exits = found.files.exits(stage.name, pack.number, pack.tasks)[:4]
    shown = [f"  | {line}" for line in tail(log, lines)] if lines else []
    return [f"{what}{where}: {pack.why}", *(f"  {one}" for one in exits), f"  log: {log}", *shown]


def advice(found: Diagnosis) -> str:
    """One line that says what the user should do next."""
    again = "run the launcher again as before (such as jobs/submit_all.py): it continues with what is missing"
    rest = [job.id for stage, job in found.queue.others if stage == CONTINUATION]
    if rest:
        again = f"wait until the continuation job {rest[0]}, which submits what is left, has ended; then {again}"
    failed, blocked = found.packs("failed"), found.packs("blocked")
    unknown, left = found.packs("unknown"), found.packs("missing")
    active = found.packs("running") or found.packs("pending")
    never = [pack for _, pack in blocked if NEVER in pack.why]
    root = found.files.root
    if failed:
        names = ", ".join(dict.fromkeys(stage.name for stage, _ in failed))
        free = f", free the queue of jobs that can never start (jobs/cancel.py {root})" if never else ""
        return f"repair what the log of {names} says{free}, then {again}."
    if never:
        return f"free the queue of jobs that can never start (jobs/cancel.py {root}), then {again}."
    if unknown or (not found.queue.answered and found.queue.notes):
        return "Slurm does not answer: type `scontrol ping`, and ask again when its controller is up."
    remedies = list(dict.fromkeys(pack.remedy for _, pack in found.packs("pending") if pack.remedy))
    if remedies:
        return f"{'; '.join(remedies[:_REASONS_SHOWN])}."
    if rest:
        return f"nothing but wait: the continuation job {rest[0]} submits what is left."
    if left and not active:
        return f"{again[0].upper()}{again[1:]}."
    if left:
        return f"wait for what is queued or runs, then {again}."
    if active:
        return "nothing but wait; ask again for news."
    planned = [stage for stage in found.stages if stage.files.tasks is not None]
    if len(planned) < len(found.stages):
        return f"what was asked for is done; for the stages that were not, {again}."
    return "nothing: every task is done." if planned else f"{again[0].upper()}{again[1:]}."


def as_json(found: Diagnosis) -> dict[str, Any]:
    """The whole status as a JSON object for programs."""
    return {
        "run": found.files.root.name,
        "folder": str(found.files.root),
        "slurm_answered": found.queue.answered,
        "launcher": found.files.holder or None,
        "stages": [_stage_json(stage) for stage in found.stages],
        "failing": [
            {
                "stage": stage.name, "pack": pack.number, "tasks": pack.tasks, "attempts": pack.attempts,
                "node": pack.node, "job": pack.job, "why": pack.why,
                "exits": found.files.exits(stage.name, pack.number, pack.tasks),
                "log": str(log := found.files.log(stage.files, pack.number)), "tail": tail(log, _TAIL),
            }
            for stage, pack in found.packs("failed")
        ],
        "training": training_numbers.newest(found.files.root) or None,
        "training_sum": training_sum.remembered(RunPaths(found.files.root)),
        "other_jobs": [{"stage": stage, "job": job.id, "state": job.state} for stage, job in found.queue.others],
        "notes": [*found.files.notes, *found.queue.notes],
        "next": advice(found),
    }  # fmt: skip


def _stage_json(stage: StageState) -> dict[str, Any]:
    counts: dict[str, int] = {state: stage.count(state) for state in STATES}
    undone = [
        {"pack": one.number, "tasks": one.tasks, "state": one.state, "why": one.why,
         "attempts": one.attempts, "node": one.node, "job": one.job}
        for one in stage.packs.values()
    ]  # fmt: skip
    return {"stage": stage.name, "planned": stage.files.tasks is not None, "tasks": stage.files.size, **counts,
            "attempts": stage.attempts, "again": dict(stage.again), "lost_nodes": stage.lost, "avoided": stage.avoided,
            "superseded": stage.superseded, "not_done": undone}  # fmt: skip
