"""What cluster.yaml may say to sbatch and srun beyond the keys of its own: options in Slurm's spelling, and values that
fit into a line of a batch file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

_CHAIN = (
    "array", "dependency", "error", "job-name", "kill-on-invalid-dep", "no-requeue", "open-mode", "output", "parsable",
    "requeue", "signal", "test-only", "wait", "wrap",
)  # fmt: skip
"""Options of sbatch by which the launcher chains, finds, logs and requeues its jobs."""
_KEYS = {
    "account": "account", "clusters": "slurm.clusters", "constraint": "constraint", "cpus-per-task": "cpus",
    "exclude": "exclude", "exclusive": "exclusive", "gpus-per-node": "gpus_per_node", "gres": "gres",
    "licenses": "licenses", "mail-type": "slurm.mail_type", "mail-user": "slurm.mail_user", "mem": "mem_gb",
    "mem-per-cpu": "mem_per_cpu", "nice": "nice", "nodes": "nodes", "ntasks": "ranks_per_node",
    "ntasks-per-node": "ranks_per_node", "partition": "partition", "qos": "qos", "reservation": "reservation",
    "switches": "switches", "time": "minutes", "wckey": "wckey",
}  # fmt: skip
"""Option of sbatch -> the key of cluster.yaml that says it."""
_OPTION = re.compile(r"--([a-z0-9][a-z0-9-]*)(?:=(.*))?", re.DOTALL)
_UNFIT = re.compile(r"[\x00-\x1f\x7f\\]")
"""What sbatch does not take from a batch file's line as it is: the end of a line, and the backslash, which it drops."""


def one_line(value: str) -> str:
    """The value, if sbatch reads it from a batch file as it is. Raises ValueError."""
    if match := _UNFIT.search(value):
        raise ValueError(f"found {value!r}, which sbatch cannot read because of its {match[0]!r}; leave that out")
    return value


def pattern_of(path: str) -> str:
    """A path as the value of --output, in which Slurm replaces what begins with %. Raises ValueError."""
    return one_line(path).replace("%", "%%")


Words = Annotated[str, AfterValidator(one_line)]
"""A value of an sbatch option."""


def options(args: Sequence[str]) -> dict[str, str | bool]:
    """`--name=value` or `--name` -> name: value or True. Raises ValueError for what is neither, or breaks the chain."""
    found: dict[str, str | bool] = {}
    for arg in args:
        match = _OPTION.fullmatch(arg)
        if match is None:
            raise ValueError(f"found {arg!r}, expected one option an entry, as --name=value or --name")
        name, value = match[1], match[2]
        # Slurm completes names, so `--arr` is `--array`.
        if meant := next((one for one in _CHAIN if one.startswith(name)), None):
            raise ValueError(
                f"found {arg!r}, but --{meant} is how the launcher chains, logs and requeues its jobs; leave it out"
            )
        if meant := next((one for one in _KEYS if one.startswith(name)), None):
            raise ValueError(f"found {arg!r}; say it with the key {_KEYS[meant]} instead")
        found[name] = True if value is None else one_line(value)
    return found


def check_sbatch_args(args: list[str] | None) -> list[str] | None:
    """For `sbatch_args`. Raises ValueError."""
    options(args or ())
    return args


def check_srun_args(args: list[str] | None) -> list[str] | None:
    """For `srun_args`: the ranks need the environment of their job. Raises ValueError."""
    words = list(args or ())
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"--exp(o(r(t)?)?)?", name):
            continue
        value = value if equals else next(iter(words[number + 1 :]), "")
        if value.split(",")[0] != "ALL":
            raise ValueError(
                f"found {word!r}, which keeps from the ranks what they need of their job's environment; leave it out, "
                "or write --export=ALL,NAME=value to add to it"
            )
    return args
