"""Our training checkpoints: every rank's slices -> iter_XXXXXXX/*.distcp + state.json -> rename -> tracker file.

Saving: all ranks write into a temporary folder (torch.distributed.checkpoint) and digest what they wrote; rank 0 adds
state.json, renames the folder and replaces the tracker last; saving.py puts these steps in order. Loading takes the
newest folder that verifies, into any number of ranks. `.metadata` is a pickle: it is read through an allow-list, so a
forged one cannot run code.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from megatron_llm.model.canonical_state import LazyState
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import shapes
from megatron_llm.optim.adamw import MOMENTS
from run_contract.errors import UserError
from run_contract.publish import checksum, fsync_all, put, remove, write_json, write_text

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = ".metadata"
STATE = "state.json"
ITERATION = re.compile(r"iter_(\d{7,})")
TEMPORARY = re.compile(r"\.iter_\d{7,}\.(tmp|old)-.*")
CHECKSUM_THREADS = 8
SLICE_OVERHEAD = 2048
"""Bytes around the numbers of one tensor's slice of one rank."""
ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
}
"""Everything that a `.metadata` of ours names."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Nothing: torch would note the temporary path and a random number, and equal runs would differ in bytes."""
        return StorageMeta()


class _CopyPlanner(DefaultSavePlanner):
    """Writes copies instead of the tensors, which tell only shapes and places."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """This rank's part of a tensor; it has only one."""
        return self.copies[index.fqn]


class _Reader(FileSystemReader):
    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """The allow-listed `.metadata`, of tensors in this folder only; raises UserError."""
        path = Path(self.path) / METADATA
        try:
            metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # a forged pickle can raise anything
            raise UserError(f"{path} is not a training checkpoint of this engine: {error}") from error
        entries = metadata.state_dict_metadata.values()
        paths = {str(info.relative_path) for info in metadata.storage_data.values()}
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries) or any("/" in name for name in paths):
            raise UserError(f"{path} names something other than tensors in its own folder")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        assert isinstance(metadata, Metadata)
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse: torch would unpickle it, and our checkpoints hold tensors only."""
        raise UserError(f"the checkpoint stores {read_item.storage_index.fqn} as bytes; only tensors are read")


def iteration_folder(save_dir: Path, iteration: int) -> Path:
    """save_dir/iter_0000500."""
    return save_dir / f"iter_{iteration:07d}"


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint folder was written by this engine's training (not a Megatron layout)."""
    return (folder / METADATA).is_file()


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint; raises UserError."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return {**state, "files": {name: (int(size), str(digest)) for name, (size, digest) in state["files"].items()}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / STATE} cannot be read: {error!r}") from error


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files (sizes first, then checksums), or None."""
    try:
        files = read_state(folder)["files"]
    except UserError as error:
        return str(error)
    for name, (size, _) in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes, state.json says {size}"
    with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
        digests = pool.map(lambda name: checksum(folder / name), files)
        wrong = [
            name for digest, (name, (_, expected)) in zip(digests, files.items(), strict=True) if digest != expected
        ]
    return f"{wrong[0]} does not match the checksum in state.json" if wrong else None


def latest_valid(save_dir: Path) -> Path | None:
    """The newest iter_* that verifies, or None; prints which newer ones are skipped and why."""
    found = {int(match[1]): path for path in save_dir.glob("iter_*") if (match := ITERATION.fullmatch(path.name))}
    for _, folder in sorted(found.items(), reverse=True):
        if (reason := problem(folder)) is None:
            return folder
        print(f"checkpoint {folder} is skipped: {reason}", flush=True)
    return None


def remove_stale(save_dir: Path) -> None:
    """Delete what killed attempts left half-written; only the attempt that holds the claim may call this."""
    for path in save_dir.glob(".iter_*"):
        if TEMPORARY.fullmatch(path.name):
            remove(path)


def stored(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: `model.NAME` and, with an optimizer, `optimizer.MOMENT.NAME`; these share the
    run's memory."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    if optimizer:
        for moment in MOMENTS:
            tensors |= {f"optimizer.{moment}.{name}": optimizer.state[p][moment] for name, p in parameters.items()}
    return tensors


def needed_bytes(config: ModelConfig, ranks: int, *, with_optimizer: bool = True) -> int:
    """Upper bound of a checkpoint's size on disk: fp32 weights and moments, and what surrounds each slice."""
    numbers = [shape.numel() for shape in shapes(config).values()]
    return (1 + with_optimizer * len(MOMENTS)) * (4 * sum(numbers) + SLICE_OVERHEAD * len(numbers) * ranks)


def write(
    folder: Path, tensors: Mapping[str, Tensor], copies: Mapping[str, Tensor] | None, group: dist.ProcessGroup
) -> None:
    """Write this rank's slices, of `copies` where they are given, and on rank 0 `.metadata`; fsynced. Collective."""
    planner = DefaultSavePlanner() if copies is None else _CopyPlanner(copies)
    save_tensors(dict(tensors), storage_writer=_Writer(folder), planner=planner, process_group=group)


def digests(folder: Path, rank: int) -> dict[str, tuple[int, str]]:
    """Size and checksum of the files that a rank wrote, read back."""
    own = sorted(folder.glob(f"__{rank}_*")) + ([folder / METADATA] if rank == 0 else [])
    return {path.name: (path.stat().st_size, checksum(path)) for path in own}


def complete(folder: Path, state: dict[str, Any]) -> None:
    """Add state.json and flush all to disk (rank 0). Raises UserError when files of other ranks are not to be seen."""
    for name, (size, _) in state["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise UserError(
                f"{folder / name}, which another rank wrote, is not seen whole by rank 0; "
                "--save must be a folder that all nodes share"
            )
    write_json(folder / STATE, state)
    fsync_all(folder)


def publish(temporary: Path, iteration: int, *, keep: bool) -> None:
    """Give a complete folder its name, or drop it where one of that name is to be kept; then replace the tracker.

    Raises Superseded when the claim is another attempt's; nothing is published then.
    """
    final = iteration_folder(temporary.parent, iteration)
    if not keep:
        put(temporary, final)
    write_text(final.parent / TRACKER, f"{iteration}\n")


@contextmanager
def _readable(folder: Path) -> Iterator[_Reader]:
    """A reader of the folder; what torch raises about its content becomes a UserError."""
    try:
        yield _Reader(folder)
    except CheckpointException as error:
        raise UserError(f"{folder} cannot be loaded: {error}") from error


def load(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
    """Fill a sharded model and its optimizer's moments in place; any number and layout of ranks. Collective.

    Without an optimizer only the model.
    """
    with _readable(folder) as reader:
        load_tensors(stored(parameters, optimizer), storage_reader=reader, planner=_Planner())


def load_model_state(folder: Path) -> tuple[ModelConfig, Mapping[str, Tensor], dict[str, Any]]:
    """Geometry, whole weights (CPU, by canonical name, read when asked for) and state.json; needs no process group."""
    state = read_state(folder)
    with _readable(folder) as reader:
        stored = reader.read_metadata().state_dict_metadata
    sizes = {
        name.removeprefix("model."): entry
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith("model.")
    }

    def read(name: str) -> Tensor:
        tensor = torch.empty(sizes[name].size, dtype=sizes[name].properties.dtype)
        with _readable(folder) as reader, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
            load_tensors({f"model.{name}": tensor}, storage_reader=reader, planner=_Planner(), no_dist=True)
        return tensor

    return ModelConfig(**state["model_config"]), LazyState(sizes, read), state
