"""Containers: the exact argv of each runtime, what reaches the inside, and what a mistake is answered with."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from run_contract.errors import UserError
from snakmodel.chain.containers import check_local, container_spec
from snakmodel.config.cluster import Cluster, Resources
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.config.sections import PROJECT
from snakmodel.job.containers import contain, inner_python, needed, supervisor_python
from snakmodel.job.supervisor import python_of
from snakmodel.run.task_list import TaskList
from tests import toy

ENVIRONMENT = {"RANK": "1", "MASTER_ADDR": "10.0.0.1", "OMP_NUM_THREADS": "4", "HF_TOKEN": "hf_secret", "EDITOR": "vi"}


def task_list(root: Path, container: dict[str, Any], **resources: Any) -> TaskList:
    """What the jobs of a toy stage are given when cluster.yaml has this container."""
    stages = toy.two_stages(root)
    if resources:
        changed = stages[0].resources.model_copy(update=resources)
        stages[0] = replace(stages[0], resources=changed)
    plan = toy.plan(root, stages, {"container": container})
    return TaskList.read(plan.write_task_list(plan.chain["first"], "/venv/bin/python"))


def binds(root: Path, flag: str) -> list[str]:
    """The folders that are always visible, as flags: the toy recipe's inputs lie in the project's folder."""
    return [flag, f"{PROJECT}:{PROJECT}", flag, f"{root}:{root}"]


def test_no_container(tmp_path: Path) -> None:
    """Without a container the command, the environment and the inherited socket are left as they are."""
    tasks, environment = task_list(tmp_path / "run", {}), dict(ENVIRONMENT)
    assert tasks.container is None
    assert contain(tasks, python_of(tasks, ["python", "x.py"]), environment, (7,)) == (
        ["/venv/bin/python", "-u", "x.py"],
        (7,),
    )
    assert environment == ENVIRONMENT


def test_apptainer(tmp_path: Path) -> None:
    """apptainer exec with binds and working directory; needed variables in apptainer's spelling, none on the argv."""
    root = tmp_path / "run"
    container = {"runtime": "apptainer", "image": "/images/s.sif", "binds": ["/data", "/etc/pki:/pki:ro"]}
    tasks, environment = task_list(root, container, gpus_per_node=2), dict(ENVIRONMENT)
    argv, inherited = contain(tasks, python_of(tasks, ["python", "x.py", "--a"]), environment, (7,))
    assert argv == [
        *("apptainer", "exec", "--nv", *binds(root, "--bind"), "--bind", "/data:/data", "--bind", "/etc/pki:/pki:ro"),
        *("--pwd", str(PROJECT), "/images/s.sif", "python3", "-u", "x.py", "--a"),
    ]
    assert inherited == (7,)
    assert environment["APPTAINERENV_RANK"] == "1"
    assert environment["APPTAINERENV_HF_TOKEN"] == "hf_secret"
    assert environment["APPTAINERENV_PYTHONPATH"] == f"{PROJECT}:{PROJECT}/Megatron-LLM"
    assert "APPTAINERENV_EDITOR" not in environment
    assert supervisor_python(tasks) == "/venv/bin/python"


def test_docker(tmp_path: Path) -> None:
    """docker run with the host's network, this user, shared memory, this job's GPUs, and variables by name only."""
    root = tmp_path / "run"
    container = {"runtime": "docker", "image": "snak:1", "shm_size": "8g", "python": "/opt/bin/python"}
    tasks = task_list(root, container, gres="gpu:a100:2")
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "2,3"}
    argv, inherited = contain(tasks, python_of(tasks, ["python", "x.py"]), environment, ())
    assert argv == [
        *("docker", "run", "--rm", "--init", "--network=host", f"--user={os.getuid()}:{os.getgid()}"),
        *("--shm-size=8g", '--gpus="device=2,3"', *binds(root, "--volume")),
        *("--env", "HF_TOKEN", "--env", "MASTER_ADDR", "--env", "OMP_NUM_THREADS", "--env", "PYTHONPATH"),
        *("--env", "RANK", "--env", "HOME=/tmp", "--workdir", str(PROJECT), "--entrypoint", ""),
        *("snak:1", "/opt/bin/python", "-u", "x.py"),
    ]
    assert inherited == ()


def test_docker_frees_the_rendezvous_port(tmp_path: Path) -> None:
    """docker's daemon cannot pass the listening socket on: it is closed, so rank 0 inside can bind its port."""
    tasks = task_list(tmp_path / "run", {"runtime": "docker", "image": "snak:1"})
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    descriptor = listener.detach()
    environment = {**ENVIRONMENT, "MASTER_LISTEN_FD": str(descriptor)}
    argv, inherited = contain(tasks, ["true"], environment, (descriptor,))
    assert inherited == ()
    assert "MASTER_LISTEN_FD" not in environment
    assert "MASTER_LISTEN_FD" not in argv
    socket.create_server(("127.0.0.1", port)).close()


def test_pyxis(tmp_path: Path) -> None:
    """pyxis is flags of srun, after the user's own; the supervisor runs inside, with the image's Python."""
    root = tmp_path / "run"
    tasks = task_list(
        root, {"runtime": "pyxis", "image": "/images/s.sqsh", "binds": ["/data:/d"]}, srun_args=["--mpi=none"]
    )
    assert tasks.srun_args == [
        "--mpi=none",
        "--container-image=/images/s.sqsh",
        f"--container-mounts={PROJECT}:{PROJECT},{root}:{root},/data:/d",
        f"--container-workdir={PROJECT}",
        "--no-container-remap-root",
    ]
    assert contain(tasks, ["python3", "x.py"], dict(ENVIRONMENT), (7,)) == (["python3", "x.py"], (7,))
    assert supervisor_python(tasks) == inner_python(tasks) == "python3"


def test_what_reaches_the_inside() -> None:
    """Ranks, rendezvous, attempt, threads, tokens and libraries' settings are passed in; the rest of a shell is not."""
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MASTER_LISTEN_FD"]
    names += ["SNAKMODEL_CLAIM", "SNAKMODEL_ATTEMPT", "OMP_NUM_THREADS", "HF_TOKEN", "NCCL_DEBUG", "SLURM_JOB_ID"]
    assert needed(dict.fromkeys([*names, "HOME", "PATH", "LD_LIBRARY_PATH", "XRANK"], "")) == sorted(names)


def test_a_stage_may_have_its_own_container(tmp_path: Path) -> None:
    """`container` below stages replaces the run's; `runtime: none` switches it off."""
    cluster = Cluster.model_validate(
        {"container": {"runtime": "docker", "image": "a"}, "stages": {"train": {"container": {"runtime": "none"}}}}
    )
    train, tokenize = (cluster.with_defaults(cluster.resources(name)).container for name in ("train", "tokenize"))
    assert train is not None
    assert tokenize is not None
    assert (train.runtime, tokenize.runtime) == ("none", "docker")


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ({"runtime": "apptainer"}, "container.image is missing"),
        ({"runtime": "docker", "image": "a", "binds": ["data"]}, "found 'data', expected /SOURCE"),
        ({"runtime": "podman", "image": "a"}, "'apptainer', 'pyxis', 'docker' or 'none'"),
    ],
)
def test_mistakes(container: dict[str, Any], words: str) -> None:
    """A missing image, a relative bind and an unknown runtime are refused."""
    with pytest.raises(ValueError, match=words):
        Cluster.model_validate({"container": container})


def test_pyxis_needs_slurm() -> None:
    """On this machine there is no srun that could start the container, so it is refused, wherever it is set."""
    pyxis = {"runtime": "pyxis", "image": "a"}
    for settings in ({"container": pyxis}, {"stages": {"train": {"container": pyxis}}}):
        with pytest.raises(UserError, match="a plugin of srun"):
            check_local(Cluster.model_validate(settings))
    check_local(Cluster.model_validate({"container": {"runtime": "docker", "image": "a"}}))


def test_containers_show_what_the_stages_on_text_read(tmp_path: Path) -> None:
    """The folders of all files that the recipe names are bound, but none of the system's own programs."""
    names = ["sources", "thresholds", "model", "evaluation", "script", "folder"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.bin").write_text("x")
    command = f"/bin/sh {tmp_path}/script/file.bin --model={tmp_path}/folder {{input}} {{output}}"
    data = {
        "path": str(tmp_path / "text"),
        "collect": str(tmp_path / "sources/file.bin"),
        "custom": [{"name": "mine", "command": command}],
    }
    filters = {
        "language": {"keep": "da", "model": str(tmp_path / "model/file.bin")},
        "quality": {"thresholds": str(tmp_path / "thresholds/file.bin")},
    }
    evaluation = {"against": [str(tmp_path / "evaluation/file.bin")]}
    recipe = Recipe.model_validate(toy.recipe(data=data, filter=filters, decontaminate=evaluation))
    cluster = Cluster.model_validate({"container": {"runtime": "docker", "image": "image"}})
    config = Config(recipe=recipe, cluster=cluster)
    spec = container_spec(config, tmp_path / "run", cluster.with_defaults(Resources()))
    assert spec is not None
    folders = {bind.partition(":")[0] for bind in spec.binds}
    assert {str(tmp_path / name) for name in [*names, "text", "run"]} <= folders
    assert not {"/", "/bin", "/usr/bin"} & folders
