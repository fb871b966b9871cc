"""WHERE a run happens: the sections of cluster.yaml."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from run_contract.errors import UserError
from snakmodel.config.sbatch_options import Words, check_sbatch_args, check_srun_args
from snakmodel.config.sections import PROJECT, ProjectPath, Section, suggest

SIGNAL_EARLY_SECONDS = 60
"""Slurm may send the notice of the time limit so much earlier than asked."""
START_SECONDS = 30
"""The least that start-up and two steps of training take."""


SbatchArgs = Annotated[list[str], AfterValidator(check_sbatch_args)]
SrunArgs = Annotated[list[str], AfterValidator(check_srun_args)]

_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
_CLOCK = re.compile(r"\d+(?::\d+){0,2}")


def minutes_of(text: str) -> int:
    """The minutes of a time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; seconds are rounded up."""
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
    """The container that each rank's command runs in. The run's and the project's folders and the recipe's input
    paths are always visible inside, under their own names."""

    runtime: Literal["apptainer", "pyxis", "docker", "none"] = "none"
    """apptainer and docker wrap the command; pyxis is a plugin of srun."""
    image: str | None = None
    """What the runtime takes: a .sif or .sqsh file, or docker://…, or a name."""
    binds: list[str] = Field(default=[])
    """Further folders to show inside: SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro."""
    shm_size: str | None = None
    """Size of /dev/shm in docker, such as 8g; the other runtimes share the node's."""
    python: str = "python3"
    """Python inside the image, with the toolkit's packages."""

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
    """What one job of a stage asks for."""

    nodes: int = Field(default=1, ge=1)
    ranks_per_node: int = Field(default=1, ge=1)
    """Processes on each node (one a GPU where there are GPUs)."""
    cpus: int = Field(default=1, ge=1)
    """Cores of each process."""
    mem_gb: float | None = Field(default=None, gt=0)
    """Memory of each node; the partition's default when absent."""
    gpus_per_node: int = Field(default=0, ge=0)
    gres: Words | None = None
    """Generic resources of each node in Slurm's spelling, such as gpu:a100:4; GPUs either here or above."""
    minutes: int = Field(default=120, ge=2)
    """Time limit: a number of minutes, or Slurm's spelling, such as 24:00:00 or 2-12 (two days and twelve hours)."""
    mem_per_cpu: str | None = Field(default=None, pattern=r"^[0-9]+[KMGT]?$")
    """Memory of each core in Slurm's spelling, such as 4G; memory either here or above."""
    partition: Words | None = None
    """Partition, where it differs from `slurm.partition`; the same for the keys below."""
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
    """Further options of sbatch instead of those of `slurm.sbatch_args`."""
    setup: list[str] | None = None
    """Shell lines instead of those of `slurm.setup`."""
    srun_args: SrunArgs | None = None
    """Arguments of srun instead of those of `slurm.srun_args`."""
    container: Container | None = None
    """Container instead of the run's; `{runtime: none}` for none."""

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
        """Processes over all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def has_gpus(self) -> bool:
        """Whether GPUs are asked for, in either spelling."""
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
    """How jobs are handed to Slurm."""

    account: Words | None = None
    partition: Words | None = None
    qos: Words | None = None
    constraint: Words | None = None
    exclude: Words | None = None
    reservation: Words | None = None
    exclusive: bool | Literal["user", "mcs"] | None = None
    """Whole nodes: true, or Slurm's user or mcs."""
    wckey: Words | None = None
    licenses: Words | None = None
    """In Slurm's spelling, such as matlab:2."""
    switches: Words | None = None
    """The most switches that a job's nodes may hang on, and how long to wait for that: 1@60."""
    nice: int | None = None
    """Taken off the priority."""
    clusters: Words | None = None
    """The cluster to submit to, where several share one accounting; one, as jobs cannot wait for those of another."""
    sbatch_args: SbatchArgs = Field(default=[])
    """Any other option of sbatch, one an entry, such as --tmp=10G."""
    array_parallelism: int = Field(default=256, ge=1)
    """Tasks of one array that may run at once (the `%N` of `--array`)."""
    signal_seconds: int = Field(default=120, ge=1)
    """Notice before the time limit at which a training job saves and requeues itself."""
    setup: list[str] = Field(default=[])
    """Shell lines before the job's command: modules, conda, exports."""
    srun_args: SrunArgs = Field(default=[])
    """Further arguments of srun."""
    mail_type: str | None = None
    """When Slurm writes a mail: BEGIN, END, FAIL, REQUEUE, …, separated by commas."""
    mail_user: Words | None = None
    """Who receives it; the person who submits when absent."""
    interface: str | None = None
    """Network interface for rank-to-rank traffic; by default the libraries choose."""

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
    """The embedded scheduler."""

    cpus: int | None = Field(default=None, ge=1)
    """Cores that tasks may use together; all that this process may use when absent."""


class Retries(Section):
    """When a job that did not finish is started again."""

    without_progress: int = Field(default=3, ge=1)
    """Attempts in a row that got nothing further before the stage fails."""
    crashes: int = Field(default=5, ge=0)
    """Crashes allowed although each attempt got further."""
    hung_minutes: float = Field(default=30, gt=0)
    """A step is killed and started again when for so long its log and its iteration have not moved (nor, for a single
    process, has its processor time)."""


_PER_STAGE = (
    "partition", "account", "qos", "constraint", "exclude", "reservation", "exclusive", "wckey", "licenses", "switches",
    "nice", "sbatch_args", "setup", "srun_args",
)  # fmt: skip


class Cluster(Section):
    """WHERE a run happens. May change between submissions without touching what is done."""

    scheduler: Literal["auto", "local", "slurm"] = "auto"
    runs: ProjectPath = PROJECT / "runs"
    """Folder that holds the runs; shared by all nodes."""
    logs: ProjectPath = PROJECT / "logs"
    python: str | None = None
    """Python that jobs run; the launcher's own when absent."""
    shards_per_job: int = Field(default=1, ge=1)
    """Shards that one array element works through; fixed at a run's first submission."""
    slurm: Slurm = Slurm()
    container: Container = Container()
    local: Local = Local()
    retries: Retries = Retries()
    defaults: Resources = Resources()
    stages: dict[str, dict[str, Any]] = Field(default={})
    """Resources of single stages, by stage name, over `defaults`."""

    def resources(self, stage: str) -> Resources:
        """The resources of a stage: `defaults` with that stage's own values over them."""
        return Resources.model_validate({**self.defaults.model_dump(), **self.stages.get(stage, {})})

    def with_defaults(self, resources: Resources) -> Resources:
        """The same with everything that the stage leaves open taken from `slurm` and `container`."""
        general = {name: getattr(self.slurm, name) for name in _PER_STAGE} | {"container": self.container}
        return resources.model_copy(
            update={name: value for name, value in general.items() if getattr(resources, name) is None}
        )

    def check_time_limit(self, stage: str) -> None:
        """Refuse a time limit in which a stage that saves when signalled could not get two steps further."""
        minutes, notice = self.resources(stage).minutes, self.slurm.signal_seconds
        needed = notice + SIGNAL_EARLY_SECONDS + START_SECONDS
        if minutes * 60 < needed:
            raise UserError(
                f"stages.{stage}.minutes: {minutes} is too short. slurm.signal_seconds is {notice}, Slurm may signal "
                f"{SIGNAL_EARLY_SECONDS} s before that, and start-up and two steps take {START_SECONDS} s or more: "
                f"give at least {-(-needed // 60)} minutes, or a smaller slurm.signal_seconds."
            )
