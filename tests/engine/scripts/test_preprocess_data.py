"""preprocess_data.py as people run it: the bytes it writes, and what it says when the input is wrong."""

from __future__ import annotations

import gzip
import json
import os
import resource
import runpy
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sentencepiece
import tokenizers
import zstandard

from megatron_llm.data import document_blocks as documents_module
from megatron_llm.data.document_blocks import columns, read_blocks
from megatron_llm.data.indexed_dataset import IndexedDataset
from megatron_llm.data.manifest import COUNTS, MANY_SOURCES, MOST_SOURCES, bounded
from megatron_llm.tokenizer import agreement, agreement_file, encoder
from megatron_llm.tokenizer.gigatoken import Fast
from run_contract.errors import UserError

TOOL = Path(__file__).parents[3] / "Megatron-LLM/tools/preprocess_data.py"
TEXTS = [f"Hane nummer {i} gol højt over engen. " * (i % 7) for i in range(300)]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BPE model as Llama's: byte fallback, no normalisation."""
    return train(tmp_path_factory.mktemp("vocab") / "tokenizer.model", normalization_rule_name="identity")


def train(path: Path, **settings: Any) -> Path:
    """A small BPE model with byte fallback."""
    defaults = {"vocab_size": 310, "remove_extra_whitespaces": False}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, model_type="bpe", byte_fallback=True, pad_id=-1,
            minloglevel=2, **{**defaults, **settings},
        )  # fmt: skip
    return path


def command(vocab: Path, source: Path | str, prefix: Path | str, *flags: str) -> list[str]:
    """The command line."""
    return [
        sys.executable, str(TOOL), "--input", str(source), "--output_prefix", str(prefix), "--tokenizer_type",
        "SentencePieceTokenizer", "--vocab_file", str(vocab), "--chunk_size", "16", "--no_new_tokens", *flags,
    ]  # fmt: skip


def run(vocab: Path, source: Path | str, prefix: Path | str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(command(vocab, source, prefix, *flags), capture_output=True, text=True, timeout=600)


def write_jsonl(path: Path, texts: list[str], **more: str) -> Path:
    """One document a line."""
    path.write_text("".join(json.dumps({"text": text, **more}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


def write_arrow(path: Path, columns: dict[str, list[Any]], rows: int = 50) -> Path:
    """An Arrow stream, as the datasets library writes it, in batches of some rows."""
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def outputs(prefix: Path | str, key: str = "text") -> tuple[bytes, bytes, dict[str, Any]]:
    """The three files of one key."""
    stem = f"{prefix}_{key}_document"
    return (
        Path(stem + ".bin").read_bytes(),
        Path(stem + ".idx").read_bytes(),
        json.loads(Path(stem + ".json").read_text()),
    )


def documents(prefix: Path) -> list[list[int]]:
    """All documents, read back."""
    dataset = IndexedDataset(f"{prefix}_text_document")
    return [dataset.get(i).tolist() for i in range(len(dataset))]


def test_golden_bytes(vocab: Path, tmp_path: Path) -> None:
    """Two documents and an empty one, against bytes put together from SentencePiece's ids and the format."""
    encode = sentencepiece.SentencePieceProcessor(model_file=str(vocab)).encode
    a, b = encode("Hane gol."), encode("</s> æ\u2028ø\u0085å")
    source = write_jsonl(tmp_path / "x.jsonl", ["Hane gol.", "", "</s> æ\u2028ø\u0085å"])
    result = run(vocab, source, f"{tmp_path}/out/", "--append_eod")
    assert result.returncode == 0, result.stderr
    found_bin, found_idx, manifest = outputs(f"{tmp_path}/out/")
    assert found_bin == struct.pack(f"<{len(a) + len(b) + 2}H", *a, 2, *b, 2)
    assert found_idx == b"MMIDIDX\0\0" + struct.pack(
        "<QBQQ2i2q3q", 1, 8, 2, 3, len(a) + 1, len(b) + 1, 0, 2 * len(a) + 2, 0, 1, 2
    )
    fingerprint = manifest.pop("tokenizer_fingerprint")
    assert len(fingerprint) == 32
    counts = {
        "documents": 3, "empty_documents": 1, "characters": 19, "bytes": 25, "tokens": len(a) + len(b) + 2,
        "sequences": 2, "unknown_tokens": 0, "byte_tokens": sum(piece in range(3, 259) for piece in a + b),
    }  # fmt: skip
    rates = {
        "tokens_per_byte": round(counts["tokens"] / 25, 6),
        "fallback_rate": round(counts["byte_tokens"] / counts["tokens"], 6),
    }
    assert counts["byte_tokens"] > 5
    assert manifest == {
        **counts, **rates, "vocab_size": 310, "tokenizer_type": "SentencePieceTokenizer", "append_eod": True, "eod": 2,
        "prepend_bos": False, "bos": 1, "dtype": "uint16", "sources": {"all": {**counts, **rates}},
        "backends": {"sentencepiece": 3}, "why_not_fast": [], "sample_mismatches": 0,
    }  # fmt: skip


def test_workers_and_input_kinds_give_the_same_bytes(vocab: Path, tmp_path: Path) -> None:
    """One worker or three, JSON lines, compressed or not, Arrow or a glob of parts: the same files."""
    lines = write_jsonl(tmp_path / "x.jsonl", TEXTS).read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines[:999]) + gzip.compress(lines[999:]))
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(lines))
    write_arrow(tmp_path / "x.arrow", {"source": ["all"] * 300, "text": TEXTS})
    write_jsonl(tmp_path / "part-0.jsonl", TEXTS[:70])
    write_arrow(tmp_path / "part-1.arrow", {"text": TEXTS[70:]})
    runs = [
        ("x.jsonl", "1"),
        ("x.jsonl", "3"),
        ("x.arrow", "3"),
        ("x.arrow", "1"),
        ("part-*", "2"),
        ("x.jsonl.gz", "1"),
        ("x.jsonl.zst", "2"),
    ]
    found = []
    for number, (source, workers) in enumerate(runs):
        result = run(vocab, tmp_path / source, tmp_path / f"out{number}", "--workers", workers)
        assert result.returncode == 0, result.stderr
        found.append(outputs(tmp_path / f"out{number}"))
    assert all(output == found[0] for output in found)
    encode = sentencepiece.SentencePieceProcessor(model_file=str(vocab)).encode
    assert documents(tmp_path / "out0") == [encode(text) for text in TEXTS if text]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_each_key_has_its_own_output(vocab: Path, tmp_path: Path) -> None:
    """--json_keys text title writes two datasets."""
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS[:5], title="Engen")
    assert run(vocab, source, tmp_path / "out", "--json_keys", "text", "title").returncode == 0
    assert outputs(tmp_path / "out")[2]["sequences"] == 4
    assert outputs(tmp_path / "out", "title")[2]["sequences"] == 5


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_shard_without_tokens_is_a_valid_empty_dataset(vocab: Path, tmp_path: Path, texts: list[str]) -> None:
    """No documents, or only empty ones: legal in a chain of shards, and the counts say so."""
    assert run(vocab, write_jsonl(tmp_path / "x.jsonl", texts), tmp_path / "out", "--append_eod").returncode == 0
    manifest = outputs(tmp_path / "out")[2]
    assert (manifest["documents"], manifest["empty_documents"], manifest["tokens"]) == (len(texts), len(texts), 0)
    assert documents(tmp_path / "out") == []


@pytest.mark.parametrize("workers", ["1", "3"])
def test_a_wrong_line_is_named_and_nothing_is_written(vocab: Path, tmp_path: Path, workers: str) -> None:
    """Exit code 2, one line that names file and line, and no output."""
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    source.write_bytes(source.read_bytes() + b'{"text": \n')
    result = run(vocab, source, tmp_path / "out", "--workers", workers)
    check_refused(result, r"x\.jsonl, line 301 is not valid JSON", tmp_path)


def check_refused(result: subprocess.CompletedProcess[str], message: str, folder: Path, code: int = 2) -> None:
    """The error is one line that matches, the code is right, and nothing was published or left behind."""
    assert result.returncode == code
    errors = [line for line in result.stderr.splitlines() if not line.startswith(("Processed ", "Tokenising "))]
    assert len(errors) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(errors[0])
    assert [path.name for path in folder.iterdir() if path.name.startswith((".", "out"))] == []


def test_wrong_arrow_input(vocab: Path, tmp_path: Path) -> None:
    """A null, a cut stream and a file that is no Arrow stream are named."""
    good = write_arrow(tmp_path / "x.arrow", {"text": TEXTS, "source": ["s"] * 300}).read_bytes()
    write_arrow(tmp_path / "null.arrow", {"text": ["a", None]})
    check_refused(run(vocab, tmp_path / "null.arrow", tmp_path / "out"), r"row 2: 'text' is None", tmp_path)
    for name, content in {"end": good[:-8], "middle": good[: len(good) // 2]}.items():
        (tmp_path / f"{name}.arrow").write_bytes(content)
        result = run(vocab, tmp_path / f"{name}.arrow", tmp_path / "out")
        check_refused(result, rf"{name}\.arrow is not a whole Arrow stream", tmp_path)


def test_missing_input_exits_3(vocab: Path, tmp_path: Path) -> None:
    """A file that is not there is exit code 3."""
    check_refused(run(vocab, tmp_path / "none.jsonl", tmp_path / "out"), "no such file", tmp_path, 3)


def test_a_file_that_is_no_tokenizer_is_refused(vocab: Path, tmp_path: Path) -> None:
    """Each type names the other one's file."""
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    check_refused(
        run(source, source, tmp_path / "out"), "is not a SentencePiece model .*HuggingFaceTokenizer", tmp_path
    )
    result = run(vocab, source, tmp_path / "out", "--tokenizer_type", "HuggingFaceTokenizer")
    check_refused(result, r"is not a Hugging Face tokenizer\.json", tmp_path)


@pytest.mark.parametrize("flags", [["--split_sentences"], ["--merge_file", "merges.txt"]])
def test_flags_of_upstream_that_would_change_the_result_are_refused(tmp_path: Path, flags: list[str]) -> None:
    """They are refused with the reason, before anything is read."""
    result = run(tmp_path / "none", tmp_path / "none.jsonl", tmp_path / "out", *flags)
    assert result.returncode == 2
    assert f"{flags[0]} is refused: " in result.stderr


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([{"url": "a"}, None, {"url": "b"}], pa.struct([("url", pa.string())]), {"all": 3}),
        ([["a"], [], None], pa.list_(pa.string()), {"all": 3}),
        ([b"\xff", b"a", None], pa.binary(), {"all": 3}),
        ([1, 2, None], pa.timestamp("us"), {"all": 3}),
        (["a", None, "a"], pa.string(), {"a": 2, "(no source)": 1}),
        (["b", None, "a"], pa.dictionary(pa.int8(), pa.string()), {"b": 1, "(no source)": 1, "a": 1}),
    ],
)
def test_the_source_column_may_hold_anything(tmp_path: Path, values: list[Any], kind: Any, expected: Any) -> None:
    """Documents are counted by it where it holds strings, with or without nulls; else they are all of one source."""
    path = tmp_path / "x.arrow"
    table = pa.table({"text": ["et", "to", "tre"], "source": pa.array(values, kind), "other": pa.nulls(3)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (block,) = read_blocks(path, ["text"])
    found = columns(block, ["text"])
    assert found.texts["text"].to_pylist() == ["et", "to", "tre"]
    assert Counter(found.sources.to_pylist()) == expected


def test_too_many_sources_are_counted_together() -> None:
    """Beyond the limit only the sum is kept, whether it is passed in a block or by the sum of two shards."""
    ones = {name: np.ones(MOST_SOURCES + 1, np.int64) for name in COUNTS}
    names = pa.array([f"s{number}" for number in range(MOST_SOURCES + 1)])
    together = {MANY_SOURCES: dict.fromkeys(COUNTS, MOST_SOURCES + 1)}
    by_source = runpy.run_path(str(TOOL))["by_source"]
    assert by_source(names.dictionary_encode(), ones) == together
    few = by_source(names[:-1].dictionary_encode(), {name: values[:-1] for name, values in ones.items()})
    assert bounded(few) == few
    assert len(few) == MOST_SOURCES
    last = by_source(names[-1:].dictionary_encode(), {name: values[-1:] for name, values in ones.items()})
    assert bounded({**few, **last}) == together
    assert bounded({**together, **last}) == {MANY_SOURCES: dict.fromkeys(COUNTS, MOST_SOURCES + 2)}


def test_counts_by_source(vocab: Path, tmp_path: Path) -> None:
    """Each source's documents, characters, bytes, tokens and byte tokens, against counts made one by one."""
    sources = [("news", "forum", "tales")[i * i % 3 if i < 200 else 2] for i in range(300)]
    texts = [text + ("\U0001f600" if i % 11 == 0 else "") for i, text in enumerate(TEXTS)]
    source = write_arrow(tmp_path / "x.arrow", {"text": texts, "source": sources})
    assert run(vocab, source, tmp_path / "out", "--append_eod").returncode == 0
    manifest = outputs(tmp_path / "out")[2]
    encode = sentencepiece.SentencePieceProcessor(model_file=str(vocab)).encode
    assert list(manifest["sources"]) == ["forum", "news", "tales"]
    for name, counts in manifest["sources"].items():
        mine = [text for text, one in zip(texts, sources, strict=True) if one == name]
        ids = [encode(text) for text in mine]
        tokens = sum(len(one) + 1 for one in ids if one)
        byte_tokens = sum(3 <= token < 259 for one in ids for token in one)
        assert counts == {
            "documents": len(mine), "empty_documents": mine.count(""), "characters": sum(map(len, mine)),
            "bytes": sum(len(text.encode()) for text in mine), "tokens": tokens,
            "sequences": len(mine) - mine.count(""),
            "unknown_tokens": 0, "byte_tokens": byte_tokens,
            "tokens_per_byte": round(tokens / sum(len(text.encode()) for text in mine), 6),
            "fallback_rate": round(byte_tokens / tokens, 6),
        }  # fmt: skip
    assert sum(counts["byte_tokens"] for counts in manifest["sources"].values()) == manifest["byte_tokens"] > 50


@pytest.mark.parametrize("flags", [["--prepend_bos"], ["--prepend_bos", "--append_eod"], ["--append_eod"], []])
def test_bos_and_eod_stand_around_every_document_with_tokens(vocab: Path, tmp_path: Path, flags: list[str]) -> None:
    """As asked, in the ids and in the manifest; an empty document has neither."""
    assert run(vocab, write_jsonl(tmp_path / "x.jsonl", TEXTS), tmp_path / "out", *flags).returncode == 0
    encode = sentencepiece.SentencePieceProcessor(model_file=str(vocab)).encode
    before, after = [1] * ("--prepend_bos" in flags), [2] * ("--append_eod" in flags)
    assert documents(tmp_path / "out") == [[*before, *encode(text), *after] for text in TEXTS if text]
    manifest = outputs(tmp_path / "out")[2]
    assert (manifest["prepend_bos"], manifest["append_eod"]) == (bool(before), bool(after))


def run_here(monkeypatch: pytest.MonkeyPatch, vocab: Path, source: Path, prefix: Path, *flags: str) -> None:
    """Run it in this process; no input counts as small, and few characters are compared."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", command(vocab, source, prefix, *flags)[1:])
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr(encoder, "SMALL", 0)
        patch.setattr(agreement, "BLOCKS", ((0x20, 0x100),))
        patch.setattr(agreement_file, "folders", lambda: [])
        runpy.run_path(str(TOOL))["main"]()


def test_backends_give_the_same_bytes_and_say_so(
    vocab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """gigatoken and sentencepiece: one .bin and .idx, also with control texts and a long document."""
    texts = [*TEXTS, "en </s> hane", "  <s>", "Hane gol. " * 150_000, "engen"]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    found = {}
    for backend in ("gigatoken", "sentencepiece"):
        flags = ["--append_eod", "--workers", "3", "--tokenizer_backend", backend]
        run_here(monkeypatch, vocab, source, tmp_path / backend, *flags)
        assert f"Tokenising with {backend}" in capsys.readouterr().err
        found[backend] = outputs(tmp_path / backend)
    assert found["gigatoken"][:2] == found["sentencepiece"][:2]
    assert found["gigatoken"][2]["backends"] == {"gigatoken": 302, "sentencepiece": 2}
    assert found["sentencepiece"][2]["backends"] == {"sentencepiece": 304}
    encode = sentencepiece.SentencePieceProcessor(model_file=str(vocab)).encode
    assert documents(tmp_path / "gigatoken")[-2] == [*encode(texts[-2]), 2]


def test_an_unfit_model_is_tokenised_by_its_own_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that normalises text: sentencepiece's ids, and the reason on stderr and in the manifest."""
    vocab = train(tmp_path / "x.model", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    run_here(monkeypatch, vocab, source, tmp_path / "out")
    why = "the model normalises text by a table of sequences"
    assert f"Tokenising with sentencepiece (gigatoken is not used: {why})." in capsys.readouterr().err
    manifest = outputs(tmp_path / "out")[2]
    assert manifest["backends"] == {"sentencepiece": 300}
    assert manifest["why_not_fast"] == [why]
    encode = sentencepiece.SentencePieceProcessor(model_file=str(vocab)).encode
    assert documents(tmp_path / "out") == [encode(text) for text in TEXTS if text]
    with pytest.raises(UserError, match="gigatoken cannot stand in for sentencepiece"):
        run_here(monkeypatch, vocab, source, tmp_path / "forced", "--tokenizer_backend", "gigatoken")


def test_a_small_input_does_not_wait_for_gigatoken(vocab: Path, tmp_path: Path) -> None:
    """A tiny shard is tokenised by the tokenizer's own library, says so, and does not load gigatoken."""
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    arguments = command(vocab, source, tmp_path / "out")[1:]
    code = f"import runpy, sys; sys.argv = {arguments!r}; runpy.run_path({str(TOOL)!r})['main'](); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "(the input is so small that loading gigatoken would take longer)" in result.stderr
    assert not {"gigatoken", "awkward", "numba"} & set(result.stdout.split())
    assert outputs(tmp_path / "out")[2]["why_not_fast"] == []


@pytest.mark.parametrize("backend", ["auto", "gigatoken"])
def test_a_mismatch_of_a_sample_tokenises_everything_again(
    vocab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    """gigatoken errs in the last of many blocks: all bytes are the reference's, and the manifest counts it."""
    source = write_jsonl(tmp_path / "x.jsonl", [*TEXTS, *["Hane Ω"] * 90])
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(encoder, "SAMPLE_REST", 30)
    run_here(monkeypatch, vocab, source, tmp_path / "right", "--tokenizer_backend", "sentencepiece")
    call = Fast.__call__

    def err(self: Fast, texts: Any) -> Any:
        ids, sizes = call(self, texts)
        return (ids + 1, sizes) if any("Ω" in text for text in texts.to_pylist()) else (ids, sizes)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "open_fast", Fast)
        patch.setattr(Fast, "__call__", err)
        run_here(monkeypatch, vocab, source, tmp_path / "found", "--tokenizer_backend", backend)
    said = capsys.readouterr().err
    assert said.index("Tokenising with gigatoken") < said.index("(gigatoken is not used: its ids differ from sentencep")
    right, found = outputs(tmp_path / "right"), outputs(tmp_path / "found")
    assert found[:2] == right[:2]
    assert found[2]["backends"] == {"sentencepiece": 390}
    assert (right[2]["sample_mismatches"], found[2]["sample_mismatches"] > 0) == (0, True)
    assert found[2]["why_not_fast"][0].startswith("its ids differ from sentencepiece's on")


def test_a_vocabulary_over_65500_takes_int32(tmp_path: Path) -> None:
    """A tokenizer.json of 66,000 words: ids beyond uint16 are whole, and the manifest names the dtype."""
    words = {f"o{i}": i for i in range(66_000)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="o0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    source = write_jsonl(tmp_path / "x.jsonl", ["o65998 o1 nix", "o65535 o65536"])
    flags = ["--tokenizer_type", "HuggingFaceTokenizer", "--append_eod"]
    result = run(tmp_path / "tokenizer.json", source, tmp_path / "out", *flags)
    assert result.returncode == 0, result.stderr
    data, _, manifest = outputs(tmp_path / "out")
    assert struct.unpack("<7i", data) == (65998, 1, 0, 66000, 65535, 65536, 66000)
    assert (manifest["dtype"], manifest["unknown_tokens"], manifest["vocab_size"]) == ("int32", 1, 66_001)


def test_a_full_disk_publishes_nothing(vocab: Path, tmp_path: Path) -> None:
    """A write that the system refuses ends in one line and no output."""
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    result = subprocess.run(
        command(vocab, source, tmp_path / "out"), capture_output=True, text=True, timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )  # fmt: skip
    check_refused(result, r"cannot write .*\.bin.*File too large; free space", tmp_path, code=74)


def start(vocab: Path, source: Path, prefix: Path) -> subprocess.Popen[str]:
    """Start it with two workers, and return when it has tokenised the first block of many."""
    process = subprocess.Popen(
        [*command(vocab, source, prefix, "--workers", "2"), "--log_interval", "16"],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("Processed "):
        assert line
    return process


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 MB of documents."""
    path = tmp_path_factory.mktemp("large") / "x.jsonl"
    path.write_bytes(write_jsonl(path, TEXTS).read_bytes() * 1500)
    return path


def test_sigterm_leaves_nothing_and_the_next_run_is_complete(vocab: Path, large: Path, tmp_path: Path) -> None:
    """TERM to every process at once, as Slurm sends it: exit code 75, no output, no process; then it runs again."""
    process = start(vocab, large, tmp_path / "out")
    os.killpg(process.pid, signal.SIGTERM)
    assert "Traceback" not in process.communicate(timeout=600)[1]
    assert process.returncode == 75
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not list(tmp_path.iterdir())
    assert run(vocab, write_jsonl(tmp_path / "x.jsonl", TEXTS), tmp_path / "out").returncode == 0
    assert len(documents(tmp_path / "out")) == len([text for text in TEXTS if text])


def test_nothing_outlives_a_kill(vocab: Path, large: Path, tmp_path: Path) -> None:
    """KILL in the middle: every process is gone, and nothing is published."""
    process = start(vocab, large, tmp_path / "out")
    process.kill()
    process.communicate(timeout=600)  # returns when the last holder of stderr is gone
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not list(tmp_path.glob("out*"))


def test_a_run_after_kills_at_any_moment_gives_the_same_bytes(vocab: Path, tmp_path: Path) -> None:
    """Kills from the start of Python to the renames, then a whole run: its files are those of an undisturbed one."""
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS * 20)
    begun = time.monotonic()
    assert run(vocab, source, tmp_path / "whole", "--append_eod").returncode == 0
    whole = time.monotonic() - begun
    claim = tmp_path / "claim.json"
    for attempt, part in enumerate((0.3, 0.6, 0.8, 0.9, 0.95, None)):
        claim.write_text(json.dumps({"attempt": f"a{attempt}"}))
        environment = {**os.environ, "SNAKMODEL_CLAIM": str(claim), "SNAKMODEL_ATTEMPT": f"a{attempt}"}
        process = subprocess.Popen(
            command(vocab, source, tmp_path / "out", "--append_eod"), stderr=subprocess.DEVNULL, env=environment
        )
        try:
            process.wait(None if part is None else part * whole)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert process.returncode == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_it_starts_without_torch() -> None:
    """A task of a large array must not pay for torch or transformers."""
    code = f"import runpy, sys; runpy.run_path({str(TOOL)!r}); print({{'torch', 'transformers'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
