"""Writes README.md and loss.png of an exported model: what the model is, and how a run of the toolkit made it.

Three things are read from the run's folder: run.yaml (the recipe), markers/STAGE/*.json (the counts of each task) and
checkpoints/ (metrics.jsonl with the losses, and the hardware). Without a run the card describes the model alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_llm.data.manifest import MANY_SOURCES
from run_contract.errors import InputsMissing, UserError

CARD = "README.md"
CURVE = "loss.png"
DATA_CARDS = ("data-card.md", "croissant.json")
"""The files about the run's data, in the folder `card` of the run; a copy of each goes beside the model card."""
HARDWARE = "hardware.json"
"""File beside the metrics that records the hardware on which training ran."""
CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
"""The folder of a model in the Hub's cache: organisation and name."""
USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{revision})
model = AutoModelForCausalLM.from_pretrained("{name}"{revision})
```
"""


@dataclass(frozen=True)
class ModelFacts:
    """The known properties of the model itself."""

    name: str
    """Name of the model: ORG/NAME on the Hub, or the folder's name."""
    revision: str | None
    parameters: int
    dtype: str
    license: str
    """Identifier of the licence, in the Hub's spelling."""


@dataclass(frozen=True)
class RunRecords:
    """The records of a run, up to the exported iteration."""

    recipe: Mapping[str, Any]
    counts: Mapping[str, Sequence[Mapping[str, Any]]]
    """Stage -> the counts of its tasks."""
    metrics: Sequence[Mapping[str, Any]]
    iteration: int
    hardware: Mapping[str, Any]
    """Device and number of ranks of the training; empty for runs of versions that did not record them."""
    data_cards: Sequence[Path] = ()
    """The files that describe the data, if the recipe asks for them."""

    @property
    def license(self) -> str | None:
        """The licence that the recipe names; None if it names none."""
        return (self.recipe.get("push") or {}).get("license")

    def total(self, stage: str, name: str) -> int:
        """The sum of a count over the tasks of a stage."""
        return sum(int(one.get(name, 0)) for one in self.counts[stage])

    @property
    def seconds(self) -> float:
        """The duration of all iterations by the rates in the log, without evaluations, checkpoints and restarts."""
        settings = self.recipe["training"]
        tokens, total, last = settings["global_batch_size"] * settings["seq_length"], 0.0, 0
        for one in self.metrics:
            if rate := one.get("tokens_per_second"):
                total += (int(one["iteration"]) - last) * tokens / rate
                last = int(one["iteration"])
        return total

    def losses(self, name: str) -> list[tuple[int, float]]:
        """The (iteration, value) pairs of `lm_loss` or `validation_loss`."""
        return [(int(one["iteration"]), float(one[name])) for one in self.metrics if name in one]


def read_run(folder: Path, iteration: int | None) -> RunRecords:
    """Read a run's folder; `iteration` None means the last one.

    Raises InputsMissing or UserError, which name the file.
    """
    with _readable(folder / "run.yaml") as path:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))["recipe"]
        end, _ = int(recipe["training"]["train_iters"]), (recipe["model"]["base"], recipe["dedup"].items())
        last = end if iteration is None else iteration
    with _readable(folder / "checkpoints" / "metrics.jsonl") as path:
        metrics = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        metrics = [one for one in metrics if int(one["iteration"]) <= last]
    stages = ("prepare", "dedup-filter", "dedup-components", "merge-tokens")
    counts = {stage: _counts(folder / "markers" / stage) for stage in stages}
    cards = [folder / "card" / name for name in DATA_CARDS] if recipe.get("data_card") is not None else []
    return RunRecords(recipe, counts, metrics, last, _hardware(folder / "checkpoints" / HARDWARE), cards)


def _hardware(path: Path) -> Mapping[str, Any]:
    """The hardware that trained the model; empty if an older version trained it."""
    if not path.exists():
        return {}
    with _readable(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """Yield the path, and turn errors of reading the file into an error that names it."""
    try:
        yield path
    except FileNotFoundError as error:
        raise InputsMissing(f"{path} is missing; --run_dir is the folder of a run that was trained") from error
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not what a run writes: {error!r}; check --run_dir") from error


def _counts(folder: Path) -> list[Mapping[str, Any]]:
    """The counts of the tasks of a stage, from their done markers. Raises InputsMissing."""
    counts = []
    for marker in sorted(folder.glob("*.json")):
        with _readable(marker) as path:
            counts.append(json.loads(path.read_text(encoding="utf-8"))["counts"])
    if not counts:
        raise InputsMissing(f"{folder} holds no done marker; --run_dir is the folder of a run that was trained")
    return counts


def write(folder: Path, model: ModelFacts, run: RunRecords | None) -> None:
    """Write README.md into `folder` and, given a run, loss.png and copies of the files about its data.

    Raises InputsMissing if one of these is missing.
    """
    from huggingface_hub import ModelCard, ModelCardData  # its import takes a while

    head = ModelCardData(
        license=model.license, library_name="transformers", pipeline_tag="text-generation", **_head(run)
    )
    made = "continually pre-trained" if run is None else f"{_base(run)}, continually pre-trained"
    parts = [
        f"---\n{head.to_yaml()}\n---\n\n# {model.name}",
        f"A language model of {model.parameters:,} parameters ({model.dtype}): {made} with the SnakModel Toolkit "
        f"{toolkit_version()}.",
    ]
    if run:
        parts += [_data(run), _deduplication(run), _training(run)]
        draw(folder / CURVE, run)
        for path in run.data_cards:
            with _readable(path):
                shutil.copyfile(path, folder / path.name)
    revision = f', revision="{model.revision}"' if model.revision else ""
    parts.append(USE.format(name=model.name, revision=revision))
    ModelCard("\n\n".join(parts)).save(folder / CARD)


def toolkit_version() -> str:
    """The version of the toolkit that writes the card."""
    try:
        return importlib.metadata.version("snakmodel-toolkit")
    except importlib.metadata.PackageNotFoundError:  # only the engine's folder, not installed
        return "(version not known)"


def _head(run: RunRecords | None) -> dict[str, Any]:
    """The metadata for the Hub: languages, and the base model if the recipe or the Hub's cache names it."""
    if run is None:
        return {}
    push = run.recipe.get("push") or {}
    cached = CACHED.search(str(run.recipe["model"]["base"]))
    base = push.get("base_model") or (f"{cached[1]}/{cached[2]}" if cached else None)
    found = {"language": push.get("language"), "base_model": base}
    return {name: value for name, value in found.items() if value}


def _base(run: RunRecords) -> str:
    """The base model by the name of its folder only, since its path is private."""
    return f"{Path(run.recipe['model']['base']).name} ({run.recipe['model']['family']})"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(f"{c:,}" if isinstance(c, int) else str(c) for c in line) + " |" for line in lines
    )


def _data(run: RunRecords) -> str:
    raw: dict[str, Counter[str]] = {"documents": Counter(), "bytes": Counter()}
    kept: Counter[str] = Counter()
    for one in run.counts["prepare"]:
        for source, entry in one["sources"].items():
            for name, counter in raw.items():
                counter[source] += int(entry[name])
    for one in run.counts["dedup-filter"]:
        kept.update(one["sources"])
    tokens = {name: int(one["tokens"]) for name, one in run.counts["merge-tokens"][0].get("sources", {}).items()}
    rows = [
        (source, count, kept[source], raw["bytes"][source], tokens.get(source, 0))
        for source, count in raw["documents"].items()
        if not any(MANY_SOURCES in counts for counts in (raw["documents"], kept, tokens))
    ]
    total = ("all", raw["documents"].total(), kept.total(), raw["bytes"].total(), run.total("merge-tokens", "tokens"))
    more = (
        f"Where the text came from, and what each stage kept of it: [data card]({DATA_CARDS[0]})."
        if run.data_cards
        else ""
    )
    table = _table(("source", "documents", "after deduplication", "bytes", "tokens"), [*rows, total])
    return "\n\n".join(["## Data", table, *([more] if more else [])])


def _deduplication(run: RunRecords) -> str:
    dedup = run.recipe["dedup"]
    before, after = run.total("dedup-components", "documents"), run.total("dedup-filter", "documents")
    settings = ", ".join(f"{name} {value}" for name, value in _given(dedup).items() if name != "ranges")
    found = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in run.counts["dedup-components"][0].items()
                      if isinstance(n, int))  # fmt: skip
    share = (before - after) / before if before else 0.0
    return (
        f"## Deduplication\n\nMinHash near-deduplication removed {before - after:,} of {before:,} documents "
        f"({share:.1%}).\n\nSettings: {settings}.\n\nCounts: {found}."
    )


def _given(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that have a value. Of the paths in a list only the last part is shown, since they are private."""
    return {
        name: ", ".join(Path(one).name if "/" in str(one) else str(one) for one in value)
        if isinstance(value, list)
        else str(value)
        for name, value in settings.items()
        if value is not None and value != []
    }


def _training(run: RunRecords) -> str:
    settings = run.recipe["training"]
    seen = run.iteration * settings["global_batch_size"] * settings["seq_length"]
    parts = [f"## Training\n\n{run.iteration:,} of {settings['train_iters']:,} iterations, {seen:,} tokens seen."]
    for name, title in (("lm_loss", "Training loss"), ("validation_loss", "Validation loss")):
        if losses := run.losses(name):
            parts.append(f"{title}: {losses[0][1]:.3f} at first, {losses[-1][1]:.3f} at last.")
    if run.hardware:
        parts.append(f"Hardware: {run.hardware['ranks']} x {run.hardware['device']}, torch {run.hardware['torch']}.")
    if run.seconds:
        parts.append(f"Time: {run.seconds / 3600:,.2f} hours of training iterations.")
    parts.append(f"![loss curve]({CURVE})")
    parts.append(_table(("hyper-parameter", "value"), list(_given(settings).items())))
    return "\n\n".join(parts)


def draw(path: Path, run: RunRecords) -> None:
    """Draw the loss curve as PNG; equal losses give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (("lm_loss", "training", "-"), ("validation_loss", "validation", "o-")):
        if losses := run.losses(name):
            axes.plot(*zip(*losses, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
