"""Training samples in exactly Megatron's order: prefixes -> split -> documents shuffled -> samples shuffled -> tokens.

`plan` works out what the train, valid and test splits read. `open_split` opens one of them as a map-style dataset, from
an index on disk (tools/build_index.py) or an index built in memory. Sample k depends only on the data, the split, the
seed, the sequence length and the number of samples asked for. It does not depend on the number of ranks or on the
samples consumed before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_llm.data import sample_order, sample_order_files
from megatron_llm.data.indexed_dataset import IndexedDataset
from megatron_llm.data.manifest import beside
from megatron_llm.data.sample_order import Order, Routes, SampleIndex
from run_contract.errors import UserError

SPLITS = ("train", "valid", "test")


class Samples(Protocol):
    """The interface of a dataset for training: `samples[k]` are the seq_length + 1 int64 tokens of global sample k."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class DataPaths:
    """The data of train, valid and test: each is one prefix, or `weight prefix weight prefix …`."""

    train: Sequence[str]
    valid: Sequence[str]
    test: Sequence[str]
    split: str | None
    """Proportions of documents, such as `969,30,1`, if all three share their data; None if each takes all of its
    own."""

    @classmethod
    def of(
        cls,
        data_path: Sequence[str] | None,
        separate: tuple[Sequence[str] | None, Sequence[str] | None, Sequence[str] | None],
        split: str,
    ) -> DataPaths:
        """Build the paths from --data_path, or from --train_data_path, --valid_data_path and --test_data_path.

        Raises UserError.
        """
        train, valid, test = separate
        if bool(data_path) == bool(train) or (data_path and (valid or test)):
            raise UserError(
                "give either --data_path, which --split divides, or --train_data_path and, as needed, "
                "--valid_data_path and --test_data_path, which are read whole"
            )
        if data_path:
            return cls(data_path, data_path, data_path, split)
        return cls(train or (), valid or (), test or (), None)

    def prefixes(self) -> list[Path]:
        """The prefixes of all datasets, each once, in the order of the flags."""
        named = [prefix for path in (self.train, self.valid, self.test) if path for prefix in parse_data_path(path)[1]]
        return list(dict.fromkeys(named))

    def index_folder(self) -> Path:
        """The default folder of the sample indices: PREFIX.index, beside the first dataset."""
        return beside(self.prefixes()[0], ".index")

    def fingerprint(self) -> str:
        """A digest that identifies the data without reading the tokens: weights, .idx headers and sizes, in order."""
        paths = [self.train] if self.split is not None else [self.train, self.valid, self.test]
        parts: list[str] = []
        for number, path in enumerate(paths):
            parts += [SPLITS[number]] if number else []
            for weight, prefix in zip(*parse_data_path(path), strict=True) if path else ():
                parts.append(f"{weight!r} {IndexedDataset(prefix).fingerprint()}")
        return xxhash.xxh3_128("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class SplitPlan:
    """The documents that one split reads, and their order."""

    split: str
    datasets: Sequence[IndexedDataset]
    orders: Sequence[Order]
    weights: Sequence[float] | None
    """Weights of the datasets of a blend; None for a single dataset."""

    def description(self) -> dict[str, Any]:
        """All values that the index depends on, as JSON values."""
        parts = [
            {"data": dataset.fingerprint(), **asdict(order)}
            for dataset, order in zip(self.datasets, self.orders, strict=True)
        ]
        return {"weights": self.weights and list(self.weights), "datasets": parts}

    def samples(self) -> int:
        """The number of samples of the split."""
        return sum(order.samples for order in self.orders)

    def bytes(self) -> int:
        """Size of the index arrays in bytes.

        Building them takes little more memory: 4 bytes per document where there are several epochs.
        """
        return sum(order.bytes() for order in self.orders) + (10 * self.samples() if self.weights else 0)

    def build(self) -> dict[str, NDArray[Any]]:
        """Build the index arrays, by the names that they have on disk."""
        arrays: dict[str, NDArray[Any]] = {}
        for number, (dataset, order) in enumerate(zip(self.datasets, self.orders, strict=True)):
            built = sample_order.build(dataset.sizes, order)
            arrays |= {f"{number}.{name}": array for name, array in built._asdict().items()}
        if self.weights:
            arrays |= sample_order.build_routes(self.weights, self.samples())._asdict()
        return arrays


def plan(paths: DataPaths, seed: int, seq_length: int, samples: tuple[int, int, int]) -> list[SplitPlan | None]:
    """The plans of train, valid and test for at least `samples` samples each; None where none are asked for.

    Raises UserError for an invalid data path or split, or one whose documents do not fill one sample.
    """
    opened = {prefix: IndexedDataset(prefix) for prefix in paths.prefixes()}
    return [
        plan_split(paths, opened, number, wanted, seed, seq_length) if wanted else None
        for number, wanted in enumerate(samples)
    ]


def plan_split(
    paths: DataPaths, opened: Mapping[Path, IndexedDataset], number: int, samples: int, seed: int, seq_length: int
) -> SplitPlan:
    """The plan of train (0), valid (1) or test (2) over the opened datasets. Raises UserError."""
    name, path = SPLITS[number], (paths.train, paths.valid, paths.test)[number]
    if not path:
        raise UserError(
            f"{samples} samples of {name} are asked for, but {name} has no data: give --{name}_data_path, or "
            "--eval_iters 0"
        )
    weights, prefixes = parse_data_path(path)
    datasets, orders, blend = [opened[prefix] for prefix in prefixes], [], len(path) > 1
    for dataset, weight in zip(datasets, weights, strict=True):
        first, last = 0, len(dataset)
        if paths.split is not None:
            first, last = split_boundaries(paths.split, last)[number : number + 2]
        _check_tokens(dataset, first, last, name, paths.split, seq_length)
        wanted = int(np.ceil(samples * weight * 1.005)) if blend else samples
        orders.append(Order.of(dataset.sizes, first, last, wanted, seq_length, seed))
    return SplitPlan(name, datasets, orders, weights if blend else None)


def find_index(plan: SplitPlan, folder: Path) -> Path | None:
    """The path of the manifest of a split's index in a folder, verified; None when there is no such index.

    Raises UserError when the index is damaged.
    """
    manifest = sample_order_files.manifest_path(folder, plan.split, plan.description())
    if not manifest.exists():
        return None
    sample_order_files.verify(manifest)
    return manifest


def open_split(plan: SplitPlan, manifest: Path | None) -> Samples:
    """Open the samples of a split, in the order of an index on disk, or of one that is built now."""
    arrays = sample_order_files.read(manifest) if manifest else plan.build()
    parts = [
        GPTDataset(dataset, SampleIndex(*(arrays[f"{number}.{name}"] for name in SampleIndex._fields)))
        for number, dataset in enumerate(plan.datasets)
    ]
    if plan.weights is None:
        return parts[0]
    return Blend(parts, Routes(*(arrays[name] for name in Routes._fields)))


def parse_data_path(data_path: Sequence[str]) -> tuple[list[float], list[Path]]:
    """The normalised weights and the prefixes of --data_path. Raises UserError."""
    if len(data_path) == 1:
        return [1.0], [Path(data_path[0])]
    try:
        weights = [float(weight) for weight in data_path[0::2]]
    except ValueError:
        weights = []
    if len(data_path) % 2 or not weights or not all(0 < weight < float("inf") for weight in weights):
        raise UserError(
            f"--data_path {' '.join(data_path)}: give one prefix, or pairs `weight prefix weight prefix …` "
            "in which every weight is a number above 0"
        )
    total = reduce(add, weights)  # sum() rounds differently from Python 3.12 on, and the order of samples depends on it
    return [weight / total for weight in weights], [Path(prefix) for prefix in data_path[1::2]]


def split_boundaries(split: str, documents: int) -> list[int]:
    """The four document numbers that bound train, valid and test, from proportions such as `969,30,1` or `9/1`.

    Raises UserError.
    """
    try:
        shares = [float(share) for share in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise UserError(f"--split {split}: give one to three proportions of the documents, such as 969,30,1")
    total = reduce(add, shares)
    boundaries = [0]
    for share in [*shares, 0.0, 0.0][:3]:
        boundaries.append(boundaries[-1] + round(share / total * documents))
    overshoot = boundaries[-1] - documents
    return [0, *(max(0, boundary - overshoot) for boundary in boundaries[1:])]


def _check_tokens(part: IndexedDataset, first: int, last: int, name: str, split: str | None, seq_length: int) -> None:
    """Raise UserError unless one pass over the split's documents fills at least one sample."""
    tokens = int(part.sizes[first:last].sum(dtype=np.int64))
    if tokens <= seq_length:
        what = f"--{name}_data_path has" if split is None else f"--split {split} gives {name}"
        raise UserError(
            f"{part.prefix}: {what} {last - first} of {len(part)} documents with {tokens} tokens in all, but one "
            f"sample needs {seq_length + 1}; give it a larger share in --split, use more data or a smaller "
            "--seq_length, or ask for none of its samples (--eval_iters 0)"
        )


class GPTDataset:
    """The samples of one dataset, in the order of its index."""

    def __init__(self, dataset: IndexedDataset, index: SampleIndex) -> None:
        self.dataset = dataset
        self.doc_idx, self.sample_idx, self.shuffle_idx = index

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    def __getitem__(self, k: int) -> NDArray[np.int64]:
        """The seq_length + 1 tokens of sample k, int64."""
        row = int(self.shuffle_idx[k])
        (first, start), (last, end) = self.sample_idx[row].tolist(), self.sample_idx[row + 1].tolist()
        pieces = []
        for position in range(first, last + 1):
            offset = start if position == first else 0
            length = end + 1 - offset if position == last else None
            pieces.append(self.dataset.get(int(self.doc_idx[position]), offset, length))
        return np.concatenate(pieces).astype(np.int64)


class Blend:
    """The samples of a blend of several datasets; a route says from which dataset each one comes."""

    def __init__(self, datasets: Sequence[Samples], routes: Routes) -> None:
        self.datasets = datasets
        self.dataset_index, self.dataset_sample_index = routes

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, k: int) -> NDArray[np.int64]:
        """The seq_length + 1 tokens of sample k, int64. Raises IndexError when its dataset has no more samples."""
        return self.datasets[int(self.dataset_index[k])][int(self.dataset_sample_index[k])]
