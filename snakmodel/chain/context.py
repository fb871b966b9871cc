"""What the declarations of all stages share: the settings, the run's paths, and the spelling of flags."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run_contract.errors import UserError
from snakmodel.chain.against import earlier_runs
from snakmodel.chain.inputs import Inputs
from snakmodel.chain.stage import Input, Stage, Task
from snakmodel.config.load import VARIABLE, Config, not_set
from snakmodel.config.recipe import Tokenizer
from snakmodel.prepare.input_files import FilePart
from snakmodel.run.paths import RunPaths

if TYPE_CHECKING:
    from snakmodel.dedup.earlier_runs import EarlierRun
    from snakmodel.prepare.kept_columns import KeptColumn  # imports pyarrow

CORPUS = "tokens/corpus_text_document"
INDEX = "index"
TRACKER = "latest_checkpointed_iteration.txt"
CHECKPOINT_UTIL = "Megatron-LLM/tools/checkpoint_util.py"


class Context:
    """The settings, paths, shards and input files that the stages share while they are declared."""

    def __init__(
        self,
        config: Config,
        root: Path,
        shards: Sequence[Sequence[FilePart]],
        inputs: Inputs,
        kept: Sequence[KeptColumn] = (),
    ) -> None:
        self.recipe = config.recipe
        self.cluster = config.cluster
        self.root = root
        self.shards_file = RunPaths(root).shards
        self.shards = shards
        self.inputs = inputs
        self.kept = kept
        self.documents = "prepare", "arrow"
        """The stage that made the documents as they are before deduplication, and the folder of its shards."""
        self.final = "dedup-filter", "dedup/kept"
        """The stage that made the documents as they are tokenised, and the folder of its shards."""
        self.passes: list[tuple[str, str]] = []
        """The stages between `prepare` and deduplication, and the folders of their shards."""

    @cached_property
    def _base(self) -> dict[str, Any]:
        """The base model's config.json. Raises UserError if the base model is not set or its config.json is unfit."""
        check_set("model.base", self.recipe.model.base)
        return _base_config(self.recipe.model.base)

    @cached_property
    def vocab_size(self) -> int:
        """The number of embeddings of the base model. Raises UserError if the tokenizer has more pieces than that."""
        size, pieces = int(self._base["vocab_size"]), _pieces(self.recipe.tokenizer)
        if pieces > size:
            raise UserError(
                f"tokenizer.file: {self.recipe.tokenizer.file} has {pieces} pieces, but the base model "
                f"{self.recipe.model.base} has {size} embeddings. Give the tokenizer that belongs to the model."
            )
        return size

    def check_base(self) -> None:
        """Raise UserError unless the base model exists and the tokenizer fits it."""
        _ = self.vocabulary, self.vocab_size

    @cached_property
    def tied(self) -> bool:
        """Whether the base model uses its embedding matrix as its output layer too."""
        return bool(self._base.get("tie_word_embeddings", self.recipe.model.family == "falcon"))

    @cached_property
    def vocabulary(self) -> list[Any]:
        """What stands for the tokenizer in the keys of tasks. Raises UserError if there is no usable tokenizer."""
        check_set("tokenizer.file", self.recipe.tokenizer.file)
        if not self.recipe.tokenizer.file.is_file():
            raise UserError(
                f"tokenizer.file: there is no file {self.recipe.tokenizer.file}. Give the tokenizer.model or the "
                "tokenizer.json of the base model."
            )
        found = [one for path in _tokenizer_files(self.recipe.tokenizer) for one in self.inputs.whole(path)]
        _pieces(self.recipe.tokenizer)
        return found

    @cached_property
    def earlier_runs(self) -> list[EarlierRun]:
        """The runs in `dedup.against`. Raises UserError if one cannot be used; see chain/against.py."""
        return earlier_runs(self.recipe.dedup, self.root)

    def path(self, name: str) -> str:
        """The absolute path of a file or folder of the run."""
        return f"{self.root}/{name}"

    def stage(self, name: str, tasks: Sequence[Task], **more: Any) -> Stage:
        """A stage with its resources from cluster.yaml."""
        resources = self.cluster.resources(name)
        if more.get("resumable"):
            self.cluster.check_time_limit(name)
        threads = {"OMP_NUM_THREADS": str(resources.cpus), **more.pop("environment", {})}
        return Stage(name, tuple(tasks), resources, environment=threads, **more)

    def tokenizer_flags(self) -> tuple[str, ...]:
        """The engine's flags that name the tokenizer."""
        t = self.recipe.tokenizer
        return flags(tokenizer_type=t.type, vocab_file=t.file)


def flags(**values: object) -> tuple[str, ...]:
    """Keyword arguments as `--name value` words; True gives the flag alone, and False and None are left out."""
    words: list[str] = []
    for name, value in values.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return tuple(words)


def shard_task(
    argv: tuple[str, ...], prefix: str, *suffixes: str, inputs: tuple[Input, ...] = (), outside: Any = None
) -> Task:
    """A task that writes one file PREFIX + suffix for each of the suffixes, and its counts to PREFIX.json."""
    counts = f"{prefix}.json"
    return Task(argv, (*(prefix + suffix for suffix in suffixes), counts), inputs, counts, outside=outside)


def token_files(prefix: str, *, columns: bool = False) -> tuple[str, ...]:
    """The files in which the engine stores a tokenised dataset, and the columns of its documents if they are kept."""
    return (f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json", *([f"{prefix}.columns.arrow"] if columns else []))


def _base_config(base: Path) -> dict[str, Any]:
    """The base model's config.json. Raises UserError if it does not exist or holds no integer vocab_size."""
    path = base / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        int(config["vocab_size"])
    except OSError:
        raise UserError(
            f"model.base: {base} is not a Hugging Face model folder: config.json is not there. "
            "Download the model and give its folder (for the demo's own model: make demo)."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no integer vocab_size ({error}). Give the folder of a causal language model as model.base."
        ) from error
    return config


def _tokenizer_files(tokenizer: Tokenizer) -> list[Path]:
    """The files that decide which ids a text becomes.

    A tokenizer.json does not name the end-of-document token itself; the tokenizer_config.json beside it does.
    """
    beside = tokenizer.file.with_name("tokenizer_config.json")
    return [tokenizer.file, beside] if tokenizer.type == "HuggingFaceTokenizer" else [tokenizer.file]


def check_set(key: str, path: Path) -> None:
    """Raise UserError if a path still holds a variable that the environment lacks."""
    if unset := VARIABLE.search(str(path)):
        raise UserError(f"{key}: {not_set(unset[1])}")


def _pieces(tokenizer: Tokenizer) -> int:
    """The number of pieces of the tokenizer. Raises UserError if the file is not of the type that the recipe names."""
    path = tokenizer.file
    return _json_pieces(path) if tokenizer.type == "HuggingFaceTokenizer" else _model_pieces(path)


def _model_pieces(path: Path) -> int:
    import sentencepiece

    try:
        return int(sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size())
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"tokenizer.file: {path} is not a SentencePiece model ({error}). Give its tokenizer.model, or say "
            "`type: HuggingFaceTokenizer` for a tokenizer.json."
        ) from error


def _json_pieces(path: Path) -> int:
    import tokenizers

    try:
        return max(tokenizers.Tokenizer.from_file(str(path)).get_vocab().values()) + 1
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(
            f"tokenizer.file: {path} is not a Hugging Face tokenizer.json ({error}). Give that file, or say "
            "`type: SentencePieceTokenizer` for a tokenizer.model."
        ) from error
