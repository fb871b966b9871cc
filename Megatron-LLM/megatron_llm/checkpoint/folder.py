"""A training checkpoint's folder: every rank's slices -> iter_XXXXXXX/*.distcp + state.json -> rename -> tracker file.

To save, all ranks write into a temporary folder (torch.distributed.checkpoint) and compute checksums of what they
wrote. Rank 0 then adds state.json, renames the folder and replaces the tracker file last. checkpoint/saver.py puts
these steps in order. To load, the newest folder that verifies is taken, with any number of ranks. `.metadata` is a
pickle; it is read through an allow-list, so that a forged file cannot run code.
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
"""Upper bound, in bytes, of what a file stores besides the numbers of one rank's slice of one tensor."""
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
"""All names that a `.metadata` file written by this engine refers to."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Return empty metadata. torch would store the temporary path and a random number, so that the files of equal
        runs would differ."""
        return StorageMeta()


class _CopyPlanner(DefaultSavePlanner):
    """A save planner that writes copies instead of the tensors, which only provide shapes and offsets."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The copy of this rank's part of a tensor; a rank has only one part of each."""
        return self.copies[index.fqn]


class _Reader(FileSystemReader):
    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Read `.metadata` through the allow-list, and check that it names only tensors in this folder.

        Raises UserError.
        """
        path = Path(self.path) / METADATA
        try:
            metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # a forged pickle can raise anything
            raise UserError(
                f"{path} does not describe a training checkpoint of this engine: {error}; load another checkpoint"
            ) from error
        entries = metadata.state_dict_metadata.values()
        paths = {str(info.relative_path) for info in metadata.storage_data.values()}
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries) or any("/" in name for name in paths):
            raise UserError(
                f"{path} names something other than tensors in its own folder, and only such tensors are loaded; load "
                "another checkpoint"
            )
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        assert isinstance(metadata, Metadata)
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse to load bytes, which torch would unpickle: this engine's checkpoints contain tensors only.

        Raises UserError.
        """
        raise UserError(
            f"the checkpoint stores {read_item.storage_index.fqn} as bytes, and only tensors are read; load a "
            "checkpoint that this engine wrote"
        )


def iteration_folder(save_dir: Path, iteration: int) -> Path:
    """The folder of an iteration's checkpoint, such as save_dir/iter_0000500."""
    return save_dir / f"iter_{iteration:07d}"


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint folder was written by this engine's training (not a Megatron layout)."""
    return (folder / METADATA).is_file()


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint. Raises UserError."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return {**state, "files": {name: (int(size), str(digest)) for name, (size, digest) in state["files"].items()}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / STATE} cannot be read: {error!r}") from error


def problem(folder: Path) -> str | None:
    """The first problem of a checkpoint's files (sizes are checked first, then checksums), or None."""
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
    """The newest checkpoint folder that verifies, or None; prints which newer ones are skipped, and why."""
    found = {int(match[1]): path for path in save_dir.glob("iter_*") if (match := ITERATION.fullmatch(path.name))}
    for _, folder in sorted(found.items(), reverse=True):
        if (reason := problem(folder)) is None:
            return folder
        print(f"checkpoint {folder} is skipped: {reason}", flush=True)
    return None


def remove_stale(save_dir: Path) -> None:
    """Delete the half-written folders of killed attempts; only the attempt that holds the claim may call this."""
    for path in save_dir.glob(".iter_*"):
        if TEMPORARY.fullmatch(path.name):
            remove(path)


def stored(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: `model.NAME` and, with an optimizer, `optimizer.MOMENT.NAME`.

    They share memory with the running model and optimizer.
    """
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    if optimizer:
        for moment in MOMENTS:
            tensors |= {f"optimizer.{moment}.{name}": optimizer.state[p][moment] for name, p in parameters.items()}
    return tensors


def needed_bytes(config: ModelConfig, ranks: int, *, with_optimizer: bool = True) -> int:
    """Upper bound of a checkpoint's size on disk, in bytes: fp32 weights and moments, and what surrounds each slice."""
    numbers = [shape.numel() for shape in shapes(config).values()]
    return (1 + with_optimizer * len(MOMENTS)) * (4 * sum(numbers) + SLICE_OVERHEAD * len(numbers) * ranks)


def write(
    folder: Path, tensors: Mapping[str, Tensor], copies: Mapping[str, Tensor] | None, group: dist.ProcessGroup
) -> None:
    """Write this rank's slices and, on rank 0, `.metadata`, and flush them to disk (fsync). Collective.

    copies: if given, their values are written in place of those of `tensors`.
    """
    planner = DefaultSavePlanner() if copies is None else _CopyPlanner(copies)
    save_tensors(dict(tensors), storage_writer=_Writer(folder), planner=planner, process_group=group)


def digests(folder: Path, rank: int) -> dict[str, tuple[int, str]]:
    """Size in bytes and checksum of each file that a rank wrote, read back from disk."""
    own = sorted(folder.glob(f"__{rank}_*")) + ([folder / METADATA] if rank == 0 else [])
    return {path.name: (path.stat().st_size, checksum(path)) for path in own}


def complete(folder: Path, state: dict[str, Any]) -> None:
    """Add state.json and flush everything to disk (rank 0 only).

    Raises UserError if rank 0 cannot see a file of another rank.
    """
    for name, (size, _) in state["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise UserError(
                f"rank 0 does not see the whole of {folder / name}, which another rank wrote; --save must be a folder "
                "that all nodes share"
            )
    write_json(folder / STATE, state)
    fsync_all(folder)


def publish(temporary: Path, iteration: int, *, keep: bool) -> None:
    """Rename a complete folder to its final name, and then replace the tracker file.

    keep: a valid checkpoint of that name exists and stays, so the new folder is not renamed. Raises Superseded, and
    publishes nothing, when the claim belongs to another attempt.
    """
    final = iteration_folder(temporary.parent, iteration)
    if not keep:
        put(temporary, final)
    write_text(final.parent / TRACKER, f"{iteration}\n")


@contextmanager
def _readable(folder: Path) -> Iterator[_Reader]:
    """A reader of the folder; an error that torch raises about its content becomes a UserError."""
    try:
        yield _Reader(folder)
    except CheckpointException as error:
        raise UserError(f"{folder} cannot be loaded: {error}") from error


def load(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
    """Load a sharded model and its optimizer's moments in place, with any number and layout of ranks. Collective.

    Without an optimizer only the model is loaded.
    """
    with _readable(folder) as reader:
        load_tensors(stored(parameters, optimizer), storage_reader=reader, planner=_Planner())


def load_model_state(folder: Path) -> tuple[ModelConfig, Mapping[str, Tensor], dict[str, Any]]:
    """The geometry, the whole weights and the state.json of a checkpoint; needs no process group.

    The weights are on the CPU, named as in the canonical state, and each is read when it is asked for.
    """
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
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is disabled on purpose
            load_tensors({f"model.{name}": tensor}, storage_reader=reader, planner=_Planner(), no_dist=True)
        return tensor

    return ModelConfig(**state["model_config"]), LazyState(sizes, read), state
