"""Forecasts, as an upper estimate, the disk that a run will need: from its input, the base model and the recipe.

With B bytes of raw text in the recipe's sources (compressed files count three times their size), D documents and N
lines (B divided by the mean length of a document and of a line in the first megabyte of the largest file), P
parameters, W bytes per weight (2 for bf16 and fp16, 4 for fp32) and E exported iterations, the parts of a run take:

    arrow       1.1 B              one copy of the text, with `source` and offsets
    filter      1.1 B c            c further copies: one for `filter` (a rejected document lies in `filter/rejected/`
                                   instead of `filter/`), one for each command in `data.custom`, and one for `filtered`
    lines       24 N               the counts of the N lines of the text; nothing without `dedup.lines`
    dedup       1.1 B + 24 D b     the kept shards (at worst nothing is removed), and 24 bytes per document and band;
                                   b is the number of bands
    text        4 B                jsonl and txt, each per shard and joined; nothing with `text: {export: false}`
    tokens      2 t B / 3          tokens per shard and merged, at 3 bytes of text per token;
                                   t is 2 bytes per id with fewer than 65,500 pieces, and 4 otherwise
    index       p (4 D + 7 B / L)  the order of the training samples, for p passes over the corpus (at 5 bytes of text
                                   per token) and L tokens per sample
    weights     2 P W              the converted and the sharded weights
    checkpoints 12 P (n + 1)       fp32 weights and two fp32 moments, in the n checkpoints that are kept and one that is
                                   being written
    exports     3 E P W            merged, in Hugging Face format, and pushed to a folder (2 E P W if pushed to the Hub)

P is the size of the base model's weight files, divided by the bytes per weight that its config.json names.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from snakmodel.chain.filter_stages import has_final_filter
from snakmodel.chain.plan import RunPlan
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.dedup.minhash.hasher import BandHasher
from snakmodel.dedup.minhash.parameters import Parameters
from snakmodel.prepare.input_files import input_files

_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}
_SMALL_VOCABULARY = 65_500


@dataclass(frozen=True)
class Forecast:
    """The number of bytes that each part of a run will take at its end."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """The bytes of all parts together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {decimal(size)}" for name, size in self.parts.items())


def forecast(config: Config, files: dict[Path, int], parameters: int, vocabulary: int, bands: int) -> Forecast:
    """Apply the formula in the module's docstring.

    `files` maps the raw text files that the run reads to their bytes of text; `parameters` is the number of parameters
    of the base model, `vocabulary` its number of embeddings, and `bands` the number of bands of a MinHash signature.
    """
    recipe = config.recipe
    training = recipe.training
    text = sum(files.values())
    documents = _documents(recipe, files, text)
    width = _WIDTHS[training.dtype]
    passes = 1 + 5 * training.train_iters * training.global_batch_size * training.seq_length // max(1, text)
    saves = _kept(recipe)
    exported = len(recipe.exported_iterations) * parameters * _WIDTHS[recipe.export.dtype or training.dtype]
    parts = {
        "arrow": text * 11 // 10,
        "filter": _copies(recipe) * (text * 11 // 10),
        "lines": 24 * _lines(files, text) if recipe.dedup.lines else 0,
        "dedup": text * 11 // 10 + 24 * documents * bands,
        "text": 4 * text if recipe.text.export else 0,
        "tokens": 2 * text * (2 if vocabulary < _SMALL_VOCABULARY else 4) // 3,
        "index": passes * (4 * documents + 7 * text // training.seq_length),
        "weights": 2 * parameters * width,
        "checkpoints": 12 * parameters * (saves + 1),
        "exports": exported * (2 if recipe.push.repository else 3),
    }
    return Forecast(parts)


def forecast_plan(plan: RunPlan) -> Forecast:
    """The forecast for a planned run."""
    recipe, dedup = plan.config.recipe, plan.config.recipe.dedup
    files = {one.path: one.text_bytes() for one in input_files(recipe.data.path, recipe.data.shares)}
    parameters = Parameters(dedup.num_perm, dedup.threshold, b=dedup.b, r=dedup.r)
    base = json.loads((recipe.model.base / "config.json").read_text(encoding="utf-8"))
    bands = BandHasher(parameters).bands
    return forecast(plan.config, files, _parameters(recipe.model.base, base), int(base["vocab_size"]), bands)


def used(root: Path) -> int:
    """The number of bytes that a run's folder takes already."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def free(folder: Path) -> int:
    """The number of bytes that this user may still write to a folder's file system. A quota does not show here."""
    return shutil.disk_usage(folder).free


def _kept(recipe: Recipe) -> int:
    """The number of checkpoints that are kept: all saved ones, or those that keep_last and keep_every leave."""
    t = recipe.training
    saved = {*range(t.save_interval, t.train_iters, t.save_interval), t.train_iters}
    if t.keep_last is None:
        return len(saved)
    stay = {iteration for iteration in saved if t.keep_every and iteration % t.keep_every == 0}
    return len(stay | set(sorted(saved)[-t.keep_last :]))


def _copies(recipe: Recipe) -> int:
    """The number of stages, besides `prepare` and `dedup-filter`, that write all documents."""
    return recipe.filter.any + len(recipe.data.custom) + has_final_filter(recipe)


def _documents(recipe: Recipe, files: dict[Path, int], text: int) -> int:
    if recipe.data.document == "file":
        return len(files)
    return _number_of(b"\n" if recipe.data.document == "line" else b"\n\n", files=files, text=text)


def _lines(files: dict[Path, int], text: int) -> int:
    """The number of lines; in JSON, a line of a document ends with a backslash and the letter n."""
    return _number_of(b"\n", b"\\n", files=files, text=text)


def _number_of(*ends: bytes, files: dict[Path, int], text: int) -> int:
    """How often any of `ends` is in the whole text, if it is as often as in the beginning of the largest file."""
    if not files:
        return 0
    with max(files, key=lambda path: files[path]).open("rb") as file:
        sample = file.read(10**6)
    return text * max(1, sum(sample.count(end) for end in ends)) // max(1, len(sample))


def _parameters(base: Path, config: dict[str, object]) -> int:
    weights = list(base.glob("*.safetensors")) or list(base.glob("pytorch_model*.bin"))
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return sum(path.stat().st_size for path in weights) // _WIDTHS.get(named, 4)
