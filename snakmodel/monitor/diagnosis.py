"""Derives the state of every pack of a run, and the reason for it, from the run's files and Slurm's queue.

Proof comes first: a pack with valid markers is done, whatever Slurm says. Next comes what squeue and sacct know, and
last the run's events. A pack that waits for something that failed is blocked; one that is neither done nor queued is
missing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from snakmodel.monitor.run_files import PackHistory, RunFiles, StageFiles
from snakmodel.run.log_file import tail
from snakmodel.slurm.ask import use_cluster
from snakmodel.slurm.jobs import FAILED, INTERRUPTED, RUNNING, Job, Owner, Queue, look
from snakmodel.slurm.pending_reasons import NEVER, explain

State = Literal["done", "running", "pending", "failed", "blocked", "unknown", "missing"]
STATES: tuple[State, ...] = ("done", "running", "pending", "failed", "blocked", "unknown", "missing")
_ERROR_LINES = 50
"""Number of lines at the end of a log in which the error is looked for."""


@dataclass
class Pack:
    """One array element that is not done, with its state."""

    number: int
    state: State
    why: str
    tasks: list[int]
    """The pack's tasks that have no valid marker."""
    node: str = ""
    job: str = ""
    attempts: int = 0
    remedy: str = ""
    """What the user must do before Slurm starts it; empty where waiting is enough."""


@dataclass
class StageState:
    """One stage: how many tasks are in which state, and the packs that are not done."""

    files: StageFiles
    packs: dict[int, Pack] = field(default_factory=dict)
    attempts: int = 0
    """The largest number of attempts that any of its packs took, including packs that are done."""
    again: Counter[str] = field(default_factory=Counter)
    """Maps each kind of end to the number of attempts that ended so and were followed by another one."""
    lost: list[str] = field(default_factory=list)
    """Nodes that were lost while the stage ran on them."""
    avoided: list[str] = field(default_factory=list)
    """Nodes that the stage's jobs were kept off."""
    superseded: int = 0
    """Number of attempts that lived on beside a later one and were refused."""

    @property
    def name(self) -> str:
        """The name of the stage."""
        return self.files.name

    def recall(self, history: PackHistory) -> None:
        """Add what happened to one of the stage's packs."""
        self.attempts = max(self.attempts, history.starts)
        self.again.update(kind for kind, _ in history.again)
        self.lost += [node for kind, node in history.again if kind == "node-failure" and node not in self.lost]
        self.avoided += [node for node in history.avoided if node not in self.avoided]
        self.superseded += history.superseded

    def count(self, state: State) -> int:
        """The number of tasks in a state."""
        undone = sum(len(pack.tasks) for pack in self.packs.values())
        if state == "done":
            return self.files.size - undone
        return sum(len(pack.tasks) for pack in self.packs.values() if pack.state == state)


@dataclass
class Diagnosis:
    """The state of a whole run."""

    files: RunFiles
    queue: Queue
    stages: list[StageState]

    def packs(self, state: State) -> list[tuple[StageState, Pack]]:
        """All packs in a state, with their stages, in chain order."""
        return [(stage, pack) for stage in self.stages for pack in stage.packs.values() if pack.state == state]


def diagnose(files: RunFiles) -> Diagnosis:
    """Judge every pack of a run; Slurm is asked only if something of the run was submitted to it."""
    queue = Queue()
    elsewhere = any(not history.job.startswith("local") for history in files.histories.values())
    if files.journal or elsewhere:
        use_cluster(files.cluster)
        wanted = {stage.name: set(stage.undone) for stage in files.stages}
        queue = look(Owner.of(files.root, files.journal), files.journal, wanted)
    judge = _Judge(files, queue)
    return Diagnosis(files, queue, [judge.stage(stage) for stage in files.stages])


class _Judge:
    """Judges one stage after the other, using the states of the stages that it waits for."""

    def __init__(self, files: RunFiles, queue: Queue) -> None:
        self.files = files
        self.queue = queue
        self.newest = {(one["stage"], int(n)): str(one.get("job", "")) for one in files.journal for n in one["packs"]}
        self.order = {str(one.get("job", "")): number for number, one in enumerate(files.journal)}
        self.judged: dict[str, StageState] = {}
        self.roots: dict[tuple[str, int], str] = {}
        """Maps the (stage, pack) of each failed or blocked pack to the stage whose failure is at the root of it."""
        self.histories: dict[str, list[PackHistory]] = {}
        """Maps each stage to the histories of its packs."""
        for (name, _), history in files.histories.items():
            self.histories.setdefault(name, []).append(history)
        self.bad: dict[str, str] = {}
        """Maps each stage that has a failed or blocked pack to the stage whose failure is at the root of it."""
        holder = files.holder
        self.launcher = f"local{holder.get('pid')}"
        self.runs_here = bool(holder) and any(one.job == self.launcher for one in files.histories.values())

    def stage(self, stage: StageFiles) -> StageState:
        """Judge one stage. The stages before it must have been judged."""
        state = StageState(stage)
        self.judged[stage.name] = state
        for history in self.histories.get(stage.name, ()):
            state.recall(history)
        waits = stage.waits()
        for number, problems in stage.undone.items():
            history = self.files.histories.get((stage.name, number), PackHistory())
            pack = Pack(number, "missing", "", list(problems), attempts=self.files.attempts(stage.name, number))
            pack.node, pack.job = str(history.start.get("node", "")), history.job
            pack.state, pack.why = self._pack(stage.name, pack, history, waits)
            state.packs[number] = pack
            state.attempts = max(state.attempts, pack.attempts)
            if pack.state in ("failed", "blocked"):
                root = self._root(waits, number) if pack.state == "blocked" else stage.name
                self.roots[stage.name, number] = root or stage.name
                self.bad.setdefault(stage.name, root or stage.name)
        return state

    def _root(self, waits: dict[str, Literal["same", "all"]], number: int) -> str:
        """The failed stage that keeps a pack from running; empty if there is none."""
        for other, kind in waits.items():
            root = self.roots.get((other, number)) if kind == "same" else self.bad.get(other)
            if root:
                return root
        return ""

    def _waiting(self, waits: dict[str, Literal["same", "all"]], number: int) -> list[str]:
        """The stages that a pack waits for and that are not done as far as it needs them."""
        return [
            other
            for other, kind in waits.items()
            if other in self.judged
            and (number in self.judged[other].packs if kind == "same" else self.judged[other].packs)
        ]

    def _pack(
        self, stage: str, pack: Pack, history: PackHistory, waits: dict[str, Literal["same", "all"]]
    ) -> tuple[State, str]:
        """The state of a pack and the reason for it.

        The pack's job, node and remedy are filled in as far as Slurm knows them.
        """
        job = self._job(stage, pack.number, history)
        root, waiting = self._root(waits, pack.number), self._waiting(waits, pack.number)
        if job:
            pack.job, pack.node = job.id, job.node or pack.node
        if job and job.id in self.queue.shared and (found := self._shared(stage, pack, job, history, root)):
            return found
        if job and job.state in RUNNING:
            return "running", "is just ending" if job.state == "COMPLETING" else job.state.lower()
        if job and job.active:
            pack.remedy = explain(job.reason, job.id).remedy
            return _queued(job, root, waiting)
        if self.runs_here:
            return self._local(history, root, waiting, self.files.log(self.judged[stage].files, pack.number))
        if job and job.state in FAILED:
            log = self.files.log(self.judged[stage].files, pack.number)
            if history.job == job.id and job.state == "FAILED" and history.last.get("event") == "start":
                if error := _error_in(log):
                    return "failed", error
                return (
                    "missing",
                    "its job was killed from outside, and it could not say why; there is nothing to repair",
                )
            return "failed", _never_began(job, log.parent) if history.job != job.id else _ended(job, history, log)
        if not job and history.last.get("event") == "failed" and self._is_current(stage, pack.number, history):
            return "failed", _ended(None, history, self.files.log(self.judged[stage].files, pack.number))
        if root:
            removed = "; Slurm removed its job" if job and job.state == "CANCELLED" else ""
            return "blocked", f"because {root} failed{removed}"
        return self._left(stage, pack, job, history, waiting)

    def _shared(self, stage: str, pack: Pack, job: Job, history: PackHistory, root: str) -> tuple[State, str] | None:
        """The state of one of the packs that a job by hand works through, or None if the state of the job decides."""
        event = history.last.get("event") if history.job == job.id else None
        if event == "failed" and (job.state in RUNNING or job.state in FAILED):
            return "failed", _ended(None, history, self.files.log(self.judged[stage].files, pack.number))
        if root and not job.active:
            return "blocked", f"because {root} failed"
        if job.state in RUNNING and event != "start":
            return "pending", f"waits its turn in job {job.id}, which works through several tasks"
        if job.state in FAILED:
            return "missing", f"job {job.id}, which works through several tasks, ended {job.state} before this was done"
        return None

    def _job(self, stage: str, number: int, history: PackHistory) -> Job | None:
        """The job that Slurm knows for a pack: an active one if there is any, else the newest."""
        known = self.queue.packs.get((stage, number), [])
        started = self.queue.by_id.get(history.job) if history.job and "_" not in history.job else None
        for job in [*known, *([started] if started else [])]:  # started: a batch file submitted by hand
            if job.active:
                return job
        newest = self.newest.get((stage, number))
        ended = [job for job in known if newest is None or job.array == newest]
        return ended[-1] if ended else None

    def _is_current(self, stage: str, number: int, history: PackHistory) -> bool:
        """Whether the pack has not been submitted again since its latest attempt."""
        newest = self.newest.get((stage, number), "")
        last = history.job.partition("_")[0]
        return last not in self.order or self.order[last] >= self.order.get(newest, -1)

    def _local(self, history: PackHistory, root: str, waiting: list[str], log: Path) -> tuple[State, str]:
        """The state of a pack while a launcher on this machine runs the stages itself."""
        event = history.last.get("event") if history.job == self.launcher else None
        if event == "failed":
            return "failed", _ended(None, history, log)
        if event == "start":
            return "running", f"by the launcher on {self.files.holder.get('host')}"
        if root:
            return "blocked", f"because {root} failed"
        return "pending", f"waits for {', '.join(waiting)}" if waiting else "waits for free cores"

    def _left(
        self, stage: str, pack: Pack, job: Job | None, history: PackHistory, waiting: list[str]
    ) -> tuple[State, str]:
        """The state of a pack that is neither done nor queued, and for which nothing has failed."""
        newest = self.newest.get((stage, pack.number), "")
        event, local = history.last.get("event"), history.job.startswith("local")
        if not self.queue.answered and not job and (newest or (history.starts and not local)):
            last = f"{event} on {pack.node} at {history.last.get('time')}" if event else f"submitted as job {newest}"
            return "unknown", f"{last}; whether it is queued or runs, only Slurm knows"
        needs = f"; it waits for {', '.join(waiting)}" if waiting else ""
        if job and job.state == "CANCELLED":
            return "missing", f"cancelled{needs}"
        if job and job.state in INTERRUPTED:
            return "missing", f"interrupted ({job.state}), which is no failure, and not queued again"
        if job:
            return "missing", f"its job ended {job.state}, but a done marker is missing or no longer valid"
        if event in ("start", "again", "requeue", "cancelled"):
            said = history.last.get("reason") or "without a word (killed, or its node was lost)"
            return (
                "missing",
                "cancelled" if event == "cancelled" else f"its last attempt ended: {said}; it is not queued",
            )
        if newest:
            return "missing", f"not queued: Slurm no longer knows job {newest}{needs}"
        return "missing", f"not queued{needs}"


def _queued(job: Job, root: str, waiting: list[str]) -> tuple[State, str]:
    """The state of a pack whose job waits in Slurm's queue."""
    if job.reason == NEVER:
        cause = f"because {root} failed; " if root else ""
        return (
            "blocked",
            f"{cause}job {job.array} can never start ({NEVER}: a job that it waits for failed or was cancelled)",
        )
    if job.reason == "Dependency":
        if root:
            return "blocked", f"because {root} failed"
        return "pending", f"waits for {', '.join(waiting)}" if waiting else "waits for jobs that are just ending"
    return "pending", explain(job.reason, job.id).words


def _never_began(job: Job, logs: Path) -> str:
    """Why a job failed of which no attempt has left a record: Slurm itself could not start it."""
    if job.state != "FAILED":
        return _ended(job, PackHistory(), logs)
    if not logs.is_dir():
        gone = f"{logs}, the folder of its log, is gone; the launcher makes it anew"
        return f"Slurm could not start it (FAILED: {job.reason}): {gone}"
    return f"it ended before its command began (FAILED: {job.reason}); its log or the node may say why"


def _ended(job: Job | None, history: PackHistory, log: Path) -> str:
    """Why a pack failed: the driver's reason, with the log's error where that says more; else Slurm's word."""
    if history.last.get("event") == "failed" and history.last.get("reason"):
        reason = str(history.last["reason"])
        error = _error_in(log) or "its inputs or settings are not right; its log says more"
        return f"refused: {error}" if reason == "refused" else reason
    if job and job.state == "TIMEOUT":
        return "reached its time limit (TIMEOUT)"
    if job and job.state == "OUT_OF_MEMORY":
        return "used more memory than it asked for (OUT_OF_MEMORY): raise mem_gb in cluster.yaml"
    return f"ended {job.state}: {job.reason}" if job else "failed"


def _error_in(log: Path) -> str:
    """The last error in a log since its last task began; empty where there is none.

    With it, a full disk, a damaged file and a wrong setting can be told apart.
    """
    lines = tail(log, _ERROR_LINES)
    began = max((number for number, line in enumerate(lines) if " | attempt " in line), default=-1)
    errors = [line for line in lines[began + 1 :] if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else ""
