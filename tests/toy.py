"""A small chain of real commands, for tests of the launcher that need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snakmodel.chain.build import STAGES, left_out
from snakmodel.chain.plan import RunPlan
from snakmodel.chain.stage import Chain, Input, Stage, Task
from snakmodel.config.cluster import Cluster, Resources
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.run.paths import RunPaths

PUBLISH = (
    "import sys, pathlib; from run_contract.publish import publishing\n"
    "with publishing(pathlib.Path(sys.argv[1])) as (t,):\n"
    "    t.write_text(''.join(pathlib.Path(p).read_text() for p in sys.argv[2:]) or sys.argv[1][-5:])\n"
)
"""python -c PUBLISH OUTPUT [INPUT …]: write OUTPUT from the inputs."""


def recipe(**changes: Any) -> dict[str, Any]:
    """The smallest valid recipe, as read from YAML."""
    return {
        "name": "toy",
        "data": {"path": "text"},
        "tokenizer": {"file": "base/tokenizer.model"},
        "model": {"base": "base"},
        "training": {"train_iters": 4, "global_batch_size": 2, "seq_length": 8, "lr": 0.1, "save_interval": 2},
        **changes,
    }


DEMO_STAGES = [name for name in STAGES if name not in left_out(Recipe.model_validate(recipe()))]
"""The stages of a recipe that names no optional one."""


def task(root: Path, output: str, *reads: str, inputs: Sequence[Input] = (), script: str = PUBLISH) -> Task:
    """A task that runs `script` with the output's path and those of what it reads."""
    paths = [str(root / name) for name in (output, *reads)]
    return Task(("python", "-c", script, *paths), (output,), tuple(inputs))


def two_stages(root: Path, shards: int = 3, script: str = PUBLISH) -> list[Stage]:
    """`first`: a file a shard; `second`: a copy of each, task by task; `last`: all of them joined."""
    every = range(shards)
    first = [task(root, f"a/{i}.txt", script=script) for i in every]
    second = [task(root, f"b/{i}.txt", f"a/{i}.txt", inputs=[Input("first", i)]) for i in every]
    last = task(root, "c.txt", *(f"b/{i}.txt" for i in every), inputs=[Input("second")])
    one = Resources()
    return [
        Stage("first", tuple(first), one, per_shard=True),
        Stage("second", tuple(second), one, per_shard=True),
        Stage("last", (last,), one),
    ]


def plan(root: Path, stages: Sequence[Stage], cluster: Mapping[str, Any] | None = None, pack: int = 1) -> RunPlan:
    """A plan of everything that these stages have not done yet."""
    root.mkdir(parents=True, exist_ok=True)
    chain = Chain.of(root, stages)
    config = Config(
        recipe=Recipe.model_validate(recipe()),
        cluster=Cluster.model_validate({"logs": str(root.parent / "logs"), **(cluster or {})}),
    )
    packs = {}
    missing = {}
    for stage in stages:
        size = pack if stage.per_shard else 1
        numbers = list(range(len(stage.tasks)))
        packs[stage.name] = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        missing[stage.name] = [
            n for n, tasks in enumerate(packs[stage.name]) if any(chain.marker_problem(stage.name, i) for i in tasks)
        ]
    return RunPlan(config, RunPaths(root), chain, packs, missing, None, [])


def row(output: str, stage: str) -> dict[str, str]:
    """The counts of a stage in the table."""
    lines = output.splitlines()
    head = next(line.split() for line in lines if line.startswith("stage "))
    cells = next(line.split() for line in lines if line.startswith(f"{stage} "))
    return dict(zip(head, cells, strict=False))
