"""The `container:` of cluster.yaml as the task list has it, and srun's flags for pyxis."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from run_contract.errors import UserError
from snakmodel.run.task_list import ContainerSpec

if TYPE_CHECKING:
    from snakmodel.config.cluster import Cluster, Resources
    from snakmodel.config.load import Config


def container_spec(config: Config, root: Path, resources: Resources) -> ContainerSpec | None:
    """What a stage's commands run in, or None. Folders that the chain reads and writes are bound under their names.

    Raises UserError where a folder's name stands in the way.
    """
    from snakmodel.config.sections import PROJECT

    container, recipe = resources.container, config.recipe
    if container is None or container.runtime == "none":
        return None
    assert container.image is not None
    seen = [PROJECT, root, recipe.data.path, recipe.tokenizer.file.parent, recipe.model.base]
    if odd := next((folder for folder in seen if re.search("[:,]", str(folder))), None):
        raise UserError(
            f"{odd}: {container.runtime} cannot show a folder inside whose path has a colon or a comma, which it takes "
            "for the end of the path. Give the folder another name, or do without a container"
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


def check_local(cluster: Cluster) -> None:
    """Refuse, without Slurm, a container that only srun can start."""
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
    """What pyxis adds to srun; nothing for the other runtimes."""
    if container is None or container.runtime != "pyxis":
        return []
    mounts = ",".join(container.binds)
    flags = [f"--container-image={container.image}", f"--container-mounts={mounts}", f"--container-workdir={project}"]
    return [*flags, "--no-container-remap-root"]
