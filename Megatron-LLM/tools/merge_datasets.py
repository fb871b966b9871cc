"""python Megatron-LLM/tools/merge_datasets.py --input tokens/shards --output_prefix tokens/corpus_text_document

Every *_document.{bin,idx,json} of a folder, in the order of their names -> one PREFIX.{bin,idx,json}: the bytes that
one serial run of preprocess_data.py over all their documents gives.
"""

from __future__ import annotations

import argparse
from functools import reduce
from pathlib import Path

import numpy as np

from megatron_llm.files import InputsMissing, UserError, publishing, run_main, write_json
from megatron_llm.indexed_dataset import IndexedDataset, IndexedDatasetWriter, Manifest, beside


def main() -> None:
    """Check all shards, then join them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="folder of *_document.{bin,idx,json}")
    parser.add_argument("--output_prefix", required=True, type=Path, help="outputs are PREFIX.{bin,idx,json}")
    args = parser.parse_args()
    prefixes = find_shards(args.input, args.output_prefix)
    manifest = reduce(joined, ((prefix, check_shard(prefix)) for prefix in prefixes))[1]
    with publishing(*(beside(args.output_prefix, suffix) for suffix in (".bin", ".idx", ".json"))) as paths:
        with IndexedDatasetWriter(paths[0], paths[1], np.dtype(manifest.dtype)) as writer:
            for prefix in prefixes:
                writer.append(IndexedDataset(prefix))
        check_totals(writer, manifest)
        write_json(paths[2], manifest.as_dict())


def find_shards(folder: Path, output_prefix: Path) -> list[Path]:
    """The prefixes in a folder, sorted by name (so s10 comes before s2: number shards with leading zeros)."""
    if output_prefix.resolve().parent == folder.resolve():
        raise UserError(
            f"--output_prefix {output_prefix} lies in --input {folder}: the next merge would read it; move it"
        )
    names = {path.stem for suffix in (".bin", ".idx") for path in folder.glob(f"*_document{suffix}")}
    if not names:
        raise InputsMissing(
            f"--input {folder} holds no *_document.bin and *_document.idx; run preprocess_data.py first"
        )
    return [folder / name for name in sorted(names)]


def check_shard(prefix: Path) -> Manifest:
    """Check a shard's files and that its manifest tells the truth about them."""
    dataset, manifest = IndexedDataset(prefix), Manifest.read(prefix)
    found = (len(dataset), len(dataset.tokens), dataset.dtype.name)
    stated = (manifest.sequences, manifest.tokens, manifest.dtype)
    if found != stated:
        raise UserError(
            f"{prefix}.json states {stated} sequences, tokens and dtype, its .idx has {found}; "
            "the files are of different runs: tokenise this shard again"
        )
    return manifest


def joined(left: tuple[Path, Manifest], right: tuple[Path, Manifest]) -> tuple[Path, Manifest]:
    """The first shard's prefix and the manifest of both; UserError when their ids do not mean the same."""
    try:
        return left[0], left[1] + right[1]
    except ValueError as error:
        raise UserError(
            f"{right[0]} does not fit {left[0]}: {error}; tokenise all shards with the same tokenizer and options"
        ) from error


def check_totals(writer: IndexedDatasetWriter, manifest: Manifest) -> None:
    """A shard that was written again during the merge must not end up in the output."""
    found, stated = (writer.sequences, writer.tokens), (manifest.sequences, manifest.tokens)
    if found != stated:
        raise UserError(f"merged {found} sequences and tokens, expected {stated}: a shard changed meanwhile; run again")


if __name__ == "__main__":
    run_main(main)
