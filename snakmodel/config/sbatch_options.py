"""Checks the options that cluster.yaml gives to sbatch and srun beyond its own keys.

The options are in Slurm's spelling, and their values have to fit into one line of a batch file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

_CHAIN = (
    "array", "dependency", "error", "job-name", "kill-on-invalid-dep", "no-requeue", "open-mode", "output", "parsable",
    "requeue", "signal", "test-only", "wait", "wrap",
)  # fmt: skip
"""The options of sbatch by which the launcher chains, finds, logs and requeues its jobs."""
_KEYS = {
    "account": "account", "clusters": "slurm.clusters", "constraint": "constraint", "cpus-per-task": "cpus",
    "exclude": "exclude", "exclusive": "exclusive", "gpus-per-node": "gpus_per_node", "gres": "gres",
    "licenses": "licenses", "mail-type": "slurm.mail_type", "mail-user": "slurm.mail_user", "mem": "mem_gb",
    "mem-per-cpu": "mem_per_cpu", "nice": "nice", "nodes": "nodes", "ntasks": "ranks_per_node",
    "ntasks-per-node": "ranks_per_node", "partition": "partition", "qos": "qos", "reservation": "reservation",
    "switches": "switches", "time": "minutes", "wckey": "wckey",
}  # fmt: skip
"""Maps an option of sbatch to the key of cluster.yaml that stands for it."""
_OPTION = re.compile(r"--([a-z0-9][a-z0-9-]*)(?:=(.*))?", re.DOTALL)
_UNFIT = re.compile(r"[\x00-\x1f\x7f\\]")
"""Characters that sbatch does not read unchanged from a line of a batch file: line ends, other control characters, and
the backslash, which it drops."""


def one_line(value: str) -> str:
    """The value, if sbatch reads it unchanged from a batch file; otherwise raises ValueError."""
    if match := _UNFIT.search(value):
        raise ValueError(f"found {value!r}, which sbatch cannot read because of its {match[0]!r}; leave that out")
    return value


def pattern_of(path: str) -> str:
    """A path as the value of --output, with % doubled because Slurm replaces what begins with %. Raises ValueError."""
    return one_line(path).replace("%", "%%")


Words = Annotated[str, AfterValidator(one_line)]
"""A value of an sbatch option."""


def options(args: Sequence[str]) -> dict[str, str | bool]:
    """Turn options `--name=value` or `--name` into a mapping from the name to the value or True.

    Raises ValueError if one is neither, breaks the chain, or has a key of its own in cluster.yaml.
    """
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
    """Return the `sbatch_args` as they are. Raises ValueError if one of them is not allowed."""
    options(args or ())
    return args


def check_srun_args(args: list[str] | None) -> list[str] | None:
    """Return the `srun_args` as they are.

    Raises ValueError if an --export would keep the job's environment from the ranks, which need it.
    """
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
