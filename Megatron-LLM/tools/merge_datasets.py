"""python Megatron-LLM/tools/merge_datasets.py --input tokens/shards --output_prefix tokens/corpus_text_document

Merges every .bin, .idx and .json file of a folder, in the order of their names, into one PREFIX.{bin,idx,json}. The
result has the same bytes as one serial run of preprocess_data.py over all the documents. Shards written by Megatron's
own tools have no .json; then the merged dataset has none either.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np

from megatron_llm.data import document_columns
from megatron_llm.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_llm.data.manifest import Manifest, beside
from run_contract.entry_point import run_main
from run_contract.errors import InputsMissing, UserError
from run_contract.publish import publishing, write_json


@dataclass(frozen=True)
class Shard:
    """The properties of a checked shard, which the merge must find again."""

    prefix: Path
    sequences: int
    tokens: int
    dtype: str
    manifest: Manifest | None


def main() -> None:
    """Check all shards, join them, and check the result."""
    args = make_parser().parse_args()
    prefixes = find_shards(args.input, args.output_prefix)
    with_manifests = any(beside(prefix, ".json").exists() for prefix in prefixes)
    shards = [check_shard(prefix, with_manifests) for prefix in prefixes]
    manifests = [check_fits(shard, shards[0]).manifest for shard in shards]
    manifest = reduce(add, filter(None, manifests)) if with_manifests else None
    with_columns = bool(manifest and manifest.columns)
    suffixes = (".bin", ".idx", *([".json"] if manifest else []), *([document_columns.SUFFIX] if with_columns else []))
    with publishing(*(beside(args.output_prefix, suffix) for suffix in suffixes)) as paths:
        with IndexedDatasetWriter(paths[0], paths[1], np.dtype(shards[0].dtype)) as writer:
            for shard in shards:
                writer.append(IndexedDataset(shard.prefix))
        check_merged(writer, shards, manifest)
        if with_columns:
            merge_columns(shards, paths[3])
        if manifest:
            write_json(paths[2], manifest.as_dict())


def merge_columns(shards: Sequence[Shard], path: Path) -> None:
    """Join the columns of the shards. Raises InputsMissing, or UserError if they do not fit the sequences."""
    parts = [beside(shard.prefix, document_columns.SUFFIX) for shard in shards]
    for part in parts:
        if not part.is_file():
            raise InputsMissing(f"{part} does not exist, though the manifest beside it names columns; tokenise again")
    rows, sequences = document_columns.merge(parts, path), sum(shard.sequences for shard in shards)
    if rows != sequences:
        raise UserError(f"{parts[0].parent}: the columns have {rows} rows for {sequences} sequences; tokenise again")


def make_parser() -> argparse.ArgumentParser:
    """The parser of upstream's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", required=True, type=Path, help="folder of .bin, .idx and .json files")
    parser.add_argument("--output_prefix", required=True, type=Path, help="outputs are PREFIX.{bin,idx,json}")
    return parser


def find_shards(folder: Path, output_prefix: Path) -> list[Path]:
    """The prefixes in a folder, sorted by name (s10 comes before s2, so number shards with leading zeros).

    Raises UserError, InputsMissing.
    """
    if output_prefix.resolve().parent == folder.resolve():
        raise UserError(
            f"--output_prefix {output_prefix} lies in --input {folder}: the next merge would read it; move it"
        )
    found = (path for suffix in (".bin", ".idx", "_document.json") for path in folder.glob(f"[!.]*{suffix}"))
    names = {path.stem for path in found}  # a manifest alone belongs to a shard without tokens, an error
    if not names:
        raise InputsMissing(f"--input {folder} holds no .bin and .idx files; run preprocess_data.py first")
    return [folder / name for name in sorted(names)]


def check_shard(prefix: Path, with_manifest: bool) -> Shard:
    """Check a shard's files, and that its manifest agrees with them. Raises UserError."""
    dataset = IndexedDataset(prefix)
    found = (len(dataset), len(dataset.tokens), dataset.dtype.name)
    manifest = Manifest.read(prefix) if with_manifest else None
    if manifest:
        stated = (manifest.sequences, manifest.tokens, manifest.dtype)
        if found != stated:
            raise UserError(
                f"{prefix}.json states {stated} sequences, tokens and dtype, but its .idx has {found}; the files are "
                "of different runs: tokenise this shard again"
            )
        if wrong := manifest.wrong_sum():
            raise UserError(f"{prefix}.json does not add up: {wrong}; tokenise this shard again")
    return Shard(prefix, *found, manifest)


def check_fits(shard: Shard, first: Shard) -> Shard:
    """Raise UserError unless the ids of two shards have the same meaning."""
    try:
        if shard.dtype != first.dtype:
            raise ValueError(f"dtype is {shard.dtype!r}, not {first.dtype!r}")
        if shard.manifest and first.manifest:
            shard.manifest.check_same(first.manifest)
    except ValueError as error:
        raise UserError(
            f"{shard.prefix} does not fit {first.prefix}: {error}; "
            "tokenise all shards with the same tokenizer and options"
        ) from error
    return shard


def check_merged(writer: IndexedDatasetWriter, shards: Sequence[Shard], manifest: Manifest | None) -> None:
    """Check that the merged files hold the sums over the shards, even if a shard was rewritten during the merge.

    Raises UserError.
    """
    found = (writer.sequences, writer.tokens, writer.bin_path.stat().st_size)
    tokens = sum(shard.tokens for shard in shards)
    expected = (sum(shard.sequences for shard in shards), tokens, tokens * writer.dtype.itemsize)
    if found != expected:
        raise UserError(
            f"merged {found} sequences, tokens and bytes, but the shards hold {expected}: a shard was changed during "
            "the merge; run this again"
        )
    if manifest and (wrong := manifest.wrong_sum()):
        raise UserError(f"the counts of the shards do not add up: {wrong}; tokenise them again")


if __name__ == "__main__":
    run_main(main)
