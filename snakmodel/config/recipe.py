"""WHAT a run does: the sections of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from snakmodel.config.data_card import DataCard
from snakmodel.config.filters import Custom, Decontaminate, Filter
from snakmodel.config.kept_columns import KeptColumns
from snakmodel.config.sections import ProjectPath, Section


class Clean(Section):
    """How documents are cleaned. The documents that cleaning changes or leaves out are counted."""

    trim: bool = False
    """Whether white space is removed from both ends."""
    nfc: bool = False
    """Whether characters are composed: Unicode normal form C."""
    min_characters: int = Field(default=0, ge=0)
    """The number of characters below which a document is left out."""


def _check_source(entry: Any) -> None:
    """Raise ValueError if an entry of `data.sources` is neither a name nor `NAME: SHARE`."""
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
    """The folder of the raw text: .txt and .jsonl files (.gz and .zst too), .parquet files and Hugging Face datasets.
    Each sub-folder is a source."""
    collect: ProjectPath | None = None
    """A file of sources, such as recipes/sources/danish.yaml, which are collected into `path` first; see
    docs/collect.md."""
    sources: list[str | dict[str, float]] | None = None
    """The sources to take, in this order; if absent, all of them in the order of their names. `NAME: 0.5` takes half of
    one."""
    seed: int = 8446
    """The seed that decides which documents of a source are taken if only a share of them is."""
    document: Literal["line", "blank-line", "file"] = "line"
    """The unit of a text file that is one document."""
    key: str = "text"
    """The JSON key or the column that holds a document in files other than text files."""
    encoding: Literal["utf-8", "utf-16", "utf-16-le", "utf-16-be"] = "utf-8"
    """The encoding of text and JSON lines; utf-16 is for files that begin with a byte order mark."""
    errors: Literal["error", "replace", "skip"] = "error"
    """What happens to a document that is not UTF-8 or holds a NUL character. A document that is not a string is left
    out with `skip`, and is an error otherwise."""
    clean: Clean = Clean()
    shards: int | None = Field(default=None, ge=1)
    """The number of shards; if absent, the input's bytes divided by `shard_mb`. There are fewer if single compressed
    files are larger than a shard."""
    shard_mb: int = Field(default=512, ge=1)
    """The size of a shard, in MB of input as it lies on disk; used if `shards` is absent."""
    keep: KeptColumns | None = None
    """The JSON keys or columns that the shards keep beside the text, such as [url, date, {score: float}]. Every
    document then has the column `id` too, which says where it came from. An empty list keeps just the `id`."""
    where: str | None = Field(default=None, min_length=1)
    """A condition on the kept columns, such as `score > 0.5 and date >= 2020`; documents for which it does not hold are
    left out."""
    custom: list[Custom] = Field(default=[])
    """The user's own commands, which every shard passes in this order, after `filter` and before deduplication."""

    @field_validator("custom")
    @classmethod
    def _named_once(cls, found: list[Custom]) -> list[Custom]:
        names = [one.name for one in found]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{repeated[0]!r} is the name of {names.count(repeated[0])} commands; name each its own")
        return found

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
        """Maps each source to the share of its documents, in order; None stands for all of everything."""
        if self.sources is None:
            return None
        pairs = ({entry: 1.0} if isinstance(entry, str) else entry for entry in self.sources)
        return {name: share for pair in pairs for name, share in pair.items()}


class Dedup(Section):
    """Near-deduplication by MinHash, with the clusters of text-dedup."""

    num_perm: int = Field(default=64, ge=2)
    """The number of permutations in a signature."""
    threshold: float = Field(default=0.85, gt=0, lt=1)
    """The Jaccard similarity from which documents count as duplicates."""
    ngram: int = Field(default=5, ge=1)
    """The number of words in an n-gram."""
    min_length: int = Field(default=5, ge=0)
    """The number of words below which a document is short; see `short_docs`."""
    hash_func: Literal["sha1", "xxh3"] = "sha1"
    """The hash of an n-gram. xxh3 is faster, but finds different clusters than sha1."""
    b: int | None = Field(default=None, ge=1)
    """The number of bands of a signature; two documents that agree in one band are linked. If absent, the best number
    for the threshold."""
    r: int | None = Field(default=None, ge=1)
    """The number of values in a band; has to be given together with `b`."""
    compat: Literal["text-dedup-0.4.0", "text-dedup-0.3.1"] = "text-dedup-0.4.0"
    """The version of text-dedup whose clusters are reproduced; 0.3.1 cuts words at letters other than a-z."""
    verify_jaccard: bool = False
    """Whether only documents whose true Jaccard similarity reaches the threshold are linked; their texts are read
    again."""
    ranges: int = Field(default=16, ge=1)
    """The number of ranges into which the keys of all bands are cut; more ranges mean less memory per task."""
    short_docs: Literal["exact", "keep", "drop", "collapse"] = "exact"
    """What happens to short documents: identical ones are deduplicated (exact), all are kept, all are dropped, or all
    are collapsed into one."""
    against: tuple[ProjectPath, ...] = ()
    """The folders of earlier runs whose documents count too: of this run, exactly those documents are removed that a
    deduplication of all documents together would remove, with the earlier runs' documents first, in this order. Also
    what an earlier run removed itself counts, and a document of an earlier run may connect two new ones. The earlier
    runs need the same settings of this section, must have done dedup-signatures, and have to stay where they are while
    this run is planned; with `verify_jaccard` their `arrow` folder too. Nothing of them is changed."""
    cluster_size: bool = False
    """Whether the kept shards get a column `cluster_size` (int64): the number of documents in the cluster of a kept
    document, itself included, and 1 if nothing resembles it. Each shard needs 8 bytes more per document."""

    lines: int | None = Field(default=None, ge=1)
    """If given, lines that occur more often than this in the whole deduplicated corpus are removed, all of them."""

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
    """The deduplicated text as files for users and other programs; no stage of the chain reads them."""

    export: bool = True
    """Whether the text is written as jsonl and txt, one pair per shard and one for the whole. They take four times the
    size of the text."""


class Tokenizer(Section):
    """The tokenizer, which turns text into token ids."""

    type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"] = "SentencePieceTokenizer"
    file: ProjectPath
    """The base model's tokenizer.model or, for a HuggingFaceTokenizer, its tokenizer.json with tokenizer_config.json
    beside it."""
    append_eod: bool = True
    """Whether every document ends with the end-of-document id. In the published run it did not, and documents run into
    each other."""
    prepend_bos: bool = False
    """Whether every document begins with the beginning-of-sentence id."""


class Model(Section):
    """The base model whose pre-training is continued."""

    family: Literal["llama", "llama2", "codellama", "mistral", "falcon"] = "llama2"
    base: ProjectPath
    """The folder of the base model in Hugging Face format."""
    size: int | None = None
    """The number of parameters in billions; if given, it is checked against the folder."""


class Training(Section):
    """Hyper-parameters of the training run, in Megatron-LLM's names."""

    train_iters: int = Field(ge=1)
    """The number of optimizer steps."""
    global_batch_size: int = Field(ge=1)
    """The number of samples per step, over all ranks."""
    micro_batch_size: int = Field(default=1, ge=1)
    """The number of samples that a rank takes at once."""
    seq_length: int = Field(ge=2)
    """The number of tokens per sample."""
    lr: float = Field(gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_wsd_decay_iters: int | None = Field(default=None, ge=0)
    """WSD (warm-up, stable, decay): the number of steps of the decay at the end."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] | None = None
    """WSD: the shape of that decay; if absent, exponential as in Megatron-LM."""
    lr_warmup_iters: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_grad: float = Field(default=1.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    skip_spikes: float | None = Field(default=None, gt=0)
    """Make no update if the loss or the gradient norm is this many standard deviations above its mean; OLMo uses 6."""
    seed: int = 8446
    split: str = "969,30,1"
    """The proportions of the documents for training, validation and test."""
    reset_position_ids: bool = False
    """Whether positions begin again at each document. This key and the next two need tokenizer.append_eod."""
    reset_attention_mask: bool = False
    """Whether attention is kept from reaching back to the documents before."""
    eod_mask_loss: bool = False
    """Whether the prediction after the end of a document is left out of the loss."""
    save_interval: int = Field(ge=1)
    """The number of steps between checkpoints."""
    keep_last: int | None = Field(default=None, ge=1)
    """The number of newest checkpoints that are kept; all if absent. May be changed while a run is under way."""
    keep_every: int | None = Field(default=None, ge=1)
    """With keep_last: checkpoints of iterations that this number divides are kept too."""
    eval_interval: int = Field(default=100, ge=1)
    eval_iters: int = Field(default=10, ge=0)
    log_interval: int = Field(default=1, ge=1)
    wandb_project: str | None = None
    """The Weights & Biases project to which the numbers are sent too; the key comes from WANDB_API_KEY or `wandb
    login`."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """The precision of the computation; master weights and reductions are always fp32. fp16 (with loss scaling) is for
    GPUs without bf16."""
    tensor_parallel: int = Field(default=1, ge=1)
    """The number of ranks that share each layer's matrices, with sequence parallelism."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """The number of ranks that hold different layers. The remaining factor of the ranks is data parallel."""
    recompute_granularity: Literal["selective", "full"] | None = None
    torch_compile: bool = False
    """Whether the layers are compiled: slower to begin, faster afterwards. It changes the last bits of the result."""
    log_samples: bool = False
    """Whether the samples of each iteration are recorded in checkpoints/samples.jsonl."""
    distributed_timeout_minutes: float | None = Field(default=None, gt=0)
    """The number of minutes after which a rank that waits for the others fails; 10 if absent."""
    extra_flags: list[str] = Field(default=[])
    """Further flags of finetune.py, such as [--exit_interval, "100"], which the engine's parser checks when the run is
    planned."""
    threads: int = Field(default=1, ge=1)
    """The number of CPU threads of a rank. It is part of the recipe because it changes the last bits of the result."""

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
    """The checkpoints that become Hugging Face folders, and how closely these must agree with the engine."""

    iterations: list[int] | Literal["all"] | None = None
    """The iterations to export; `all` stands for all that are saved, and the last one is exported if the key is
    absent."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """The data type of the exported weights; that of the training if absent."""
    verify_batches: int = Field(default=2, ge=1)
    """The number of batches of real tokens in each comparison of logits."""
    tolerance: float = Field(default=0.01, gt=0)
    """The mean absolute error of the logits that the gates allow."""


class Push(Section):
    """The place where the exported folders go: a Hub repository or, if none is named, a folder of the run."""

    repository: str | None = None
    """ORG/NAME on the Hugging Face Hub. The last iteration goes to the main branch, and each other one to a branch of
    its own."""
    license: str | None = None
    """The licence of the exported model in the Hub's spelling (llama2, apache-2.0, other, …); needed with a
    repository."""
    language: str | list[str] | None = None
    """The language of the model for its card: codes such as da, or [da, en]."""
    base_model: str | None = None
    """ORG/NAME of the base model on the Hub, for the card; needed if model.base is not in the Hub's own cache."""
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
    """The name of the run's folder, its logs and its jobs."""
    data: Data
    filter: Filter = Filter()
    dedup: Dedup = Dedup()
    decontaminate: Decontaminate | None = None
    text: Text = Text()
    tokenizer: Tokenizer
    model: Model
    training: Training
    export: Export = Export()
    push: Push = Push()
    data_card: DataCard | None = None

    @property
    def exported_iterations(self) -> list[int]:
        """The iterations that become Hugging Face folders."""
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
