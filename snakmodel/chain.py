"""The chain of a run: every stage, its commands and what each reads and writes, declared in order.

prepare -> dedup-signatures -> dedup-buckets -> dedup-components -> dedup-filter -> export-text -> join-text
                                                                               \\-> tokenize -> merge-tokens --\\
convert -> verify -> shard ------------------------------------------------------------------------------------> train
train -> merge -> export-hf -> verify-export -> push, one task an exported iteration
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from snakmodel.config import Config
from snakmodel.prepare import Part
from snakmodel.publish import UserError
from snakmodel.stage import Chain, Input, Stage, Task, fingerprint

STAGES = [
    "prepare",
    "dedup-signatures",
    "dedup-buckets",
    "dedup-components",
    "dedup-filter",
    "export-text",
    "join-text",
    "tokenize",
    "merge-tokens",
    "convert",
    "verify",
    "shard",
    "train",
    "merge",
    "export-hf",
    "verify-export",
    "push",
]

_PREPROCESS = "Megatron-LLM/tools/preprocess_data.py"
_MERGE_DATASETS = "Megatron-LLM/tools/merge_datasets.py"
_HF_TO_MEGATRON = "Megatron-LLM/weights_conversion/hf_to_megatron.py"
_MEGATRON_TO_HF = "Megatron-LLM/weights_conversion/megatron_to_hf.py"
_CHECKPOINT_UTIL = "Megatron-LLM/tools/checkpoint_util.py"
_VERIFY = "Megatron-LLM/verify_correctness.py"
_FINETUNE = "Megatron-LLM/finetune.py"
_PUSH = "Megatron-LLM/tools/push_to_hub.py"
_TRACKER = "latest_checkpointed_iteration.txt"
_CORPUS = "tokens/corpus_text_document"


def build(config: Config, root: Path, shards_file: Path, shards: Sequence[Sequence[Part]]) -> Chain:
    """Declare every stage of a run. Raises UserError when the base model or the tokenizer is not what it should be."""
    builder = _Builder(config, root, shards_file, shards)
    return Chain.of(root, [*builder.data(), *builder.tokens(), *builder.weights(), builder.train(), *builder.export()])


class _Builder:
    """The settings that the stages share while they are declared."""

    def __init__(self, config: Config, root: Path, shards_file: Path, shards: Sequence[Sequence[Part]]) -> None:
        self.recipe = config.recipe
        self.cluster = config.cluster
        self.root = root
        self.shards_file = shards_file
        self.shards = shards
        self.vocab_size = _base_vocab_size(self.recipe.model.base)
        self.vocabulary = fingerprint(self.recipe.tokenizer.file)
        _check_tokenizer(self.recipe.tokenizer.file, self.vocab_size, self.recipe.model.base)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def stage(self, name: str, tasks: Sequence[Task], waits: dict[str, Any], **more: Any) -> Stage:
        resources = self.cluster.resources(name)
        if more.get("resumable"):
            self.cluster.check_time_limit(name)
        threads = {"OMP_NUM_THREADS": str(resources.cpus), **more.pop("environment", {})}
        return Stage(name, tuple(tasks), waits, resources, environment=threads, **more)

    def data(self) -> list[Stage]:
        """Raw text to deduplicated shards and the joined text files."""
        count = len(self.shards)
        names = [f"shard-{index:05d}" for index in range(count)]
        d = self.recipe.dedup
        files = {file: fingerprint(Path(file)) for file in {part.file for shard in self.shards for part in shard}}
        signature_flags = (
            f"--column text --num_perm {d.num_perm} --threshold {d.threshold} --ngram {d.ngram} "
            f"--min_length {d.min_length} --ranges {d.ranges} --short_docs {d.short_docs}"
        ).split()
        dedup = ("python", "-m", "snakmodel.dedup")

        def prepare(index: int) -> Task:
            argv = ("python", "-m", "snakmodel.prepare", "--shards", str(self.shards_file), "--shard", str(index))
            flags = ("--document", self.recipe.data.document, "--errors", self.recipe.data.errors)
            outside = [[*files[part.file], {**asdict(part), "file": None}] for part in self.shards[index]]
            return _shard_task(
                (*argv, "--output", self.path(f"arrow/{names[index]}"), *flags),
                "arrow",
                index,
                ".arrow",
                outside=outside,
            )

        def signatures(index: int) -> Task:
            paths = (
                "--input",
                self.path(f"arrow/{names[index]}.arrow"),
                "--output",
                self.path(f"dedup/signatures/{names[index]}"),
            )
            return _shard_task(
                (*dedup, "signatures", *paths, *signature_flags), "dedup/signatures", index, ".sig", reads="prepare"
            )

        def buckets(index: int) -> Task:
            output = f"dedup/buckets/range-{index:05d}"
            flags = ("--shards", str(count), "--range", str(index), "--output", self.path(output))
            return Task(
                (*dedup, "buckets", "--signatures", self.path("dedup/signatures"), *flags),
                (f"{output}.npy", f"{output}.json"),
                (Input("dedup-signatures", full=False),),
                f"{output}.json",
            )

        def filtered(index: int) -> Task:
            removed = f"dedup/components/removed/{names[index]}.npy"
            paths = ("--input", self.path(f"arrow/{names[index]}.arrow"), "--removed", self.path(removed))
            task = _shard_task(
                (*dedup, "filter", *paths, "--output", self.path(f"dedup/kept/{names[index]}")),
                "dedup/kept",
                index,
                ".arrow",
                reads="prepare",
            )
            return Task(
                task.argv, task.outputs, (*task.inputs, Input("dedup-components", only=(removed,))), task.counts
            )

        def text(index: int) -> Task:
            paths = (
                "--input",
                self.path(f"dedup/kept/{names[index]}.arrow"),
                "--output",
                self.path(f"text/shards/{names[index]}"),
            )
            return _shard_task(
                ("python", "-m", "snakmodel.export_text", "shard", *paths),
                "text/shards",
                index,
                ".jsonl",
                ".txt",
                reads="dedup-filter",
            )

        components = Task(
            (
                *dedup,
                "components",
                "--signatures",
                self.path("dedup/signatures"),
                "--buckets",
                self.path("dedup/buckets"),
                "--shards",
                str(count),
                "--ranges",
                str(d.ranges),
                "--output",
                self.path("dedup/components"),
            ),
            ("dedup/components",),
            (Input("dedup-signatures", full=False), Input("dedup-buckets")),
            "dedup/components/stats.json",
        )
        join = Task(
            (
                "python",
                "-m",
                "snakmodel.export_text",
                "join",
                "--input",
                self.path("text/shards"),
                "--shards",
                str(count),
                "--output",
                self.path("text/corpus"),
            ),
            ("text/corpus.jsonl", "text/corpus.txt", "text/corpus.json"),
            (Input("export-text"),),
            "text/corpus.json",
        )
        every = range(count)
        return [
            self.stage("prepare", [prepare(i) for i in every], {}, per_shard=True),
            self.stage("dedup-signatures", [signatures(i) for i in every], {"prepare": "same"}, per_shard=True),
            self.stage("dedup-buckets", [buckets(i) for i in range(d.ranges)], {"dedup-signatures": "all"}),
            self.stage("dedup-components", [components], {"dedup-signatures": "all", "dedup-buckets": "all"}),
            self.stage(
                "dedup-filter",
                [filtered(i) for i in every],
                {"prepare": "same", "dedup-components": "all"},
                per_shard=True,
            ),
            self.stage("export-text", [text(i) for i in every], {"dedup-filter": "same"}, per_shard=True),
            self.stage("join-text", [join], {"export-text": "all"}),
        ]

    def tokens(self) -> list[Stage]:
        """Kept shards to one token file."""
        t = self.recipe.tokenizer
        flags = (
            *self._tokenizer_flags(),
            "--chunk_size",
            "64",
            "--no_new_tokens",
            *(["--append_eod"] if t.append_eod else []),
        )
        workers = ("--workers", str(self.cluster.resources("tokenize").cpus))

        def tokenize(index: int) -> Task:
            name = f"shard-{index:05d}"
            prefix = f"tokens/shards/{name}_text_document"
            paths = (
                "--input",
                self.path(f"dedup/kept/{name}.arrow"),
                "--output_prefix",
                self.path(f"tokens/shards/{name}"),
            )
            return Task(
                ("python", _PREPROCESS, *paths, *flags),
                _token_files(prefix),
                (Input("dedup-filter", index),),
                f"{prefix}.json",
                workers,
                self.vocabulary,
            )

        merge = Task(
            ("python", _MERGE_DATASETS, "--input", self.path("tokens/shards"), "--output_prefix", self.path(_CORPUS)),
            _token_files(_CORPUS),
            (Input("tokenize"),),
            f"{_CORPUS}.json",
        )
        return [
            self.stage(
                "tokenize", [tokenize(i) for i in range(len(self.shards))], {"dedup-filter": "same"}, per_shard=True
            ),
            self.stage("merge-tokens", [merge], {"tokenize": "all"}),
        ]

    def weights(self) -> list[Stage]:
        """The base model to the layout that training loads, behind a gate."""
        m, t = self.recipe.model, self.recipe.training
        size = (f"--size={m.size}",) if m.size else ()
        convert = Task(
            ("python", _HF_TO_MEGATRON, m.family, *size, f"--out={self.path('megatron')}", f"--model-path={m.base}"),
            ("megatron/release", f"megatron/{_TRACKER}"),
            outside=[fingerprint(path) for path in sorted(m.base.iterdir()) if path.is_file()],
        )
        text = Input("prepare", 0, only=("arrow/shard-00000.arrow",))
        verify = Task(
            self._verify("megatron", str(m.base), "megatron/verify.json", str(self.recipe.export.tolerance)),
            ("megatron/verify.json",),
            (Input("convert"), text),
            "megatron/verify.json",
            self._device("verify"),
            self.vocabulary,
        )
        shard = Task(
            self._reshard("megatron", "sharded", t.tensor_parallel, t.pipeline_parallel, t.dtype),
            ("sharded/release", f"sharded/{_TRACKER}"),
            (Input("convert"), Input("verify")),
        )
        return [
            self.stage("convert", [convert], {}),
            self.stage("verify", [verify], {"convert": "all", "prepare": "all"}),
            self.stage("shard", [shard], {"convert": "all", "verify": "all"}),
        ]

    def train(self) -> Stage:
        """The training job."""
        outputs = [f"checkpoints/iter_{iteration:07d}" for iteration in self.recipe.exported_iterations]
        task = Task(
            ("python", _FINETUNE, *self._training_flags()),
            (*outputs, "checkpoints/metrics.jsonl"),
            (Input("merge-tokens"), Input("shard")),
            outside=self.vocabulary,
        )
        return self.stage(
            "train",
            [task],
            {"merge-tokens": "all", "shard": "all"},
            resumable=True,
            progress=f"checkpoints/{_TRACKER}",
            environment={"OMP_NUM_THREADS": str(self.recipe.training.threads)},
        )

    def export(self) -> list[Stage]:
        """Every exported iteration to a Hugging Face folder, verified and pushed."""
        push = self.recipe.push
        dtype = self.recipe.export.dtype or self.recipe.training.dtype
        names = [f"iter_{iteration:07d}" for iteration in self.recipe.exported_iterations]

        def merge(index: int, iteration: int) -> Task:
            name = names[index]
            argv = (*self._reshard("checkpoints", "merged", 1, 1, dtype), "--load_iters", str(iteration))
            return Task(argv, (f"merged/{name}",), (Input("train", 0, only=(f"checkpoints/{name}",)),))

        def export_hf(index: int, iteration: int) -> Task:
            argv = ("python", _MEGATRON_TO_HF, f"--input_dir={self.path('merged')}", "--load_iters", str(iteration))
            more = (f"--output_dir={self.path(f'hf/{names[index]}')}", "--vocab_file", str(self.recipe.tokenizer.file))
            return Task((*argv, *more), (f"hf/{names[index]}",), (Input("merge", index),), outside=self.vocabulary)

        def verify(index: int, iteration: int) -> Task:
            name, report = names[index], f"hf/reports/{names[index]}.json"
            exact = ("--tolerance", "0.1") if dtype != "fp32" else ("--max_tolerance", "1e-4")
            argv = (
                *self._verify("checkpoints", self.path(f"hf/{name}"), report, str(self.recipe.export.tolerance)),
                *exact,
                "--load_iters",
                str(iteration),
            )
            checkpoint = Input("train", 0, only=(f"checkpoints/{name}",))
            text = Input("prepare", 0, only=("arrow/shard-00000.arrow",))
            return Task(
                argv,
                (report,),
                (checkpoint, Input("export-hf", index), text),
                report,
                self._device("verify-export"),
                self.vocabulary,
            )

        def pushed(index: int, iteration: int) -> Task:
            name = names[index]
            argv = ("python", _PUSH, self.path(f"hf/{name}"), "--max_shard_size", push.max_shard_size)
            inputs = (Input("export-hf", index), Input("verify-export", index))
            if push.repository:
                revision = () if index == len(names) - 1 else ("--revision", name)
                return Task((*argv, "--hf_repo_name", push.repository, *revision), (), inputs)
            return Task((*argv, "--output_folder", self.path(f"pushed/{name}")), (f"pushed/{name}",), inputs)

        every = list(enumerate(self.recipe.exported_iterations))
        return [
            self.stage("merge", [merge(*one) for one in every], {"train": "all"}),
            self.stage("export-hf", [export_hf(*one) for one in every], {"merge": "same"}),
            self.stage(
                "verify-export",
                [verify(*one) for one in every],
                {"train": "all", "export-hf": "same", "prepare": "all"},
            ),
            self.stage("push", [pushed(*one) for one in every], {"export-hf": "same", "verify-export": "same"}),
        ]

    def _tokenizer_flags(self) -> tuple[str, ...]:
        t = self.recipe.tokenizer
        return ("--tokenizer_type", t.type, "--vocab_file", str(t.file))

    def _device(self, stage: str) -> tuple[str, ...]:
        return ("--huggingface_device", "cuda" if self.cluster.resources(stage).gpus_per_node else "cpu")

    def _verify(self, load: str, folder: str, report: str, tolerance: str) -> tuple[str, ...]:
        return (
            "python", _VERIFY, f"--model_name={self.recipe.model.family}", "--load", self.path(load),
            "--huggingface_cache", folder, "--input", self.path("arrow/shard-00000.arrow"), *self._tokenizer_flags(),
            "--seq_length", str(self.recipe.training.seq_length), "--iterations",
            str(self.recipe.export.verify_batches), "--tolerance", tolerance, "--report", self.path(report),
        )  # fmt: skip

    def _reshard(self, load: str, save: str, tensor: int, pipeline: int, dtype: str) -> tuple[str, ...]:
        return (
            "python", _CHECKPOINT_UTIL, "--target_tensor_parallel_size", str(tensor),
            "--target_pipeline_parallel_size", str(pipeline),
            "--load_dir", self.path(load), "--save_dir", self.path(save), "--model_type", self.recipe.model.family,
            "--true_vocab_size", str(self.vocab_size), *(() if dtype == "fp32" else (f"--{dtype}",)),
        )  # fmt: skip

    def _training_flags(self) -> list[str]:
        t = self.recipe.training
        named = t.model_dump(exclude={"dtype", "tensor_parallel", "pipeline_parallel", "recompute_granularity"})
        flags = [item for name, value in named.items() for item in (f"--{name}", str(value))]
        flags += [
            "--tensor_model_parallel_size",
            str(t.tensor_parallel),
            "--pipeline_model_parallel_size",
            str(t.pipeline_parallel),
        ]
        flags += [
            "--load",
            self.path("sharded"),
            "--save",
            self.path("checkpoints"),
            "--tensorboard_dir",
            self.path("checkpoints/tensorboard"),
        ]
        flags += ["--data_path", self.path(_CORPUS), "--model_name", self.recipe.model.family, *self._tokenizer_flags()]
        flags += ["--use_checkpoint_args", "--use_flash_attn", "--hidden_dropout", "0.0", "--attention_dropout", "0.0"]
        flags += [
            "--use_rms_norm",
            "--glu_activation",
            "swiglu",
            "--no_tie_embed_logits",
            "--no_new_tokens",
            "--no_bias_gelu_fusion",
        ]
        flags += ["--bf16"] if t.dtype == "bf16" else []
        flags += ["--sequence_parallel"] if t.tensor_parallel > 1 else []
        flags += ["--recompute_granularity", t.recompute_granularity] if t.recompute_granularity else []
        return flags


def _shard_task(
    argv: tuple[str, ...], folder: str, index: int, *suffixes: str, reads: str | None = None, outside: Any = None
) -> Task:
    """A per-shard task that writes FOLDER/shard-XXXXX with these suffixes and reads its own shard of a stage."""
    prefix = f"{folder}/shard-{index:05d}"
    inputs = (Input(reads, index),) if reads else ()
    return Task(
        argv, (*(prefix + suffix for suffix in suffixes), f"{prefix}.json"), inputs, f"{prefix}.json", outside=outside
    )


def _token_files(prefix: str) -> tuple[str, ...]:
    return (f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json")


def _base_vocab_size(base: Path) -> int:
    """The base model's vocabulary, from its config.json."""
    path = base / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["vocab_size"])
    except OSError:
        raise UserError(
            f"model.base: {base} is not a Hugging Face model folder: config.json is not there. "
            "Download the model and give its folder (for the demo's own model: make demo)."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no integer vocab_size in it ({error}); is this a causal language model?") from error


def _check_tokenizer(path: Path, vocab_size: int, base: Path) -> None:
    """Refuse a file that is no SentencePiece model, and one with more pieces than the base model has embeddings."""
    import sentencepiece

    try:
        pieces = int(sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size())
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"tokenizer.file: {path} is not a SentencePiece model ({error}). Give its tokenizer.model."
        ) from error
    if pieces > vocab_size:
        raise UserError(
            f"tokenizer.file: {path} has {pieces} pieces, but the base model {base} has {vocab_size} embeddings. "
            "Give the tokenizer that belongs to the model."
        )
