"""The way from tokenised data to each rank's micro-batches: checks -> datasets -> sample numbers -> tensors.

Sample k of the run is sample k of the dataset. With d data-parallel ranks and mb samples per micro-batch, rank r takes
rows [r*mb, (r+1)*mb) of every d*mb samples. The order of samples therefore depends only on the seed and the number of
consumed samples, and that number is all that resuming needs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_llm.data import gpt_dataset
from megatron_llm.data.gpt_dataset import DataPaths, Samples, SplitPlan
from megatron_llm.data.manifest import Manifest
from megatron_llm.flags.arguments import Arguments, DataFlags
from megatron_llm.process.signals import shield_worker
from megatron_llm.tokenizer import build as tokenizer
from run_contract.errors import InputsMissing, UserError


@dataclass(frozen=True)
class DataIdentity:
    """The properties of the data that must stay the same across restarts of a run and that must fit the model."""

    fingerprint: str
    vocab_size: int | None
    """Vocabulary size of the tokenizer; None when neither a manifest nor --vocab_file gives it."""
    tokenizer_fingerprint: str | None


def identify(flags: DataFlags, given: Collection[str]) -> DataIdentity:
    """Read the manifests and the tokenizer, and check that they belong together. Raises UserError, InputsMissing."""
    fingerprint = flags.paths().fingerprint()
    known: dict[str, tuple[str, int]] = {}
    for prefix in flags.paths().prefixes():
        try:
            manifest = Manifest.read(prefix)
        except InputsMissing:
            print(f"{prefix}.json is missing, so it is not checked that this data fits the tokenizer", flush=True)
        else:
            known[f"the data {prefix}"] = (manifest.tokenizer_fingerprint, manifest.vocab_size)
            if "tokenizer_type" in given and flags.tokenizer_type != manifest.tokenizer_type:
                raise UserError(
                    f"--tokenizer_type {flags.tokenizer_type}, but the data {prefix} were tokenised with "
                    f"{manifest.tokenizer_type}; give that type, or leave the flag out"
                )
    if flags.vocab_file:
        built = tokenizer.build(
            flags.tokenizer_type,
            flags.vocab_file,
            no_new_tokens=flags.no_new_tokens,
            vocab_extra_ids=flags.vocab_extra_ids,
            vocab_extra_ids_list=flags.vocab_extra_ids_list,
        )
        known[f"--vocab_file {flags.vocab_file}"] = (built.fingerprint, built.vocab_size)
    if len(set(known.values())) > 1:
        found = "; ".join(f"{name} has {vocab} tokens, fingerprint {print_}" for name, (print_, vocab) in known.items())
        raise UserError(
            f"the tokenizers are different: {found}; tokenise the data again with the tokenizer of the model"
        )
    tokenizer_fingerprint, vocab_size = next(iter(known.values()), (None, None))
    return DataIdentity(fingerprint, vocab_size, tokenizer_fingerprint)


def check_fits(
    identity: DataIdentity, paths: DataPaths, length: int, vocab_size: int, max_position_embeddings: int
) -> None:
    """Check that the data's vocabulary and --seq_length (`length`) fit the model. Raises UserError."""
    if identity.vocab_size is not None and identity.vocab_size > vocab_size:
        raise UserError(
            f"the data {', '.join(map(str, paths.prefixes()))} has {identity.vocab_size} kinds of tokens, but the "
            f"model's embedding has only {vocab_size} rows; tokenise with the model's own tokenizer and "
            "--no_new_tokens, or give the model rows for the new tokens: checkpoint_util.py --true_vocab_size "
            f"{identity.vocab_size}"
        )
    if length > max_position_embeddings:
        raise UserError(
            f"--seq_length {length} is more than the model's max_position_embeddings "
            f"{max_position_embeddings}; use at most that"
        )


def find_indices(args: Arguments, global_batch: int) -> list[Path | None]:
    """Find and verify the indices of the training and validation samples that tools/build_index.py wrote (rank 0 only).

    Returns the path of each index's manifest. Where an index does not exist, the entry is None; with --index_path a
    missing index is an error instead. Raises UserError, InputsMissing.
    """
    folder = args.data.index_path or args.data.paths().index_folder()
    needed, plans = args.data.index_path is not None, _plans(args, global_batch)
    return [_find_index(plan, folder, needed=needed) if plan else None for plan in plans]


def _find_index(plan: SplitPlan, folder: Path, *, needed: bool) -> Path | None:
    manifest = gpt_dataset.find_index(plan, folder)
    if manifest is None and needed:
        raise InputsMissing(
            f"--index_path {folder} has no index of {plan.samples()} samples for {plan.split} with these data flags; "
            "build it by tools/build_index.py with the flags of this run, or leave --index_path out"
        )
    if manifest is None:
        print(
            f"no index of the {plan.split} samples in {folder}: every rank builds it in {plan.bytes() / 1e9:.2f} GB of "
            "memory; tools/build_index.py builds it once",
            flush=True,
        )
    return manifest


def datasets(args: Arguments, global_batch: int, indices: list[Path | None]) -> tuple[Samples, Samples | None]:
    """Open the training and the validation samples (None with --eval_iters 0), as many as the whole run needs."""
    plans = zip(_plans(args, global_batch), indices, strict=True)
    train, valid = (gpt_dataset.open_split(plan, manifest) if plan else None for plan, manifest in plans)
    assert train is not None
    return train, valid


def _plans(args: Arguments, global_batch: int) -> list[SplitPlan | None]:
    """The plans of what training and validation read; the test split is never evaluated."""
    train, valid, _ = args.samples(global_batch)
    return gpt_dataset.plan(args.data.paths(), args.training.seed, args.model.seq_length, (train, valid, 0))[:2]


@dataclass(frozen=True)
class Share:
    """A rank's share of the samples [first, last).

    Iterating over it gives the sample numbers of one micro-batch after another.
    """

    first: int
    last: int
    micro_batch: int
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.first, self.last, self.micro_batch * self.ranks):
            own = start + self.rank * self.micro_batch
            yield list(range(own, own + self.micro_batch))


def load(samples: Samples, share: Share, workers: int) -> Iterator[Tensor]:
    """Iterate over a rank's micro-batches, each (micro_batch, seq_length + 1) int64.

    Worker processes, if any, read ahead.
    """
    loader: DataLoader[Tensor] = DataLoader(
        samples,  # type: ignore[arg-type]  # map-style by protocol, not by inheritance
        batch_sampler=share,
        num_workers=workers,
        collate_fn=_stack,
        worker_init_fn=shield_worker,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # otherwise every start of the run would draw a number from the global generator
    )
    return iter(loader)


def _stack(rows: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.stack(rows))
