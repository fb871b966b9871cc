"""merge_datasets.py: the merge of shards is the serial run, and shards that do not fit are refused."""

from __future__ import annotations

import json
import os
import re
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from megatron_llm.data import indexed_dataset
from megatron_llm.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

TOOLS = Path(__file__).parents[3] / "Megatron-LLM/tools"
TEXTS = [f"Hane nummer {i} gol højt over engen. " * (i % 5) for i in range(140)]
SUFFIXES = (".bin", ".idx", ".json")


def tool(name: str, *flags: object) -> subprocess.CompletedProcess[str]:
    """Run one of the tools."""
    argv = [sys.executable, str(TOOLS / name), *map(str, flags)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `all_text_document.*` of one serial run, and `shards/` of seven, the third without documents."""
    folder = tmp_path_factory.mktemp("tokens")
    vocab = folder / "tokenizer.model"
    with vocab.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=310, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, pad_id=-1, minloglevel=2,
        )  # fmt: skip
    shards = [TEXTS[:30], TEXTS[30:31], [], TEXTS[31:80], TEXTS[80:100], TEXTS[100:139], TEXTS[139:]]
    for name, texts in [("all", TEXTS), *((f"shards/s-{i}", shard) for i, shard in enumerate(shards))]:
        (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        result = tool(
            "preprocess_data.py", "--input", folder / "x.jsonl", "--output_prefix", folder / name,
            "--vocab_file", vocab, "--tokenizer_type", "SentencePieceTokenizer", "--no_new_tokens", "--append_eod",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def shards(serial: Path, tmp_path: Path) -> Path:
    """A copy of the seven shards, to damage."""
    (tmp_path / "shards").mkdir()
    for path in (serial / "shards").iterdir():
        (tmp_path / "shards" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "shards"


def merge(shards: Path) -> subprocess.CompletedProcess[str]:
    """Merge a folder of shards to `merged` beside it."""
    return tool("merge_datasets.py", "--input", shards, "--output_prefix", shards.parent / "merged")


def test_merge_equals_the_serial_run(serial: Path, shards: Path) -> None:
    """Seven shards, one of them empty, give byte for byte the .bin, .idx and .json of one run; twice the same."""
    for _ in range(2):
        result = merge(shards)
        assert result.returncode == 0, result.stderr
        for suffix in SUFFIXES:
            merged = (shards.parent / f"merged{suffix}").read_bytes()
            assert merged == (serial / f"all_text_document{suffix}").read_bytes()
    assert len(merged) > 100
    assert sorted(path.name for path in shards.parent.iterdir()) == [
        "merged.bin",
        "merged.idx",
        "merged.json",
        "shards",
    ]


def check_refused(shards: Path, message: str, code: int = 2) -> None:
    """One line that matches on stderr, the exit code, and no output."""
    result = merge(shards)
    assert (result.returncode, len(result.stderr.splitlines())) == (code, 1)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(result.stderr)
    assert [path.name for path in shards.parent.iterdir()] == ["shards"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_exit_3(shards: Path, suffix: str) -> None:
    """A shard without one of its three files is not whole."""
    (shards / f"s-4_text_document{suffix}").unlink()
    check_refused(shards, rf"s-4_text_document{suffix} does not exist", 3)


def test_a_manifest_alone_is_a_lost_shard(shards: Path) -> None:
    """Where both files of a shard are gone and its manifest is not, the shard is not passed over."""
    for suffix in (".bin", ".idx"):
        (shards / f"s-4_text_document{suffix}").unlink()
    check_refused(shards, r"s-4_text_document\.(bin|idx) does not exist", 3)


def test_an_empty_folder_is_exit_3(tmp_path: Path) -> None:
    """Nothing to merge."""
    (tmp_path / "shards").mkdir()
    check_refused(tmp_path / "shards", r"holds no \.bin and \.idx files", 3)


def test_a_truncated_bin_is_refused(shards: Path) -> None:
    """The byte count of every .bin must be what its index says."""
    path = shards / "s-5_text_document.bin"
    path.write_bytes(path.read_bytes()[:-2])
    check_refused(shards, r"s-5_text_document\.bin has \d+ bytes, but its \.idx says")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "tokenizer_fingerprint",
            "0" * 32,
            "s-3_text_document does not fit .*s-0_text_document: tokenizer_fingerprint",
        ),
        ("append_eod", False, "append_eod is False, not True"),
        ("vocab_size", 311, "vocab_size is 311, not 310"),
        ("tokens", 5, "states .* its .idx has"),
        ("dtype", "int32", "states .* its .idx has"),
        ("prepend_bos", True, "prepend_bos is True, not False"),
        ("bytes", 5, "s-3_text_document.json does not add up: bytes is 5, its sources have"),
        ("sources", {"x": {"documents": 1}}, "does not add up: documents is 49, its sources have 1"),
        ("colour", "red", "s-3_text_document.json is not a manifest"),
    ],
)
def test_manifests_must_agree(shards: Path, key: str, value: Any, message: str) -> None:
    """Shards of another tokenizer or EOD policy, or with counts that are not true, are refused by name."""
    path = shards / "s-3_text_document.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    check_refused(shards, message)


def test_shards_of_another_dtype_are_refused(shards: Path) -> None:
    """A shard of int32 ids does not go into a .bin of uint16."""
    stem = shards / "s-6_text_document"
    with IndexedDatasetWriter(stem.with_suffix(".bin"), stem.with_suffix(".idx"), np.dtype("<i4")) as writer:
        writer.add(np.array([1, 2]), np.array([2], dtype=np.int32))
    counts = {**json.loads(stem.with_suffix(".json").read_text()), "dtype": "int32", "tokens": 2, "sequences": 1}
    del counts["sources"]
    stem.with_suffix(".json").write_text(json.dumps(counts))
    check_refused(shards, "s-6_text_document does not fit .*dtype is 'int32', not 'uint16'")


def test_the_output_may_not_lie_among_the_shards(shards: Path) -> None:
    """Otherwise the next merge would read it."""
    result = tool("merge_datasets.py", "--input", shards, "--output_prefix", shards / "all_text_document")
    assert result.returncode == 2
    assert "lies in --input" in result.stderr


def test_documents_of_several_sequences_keep_their_borders(tmp_path: Path) -> None:
    """Megatron files with several sequences a document: their document indices are shifted, not rebuilt."""
    header = indexed_dataset.HEADER.pack(indexed_dataset.MAGIC, 1, 8, 3, 3)
    arrays = [np.array([1, 2, 1], "<i4"), np.array([0, 2, 6], "<i8"), np.array([0, 2, 3], "<i8")]
    (tmp_path / "x.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    (tmp_path / "x.bin").write_bytes(np.arange(4, dtype="<u2").tobytes())
    with IndexedDatasetWriter(tmp_path / "y.bin", tmp_path / "y.idx", np.dtype("<u2")) as writer:
        for _ in range(2):
            writer.append(IndexedDataset(tmp_path / "x"))
    merged = IndexedDataset(tmp_path / "y")
    assert merged.documents.tolist() == [0, 2, 3, 5, 6]
    assert merged.pointers.tolist() == [0, 2, 6, 8, 10, 14]
    assert merged.tokens.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_counts_by_source_are_the_sums_over_the_shards(shards: Path) -> None:
    """Also when a source is in some shards only, and when a shard was encoded by another library."""
    path = shards / "s-3_text_document.json"
    manifest = json.loads(path.read_text())
    manifest["sources"] = {"other": manifest["sources"]["all"]}
    manifest["backends"], manifest["why_not_fast"] = {"gigatoken": 49}, ["it failed: here"]
    manifest["sample_mismatches"] = 2
    path.write_text(json.dumps(manifest))
    path = shards / "s-2_text_document.json"
    manifest = json.loads(path.read_text())
    del manifest["sample_mismatches"]  # as the version before wrote it
    path.write_text(json.dumps(manifest))
    assert merge(shards).returncode == 0
    merged = json.loads((shards.parent / "merged.json").read_text())
    assert {name: counts["documents"] for name, counts in merged["sources"].items()} == {"all": 91, "other": 49}
    for name in ("documents", "characters", "bytes", "tokens", "sequences"):
        assert sum(counts[name] for counts in merged["sources"].values()) == merged[name]
    assert merged["backends"] == {"gigatoken": 49, "sentencepiece": 91}
    assert merged["sample_mismatches"] == 2
    assert merged["why_not_fast"] == ["it failed: here"]


def test_shards_of_megatrons_own_tools_are_merged_without_manifests(serial: Path, shards: Path) -> None:
    """No .json at all, and names that do not end in _document: the same .bin and .idx, and no .json."""
    for path in sorted(shards.iterdir()):
        path.rename(
            path.with_name(path.name.replace("_text_document", ""))
        ) if path.suffix != ".json" else path.unlink()
    assert merge(shards).returncode == 0
    for suffix in (".bin", ".idx"):
        assert (shards.parent / f"merged{suffix}").read_bytes() == (serial / f"all_text_document{suffix}").read_bytes()
    assert not (shards.parent / "merged.json").exists()


def test_a_full_disk_publishes_nothing(shards: Path) -> None:
    """A write that the system refuses ends in one line, and no output."""
    argv = [sys.executable, str(TOOLS / "merge_datasets.py"), "--input", str(shards)]
    result = subprocess.run(
        [*argv, "--output_prefix", str(shards.parent / "merged")], capture_output=True, text=True, timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)),
    )  # fmt: skip
    assert result.returncode == 74
    assert re.fullmatch(r"error: cannot write .*: File too large; free space.*\n", result.stderr)
    assert [path.name for path in shards.parent.iterdir()] == ["shards"]


def test_a_merge_past_two_to_the_31_tokens_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sparse shards of 2**30 tokens each: pointers, sums and the .bin's length are exact.

    Only the copy is replaced, by one that leaves holes where the shards have them, instead of 6 GB of zeros.
    """

    def copy_sparsely(source: int, target: int, size: int) -> None:
        end = os.lseek(target, 0, os.SEEK_CUR) + size
        os.lseek(target, end - 2, os.SEEK_SET)
        os.write(target, os.pread(source, 2, size - 2))

    monkeypatch.setattr(indexed_dataset, "copy_file", copy_sparsely)
    (tmp_path / "shards").mkdir()
    for name in "abc":
        stem = tmp_path / "shards" / name
        header = indexed_dataset.HEADER.pack(indexed_dataset.MAGIC, 1, 8, 2, 3)
        sizes, pointers = np.array([2**30 - 1, 1], "<i4"), np.array([0, 2**31 - 2], "<i8")
        arrays = (sizes, pointers, np.array([0, 1, 2], "<i8"))
        stem.with_suffix(".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
        with stem.with_suffix(".bin").open("wb") as file:
            file.seek(2**31 - 2)
            file.write(name.encode() * 2)
    argv = ["merge_datasets.py", "--input", str(tmp_path / "shards"), "--output_prefix", str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(TOOLS / "merge_datasets.py"))["main"]()
    merged = IndexedDataset(tmp_path / "merged")
    assert merged.pointers.tolist() == [k * 2**31 + offset for k in range(3) for offset in (0, 2**31 - 2)]
    assert len(merged.tokens) == 3 * 2**30
    assert [merged.get(i).tobytes() for i in (1, 3, 5)] == [b"aa", b"bb", b"cc"]
