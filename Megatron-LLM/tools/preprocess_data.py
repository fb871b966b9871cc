"""python Megatron-LLM/tools/preprocess_data.py --input corpus.jsonl --output_prefix tokens/corpus
--tokenizer_type SentencePieceTokenizer --vocab_file tokenizer.model --workers 4 --chunk_size 64 --no_new_tokens

Tokenises documents: files -> blocks of documents -> columns -> token ids (on `workers` threads, in order) ->
PREFIX_text_document.{bin,idx,json}. The input is JSON lines (plain, .gz or .zst) or an Arrow stream, or a quoted glob
pattern of several such files, which are read in the order of their names.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megatron_llm.data import document_columns
from megatron_llm.data.document_blocks import Block, columns, find_inputs, offsets, read_blocks
from megatron_llm.data.document_columns import ColumnsWriter, columns_writer
from megatron_llm.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megatron_llm.data.manifest import COUNTS, MANY_SOURCES, MOST_SOURCES, Manifest, added, beside, bounded
from megatron_llm.tokenizer import build as tokenizer
from megatron_llm.tokenizer.base import Tokenizer
from megatron_llm.tokenizer.encoder import BACKENDS, Encoder, open_encoder
from megatron_llm.tokenizer.gigatoken import Differs, Unfit
from run_contract.entry_point import run_main
from run_contract.errors import EXIT_AGAIN, UserError
from run_contract.publish import publishing, write_json

Counts = dict[str, dict[str, int]]
"""Source -> name of a count -> its value."""


@dataclass(frozen=True)
class Encoded:
    """The documents of one block under one key."""

    tokens: NDArray[Any]
    """The token ids in the dtype of the .bin file."""
    lengths: NDArray[np.int32]
    """The number of tokens of each document, (n,); 0 if it gives no sequence."""
    sources: Counts
    backends: dict[str, int]

    @property
    def sizes(self) -> NDArray[np.int32]:
        """The number of tokens of each sequence."""
        return self.lengths[self.lengths > 0]


@dataclass(frozen=True)
class Policy:
    """The policy for what is added around each document's ids, and which keys are read."""

    keys: tuple[str, ...]
    append_eod: bool
    prepend_bos: bool


def main() -> None:
    """Tokenise the input into one .bin, .idx and .json file per key."""
    args = make_parser().parse_args()
    args.json_keys = tuple(dict.fromkeys(args.json_keys))
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(EXIT_AGAIN))  # nothing is published, and written files are removed
    inputs = find_inputs(args.input)
    vocabulary = open_vocabulary(args)
    encoder = open_encoder(vocabulary, args.tokenizer_backend, text_size(inputs) // args.workers)
    try:
        run(args, inputs, encoder)
    except Unfit as why:  # the two libraries differ on a sample of the documents, or gigatoken failed
        count = why.count if isinstance(why, Differs) else 0
        run(args, inputs, Encoder(vocabulary, None, str(why), count))


def text_size(inputs: list[Path]) -> int:
    """The approximate size of the inputs' text in bytes; compressed files are assumed to be a quarter of their text."""
    return sum(path.stat().st_size * (4 if path.suffix in (".gz", ".zst") else 1) for path in inputs)


def make_parser() -> argparse.ArgumentParser:
    """The parser of upstream's flags, and of --prepend_bos and --tokenizer_backend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", required=True, help="a .jsonl, .jsonl.gz, .jsonl.zst or .arrow file, or a glob")
    parser.add_argument("--json_keys", nargs="+", default=["text"], help="keys or columns, each its own output")
    parser.add_argument("--output_prefix", required=True, help="outputs are PREFIX_KEY_document.{bin,idx,json}")
    parser.add_argument("--dataset_impl", default="mmap", choices=["mmap"])
    parser.add_argument("--tokenizer_type", required=True, help=" or ".join(tokenizer.TYPES))
    parser.add_argument("--vocab_file", required=True, help="the base model's tokenizer.model or tokenizer.json")
    parser.add_argument("--append_eod", action="store_true", help="end each document with the EOD id")
    parser.add_argument("--prepend_bos", action="store_true", help="begin each document with the BOS id")
    parser.add_argument("--no_new_tokens", action="store_true", help="add no special tokens to the vocabulary")
    parser.add_argument(
        "--vocab_extra_ids",
        type=int,
        default=0,
        help="so many tokens <extra_id_0>, <extra_id_1>, … that are matched in text",
    )
    parser.add_argument("--vocab_extra_ids_list", help="tokens, comma-separated, that are matched in text")
    parser.add_argument(
        "--tokenizer_backend",
        choices=BACKENDS,
        default="auto",
        help="auto: gigatoken for all but small inputs, wherever it agrees with the tokenizer's own library; "
        "sentencepiece: only that library (`tokenizers` for a tokenizer.json). The ids are the same",
    )
    parser.add_argument(
        "--keep_columns",
        action="store_true",
        help="of .arrow files: write all other columns of the documents to PREFIX_KEY_document.columns.arrow, with a "
        "row per sequence",
    )
    parser.add_argument("--workers", type=positive, default=1, help="threads that tokenise")
    parser.add_argument("--chunk_size", type=positive, help="no effect: work is cut by bytes")
    parser.add_argument("--log_interval", type=positive, default=10_000, help="documents between two progress lines")
    parser.add_argument(
        "--split_sentences",
        action=Refused,
        nargs=0,
        help="refused: it needs NLTK's Punkt models, which are downloaded from the Internet when it runs; a document "
        "is one sequence here, as a GPT's samples are cut by tokens anyway",
    )
    parser.add_argument("--keep_newlines", action="store_true", help="no effect: a document keeps its newlines anyway")
    parser.add_argument("--lang", help="no effect: it belongs to --split_sentences, which is refused")
    parser.add_argument(
        "--merge_file", action=Refused, help="refused: give a tokenizer.json as --vocab_file in its place"
    )
    return parser


def open_vocabulary(args: argparse.Namespace) -> Tokenizer:
    """Open the tokenizer of the flags. Raises UserError when it is unusable or lacks a requested token."""
    vocabulary = tokenizer.build(
        args.tokenizer_type,
        args.vocab_file,
        no_new_tokens=args.no_new_tokens,
        vocab_extra_ids=args.vocab_extra_ids,
        vocab_extra_ids_list=args.vocab_extra_ids_list,
    )
    if args.prepend_bos and vocabulary.bos is None:
        raise UserError(f"--prepend_bos: {args.vocab_file} has no beginning-of-sentence token; leave out the flag")
    return vocabulary


class Refused(argparse.Action):
    """An upstream flag that is not supported; its help names the alternative."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]} is {self.help}")


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def run(args: argparse.Namespace, inputs: list[Path], encoder: Encoder) -> None:
    """Read, encode, write and publish. Raises Unfit when the fast encoder differs on a sample of the documents."""
    say_backend(args, encoder)
    policy = Policy(args.json_keys, args.append_eod, args.prepend_bos)
    blocks = chain.from_iterable(read_blocks(path, policy.keys) for path in inputs)
    finals = [Path(f"{args.output_prefix}_{key}_document") for key in policy.keys]
    suffixes = (".bin", ".idx", ".json", *([document_columns.SUFFIX] if args.keep_columns else []))
    with publishing(*(beside(final, suffix) for final in finals for suffix in suffixes)) as paths, ExitStack() as stack:
        outputs = [paths[i : i + len(suffixes)] for i in range(0, len(paths), len(suffixes))]
        keepers = [stack.enter_context(columns_writer(inputs, policy.keys, one[3])) for one in outputs if one[3:]]
        encoded = encode_blocks(encoder, policy, blocks, args.workers)
        totals = write(encoder, kept_columns(log_progress(encoded, args.log_interval), keepers), outputs)
        names = tuple(keepers[0].schema.names) if keepers else ()
        for one, (sources, backends) in zip(outputs, totals, strict=True):
            if MANY_SOURCES in sources:
                print("note: too many sources to count by source: documents are counted together", file=sys.stderr)
            write_json(one[2], manifest(args, encoder, sources, backends, names).as_dict())


def kept_columns(encoded: Iterable[list[Encoded]], keepers: list[ColumnsWriter]) -> Iterator[list[Encoded]]:
    """Yield the results, and write the columns of their documents."""
    for results in encoded:
        yield results
        for keeper, result in zip(keepers, results, strict=False):  # there are none, or one per key
            keeper.add(result.lengths)


def say_backend(args: argparse.Namespace, encoder: Encoder) -> None:
    """Print which library encodes, and why."""
    if encoder.fast:
        text = f"Tokenising with gigatoken, which agrees with {encoder.tokenizer.reference}."
    else:
        why = f"gigatoken is not used: {encoder.why_not_fast}" if encoder.why_not_fast else "as asked"
        if not encoder.why_not_fast and args.tokenizer_backend == "auto":
            why = "the input is so small that loading gigatoken would take longer"
        text = f"Tokenising with {encoder.tokenizer.reference} ({why})."
    print(text, file=sys.stderr, flush=True)


def encode_blocks(encoder: Encoder, policy: Policy, blocks: Iterable[Block], workers: int) -> Iterator[list[Encoded]]:
    """Yield the encoded blocks in order. Two blocks per thread are in progress at a time, so memory stays bounded.

    Threads suffice, because parsers and encoders work without Python's lock; and threads do not outlive the process.
    """
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for number, block in enumerate(blocks):
            waiting.append(pool.submit(encode_block, encoder, policy, block, first=number == 0))
            del block
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def encode_block(encoder: Encoder, policy: Policy, block: Block, *, first: bool) -> list[Encoded]:
    """The token ids of a block under each key."""
    found = columns(block, policy.keys)
    return [encode_texts(encoder, policy, found.texts[key], found.sources, first=first) for key in policy.keys]


def encode_texts(encoder: Encoder, policy: Policy, texts: Any, sources: Any, *, first: bool) -> Encoded:
    """Encode texts to ids with BOS and EOD, back to back.

    A document without tokens gives no sequence, and no BOS or EOD.
    """
    (ids, sizes), slowly = encoder.encode(texts, first=first)
    kept = sizes > 0
    ends = np.cumsum(sizes)
    tokens = ids.astype(token_dtype(encoder.tokenizer.vocab_size))
    counts = {
        "documents": np.ones(len(texts), dtype=np.int64),
        "empty_documents": ~kept,
        "characters": pc.utf8_length(texts).to_numpy(),
        "bytes": np.diff(offsets(texts)),
        "tokens": sizes + kept * (policy.append_eod + policy.prepend_bos),
        "sequences": kept,
        **fallbacks(encoder, tokens, ends),
    }
    bos = encoder.tokenizer.bos if policy.prepend_bos else None
    sequences = enclosed(tokens, ends, bos, encoder.tokenizer.eod if policy.append_eod else None)
    backends = {"gigatoken": int((~slowly).sum()), encoder.tokenizer.reference: int(slowly.sum())}
    return Encoded(sequences, counts["tokens"].astype(np.int32), by_source(sources, counts), backends)


def enclosed(tokens: NDArray[Any], ends: NDArray[np.int64], bos: int | None, eod: int | None) -> NDArray[Any]:
    """The tokens with BOS before and EOD after each document that has any; `None` for neither.

    tokens[:ends[i]] ends with document i. Arrow joins them as strings of bytes, several times as fast as np.insert.
    """
    added = [None if token is None else token.to_bytes(tokens.itemsize, sys.byteorder) for token in (bos, eod)]
    if added == [None, None] or not len(tokens):
        return tokens
    borders = np.concatenate(([0], ends[np.diff(ends, prepend=0) > 0])) * tokens.itemsize
    documents = pa.Array.from_buffers(
        pa.large_binary(), len(borders) - 1, [None, pa.py_buffer(borders), pa.py_buffer(tokens)]
    )
    first, last, between = (pa.scalar(part or b"", pa.large_binary()) for part in (*added, None))
    joined = pc.binary_join_element_wise(first, documents, last, between)
    found: NDArray[Any] = np.frombuffer(joined.buffers()[2], dtype=tokens.dtype)
    return found


def fallbacks(encoder: Encoder, tokens: NDArray[Any], ends: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """The number of tokens of each document that are unknown, and that are single bytes, (n,) each.

    tokens[:ends[i]] ends with document i. Only tokens between the smallest and the largest of the ids are looked at
    closely; in the usual vocabularies these are the first ids, which are rare.
    """
    tokenizer = encoder.tokenizer
    unknown = [] if tokenizer.unknown_id is None else [tokenizer.unknown_id]
    wanted = {"unknown_tokens": unknown, "byte_tokens": sorted(tokenizer.fallback_ids)}
    every = [*unknown, *wanted["byte_tokens"]]
    if not every:
        return {name: np.zeros(len(ends), dtype=np.int64) for name in wanted}
    near = tokens <= max(every)
    if min(every):
        near &= tokens >= min(every)
    places = np.flatnonzero(near)
    found = tokens.take(places)
    return {
        name: np.bincount(
            np.searchsorted(ends, places[np.isin(found, np.array(ids, dtype=np.int64), kind="table")], side="right"),
            minlength=len(ends),
        )
        for name, ids in wanted.items()
    }


def by_source(sources: Any, counts: dict[str, NDArray[Any]]) -> Counts:
    """The sums of each count (n,) over the documents of each source."""
    codes, names = sources.indices.to_numpy(), sources.dictionary.to_pylist()
    if len(names) == 1:
        return {names[0]: {name: int(values.sum()) for name, values in counts.items()}}
    if len(names) > MOST_SOURCES:
        return {MANY_SOURCES: {name: int(values.sum()) for name, values in counts.items()}}
    sums = {name: np.bincount(codes, values, len(names)).astype(np.int64) for name, values in counts.items()}
    return {source: {name: int(sums[name][i]) for name in COUNTS} for i, source in enumerate(names)}


def write(
    encoder: Encoder, encoded: Iterable[list[Encoded]], outputs: list[tuple[Path, ...]]
) -> list[tuple[Counts, dict[str, int]]]:
    """Write the .bin and .idx of each key, and return its counts by source and by library."""
    dtype = token_dtype(encoder.tokenizer.vocab_size)
    sources: list[Counts] = [{} for _ in outputs]
    backends: list[Counter[str]] = [Counter() for _ in outputs]
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(one[0], one[1], dtype)) for one in outputs]
        for results in encoded:
            for number, result in enumerate(results):
                writers[number].add(result.tokens, result.sizes)
                backends[number].update(result.backends)
                for name, counts in result.sources.items():
                    sources[number][name] = added(sources[number].get(name, {}), counts)
                sources[number] = bounded(sources[number])
    libraries = [{name: n for name, n in sorted(used.items()) if n} for used in backends]
    return list(zip(sources, libraries, strict=True))


def manifest(
    args: argparse.Namespace, encoder: Encoder, sources: Counts, backends: dict[str, int], names: tuple[str, ...]
) -> Manifest:
    """The manifest to be written beside the tokens; `names` are those of the columns that are kept."""
    vocabulary = encoder.tokenizer
    return Manifest(
        **{name: sum(counts[name] for counts in sources.values()) for name in COUNTS},
        vocab_size=vocabulary.vocab_size,
        tokenizer_fingerprint=vocabulary.fingerprint,
        tokenizer_type=args.tokenizer_type,
        append_eod=args.append_eod,
        eod=vocabulary.eod,
        prepend_bos=args.prepend_bos,
        bos=vocabulary.bos,
        dtype=token_dtype(vocabulary.vocab_size).name,
        sources=sources,
        backends=backends,
        why_not_fast=(encoder.why_not_fast,) if encoder.why_not_fast else (),
        sample_mismatches=encoder.mismatches,
        columns=names,
    )


def log_progress(encoded: Iterable[list[Encoded]], interval: int) -> Iterator[list[Encoded]]:
    """Yield the results; print a line to stderr every `interval` documents (or per longer block) and at the end."""
    start, documents, size, shown = time.perf_counter(), 0, 0, 0
    for results in encoded:
        yield results
        documents += sum(counts["documents"] for counts in results[0].sources.values())
        size += sum(counts["bytes"] for result in results for counts in result.sources.values())
        if documents // interval != shown:
            shown = documents // interval
            show(documents, size, time.perf_counter() - start)
    show(documents, size, time.perf_counter() - start)


def show(documents: int, size: int, seconds: float) -> None:
    """Print upstream's progress line."""
    rates = f"({documents / seconds:.1f} docs/s, {size / seconds / 1e6:.2f} MB/s)"
    print(f"Processed {documents} documents {rates}.", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
