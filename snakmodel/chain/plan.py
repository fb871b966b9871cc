"""Plans a run: builds its chain and packs from the configuration, and finds the packs without a valid done marker.

At the first submission, run.yaml freezes the resolved recipe and a key of each stage. A later change of the recipe or
of the input files is refused, with the stages that it touches, unless the user asks to start again from the first of
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run_contract.errors import UserError
from run_contract.publish import remove, write_json
from snakmodel.chain.borders import EarlierPlan, read_plan
from snakmodel.chain.build import build, build_collection, left_out
from snakmodel.chain.collect_stage import COLLECT, refuse_what_is_not_there, uncollected, wanted_sources
from snakmodel.chain.containers import container_spec, srun_flags
from snakmodel.chain.context import check_set
from snakmodel.chain.documents_check import check_documents, expected_columns_of, planned_columns
from snakmodel.chain.engine_check import Facts, ask_engine
from snakmodel.chain.frozen import downstream, freeze, read_frozen, refuse_unless_restarted, touched_stages
from snakmodel.chain.inputs import Inputs
from snakmodel.chain.stage import Chain, Stage, meaning
from snakmodel.collect.sources import Source
from snakmodel.config.load import Config
from snakmodel.config.recipe import Data, Recipe
from snakmodel.config.sections import PROJECT, suggest
from snakmodel.prepare.input_files import FilePart, Selection, cut, selection
from snakmodel.register.sources import refuse_private, refuse_unknown
from snakmodel.run.markers import marker_path
from snakmodel.run.paths import RunPaths
from snakmodel.run.task_list import InputSpec, TaskList, TaskSpec

if TYPE_CHECKING:
    pass

_TEXT_FOLDER = "Give the folder that holds the raw text, or one sub-folder of text per source."
_SAID = 3
"""The number of tasks per stage for which a note says why they are done again."""


@dataclass(frozen=True)
class RunPlan:
    """What a run consists of, and which parts of it are still missing."""

    config: Config
    paths: RunPaths
    chain: Chain
    packs: dict[str, list[list[int]]]
    """Maps each stage to its packs; the index of a pack is its array index, and a pack is a list of task indices."""
    missing: dict[str, list[int]]
    """Maps each selected stage to its packs without a valid marker; the stages are in chain order."""
    facts: Facts | None
    """What the engine reports about the model and its training; None if none of its commands is missing."""
    notes: list[str]
    """Notes for users: why existing markers did not count, and which files of the data folder are not read and why."""
    later: Sequence[Stage] = ()
    """The selected stages that can only be planned when those of this plan are done, without their tasks."""

    @property
    def unfinished(self) -> bool:
        """Whether this is only the beginning of the run: when it is done, the launcher has to plan what follows."""
        return bool(self.later)

    def logs(self, stage: str) -> Path:
        """The folder of a stage's logs."""
        return self.config.cluster.logs / self.paths.name / stage

    def write_task_list(self, stage: Stage, python: str) -> Path:
        """Write the task list that the stage's jobs read, and return its path."""
        cluster, resources = self.config.cluster, self.config.cluster.with_defaults(stage.resources)
        container = container_spec(self.config, self.paths.root, resources)
        specs = [
            TaskSpec(
                argv=[*task.argv, *task.unkeyed],
                outputs=list(task.outputs),
                inputs=[InputSpec(one.stage, one.index, list(one.only), one.full) for one in task.inputs],
                counts=task.counts,
                key=key,
                meaning=meaning(self.paths.root, task),
                reads=list(task.reads),
            )
            for task, key in zip(stage.tasks, self.chain.keys[stage.name], strict=True)
        ]
        tasks = TaskList(
            run=str(self.paths.root),
            stage=stage.name,
            project=str(PROJECT),
            python=python,
            ranks_per_node=resources.ranks_per_node,
            nodes=resources.nodes,
            cpus=resources.cpus,
            packs=self.packs[stage.name],
            tasks=specs,
            keys={name: list(self.chain.keys[name]) for name in stage.waits},
            without_progress=cluster.retries.without_progress,
            crashes=cluster.retries.crashes,
            resumable=stage.resumable,
            progress=stage.progress,
            environment=dict(stage.environment),
            srun_args=[*(resources.srun_args or []), *srun_flags(container, str(PROJECT))],
            interface=cluster.slurm.interface,
            logs=str(self.logs(stage.name)),
            container=container,
            signal_seconds=cluster.slurm.signal_seconds,
            hung_seconds=cluster.retries.hung_minutes * 60,
        )
        path = self.paths.task_list(stage.name)
        tasks.write(path)
        return path


def make_plan(
    config: Config,
    root: Path,
    selected: Sequence[str],
    restart_from: Sequence[str],
    *,
    dry: bool,
    check_inputs: bool = False,
    fit: Callable[[Sequence[Stage]], int] | None = None,
) -> RunPlan:
    """Build the chain, compare it with what the run was frozen with, and find what is missing.

    Before anything is written, the engine is asked whether it would refuse a missing command. `dry`: write nothing.
    `check_inputs`: compare the content of all files from outside the run, not only of those that look changed. `fit`
    returns the number of shards per array element for a new run; without it, cluster.yaml decides.
    """
    paths, data = RunPaths(root), config.recipe.data
    frozen = read_frozen(paths.frozen)
    check_set("data.path", data.path)
    if data.path.exists() and not data.path.is_dir():
        raise UserError(f"data.path: {data.path} is a file. {_TEXT_FOLDER}")
    if absent := uncollected(config.recipe):
        return _plan_collection(config, paths, frozen, absent, selected, restart_from, dry=dry)
    if not data.path.is_dir():
        raise UserError(f"data.path: {data.path} is not there. {_TEXT_FOLDER}")
    found = selection(data.path, data.shares)
    inputs = Inputs.read(root, check=check_inputs)
    shards = _shards(paths, data, found, frozen, inputs)
    inputs.look(found, shards, data)
    refuse_unknown(config.recipe, {one.source for one in found.files})
    refuse_private(config.recipe, dict.fromkeys(one.source for one in found.files))
    kept = planned_columns(data, found)
    chain = build(config, root, shards, inputs, [*selected, *restart_from], kept)
    _refuse_left_out(chain, config.recipe, selected, restart_from)
    minimum = config.cluster.shards_per_job
    shards_per_job = (frozen or {}).get("shards_per_job") or (fit(chain.stages) if fit else minimum)
    touched = touched_stages(frozen, chain) if frozen else []
    if frozen and touched:
        refuse_unless_restarted(paths, config, frozen, touched, restart_from, chain, inputs.changes)
    again = [name for name in downstream(chain, restart_from) if name not in touched]
    packs = {stage.name: _packs(stage, shards_per_job) for stage in chain.stages}
    missing, notes = _missing(chain, packs, selected, again)
    check_documents(config, root, chain, [name for name, packs in missing.items() if packs], kept)
    facts = ask_engine(chain, config, [name for name, packs in missing.items() if packs])
    if not dry:
        _forget(chain, again, touched)
        write_json(paths.shards, {"shards": [[asdict(part) for part in shard] for shard in shards]})
        freeze(paths.frozen, config, chain, shards_per_job, frozen["stage_keys"] if frozen else {})
        inputs.write(found.skipped)
    for stage in chain.stages:  # raise now whatever would keep a container from starting
        container_spec(config, root, config.cluster.with_defaults(stage.resources))
    return RunPlan(config, paths, chain, packs, missing, facts, [*found.notes(), found.sums(), *inputs.notes, *notes])


def _plan_collection(
    config: Config,
    paths: RunPaths,
    frozen: dict[str, Any] | None,
    absent: Mapping[str, Source],
    selected: Sequence[str],
    restart_from: Sequence[str],
    *,
    dry: bool,
) -> RunPlan:
    """The plan of a run whose text is not collected yet: it collects it, and nothing else can be planned before."""
    names = ", ".join(absent)
    if COLLECT not in selected or set(restart_from) - {COLLECT}:
        raise UserError(
            f"data.collect: these sources are not collected yet: {names}. Select the stage {COLLECT} too (--from, "
            "--only), and leave --restart-from out: other stages are planned when the text is there"
        )
    refuse_what_is_not_there(config.recipe.data.path, absent)
    kept = expected_columns_of(config.recipe.data)
    later = build(config, paths.root, [[]], Inputs.read(paths.root), selected, kept)  # refuses now what it would later
    check_documents(config, paths.root, later, [stage.name for stage in later.stages], kept)
    chain = build_collection(config, paths.root, Inputs.read(paths.root))
    touched = touched_stages(frozen, chain) if frozen else []
    if frozen and touched:
        changed = [f"the sources in {config.recipe.data.collect}"]
        refuse_unless_restarted(paths, config, frozen, touched, restart_from, chain, changed)
    packs = {COLLECT: _packs(chain[COLLECT], 1)}
    missing, notes = _missing(chain, packs, selected, restart_from)
    every = list(wanted_sources(config.recipe))
    missing[COLLECT] = sorted({*missing[COLLECT], *(every.index(name) for name in absent)})
    if not dry:
        _make_data_folder(config.recipe.data.path)
        _forget(chain, restart_from, touched)
        for index in missing[COLLECT]:
            remove(marker_path(paths.root, COLLECT, index))
        before = frozen or {"shards_per_job": None, "stage_keys": {}}
        freeze(paths.frozen, config, chain, before["shards_per_job"], before["stage_keys"])
    notes.append(
        f"{names}: to be collected into {config.recipe.data.path}; what follows is planned when they are there"
    )
    following = [stage for stage in later.stages if stage.name in selected and stage.name != COLLECT]
    return RunPlan(config, paths, chain, packs, missing, None, notes, following)


def _make_data_folder(folder: Path) -> None:
    """Make the folder of the text, which a container can only show if it is there. Raises UserError if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.path: {folder} cannot be made: {error.strerror}. Give a folder to collect into that you may write."
        ) from error


_CUTS = ("sources", "shards", "shard_mb", "seed", "encoding")
"""The settings of `data` that decide which bytes make up a shard."""


def _shards(
    paths: RunPaths, data: Data, found: Selection, frozen: dict[str, Any] | None, inputs: Inputs
) -> list[list[FilePart]]:
    """The shards that the run has already, adapted to the files as they are now, or else newly planned ones."""
    now = data.model_dump(mode="json")
    before = {"encoding": "utf-8", **(frozen["recipe"]["data"] if frozen else {})}  # older runs have no such key
    earlier = read_plan(paths.shards) if all(now[name] == before.get(name, "") for name in _CUTS) else None
    if earlier is None:
        return cut(found, data.shards, data.shard_mb * 10**6, data.seed, data.encoding)
    plan = EarlierPlan(earlier, Path(before["path"]))
    inputs.changes += plan.changes(found)
    return plan.kept(found, data.seed) or cut(found, data.shards, data.shard_mb * 10**6, data.seed, data.encoding)


def _refuse_left_out(chain: Chain, recipe: Recipe, selected: Sequence[str], restart_from: Sequence[str]) -> None:
    """Raise UserError if the user asks for stages that the recipe leaves out of the chain."""
    names = {stage.name for stage in chain.stages}
    absent = [name for name in restart_from if name not in names] or ([] if names & set(selected) else list(selected))
    if absent:
        needs = left_out(recipe)
        reasons = "; ".join(f"{name} needs {needs[name]}" for name in absent if name in needs)
        raise UserError(
            f"{', '.join(absent)}: left out, as the recipe says. Change the recipe ({reasons}), or do not name these "
            "stages."
        )


def _packs(stage: Stage, shards_per_job: int) -> list[list[int]]:
    """The task indices of each pack, by the pack's array index. They never change during a run's life."""
    size = shards_per_job if stage.per_shard else 1
    every = list(range(len(stage.tasks)))
    return [every[start : start + size] for start in range(0, len(every), size)]


def _missing(
    chain: Chain, packs: dict[str, list[list[int]]], selected: Sequence[str], forgotten: Sequence[str]
) -> tuple[dict[str, list[int]], list[str]]:
    missing: dict[str, list[int]] = {}
    notes: list[str] = []
    for stage in chain.stages:
        if stage.name not in selected:
            continue
        problems = chain.marker_problems(stage.name)
        said = [problem for problem in problems if problem and problem != "no marker"]
        notes += [f"{stage.name}: {problem}; done again" for problem in said[:_SAID]]
        notes += [f"{stage.name}: {len(said) - _SAID} more are done again"] if len(said) > _SAID else []
        again = stage.name in forgotten
        wanted = [n for n, pack in enumerate(packs[stage.name]) if again or any(problems[index] for index in pack)]
        missing[stage.name] = wanted
    return missing, notes


def _forget(chain: Chain, again: Sequence[str], touched: Sequence[str]) -> None:
    """Remove the markers of the stages in `again`.

    The markers of stages in `touched` stay: the keys of their tasks say which ones are out of date. The output folders
    of resumable stages in either list are moved aside.
    """
    for name in again:
        remove(chain.root / "markers" / name)
    for name in (*again, *touched):
        progress = chain[name].progress
        if progress and (folder := (chain.root / progress).parent).exists():
            folder.rename(folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))


def select(names: Sequence[str], first: str | None, last: str | None, only: Sequence[str]) -> list[str]:
    """The stages that --from (`first`), --until (`last`) and --only leave. Raises UserError if a name is unknown."""
    for name in (first, last, *only):
        if name is not None and name not in names:
            raise UserError(f"there is no stage {name}. {suggest(name, names)}")
    start = names.index(first) if first else 0
    end = names.index(last) + 1 if last else len(names)
    return [name for name in names[start:end] if not only or name in only]
