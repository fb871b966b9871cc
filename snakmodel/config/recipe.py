"""WHAT a run does: the sections of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from snakmodel.config.sections import ProjectPath, Section


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
    encoding: Literal["utf-8", "utf-16", "utf-16-le", "utf-16-be"] = "utf-8"
    """Encoding of text and JSON lines; utf-16 is for files that begin with a byte order mark."""
    errors: Literal["error", "replace", "skip"] = "error"
    """What to do with a document that is not UTF-8 or has a NUL, and (but for `replace`) with one that is no string."""
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


class Text(Section):
    """The deduplicated text as files for people and other programs; no stage of the chain reads them."""

    export: bool = True
    """Write it as jsonl and txt, a pair for each shard and one of all: four times the size of the text."""


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

    family: Literal["llama", "llama2", "codellama", "mistral", "falcon"] = "llama2"
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
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_wsd_decay_iters: int | None = Field(default=None, ge=0)
    """WSD (warm-up, stable, decay): steps of the decay at the end."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] | None = None
    """WSD: shape of that decay; Megatron-LM's, exponential, when absent."""
    lr_warmup_iters: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_grad: float = Field(default=1.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    skip_spikes: float | None = Field(default=None, gt=0)
    """Make no update from a loss or gradient norm so many standard deviations above its mean; OLMo uses 6."""
    seed: int = 8446
    split: str = "969,30,1"
    """Proportions of the documents for training, validation and test."""
    reset_position_ids: bool = False
    """Positions begin again at each document. This and the next two need tokenizer.append_eod."""
    reset_attention_mask: bool = False
    """Attention does not reach over to the documents before."""
    eod_mask_loss: bool = False
    """What follows the end of a document is not counted in the loss."""
    save_interval: int = Field(ge=1)
    """Steps between checkpoints."""
    keep_last: int | None = Field(default=None, ge=1)
    """Newest checkpoints that stay; all of them when absent. May be changed while a run is under way."""
    keep_every: int | None = Field(default=None, ge=1)
    """With keep_last: checkpoints of iterations divisible by this stay too."""
    eval_interval: int = Field(default=100, ge=1)
    eval_iters: int = Field(default=10, ge=0)
    log_interval: int = Field(default=1, ge=1)
    wandb_project: str | None = None
    """Send the numbers to this Weights & Biases project too; the key comes from WANDB_API_KEY or `wandb login`."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Compute precision; master weights and reductions are always fp32. fp16 (with loss scaling) is for GPUs without
    bf16."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that share each layer's matrices, with sequence parallelism."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Ranks that hold different layers. What remains of the ranks is data parallel."""
    recompute_granularity: Literal["selective", "full"] | None = None
    threads: int = Field(default=1, ge=1)
    """CPU threads of a rank. Part of the recipe because it changes the last bits of the result."""

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if (self.lr_decay_style == "WSD") != (self.lr_wsd_decay_iters is not None):
            raise ValueError(
                f"lr_decay_style is {self.lr_decay_style} and lr_wsd_decay_iters {self.lr_wsd_decay_iters}: WSD and "
                "the length of its decay belong together; give both or neither"
            )
        if self.keep_every and not self.keep_last:
            raise ValueError(
                f"keep_every is {self.keep_every} but keep_last is missing: without it every checkpoint stays; give "
                "both or neither"
            )
        if self.lr_wsd_decay_iters is not None and self.lr_wsd_decay_iters > self.train_iters:
            raise ValueError(
                f"lr_wsd_decay_iters is {self.lr_wsd_decay_iters} but train_iters is only {self.train_iters}; make it "
                "at most that"
            )
        return self


class Export(Section):
    """Which checkpoints become Hugging Face folders, and how closely they must agree with the engine."""

    iterations: list[int] | Literal["all"] | None = None
    """Iterations to export; `all` that are saved; the last one when absent."""
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
    language: str | list[str] | None = None
    """Language of the model for its card: codes such as da, or [da, en]."""
    base_model: str | None = None
    """ORG/NAME of the base model on the Hub, for the card, where model.base is not in the Hub's own cache."""
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
    text: Text = Text()
    tokenizer: Tokenizer
    model: Model
    training: Training
    export: Export = Export()
    push: Push = Push()

    @property
    def exported_iterations(self) -> list[int]:
        """Iterations that become Hugging Face folders."""
        last = self.training.train_iters
        if self.export.iterations == "all":
            return [*range(self.training.save_interval, last, self.training.save_interval), last]
        return self.export.iterations or [last]

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
            if t.keep_last and iteration != t.train_iters and not (t.keep_every and iteration % t.keep_every == 0):
                raise ValueError(
                    f"export.iterations: {iteration} may be deleted before it is exported, as training.keep_last is "
                    f"{t.keep_last}; give a training.keep_every that divides it, or leave keep_last out"
                )
        if t.seq_length % t.tensor_parallel:
            raise ValueError(
                f"training.tensor_parallel is {t.tensor_parallel} and does not divide training.seq_length "
                f"{t.seq_length}; each tensor rank takes an equal part of the sequence"
            )
        separated = [
            name for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss") if getattr(t, name)
        ]
        if separated and not self.tokenizer.append_eod:
            raise ValueError(
                f"training.{separated[0]} is true but tokenizer.append_eod is false: nothing marks the end of a "
                "document; change either"
            )
        if t.lr_warmup_iters >= t.train_iters:
            raise ValueError(
                f"training.lr_warmup_iters is {t.lr_warmup_iters} but training.train_iters is only {t.train_iters}; "
                "the warm-up must be shorter than the run"
            )
        return self
