"""cluster.yaml (where) and a recipe (what) -> one validated, frozen Config; unknown keys are refused by name.

Strings may use `${NAME}` and `${NAME:-default}` from the environment. Relative paths are taken from the project's
folder.
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from snakmodel.publish import UserError

PROJECT = Path(__file__).resolve().parent.parent
SIGNAL_EARLY_SECONDS = 60
"""Slurm may send the notice of the time limit so much earlier than asked."""
START_SECONDS = 30
"""The least that start-up and two steps of training take."""


def _from_project(path: Path) -> Path:
    return PROJECT / path.expanduser()


ProjectPath = Annotated[Path, AfterValidator(_from_project)]


class Section(BaseModel):
    """A group of settings: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Clean(Section):
    """Cleaning of the documents; what it changes and leaves out is counted."""

    trim: bool = False
    """Take white space from both ends."""
    nfc: bool = False
    """Compose characters: Unicode normal form C."""
    min_characters: int = Field(default=0, ge=0)
    """Leave out shorter documents."""


def _check_source(entry: Any) -> None:
    """Refuse an entry of `data.sources` that is neither a name nor `NAME: SHARE`."""
    if isinstance(entry, str):
        return
    pairs = list(entry.items()) if isinstance(entry, dict) else []
    if len(pairs) != 1 or not isinstance(pairs[0][0], str) or type(pairs[0][1]) not in (int, float):
        raise ValueError(f"found {entry!r}, expected a source's name or NAME: SHARE, such as news: 0.5")
    if not 0 < pairs[0][1] <= 1:
        raise ValueError(
            f"found {entry!r}, expected a share above 0 and up to 1. Taking documents more than once would be in vain: "
            "deduplication removes the copies. To weight sources, blend tokenised datasets in training"
        )


class Data(Section):
    """The raw text and how it is cut into documents and shards."""

    path: ProjectPath
    """Folder of .txt and .jsonl files (.gz and .zst too), .parquet files, Hugging Face datasets; each sub-folder is a
    source."""
    sources: list[str | dict[str, float]] | None = None
    """Sources to take, in this order; all of them in name order when absent. `NAME: 0.5` takes half of one."""
    seed: int = 8446
    """Decides which documents of a source are taken, where only a share of them is."""
    document: Literal["line", "blank-line", "file"] = "line"
    """What one document of a text file is."""
    key: str = "text"
    """JSON key, or column, that holds a document in other files."""
    errors: Literal["error", "replace", "skip"] = "error"
    """What to do with a document that is not UTF-8, and (but for `replace`) with one that is no string."""
    clean: Clean = Clean()
    shards: int | None = Field(default=None, ge=1)
    """Number of shards; by default the input's bytes over `shard_mb`. Fewer where compressed files are larger."""
    shard_mb: int = Field(default=512, ge=1)
    """Size of a shard in MB of input as it lies on disk, where `shards` is absent."""

    @field_validator("sources", mode="before")
    @classmethod
    def _checked(cls, found: Any) -> Any:
        for entry in found if isinstance(found, list) else []:
            _check_source(entry)
        names = [name for entry in found or [] for name in ([entry] if isinstance(entry, str) else entry)]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{repeated[0]!r} is there {names.count(repeated[0])} times; name each source once")
        return found

    @property
    def shares(self) -> dict[str, float] | None:
        """Source -> share of its documents, in order; None for all of everything."""
        if self.sources is None:
            return None
        pairs = ({entry: 1.0} if isinstance(entry, str) else entry for entry in self.sources)
        return {name: share for pair in pairs for name, share in pair.items()}


class Dedup(Section):
    """Near-deduplication by MinHash, with the clusters of text-dedup."""

    num_perm: int = Field(default=64, ge=2)
    """Permutations in a signature."""
    threshold: float = Field(default=0.85, gt=0, lt=1)
    """Jaccard similarity from which documents count as duplicates."""
    ngram: int = Field(default=5, ge=1)
    """Words in an n-gram."""
    min_length: int = Field(default=5, ge=0)
    """Documents with fewer words are short: see `short_docs`."""
    hash_func: Literal["sha1", "xxh3"] = "sha1"
    """Hash of an n-gram. xxh3 is faster; its clusters are others."""
    b: int | None = Field(default=None, ge=1)
    """Bands of a signature: one that agrees links two documents. The best number for the threshold if not given."""
    r: int | None = Field(default=None, ge=1)
    """Values in a band; given together with `b`."""
    compat: Literal["text-dedup-0.4.0", "text-dedup-0.3.1"] = "text-dedup-0.4.0"
    """The version of text-dedup whose clusters these are; 0.3.1 cuts words at letters beyond a-z."""
    verify_jaccard: bool = False
    """Link only documents whose true Jaccard similarity reaches the threshold; reads their texts again."""
    ranges: int = Field(default=16, ge=1)
    """Hash ranges that the bands are joined in: more means less memory a task."""
    short_docs: Literal["exact", "keep", "drop", "collapse"] = "exact"
    """Short documents: deduplicate identical ones, keep all, drop all, or collapse them into one."""

    @model_validator(mode="after")
    def _consistent(self) -> Dedup:
        if self.compat == "text-dedup-0.3.1" and self.hash_func != "sha1":
            raise ValueError(f"hash_func = {self.hash_func}: text-dedup 0.3.1 has sha1 only")
        if (self.b is None) != (self.r is None):
            raise ValueError("b and r: give both, or neither to have the best for the threshold")
        if self.b and self.r and self.b * self.r > self.num_perm:
            raise ValueError(f"b = {self.b} bands of r = {self.r} values need num_perm of {self.b * self.r} or more")
        return self


class Tokenizer(Section):
    """How text becomes token ids."""

    type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"] = "SentencePieceTokenizer"
    file: ProjectPath
    """The base model's tokenizer.model; for a HuggingFaceTokenizer its tokenizer.json, beside tokenizer_config.json."""
    append_eod: bool = True
    """End every document with the end-of-document id. The published run did not: its documents run into each other."""
    prepend_bos: bool = False
    """Begin every document with the beginning-of-sentence id."""


class Model(Section):
    """The base model whose pre-training is continued."""

    family: Literal["llama", "llama2", "codellama", "mistral"] = "llama2"
    base: ProjectPath
    """Folder of the base model in Hugging Face format."""
    size: int | None = None
    """Billions of parameters, checked against the folder when given."""


class Training(Section):
    """Hyper-parameters of the training run, in Megatron-LLM's names."""

    train_iters: int = Field(ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(ge=1)
    """Samples a step, over all ranks."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Samples a rank takes at once."""
    seq_length: int = Field(ge=2)
    """Tokens a sample."""
    lr: float = Field(gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "cosine"
    lr_warmup_iters: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_grad: float = Field(default=1.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    seed: int = 8446
    split: str = "969,30,1"
    """Proportions of the documents for training, validation and test."""
    save_interval: int = Field(ge=1)
    """Steps between checkpoints."""
    eval_interval: int = Field(default=100, ge=1)
    eval_iters: int = Field(default=10, ge=0)
    log_interval: int = Field(default=1, ge=1)
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Compute precision; master weights and reductions are always fp32."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that share each layer's matrices, with sequence parallelism."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Ranks that hold different layers. What remains of the ranks is data parallel."""
    recompute_granularity: Literal["selective", "full"] | None = None
    threads: int = Field(default=1, ge=1)
    """CPU threads of a rank. Part of the recipe because it changes the last bits of the result."""


class Export(Section):
    """Which checkpoints become Hugging Face folders, and how closely they must agree with the engine."""

    iterations: list[int] | None = None
    """Iterations to export; the last one when absent."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Data type of the exported weights; the training's when absent."""
    verify_batches: int = Field(default=2, ge=1)
    """Batches of real tokens in each logits gate."""
    tolerance: float = Field(default=0.01, gt=0)
    """Mean absolute logit error that the gates allow."""


class Push(Section):
    """Where the exported folders go: a Hub repository, or a folder of the run when none is named."""

    repository: str | None = None
    """ORG/NAME on the Hugging Face Hub. The last iteration goes to its main branch, others to branches of their own."""
    license: str | None = None
    """Licence of the exported model, in the Hub's spelling (llama2, apache-2.0, other, …); needed with a repository."""
    public: bool = False
    """Whether a repository that does not exist yet is made public."""
    max_shard_size: str = "2GB"

    @model_validator(mode="after")
    def _licensed(self) -> Push:
        if self.repository and not self.license:
            raise ValueError(
                f"push.repository is {self.repository} but push.license is missing; give the licence that the base "
                "model and the data allow, such as llama2 or apache-2.0"
            )
        return self


class Recipe(Section):
    """WHAT a run does."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run's folder, its logs and its jobs."""
    data: Data
    dedup: Dedup = Dedup()
    tokenizer: Tokenizer
    model: Model
    training: Training
    export: Export = Export()
    push: Push = Push()

    @property
    def exported_iterations(self) -> list[int]:
        """Iterations that become Hugging Face folders."""
        return self.export.iterations or [self.training.train_iters]

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        t = self.training
        for iteration in self.exported_iterations:
            saved = iteration == t.train_iters or (0 < iteration < t.train_iters and iteration % t.save_interval == 0)
            if not saved:
                raise ValueError(
                    f"export.iterations: {iteration} is never saved; checkpoints are written every "
                    f"{t.save_interval} steps and at {t.train_iters}"
                )
        if t.seq_length % t.tensor_parallel:
            raise ValueError(
                f"training.tensor_parallel is {t.tensor_parallel} and does not divide training.seq_length "
                f"{t.seq_length}; each tensor rank takes an equal part of the sequence"
            )
        if t.lr_warmup_iters >= t.train_iters:
            raise ValueError(
                f"training.lr_warmup_iters is {t.lr_warmup_iters} but training.train_iters is only {t.train_iters}; "
                "the warm-up must be shorter than the run"
            )
        return self


class Container(Section):
    """The container that each rank's command runs in. The run's and the project's folders and the recipe's input
    paths are always visible inside, under their own names."""

    runtime: Literal["apptainer", "pyxis", "docker", "none"] = "none"
    """apptainer and docker wrap the command; pyxis is a plugin of srun."""
    image: str | None = None
    """What the runtime takes: a .sif or .sqsh file, or docker://…, or a name."""
    binds: list[str] = []
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
            if len(rest) > 2 or not source.startswith("/") or not (rest[:1] or ["/"])[0].startswith("/"):
                raise ValueError(f"container.binds: found {bind!r}, expected /SOURCE, /SOURCE:/TARGET or …:ro")
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
    gres: str | None = None
    """Generic resources of each node in Slurm's spelling, such as gpu:a100:4; GPUs either here or above."""
    minutes: int = Field(default=120, ge=2)
    """Time limit."""
    partition: str | None = None
    """Partition, where it differs from `slurm.partition`; the same for the keys below."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    setup: list[str] | None = None
    """Shell lines instead of those of `slurm.setup`."""
    srun_args: list[str] | None = None
    """Arguments of srun instead of those of `slurm.srun_args`."""
    container: Container | None = None
    """Container instead of the run's; `{runtime: none}` for none."""

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


MAIL_TYPES = ("BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT", "TIME_LIMIT",
              "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50", "ARRAY_TASKS", "NONE")  # fmt: skip


class Slurm(Section):
    """How jobs are handed to Slurm."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    array_parallelism: int = Field(default=256, ge=1)
    """Tasks of one array that may run at once (the `%N` of `--array`)."""
    signal_seconds: int = Field(default=120, ge=1)
    """Notice before the time limit at which a training job saves and requeues itself."""
    setup: list[str] = []
    """Shell lines before the job's command: modules, conda, exports."""
    srun_args: list[str] = []
    """Further arguments of srun."""
    mail_type: str | None = None
    """When Slurm writes a mail: BEGIN, END, FAIL, REQUEUE, …, separated by commas."""
    mail_user: str | None = None
    """Who receives it; the person who submits when absent."""
    interface: str | None = None
    """Network interface for rank-to-rank traffic; by default the libraries choose."""

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


_PER_STAGE = ("partition", "account", "qos", "constraint", "exclude", "setup", "srun_args")


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
    stages: dict[str, dict[str, Any]] = {}
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


class Config(Section):
    """Both files together."""

    recipe: Recipe
    cluster: Cluster


def load(recipe: Path, cluster: Path, stage_names: typing.Sequence[str]) -> Config:
    """Read and validate both files. Raises UserError that names the file, the key, what was found and what is valid."""
    config = Config(recipe=_read(recipe, Recipe), cluster=_read(cluster, Cluster))
    for name, values in config.cluster.stages.items():
        if name not in stage_names:
            raise UserError(f"{cluster}: stages.{name}: there is no such stage. {suggest(name, stage_names)}")
        _validate(cluster, f"stages.{name}.", Resources, values)
    return config


def load_cluster(path: Path) -> Cluster:
    """cluster.yaml alone, for commands that need no recipe."""
    return _read(path, Cluster)


SectionType = TypeVar("SectionType", bound=Section)


def _read(path: Path, model: type[SectionType]) -> SectionType:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give an existing one with --{model.__name__.lower()}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    if raw is None and model is Cluster:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found {type(raw).__name__}, expected keys such as {', '.join(model.model_fields)}")
    return _validate(path, "", model, _expand(raw, path))


def _validate(path: Path, prefix: str, model: type[SectionType], raw: dict[str, Any]) -> SectionType:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(problem, prefix, model) for problem in error.errors()]
        raise UserError(f"{path}: " + f"\n  {path}: ".join(lines)) from error


def _explain(problem: Any, prefix: str, model: type[Section]) -> str:
    where = prefix + ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        valid = list(_section_at(model, problem["loc"][:-1]).model_fields)
        return f"{where}: unknown key. {suggest(str(problem['loc'][-1]), valid)}"
    if problem["type"] == "missing":
        return f"{where}: missing. Add this key."
    if problem["type"] == "value_error":
        return f"{where + ': ' if where else ''}{problem['ctx']['error']}"
    return f"{where}: found {problem['input']!r}. {problem['msg']}."


def _section_at(model: type[Section], location: tuple[int | str, ...]) -> type[Section]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        alternatives = [one for one in typing.get_args(annotation) if one is not type(None)]
        annotation = alternatives[0] if alternatives else annotation  # `Container | None`
        assert isinstance(annotation, type)
        assert issubclass(annotation, Section)
        model = annotation
    return model


def suggest(found: str, valid: typing.Iterable[str]) -> str:
    """A sentence with the nearest valid name, if any, and all valid ones."""
    names = list(valid)
    near = difflib.get_close_matches(found, names, n=1)
    return (f"Did you mean {near[0]}? " if near else "") + f"Valid: {', '.join(names)}."


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _expand(value: Any, path: Path) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in every string below `value`."""
    if isinstance(value, dict):
        return {key: _expand(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, path) for item in value]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        found = os.environ.get(match[1]) or match[2]
        if found is None:
            raise UserError(
                f"{path}: ${{{match[1]}}} is not set in the environment. Set it, or write a default after :-"
            )
        return found

    return _VARIABLE.sub(replacement, value)
