"""WHERE a run happens: the sections of cluster.yaml."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from run_contract.errors import UserError
from snakmodel.config.sbatch_options import Words, check_sbatch_args, check_srun_args
from snakmodel.config.sections import PROJECT, ProjectPath, Section, suggest

SIGNAL_EARLY_SECONDS = 60
"""The number of seconds by which Slurm may send the notice of the time limit earlier than asked."""
START_SECONDS = 30
"""The least number of seconds that start-up and two steps of training take."""


SbatchArgs = Annotated[list[str], AfterValidator(check_sbatch_args)]
SrunArgs = Annotated[list[str], AfterValidator(check_srun_args)]

_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
_CLOCK = re.compile(r"\d+(?::\d+){0,2}")


def minutes_of(text: str) -> int:
    """The minutes of a time limit in sbatch's spelling: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Seconds are rounded up to a minute. Raises ValueError if it is none of these.
    """
    if match := _DAYS.fullmatch(text.strip()):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    elif _CLOCK.fullmatch(text.strip()):
        parts = [int(part) for part in text.split(":")]
        days, (hours, minutes, seconds) = 0, {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    else:
        raise ValueError(
            f"found {text!r}, expected minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            "days-hours:minutes or days-hours:minutes:seconds, such as 90 or 24:00:00"
        )
    return (days * 24 + hours) * 60 + minutes + (seconds + 59) // 60


class Container(Section):
    """The container in which each rank's command runs.

    The folders of the run and of the project and the recipe's input paths are always visible inside, under their own
    names.
    """

    runtime: Literal["apptainer", "pyxis", "docker", "none"] = "none"
    """The runtime: apptainer and docker wrap the command, and pyxis is a plugin of srun."""
    image: str | None = None
    """The image, as the runtime takes it: a .sif or .sqsh file, or docker://…, or a name."""
    binds: list[str] = Field(default=[])
    """Further folders that are visible inside: SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro."""
    shm_size: str | None = None
    """The size of /dev/shm in docker, such as 8g; the other runtimes share that of the node."""
    python: str = "python3"
    """The Python interpreter inside the image, which has the toolkit's packages."""

    @model_validator(mode="after")
    def _complete(self) -> Container:
        if self.runtime != "none" and not self.image:
            raise ValueError(f"container.runtime is {self.runtime} but container.image is missing; name the image")
        for bind in self.binds:
            source, *rest = bind.split(":")
            whole = source.startswith("/") and (rest[:1] or ["/"])[0].startswith("/") and "," not in bind
            if len(rest) > 2 or not whole:
                raise ValueError(
                    f"container.binds: found {bind!r}, expected /SOURCE, /SOURCE:/TARGET or …:ro, no comma"
                )
        return self


class Resources(Section):
    """The resources that one job of a stage asks for."""

    nodes: int = Field(default=1, ge=1)
    ranks_per_node: int = Field(default=1, ge=1)
    """The number of processes on each node: one per GPU if there are GPUs."""
    cpus: int = Field(default=1, ge=1)
    """The number of cores of each process."""
    mem_gb: float | None = Field(default=None, gt=0)
    """The memory of each node, in GB; the partition's default if absent."""
    gpus_per_node: int = Field(default=0, ge=0)
    gres: Words | None = None
    """Generic resources of each node in Slurm's spelling, such as gpu:a100:4. Ask for GPUs either here or in
    `gpus_per_node`."""
    minutes: int = Field(default=120, ge=2)
    """The time limit: a number of minutes, or Slurm's spelling, such as 24:00:00 or 2-12 (two days and twelve
    hours)."""
    mem_per_cpu: str | None = Field(default=None, pattern=r"^[0-9]+[KMGT]?$")
    """The memory of each core in Slurm's spelling, such as 4G. Ask for memory either here or in `mem_gb`."""
    partition: Words | None = None
    """The partition, if it differs from `slurm.partition`. The keys below override those of `slurm` in the same way."""
    account: Words | None = None
    qos: Words | None = None
    constraint: Words | None = None
    exclude: Words | None = None
    reservation: Words | None = None
    exclusive: bool | Literal["user", "mcs"] | None = None
    wckey: Words | None = None
    licenses: Words | None = None
    switches: Words | None = None
    nice: int | None = None
    sbatch_args: SbatchArgs | None = None
    """Further options of sbatch, in place of those in `slurm.sbatch_args`."""
    setup: list[str] | None = None
    """Shell lines, in place of those in `slurm.setup`."""
    srun_args: SrunArgs | None = None
    """Arguments of srun, in place of those in `slurm.srun_args`."""
    container: Container | None = None
    """The container, in place of the run's; `{runtime: none}` stands for no container."""

    @field_validator("mem_per_cpu", "switches", mode="before")
    @classmethod
    def _as_text(cls, found: Any) -> Any:
        return str(found) if type(found) is int else found

    @field_validator("minutes", mode="before")
    @classmethod
    def _as_minutes(cls, found: Any) -> Any:
        return minutes_of(found) if isinstance(found, str) else found

    @property
    def ranks(self) -> int:
        """The number of processes over all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def has_gpus(self) -> bool:
        """Whether the stage asks for GPUs, in either of the two spellings."""
        return self.gpus_per_node > 0 or (self.gres or "").startswith("gpu")

    @model_validator(mode="after")
    def _gpus_once(self) -> Resources:
        if self.gpus_per_node and (self.gres or "").startswith("gpu"):
            raise ValueError(f"gpus_per_node is {self.gpus_per_node} and gres is {self.gres}; ask for GPUs in one way")
        return self

    @model_validator(mode="after")
    def _memory_once(self) -> Resources:
        if self.mem_gb and self.mem_per_cpu:
            raise ValueError(
                f"mem_gb is {self.mem_gb:g} and mem_per_cpu is {self.mem_per_cpu}; ask for memory in one way "
                "(null takes back what `defaults` says)"
            )
        return self


MAIL_TYPES = ("BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT", "TIME_LIMIT",
              "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50", "ARRAY_TASKS", "NONE")  # fmt: skip


class Slurm(Section):
    """The settings with which jobs are handed to Slurm."""

    account: Words | None = None
    partition: Words | None = None
    qos: Words | None = None
    constraint: Words | None = None
    exclude: Words | None = None
    reservation: Words | None = None
    exclusive: bool | Literal["user", "mcs"] | None = None
    """Whether jobs get whole nodes: true, or Slurm's words user or mcs."""
    wckey: Words | None = None
    licenses: Words | None = None
    """Licences in Slurm's spelling, such as matlab:2."""
    switches: Words | None = None
    """The largest number of switches that a job's nodes may be connected to, and how long to wait for that: 1@60."""
    nice: int | None = None
    """The number that is taken off the job's priority."""
    clusters: Words | None = None
    """The cluster to submit to, if several share one accounting. It is a single one, as jobs cannot wait for jobs of
    another."""
    sbatch_args: SbatchArgs = Field(default=[])
    """Any other options of sbatch, one per entry, such as --tmp=10G."""
    array_parallelism: int = Field(default=256, ge=1)
    """The number of elements of one array that may run at the same time (the `%N` of `--array`)."""
    signal_seconds: int = Field(default=120, ge=1)
    """The number of seconds before the time limit at which a training job is signalled, saves and requeues itself."""
    setup: list[str] = Field(default=[])
    """Shell lines that run before the job's command: modules, conda, exports."""
    srun_args: SrunArgs = Field(default=[])
    """Further arguments of srun."""
    mail_type: str | None = None
    """The events for which Slurm sends a mail: BEGIN, END, FAIL, REQUEUE, …, separated by commas."""
    mail_user: Words | None = None
    """The user who receives the mail; the one who submits if absent."""
    interface: str | None = None
    """The network interface for traffic between ranks; if absent, the libraries choose it."""

    @field_validator("switches", mode="before")
    @classmethod
    def _as_text(cls, found: Any) -> Any:
        return str(found) if type(found) is int else found

    @field_validator("clusters")
    @classmethod
    def _one_cluster(cls, found: str | None) -> str | None:
        if found and not found.replace("-", "_").isidentifier():
            raise ValueError(
                f"found {found!r}, expected the name of one cluster: jobs cannot wait for those of another"
            )
        return found

    @model_validator(mode="after")
    def _mail(self) -> Slurm:
        unknown = [one for one in (self.mail_type or "NONE").split(",") if one not in MAIL_TYPES]
        if unknown:
            raise ValueError(f"slurm.mail_type: found {unknown[0]!r}. {suggest(unknown[0], MAIL_TYPES)}")
        return self


class Local(Section):
    """The settings of the embedded scheduler."""

    cpus: int | None = Field(default=None, ge=1)
    """The number of cores that tasks may use together; if absent, all that this process may use."""


class Retries(Section):
    """The rules by which a job that did not finish is started again."""

    without_progress: int = Field(default=3, ge=1)
    """The number of attempts in a row without progress after which the stage fails."""
    crashes: int = Field(default=5, ge=0)
    """The number of crashes that are allowed even if each attempt got further."""
    hung_minutes: float = Field(default=30, gt=0)
    """The number of minutes without a sign of life after which a step is killed and started again. Signs of life are
    its log and its iteration and, for a single process, its processor time."""


_PER_STAGE = (
    "partition", "account", "qos", "constraint", "exclude", "reservation", "exclusive", "wckey", "licenses", "switches",
    "nice", "sbatch_args", "setup", "srun_args",
)  # fmt: skip


class Cluster(Section):
    """WHERE a run happens. These settings may change between submissions without affecting what is done already."""

    scheduler: Literal["auto", "local", "slurm"] = "auto"
    runs: ProjectPath = PROJECT / "runs"
    """The folder that holds the runs; all nodes have to share it."""
    logs: ProjectPath = PROJECT / "logs"
    python: str | None = None
    """The Python interpreter of the jobs; the launcher's own if absent."""
    shards_per_job: int = Field(default=1, ge=1)
    """The number of shards that one array element works through; fixed at a run's first submission."""
    slurm: Slurm = Slurm()
    container: Container = Container()
    local: Local = Local()
    retries: Retries = Retries()
    defaults: Resources = Resources()
    stages: dict[str, dict[str, Any]] = Field(default={})
    """Resources of single stages, by the name of the stage; they override `defaults`."""

    def resources(self, stage: str) -> Resources:
        """The resources of a stage: `defaults`, overridden by the stage's own values."""
        return Resources.model_validate({**self.defaults.model_dump(), **self.stages.get(stage, {})})

    def with_defaults(self, resources: Resources) -> Resources:
        """The resources, with everything that the stage leaves open taken from `slurm` and `container`."""
        general = {name: getattr(self.slurm, name) for name in _PER_STAGE} | {"container": self.container}
        return resources.model_copy(
            update={name: value for name, value in general.items() if getattr(resources, name) is None}
        )

    def check_time_limit(self, stage: str) -> None:
        """Raise UserError if the time limit of a stage that saves when signalled is too short for two further steps."""
        minutes, notice = self.resources(stage).minutes, self.slurm.signal_seconds
        needed = notice + SIGNAL_EARLY_SECONDS + START_SECONDS
        if minutes * 60 < needed:
            raise UserError(
                f"stages.{stage}.minutes: {minutes} is too short. slurm.signal_seconds is {notice}, Slurm may signal "
                f"{SIGNAL_EARLY_SECONDS} s before that, and start-up and two steps take {START_SECONDS} s or more: "
                f"give at least {-(-needed // 60)} minutes, or a smaller slurm.signal_seconds."
            )
