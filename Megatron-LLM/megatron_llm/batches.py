"""From tokenised data to each rank's micro-batches: checks -> datasets -> sample numbers -> tensors.

Sample k of the run is sample k of the dataset; rank r of d takes rows [r*mb, (r+1)*mb) of every d*mb samples. So the
order depends on the seed and the consumed samples only, and resuming needs only their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_llm import gpt_dataset, tokenizer
from megatron_llm.arguments import Arguments
from megatron_llm.files import InputsMissing, UserError
from megatron_llm.gpt_dataset import Samples
from megatron_llm.manifest import Manifest
from megatron_llm.signals import shield_worker


@dataclass(frozen=True)
class DataIdentity:
    """What must stay the same over a run's restarts, and fit the model."""

    fingerprint: str
    vocab_size: int | None
    """Of the tokenizer, None when neither a manifest nor --vocab_file tells."""
    tokenizer_fingerprint: str | None


def identify(args: Arguments) -> DataIdentity:
    """Read the manifests and the tokenizer, and check that they belong together. Raises UserError, InputsMissing."""
    fingerprint = gpt_dataset.data_fingerprint(args.data_path)
    known: dict[str, tuple[str, int]] = {}
    for prefix in gpt_dataset.parse_data_path(args.data_path)[1]:
        try:
            manifest = Manifest.read(prefix)
        except InputsMissing:
            print(f"{prefix}.json is missing: it is not checked that this data fits the tokenizer", flush=True)
        else:
            known[f"the data {prefix}"] = (manifest.tokenizer_fingerprint, manifest.vocab_size)
    if args.vocab_file:
        built = tokenizer.build(
            args.tokenizer_type,
            args.vocab_file,
            no_new_tokens=args.no_new_tokens,
            vocab_extra_ids_list=args.vocab_extra_ids_list,
        )
        known[f"--vocab_file {args.vocab_file}"] = (built.fingerprint, built.vocab_size)
    if len(set(known.values())) > 1:
        found = "; ".join(f"{name} has {vocab} tokens, fingerprint {print_}" for name, (print_, vocab) in known.items())
        raise UserError(f"tokenizers differ: {found}; tokenise the data again with the tokenizer of the model")
    tokenizer_fingerprint, vocab_size = next(iter(known.values()), (None, None))
    return DataIdentity(fingerprint, vocab_size, tokenizer_fingerprint)


def check_fits(identity: DataIdentity, args: Arguments, vocab_size: int, max_position_embeddings: int) -> None:
    """The data's vocabulary and --seq_length must fit the model. Raises UserError."""
    if identity.vocab_size is not None and identity.vocab_size > vocab_size:
        raise UserError(
            f"the data {' '.join(args.data_path)} has {identity.vocab_size} kinds of tokens and the model's embedding "
            f"only {vocab_size}; tokenise with the model's own tokenizer and --no_new_tokens"
        )
    if args.seq_length > max_position_embeddings:
        raise UserError(
            f"--seq_length {args.seq_length} is more than the model's max_position_embeddings "
            f"{max_position_embeddings}; use at most that"
        )


def datasets(args: Arguments, global_batch: int) -> tuple[Samples, Samples | None]:
    """The training and the validation samples (None with --eval_iters 0), as many as the whole run needs."""
    evaluations = args.train_iters // args.eval_interval + 1
    wanted = (args.train_iters * global_batch, evaluations * args.eval_iters * global_batch, 0)
    train, valid, _ = gpt_dataset.build(args.data_path, args.split, args.seed, args.seq_length, wanted)
    assert train is not None
    return train, valid


@dataclass(frozen=True)
class Share:
    """Which rows of the samples [first, last) a rank computes: iterates over its micro-batches as sample numbers."""

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
    """A rank's micro-batches (micro_batch, seq_length + 1), int64, read ahead by worker processes if any."""
    loader: DataLoader[Tensor] = DataLoader(
        samples,  # type: ignore[arg-type]  # map-style by protocol, not by inheritance
        batch_sampler=share,
        num_workers=workers,
        collate_fn=_stack,
        worker_init_fn=shield_worker,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # else it draws from the global one, as often as the run is started
    )
    return iter(loader)


def _stack(rows: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.stack(rows))
