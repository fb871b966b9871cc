"""Containers: wraps the argv of a rank for apptainer or docker. For pyxis, srun gets flags instead.

chain/containers.py turns `container:` of cluster.yaml into the task list's ContainerSpec. The supervisor, outside the
container, wraps each command by `contain`; with pyxis, srun has put the supervisor itself inside. Every rank reads this
module, so it imports nothing heavy.

What a rank needs inside the container (its number, the rendezvous, tokens) is passed by the variables' names. Values
never appear in an argv, which `ps` shows to everybody on the node.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from snakmodel.run.task_list import ContainerSpec, TaskList

if TYPE_CHECKING:
    pass

_NEEDED = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_(ADDR|PORT|LISTEN_FD)|PYTHONPATH|PYTHONUNBUFFERED|TZ|LANG"
    r"|(OMP|MKL|OPENBLAS|NUMBA)_NUM_THREADS|(SNAKMODEL|HF|WANDB|NCCL|GLOO|TORCH|CUDA|TOKENIZERS|SLURM)_\w+)"
)
"""Names of the variables that are passed into a container; all others in there are those of the image."""


def inner_python(tasks: TaskList) -> str:
    """The Python that a rank's command runs with."""
    return tasks.container.python if tasks.container else tasks.python


def supervisor_python(tasks: TaskList) -> str:
    """The Python that the supervisor itself runs with: the container's, where srun starts the container."""
    return inner_python(tasks) if tasks.container and tasks.container.runtime == "pyxis" else tasks.python


def contain(
    tasks: TaskList, command: list[str], environment: dict[str, str], inherited: tuple[int, ...]
) -> tuple[list[str], tuple[int, ...]]:
    """The command as the stage's container runtime expects it, and the file descriptors that it inherits.

    `environment` is changed in place: the project's folders are made importable inside the container, and apptainer
    gets the needed variables in its own spelling, so that the image's values do not win. With docker, the daemon starts
    the command, so the command cannot inherit the socket of the rendezvous: the socket is closed, and rank 0 binds the
    published port again.
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
    """The names of those variables in the environment that are passed into the container."""
    return sorted(name for name in environment if _NEEDED.fullmatch(name))


def _apptainer(tasks: TaskList, container: ContainerSpec) -> list[str]:
    argv = ["apptainer", "exec", *(["--nv"] if container.gpus else [])]
    binds = [word for bind in container.binds for word in ("--bind", bind)]
    return [*argv, *binds, "--pwd", tasks.project, container.image]


def _docker(tasks: TaskList, container: ContainerSpec, environment: dict[str, str]) -> list[str]:
    """The `docker run` command: host network and user, an init that passes signals on, and this rank's GPUs only."""
    argv = ["docker", "run", "--rm", "--init", "--network=host", f"--user={os.getuid()}:{os.getgid()}"]
    argv += [f"--shm-size={container.shm_size}"] if container.shm_size else []
    if container.gpus:
        devices = environment.get("CUDA_VISIBLE_DEVICES")
        argv.append(f'--gpus="device={devices}"' if devices else "--gpus=all")
    argv += [word for bind in container.binds for word in ("--volume", bind)]
    # Inside, the GPUs that were let in are numbered from 0, and the user's home does not exist.
    passed = [name for name in needed(environment) if name != "CUDA_VISIBLE_DEVICES"]
    argv += [word for name in passed for word in ("--env", name)]
    return [*argv, "--env", "HOME=/tmp", "--workdir", tasks.project, "--entrypoint", "", container.image]
