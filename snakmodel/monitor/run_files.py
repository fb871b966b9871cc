"""What a run's folder says by itself: stages, packs, done markers, attempts and events. Nothing here asks Slurm.

Everything is read with care: a damaged file leads to a note, never to a traceback.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from run_contract.errors import UserError
from snakmodel.config.load import load_cluster
from snakmodel.config.sections import PROJECT
from snakmodel.run import lock
from snakmodel.run.attempts import ExitRecord
from snakmodel.run.markers import judge, marker_path
from snakmodel.run.paths import RunPaths
from snakmodel.run.task_list import TaskList
from snakmodel.slurm.ask import BY_HAND

_TOKENIZE = "tokenize"
"""The stage whose done markers count the mismatches between two tokenizers."""
_ENDS = frozenset(["done", "failed", "again", "requeue", "cancelled"])
"""Names of the events that end an attempt."""


@dataclass
class PackHistory:
    """The history of one pack, as the events file tells it."""

    starts: int = 0
    start: Mapping[str, Any] = field(default_factory=dict)
    """The event of the latest start."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """The event that ended that start, or the start itself if it has not ended."""
    again: list[tuple[str, str]] = field(default_factory=list)
    """(Kind, node) of every attempt that was followed by another one."""
    avoided: list[str] = field(default_factory=list)
    """Nodes that the job was kept off."""
    superseded: int = 0
    """Number of attempts that lived on beside a later one and were refused."""

    def add(self, event: Mapping[str, Any]) -> None:
        """Add the next event. Events of an attempt that has been replaced, and mere remarks, do not change `last`."""
        if event["event"] == "start":
            self.starts += 1
            self.start = self.last = event
        elif event["event"] in _ENDS and event.get("attempt") == self.start.get("attempt"):
            self.last = event
        if event["event"] in ("requeue", "again", "lost"):
            self.again.append((str(event.get("kind") or "saved"), str(event.get("node", ""))))
        elif event["event"] == "explained" and self.again:
            self.again[-1] = (str(event["kind"]), self.again[-1][1])
        elif event["event"] == "excluded":
            self.avoided += [str(node) for node in event.get("nodes", ())]
        elif event["event"] == "superseded":
            self.superseded += 1

    @property
    def job(self) -> str:
        """The id of the job in which the latest attempt ran."""
        return str(self.start.get("attempt", "")).rpartition(".r")[0]


@dataclass
class StageFiles:
    """One stage, as its task list and its markers describe it."""

    name: str
    tasks: TaskList | None
    """The stage's task list; None if no task of it was ever planned."""
    undone: dict[int, dict[int, str]]
    """Maps each pack that is not done to its tasks without a valid marker, and each such task to what is wrong."""

    def waits(self) -> dict[str, Literal["same", "all"]]:
        """The stages that this one waits for, each either index by index ("same") or as a whole ("all")."""
        if self.tasks is None:
            return {}
        return {other: _kind(self.tasks, other) for other in self.tasks.keys}

    @property
    def size(self) -> int:
        """The number of tasks."""
        return len(self.tasks.tasks) if self.tasks else 0


def _kind(tasks: TaskList, other: str) -> Literal["same", "all"]:
    if len(tasks.keys[other]) != len(tasks.tasks):
        return "all"
    for number, task in enumerate(tasks.tasks):
        numbers = {one.index for one in task.inputs if one.stage == other}
        if numbers != {number}:
            return "all"
    return "same"


@dataclass
class RunFiles:
    """The files of one run, read from its folder."""

    root: Path
    stages: list[StageFiles]
    journal: list[dict[str, Any]]
    histories: dict[tuple[str, int], PackHistory]
    holder: dict[str, Any]
    """The process that holds the run's lock; empty if there is none, or if it is gone."""
    notes: list[str]

    @classmethod
    def read(cls, root: Path) -> RunFiles:
        """Read everything. Raises UserError when the folder is not that of a run."""
        paths, notes = RunPaths(root), list[str]()
        if not paths.frozen.exists() and not (root / "tasks").is_dir():
            raise UserError(f"{root} is not a run's folder: it holds neither run.yaml nor tasks/.{_known_runs(root)}")
        lists = _task_lists(root, notes)
        stages = [_stage(root, name, lists.get(name), notes) for name in _order(paths.frozen, lists, notes)]
        journal = [one for one in json_lines(paths.submissions, notes) if _is_submission(one)]
        histories: dict[tuple[str, int], PackHistory] = {}
        for event in json_lines(paths.events, notes):
            if isinstance(event.get("pack"), int) and "event" in event and "stage" in event:
                histories.setdefault((event["stage"], event["pack"]), PackHistory()).add(event)
        return cls(root, stages, journal, histories, lock.holder(root), notes)

    @property
    def cluster(self) -> str | None:
        """The cluster that the run was last submitted to by name, where several share one accounting; else None."""
        launched = [one for one in self.journal if not str(one.get("token", "")).startswith(BY_HAND)]
        return str(launched[-1].get("cluster", "")) or None if launched else None

    def log(self, stage: StageFiles, pack: int) -> Path:
        """The path of a pack's log, whether it exists or not."""
        named = stage.tasks.logs if stage.tasks else ""
        return Path(named or PROJECT / "logs" / self.root.name / stage.name) / f"{pack:05d}.out"

    def attempts(self, stage: str, pack: int) -> int:
        """How often a pack was started, by its events or by the folders of its attempts, whichever is more."""
        folder = self.root / "attempts" / stage / f"{pack:05d}"
        history = self.histories.get((stage, pack))
        return max(history.starts if history else 0, len(_names(folder)))

    def exits(self, stage: str, pack: int, tasks: list[int]) -> list[str]:
        """Sentences on how the last attempt at these tasks ended; empty when it left no records of a failure."""
        folder = self.root / "attempts" / stage / f"{pack:05d}"
        history = self.histories.get((stage, pack))
        names = _names(folder)
        name = (
            str(history.start["attempt"]) if history and history.start.get("attempt") in names else (names or [""])[-1]
        )
        words = []
        for path in sorted((folder / name).glob("task-*.rank-*.json")) if name else []:
            record = ExitRecord.read(path)
            if record and record.code and int(path.name[5:10]) in tasks:
                words.append(f"task {int(path.name[5:10])}, rank {record.rank} on {record.node}: {_code(record.code)}")
        return words


def _code(code: int) -> str:
    meaning = {2: " (a mistake in its settings or input)", 3: " (inputs missing)", 75: " (saved, to be run again)"}
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}{meaning.get(code, '')}"


def _names(folder: Path) -> list[str]:
    """The names of a folder's sub-folders, oldest first."""
    try:
        return [one.name for one in sorted(os.scandir(folder), key=lambda one: one.stat().st_mtime) if one.is_dir()]
    except OSError:
        return []


def _task_lists(root: Path, notes: list[str]) -> dict[str, TaskList]:
    found = {}
    for path in sorted((root / "tasks").glob("*.json")):
        try:
            found[path.stem] = TaskList.read(path)
        except UserError as error:
            notes.append(str(error))
    return found


def _order(frozen: Path, lists: Mapping[str, TaskList], notes: list[str]) -> list[str]:
    """The names of the stages in chain order.

    First come those that run.yaml lists, then all others that have a task list, each after the stages that it waits
    for.
    """
    names: list[str] = []
    if frozen.exists():
        try:
            names = [str(name) for name in yaml.safe_load(frozen.read_text(encoding="utf-8"))["stage_keys"]]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
            first = str(error).splitlines()[0]
            notes.append(f"{frozen} cannot be read ({first}); stages without a task list are not shown")
    left = [name for name in lists if name not in names]
    while left:
        ready = [name for name in left if not set(lists[name].keys) & set(left)] or left
        names += ready
        left = [name for name in left if name not in ready]
    return names


def _stage(root: Path, name: str, tasks: TaskList | None, notes: list[str]) -> StageFiles:
    undone: dict[int, dict[int, str]] = {}
    mismatches: Counter[int] = Counter()
    for pack, numbers in enumerate(tasks.packs if tasks else []):
        assert tasks is not None
        problems = {index: problem for index in numbers if (problem := _marker_problem(root, tasks, index, mismatches))}
        notes += [f"{name}: {one}; it will be done again" for one in problems.values() if one != "no marker"]
        if problems:
            undone[pack] = problems
    if mismatches and name == _TOKENIZE:  # the merged dataset's manifest repeats the sum
        notes.append(
            f"{name}: gigatoken gave different ids than the tokenizer's own library for {mismatches.total()} sampled "
            f"document(s) of {len(mismatches)} task(s), of which the first is task {min(mismatches)}; these tasks were "
            "tokenised again as a whole by the tokenizer's own library, so their ids are right"
        )
    return StageFiles(name, tasks, undone)


def _marker_problem(root: Path, tasks: TaskList, index: int, mismatches: Counter[int]) -> str | None:
    """Why a task does not count as done, or None if it does. Key, existence and sizes are checked, but not checksums.

    `mismatches` collects how many mismatches of its two tokenizers a done task has counted, where there were any.
    """
    found = judge(marker_path(root, tasks.stage, index), root, tasks.tasks[index].key)
    counts = found.marker.counts if found.marker and found.marker.key == tasks.tasks[index].key else {}
    if isinstance(count := counts.get("sample_mismatches"), int) and count:
        mismatches[index] = count
    return found.problem


def json_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines. A note counts the lines that hold none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{path} cannot be read: {error.strerror}")
        return []
    found, bad = [], 0
    for line in lines:
        try:
            one = json.loads(line)
        except ValueError:
            one = None
        if isinstance(one, dict):
            found.append(one)
        else:
            bad += bool(line.strip())
    if bad:
        notes.append(f"{path}: {bad} unreadable line(s) left out")
    return found


def _is_submission(one: Mapping[str, Any]) -> bool:
    return isinstance(one.get("stage"), str) and isinstance(one.get("packs"), list)


def find_run(name: str | None) -> Path:
    """The folder of a run: a path, the name of one of cluster.yaml's runs, or, without a name, the run touched last."""
    if name and (Path(name).is_dir() or "/" in name):
        root = Path(name).absolute()
        if not root.is_dir():
            raise UserError(f"there is no folder {root}.{_known_runs(root)}")
        return root
    runs = load_cluster(PROJECT / "cluster.yaml").runs
    if name:
        if not (runs / name).is_dir():
            raise UserError(f"there is no run {name} in {runs}.{_known_runs(runs / name)}")
        return runs / name
    found = _runs(runs)
    if not found:
        raise UserError(f"there are no runs in {runs}. Start one with jobs/submit_all.py, or give a run's folder.")
    return found[-1]


def _runs(folder: Path) -> list[Path]:
    """The folders of runs below a folder, with the one that was touched last at the end."""
    touched = {}
    for path in folder.iterdir() if folder.is_dir() else []:
        times = [one.stat().st_mtime for one in (path / "run.yaml", path / "events.jsonl") if one.exists()]
        if times:
            touched[path] = max(times)
    return sorted(touched, key=lambda path: touched[path])


def _known_runs(root: Path) -> str:
    known = [path.name for path in _runs(root.parent)]
    return f" Runs in {root.parent}: {', '.join(known)}." if known else " Give a run's folder, such as runs/demo."
