"""Our training checkpoints: every rank's slices -> iter_XXXXXXX/*.distcp + state.json -> rename -> tracker file.

Saving: all ranks write into a temporary folder (torch.distributed.checkpoint) and digest what they wrote; rank 0 adds
state.json, renames the folder and replaces the tracker last. Loading takes the newest folder that verifies, into any
number of ranks. `.metadata` is a pickle: it is read through an allow-list, so a forged one cannot run code.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from megatron_llm.files import UserError, attempt_name, checksum, remove, rename, write_json, write_text
from megatron_llm.model_config import ModelConfig
from megatron_llm.optimizer import MOMENTS
from megatron_llm.parallel import World
from megatron_llm.reshard import LazyState

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = ".metadata"
STATE = "state.json"
ITERATION = re.compile(r"iter_(\d{7,})")
TEMPORARY = re.compile(r"\.iter_\d{7,}\.(tmp|old)-.*")
CHECKSUM_THREADS = 8
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


def _tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """What is stored, by name: `model.NAME` and, with an optimizer, `optimizer.MOMENT.NAME`."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    if optimizer:
        for moment in MOMENTS:
            tensors |= {f"optimizer.{moment}.{name}": optimizer.state[p][moment] for name, p in parameters.items()}
    return tensors


def save(
    save_dir: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: ModelConfig,
    state: dict[str, Any],
    world: World,
) -> None:
    """Publish iter_XXXXXXX (state["iteration"]) and then the tracker; returns on every rank when both are durable.

    Collective. Raises Superseded when the claim is another attempt's; nothing is published then.
    """
    final = iteration_folder(save_dir, state["iteration"])
    temporary = world.on_rank0(lambda: _fresh(final.with_name(f".{final.name}.tmp-{attempt_name()}")))
    try:
        save_tensors(_tensors(parameters, optimizer), storage_writer=_Writer(temporary))
        files = _digest_together(temporary, world)
        world.on_rank0(lambda: _publish(temporary, final, {**state, "model_config": asdict(config), "files": files}))
    finally:
        if world.rank == 0:
            remove(temporary)  # only still there after an error, such as a full disk


def _fresh(folder: Path) -> Path:
    """An empty folder, made visible before other ranks write into it."""
    remove(folder)
    folder.mkdir(parents=True)
    return folder


def _digest_together(folder: Path, world: World) -> dict[str, tuple[int, str]]:
    """Size and checksum of every file; each rank reads the ones that it wrote, rank 0 also the rest."""
    own = sorted(folder.glob(f"__{world.rank}_*")) + ([folder / METADATA] if world.rank == 0 else [])
    shares: list[dict[str, tuple[int, str]]] = [{} for _ in range(world.size)]
    dist.all_gather_object(shares, {path.name: (path.stat().st_size, checksum(path)) for path in own})
    return {name: share[name] for share in shares for name in sorted(share)}


def _publish(temporary: Path, final: Path, state: dict[str, Any]) -> None:
    write_json(temporary / STATE, state)
    rename(temporary, final)
    write_text(final.parent / TRACKER, f"{state['iteration']}\n")


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
        load_tensors(_tensors(parameters, optimizer), storage_reader=reader, planner=_Planner())


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
