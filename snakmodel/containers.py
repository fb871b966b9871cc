"""Containers: the argv of a rank, wrapped for apptainer or docker; srun's flags for pyxis.

plan.py turns `container:` of cluster.yaml into the task list's ContainerSpec; supervise.py, outside the container,
wraps each command by `contain` (with pyxis srun has put supervise itself inside). Every rank reads this module, so it
imports nothing heavy.

What a rank needs inside (its number, the rendezvous, tokens) is passed by name: values never appear in an argv, which
`ps` shows to everybody on the node.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from snakmodel.publish import UserError
from snakmodel.tasklist import ContainerSpec, TaskList

if TYPE_CHECKING:
    from snakmodel.cluster import Cluster, Resources
    from snakmodel.config import Config

_NEEDED = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_(ADDR|PORT|LISTEN_FD)|PYTHONPATH|PYTHONUNBUFFERED|TZ|LANG"
    r"|(OMP|MKL|OPENBLAS|NUMBA)_NUM_THREADS|(SNAKMODEL|HF|WANDB|NCCL|GLOO|TORCH|CUDA|TOKENIZERS|SLURM)_\w+)"
)
"""Variables that reach the inside; everything else in there is the image's own."""


def container_spec(config: Config, root: Path, resources: Resources) -> ContainerSpec | None:
    """What a stage's commands run in, or None. Folders that the chain reads and writes are bound under their names.

    Raises UserError where a folder's name stands in the way.
    """
    from snakmodel.settings import PROJECT

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


def inner_python(tasks: TaskList) -> str:
    """Python that a rank's command runs with."""
    return tasks.container.python if tasks.container else tasks.python


def supervisor_python(tasks: TaskList) -> str:
    """Python that supervise itself runs with: the container's where srun starts the container."""
    return inner_python(tasks) if tasks.container and tasks.container.runtime == "pyxis" else tasks.python


def srun_flags(container: ContainerSpec | None, project: str) -> list[str]:
    """What pyxis adds to srun; nothing for the other runtimes."""
    if container is None or container.runtime != "pyxis":
        return []
    mounts = ",".join(container.binds)
    flags = [f"--container-image={container.image}", f"--container-mounts={mounts}", f"--container-workdir={project}"]
    return [*flags, "--no-container-remap-root"]


def contain(
    tasks: TaskList, command: list[str], environment: dict[str, str], inherited: tuple[int, ...]
) -> tuple[list[str], tuple[int, ...]]:
    """The command as the stage's runtime wants it, and the descriptors that it inherits.

    `environment` is changed in place: the project's folders are made importable inside, apptainer gets the needed
    variables in its own spelling (so that the image's do not win). docker's daemon starts the command, so it cannot
    inherit the rendezvous socket: that is closed, and rank 0 binds the published port again.
    """
    if tasks.container is None:
        return command, inherited
    environment["PYTHONPATH"] = f"{tasks.project}:{tasks.project}/Megatron-LLM"
    if tasks.container.runtime == "docker":
        environment.pop("MASTER_LISTEN_FD", None)
        for descriptor in inherited:
            os.close(descriptor)
        return [*_docker(tasks, tasks.container, environment), *command], ()
    if tasks.container.runtime == "apptainer":
        environment.update({f"APPTAINERENV_{name}": environment[name] for name in needed(environment)})
        return [*_apptainer(tasks, tasks.container), *command], inherited
    return command, inherited


def needed(environment: dict[str, str]) -> list[str]:
    """Names of the variables that are passed inside."""
    return sorted(name for name in environment if _NEEDED.fullmatch(name))


def _apptainer(tasks: TaskList, container: ContainerSpec) -> list[str]:
    argv = ["apptainer", "exec", *(["--nv"] if container.gpus else [])]
    binds = [word for bind in container.binds for word in ("--bind", bind)]
    return [*argv, *binds, "--pwd", tasks.project, container.image]


def _docker(tasks: TaskList, container: ContainerSpec, environment: dict[str, str]) -> list[str]:
    """docker run: the host's network and user, an init that passes signals on, and this rank's GPUs only."""
    argv = ["docker", "run", "--rm", "--init", "--network=host", f"--user={os.getuid()}:{os.getgid()}"]
    argv += [f"--shm-size={container.shm_size}"] if container.shm_size else []
    if container.gpus:
        devices = environment.get("CUDA_VISIBLE_DEVICES")
        argv.append(f'--gpus="device={devices}"' if devices else "--gpus=all")
    argv += [word for bind in container.binds for word in ("--volume", bind)]
    # Inside, the GPUs that were let in are numbered from 0, and the person's home is not there.
    passed = [name for name in needed(environment) if name != "CUDA_VISIBLE_DEVICES"]
    argv += [word for name in passed for word in ("--env", name)]
    return [*argv, "--env", "HOME=/tmp", "--workdir", tasks.project, "--entrypoint", "", container.image]
