"""python Megatron-LLM/tools/preprocess_data.py --input corpus.jsonl --output_prefix tokens/corpus
--tokenizer_type SentencePieceTokenizer --vocab_file tokenizer.model --workers 4 --chunk_size 64 --no_new_tokens

Documents -> chunks -> token ids (in worker processes, in order) -> PREFIX_text_document.{bin,idx,json}.
The input is JSON lines or an Arrow stream, or a quoted glob of several, read in the order of their names.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import json
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_llm import tokenizer as tokenizers
from megatron_llm.files import EXIT_AGAIN, InputsMissing, UserError, publishing, run_main, write_json
from megatron_llm.indexed_dataset import COUNTS, IndexedDatasetWriter, Manifest, beside, token_dtype

PR_SET_PDEATHSIG = 1
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class Options:
    """What decides the ids; small, since it travels to the workers with every chunk."""

    tokenizer_type: str
    vocab_file: str
    no_new_tokens: bool
    vocab_extra_ids_list: str | None
    append_eod: bool
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Chunk:
    """Some consecutive documents of one input file."""

    where: str
    """The file and what it counts in, for messages: `corpus.jsonl, line`."""
    first: int
    """Number of the first document in its file, from 1."""
    rows: list[Any]
    """Lines of JSON (bytes), or Arrow rows (dict)."""


@dataclass(frozen=True)
class Encoded:
    """The documents of one chunk under one key."""

    tokens: NDArray[Any]
    sizes: NDArray[np.int32]
    """One for each document that has tokens."""
    counts: dict[str, int]


def main() -> None:
    """Tokenise the input into one .bin, .idx and .json a key."""
    args = parse_args()
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(EXIT_AGAIN))  # nothing is published, and what was written is removed
    options = Options(
        args.tokenizer_type,
        args.vocab_file,
        args.no_new_tokens,
        args.vocab_extra_ids_list,
        args.append_eod,
        tuple(args.json_keys),
    )
    load_tokenizer(options)
    chunks = chain.from_iterable(read_chunks(path, options.keys, args.chunk_size) for path in find_inputs(args.input))
    encoded = encode_chunks(options, chunks, args.workers)
    finals = [Path(f"{args.output_prefix}_{key}_document") for key in options.keys]
    with publishing(*(beside(final, suffix) for final in finals for suffix in (".bin", ".idx", ".json"))) as paths:
        triples = [paths[i : i + 3] for i in range(0, len(paths), 3)]
        for triple, manifest in zip(triples, write(options, encoded, triples, args.log_interval), strict=True):
            write_json(triple[2], manifest.as_dict())


def parse_args() -> argparse.Namespace:
    """Upstream's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="a .jsonl, .json or .arrow file, or a quoted glob of them")
    parser.add_argument("--json_keys", nargs="+", default=["text"], help="keys or columns, each its own output")
    parser.add_argument("--output_prefix", required=True, help="outputs are PREFIX_KEY_document.{bin,idx,json}")
    parser.add_argument("--dataset_impl", default="mmap", choices=["mmap"])
    parser.add_argument("--tokenizer_type", required=True, help="SentencePieceTokenizer")
    parser.add_argument("--vocab_file", required=True, help="tokenizer.model of the base model")
    parser.add_argument("--append_eod", action="store_true", help="end each document with the EOD id")
    parser.add_argument("--no_new_tokens", action="store_true", help="add no special tokens to the vocabulary")
    parser.add_argument("--vocab_extra_ids_list", help="tokens, comma-separated, that are matched in text")
    parser.add_argument("--workers", type=positive, default=1, help="processes that tokenise")
    parser.add_argument("--chunk_size", type=positive, default=64, help="documents sent to a worker at once")
    parser.add_argument("--log_interval", type=positive, default=10_000, help="documents between two progress lines")
    return parser.parse_args()


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def find_inputs(pattern: str) -> list[Path]:
    """The input files, by name; InputsMissing when there is none."""
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))  # noqa: PTH207 takes absolute patterns
    paths = [Path(name) for name in names]
    if not paths:
        raise InputsMissing(f"--input {pattern}: no such file, and no file matches it")
    for path in paths:
        if path.suffix not in (".jsonl", ".json", ".arrow") or not path.is_file():
            raise UserError(f"--input {path}: not a .jsonl, .json or .arrow file; write plain text as JSON lines first")
    return paths


def read_chunks(path: Path, keys: tuple[str, ...], size: int) -> Iterator[Chunk]:
    """The documents of one file, `size` at a time."""
    return read_arrow(path, keys, size) if path.suffix == ".arrow" else read_lines(path, size)


def read_lines(path: Path, size: int) -> Iterator[Chunk]:
    """Lines of JSON, unparsed; a line ends at the newline byte and nowhere else."""
    with path.open("rb") as file:
        first = 1
        while rows := list(islice(file, size)):
            yield Chunk(f"{path}, line", first, rows)
            first += len(rows)


def read_arrow(path: Path, keys: tuple[str, ...], size: int) -> Iterator[Chunk]:
    """Rows of an Arrow stream, memory-mapped, as dicts of the wanted columns."""
    first = 1
    try:
        check_whole(path)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            if missing := set(keys) - set(reader.schema.names):
                raise UserError(f"{path} has no column {min(missing)!r}; its columns: {', '.join(reader.schema.names)}")
            for batch in reader:
                wanted = batch.select(list(keys))
                wanted.validate(full=True)
                for start in range(0, len(wanted), size):
                    rows = wanted.slice(start, size).to_pylist()
                    yield Chunk(f"{path}, row", first, rows)
                    first += len(rows)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole Arrow stream after row {first - 1}: {error}; write it again") from error


def check_whole(path: Path) -> None:
    """A stream that was cut between two batches reads without an error; its end marker is missing."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - len(END_OF_STREAM)))
        if file.read() != END_OF_STREAM:
            raise pa.ArrowInvalid("its end marker is missing")


@lru_cache(maxsize=1)
def load_tokenizer(options: Options) -> tokenizers.Tokenizer:
    """The tokenizer, loaded once a process."""
    return tokenizers.build(
        options.tokenizer_type,
        options.vocab_file,
        no_new_tokens=options.no_new_tokens,
        vocab_extra_ids_list=options.vocab_extra_ids_list,
    )


def encode_chunks(options: Options, chunks: Iterable[Chunk], workers: int) -> Iterator[list[Encoded]]:
    """Encode in order; with workers, a few chunks for each are under way at once, so memory stays bounded."""
    if workers == 1:
        yield from (encode_chunk(options, chunk) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=start_worker)
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(encode_chunk, options, chunk))
            if len(waiting) == 8 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """Leave the scheduler's signals to the parent, and do not outlive it."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def encode_chunk(options: Options, chunk: Chunk) -> list[Encoded]:
    """The token ids of a chunk under each key."""
    places = [f"{chunk.where} {number}" for number in range(chunk.first, chunk.first + len(chunk.rows))]
    documents = [
        parse(row, place) if isinstance(row, bytes) else row for row, place in zip(chunk.rows, places, strict=True)
    ]
    return [
        encode_texts(
            options, [text_of(document, key, place) for document, place in zip(documents, places, strict=True)]
        )
        for key in options.keys
    ]


def parse(line: bytes, place: str) -> dict[str, Any]:
    """One line of JSON lines."""
    try:
        document = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not valid JSON: {error}; it starts {line[:40]!r}") from error
    if not isinstance(document, dict):
        raise UserError(f'{place} is not a JSON object such as {{"text": "…"}}; it starts {line[:40]!r}')
    return document


def text_of(document: dict[str, Any], key: str, place: str) -> str:
    """The text under a key, checked."""
    text = document.get(key)
    if not isinstance(text, str):
        found = f"{key!r} is {text!r:.40}" if key in document else f"there is no {key!r}, only {sorted(document)}"
        raise UserError(f"{place}: {found}; each document needs a string, and --json_keys names its key")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: character {error.start + 1} of {key!r} is half a surrogate pair; mend it") from error
    return text


def encode_texts(options: Options, texts: list[str]) -> Encoded:
    """Ids back to back; a document without tokens gives no sequence and no EOD."""
    tokenizer = load_tokenizer(options)
    end = [tokenizer.eod] if options.append_eod else []
    documents = [ids + end for ids in tokenizer.encode_batch(texts) if ids]
    tokens = np.fromiter(chain.from_iterable(documents), dtype=token_dtype(tokenizer.vocab_size))
    counts = {
        "documents": len(texts),
        "empty_documents": len(texts) - len(documents),
        "characters": sum(map(len, texts)),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": len(tokens),
        "sequences": len(documents),
    }
    return Encoded(tokens, np.array([len(document) for document in documents], dtype=np.int32), counts)


def write(
    options: Options, encoded: Iterable[list[Encoded]], triples: list[tuple[Path, ...]], log_interval: int
) -> list[Manifest]:
    """Write each key's .bin and .idx; return their manifests."""
    tokenizer = load_tokenizer(options)
    dtype = token_dtype(tokenizer.vocab_size)
    totals: list[Counter[str]] = [Counter(dict.fromkeys(COUNTS, 0)) for _ in triples]
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(triple[0], triple[1], dtype)) for triple in triples]
        for results in log_progress(encoded, log_interval):
            for writer, total, result in zip(writers, totals, results, strict=True):
                writer.add(result.tokens, result.sizes)
                total.update(result.counts)
    return [
        Manifest(
            **total,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer_type=options.tokenizer_type,
            append_eod=options.append_eod,
            eod=tokenizer.eod,
            dtype=dtype.name,
        )
        for total in totals
    ]


def log_progress(encoded: Iterable[list[Encoded]], interval: int) -> Iterator[list[Encoded]]:
    """Pass the results on; a line on stderr every `interval` documents and at the end."""
    start, documents, size, shown = time.perf_counter(), 0, 0, 0
    for results in encoded:
        yield results
        documents += results[0].counts["documents"]
        size += sum(result.counts["bytes"] for result in results)
        if documents // interval != shown:
            shown = documents // interval
            show(documents, size, time.perf_counter() - start)
    show(documents, size, time.perf_counter() - start)


def show(documents: int, size: int, seconds: float) -> None:
    """Upstream's progress line."""
    rates = f"({documents / seconds:.1f} docs/s, {size / seconds / 1e6:.2f} MB/s)"
    print(f"Processed {documents} documents {rates}.", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
