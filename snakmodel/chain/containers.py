"""Turns the `container:` section of cluster.yaml into the task list's form, and into srun's flags for pyxis."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from run_contract.errors import UserError
from snakmodel.chain.filter_stages import step_files
from snakmodel.config.sections import PROJECT
from snakmodel.run.task_list import ContainerSpec

if TYPE_CHECKING:
    from snakmodel.config.cluster import Cluster, Resources
    from snakmodel.config.load import Config
    from snakmodel.config.recipe import Recipe


def container_spec(config: Config, root: Path, resources: Resources) -> ContainerSpec | None:
    """The container that a stage's commands run in, or None if they run without one.

    The folders that the chain reads and writes are bound under their own names. Raises UserError if the path of one of
    them holds a colon or a comma, which would end the path in a bind.
    """
    container, recipe = resources.container, config.recipe
    if container is None or container.runtime == "none":
        return None
    assert container.image is not None
    inputs = [recipe.data.path, recipe.tokenizer.file.parent, recipe.model.base, *recipe.dedup.against]
    seen = [PROJECT, root, *inputs, *_of_the_diet(recipe)]
    if odd := next((folder for folder in seen if re.search("[:,]", str(folder))), None):
        raise UserError(
            f"{odd}: the path holds a colon or a comma, which {container.runtime} takes for its end, so the folder "
            "cannot be shown inside the container. Give the folder a different name, or do without a container."
        )
    folders = [folder for folder in seen if not any(other in folder.parents for other in seen)]
    binds = [*(f"{folder}:{folder}" for folder in folders), *(_full(bind) for bind in container.binds)]
    return ContainerSpec(
        container.runtime,
        container.image,
        list(dict.fromkeys(binds)),
        container.shm_size,
        container.python,
        resources.has_gpus,
    )


def _of_the_diet(recipe: Recipe) -> list[Path]:
    """The folders of what the stages on text read from outside the run, besides the text."""
    files = [path for _, path in step_files(recipe)]
    files += [recipe.data.collect] if recipe.data.collect else []
    files += recipe.decontaminate.against if recipe.decontaminate else []
    own = [path for custom in recipe.data.custom for path in custom.paths]
    return [path if path.is_dir() else path.parent for path in ((PROJECT / one).absolute() for one in [*files, *own])]


def check_local(cluster: Cluster) -> None:
    """Raise UserError if any stage uses pyxis, which only srun can start: for runs without Slurm."""
    named = [
        cluster.container,
        cluster.defaults.container,
        *(cluster.resources(name).container for name in cluster.stages),
    ]
    if any(one is not None and one.runtime == "pyxis" for one in named):
        raise UserError("container.runtime is pyxis, a plugin of srun; on this machine use apptainer, docker or none.")


def _full(bind: str) -> str:
    return bind if ":" in bind else f"{bind}:{bind}"


def srun_flags(container: ContainerSpec | None, project: str) -> list[str]:
    """The flags that srun needs for pyxis; an empty list for the other runtimes."""
    if container is None or container.runtime != "pyxis":
        return []
    mounts = ",".join(container.binds)
    flags = [f"--container-image={container.image}", f"--container-mounts={mounts}", f"--container-workdir={project}"]
    return [*flags, "--no-container-remap-root"]
