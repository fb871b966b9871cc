"""preprocess_data.py --keep_columns and the merge: a row per sequence, with all that is known of its document."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from megatron_llm.data.indexed_dataset import IndexedDataset
from tests.engine.scripts.test_preprocess_data import TOOL, run, train, write_arrow, write_jsonl

MERGE = TOOL.with_name("merge_datasets.py")


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BPE model."""
    return train(tmp_path_factory.mktemp("vocab") / "tokenizer.model", normalization_rule_name="identity")


def documents(count: int) -> dict[str, list[Any]]:
    """Documents with an id, a nested column and one of nulls; every seventh is empty and gives no sequence."""
    random_ = random.Random(count)
    texts = ["" if i % 7 == 0 else "Hane nummer. " * random_.randint(1, 5) for i in range(count)]
    return {
        "text": texts,
        "source": [random_.choice(["news", "web"]) for _ in texts],
        "id": [f"a.jsonl:{i}" for i in range(count)],
        "score": [random_.choice([None, random_.random()]) for _ in texts],
        "tags": [{"of": [i]} for i in range(count)],
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of an Arrow stream."""
    with pa.ipc.open_stream(str(path)) as reader:
        found: list[dict[str, Any]] = reader.read_all().to_pylist()
    return found


def merged(folder: Path) -> subprocess.CompletedProcess[str]:
    """Merge all datasets of a folder."""
    command = [sys.executable, str(MERGE), "--input", str(folder), "--output_prefix", str(folder.parent / "merged")]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_row_per_sequence(tmp_path: Path, vocab: Path, shards: int) -> None:
    """However many shards: the rows are those of the documents that give a sequence, with the sequences' lengths."""
    columns = documents(400)
    (tmp_path / "shards").mkdir()
    for shard in range(shards):
        part = {name: values[400 * shard // shards : 400 * (shard + 1) // shards] for name, values in columns.items()}
        source = write_arrow(tmp_path / f"s{shard}.arrow", part, rows=37)
        prefix = tmp_path / "shards" / f"s{shard}"
        flags = ("--append_eod", "--workers", "2")
        done = run(vocab, source, prefix, *flags, "--keep_columns")
        assert done.returncode == 0, done.stderr
        run(vocab, source, tmp_path / "plain", *flags)
        for suffix in (".bin", ".idx"):
            assert (
                Path(f"{prefix}_text_document{suffix}").read_bytes()
                == (tmp_path / f"plain_text_document{suffix}").read_bytes()
            )
    done = merged(tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    sizes = IndexedDataset(tmp_path / "merged").sizes.tolist()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    expected = [{name: value for name, value in row.items() if name != "text"} for row in rows if row["text"]]
    found = read(tmp_path / "merged.columns.arrow")
    assert found == [{**row, "tokens": size} for row, size in zip(expected, sizes, strict=True)]
    assert json.loads((tmp_path / "merged.json").read_text())["columns"] == ["source", "id", "score", "tags", "tokens"]
    assert "columns" not in json.loads((tmp_path / "plain_text_document.json").read_text())


def test_columns_that_do_not_fit_are_refused(tmp_path: Path, vocab: Path) -> None:
    """JSON lines, shards with different columns, a column that has the name of ours, and a file that is gone."""
    lines = write_jsonl(tmp_path / "a.jsonl", ["en hane"])
    done = run(vocab, lines, tmp_path / "out", "--keep_columns")
    assert done.returncode == 2
    assert "is no .arrow file" in done.stderr
    taken = write_arrow(tmp_path / "taken.arrow", {"text": ["en hane"], "tokens": [1]})
    done = run(vocab, taken, tmp_path / "out", "--keep_columns")
    assert done.returncode == 2
    assert "has a column 'tokens'" in done.stderr
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "shards").mkdir()
    for name, column in (("a", ["x"]), ("b", [1])):
        source = write_arrow(tmp_path / f"{name}.arrow", {"text": ["en hane"], "url": column})
        assert run(vocab, source, tmp_path / "shards" / name, "--keep_columns").returncode == 0
    done = merged(tmp_path / "shards")
    assert done.returncode == 2
    assert "url (int64)" in done.stderr
    assert "url (string)" in done.stderr
    (tmp_path / "shards" / "b_text_document.columns.arrow").unlink()
    done = merged(tmp_path / "shards")
    assert done.returncode == 3
    assert "b_text_document.columns.arrow does not exist" in done.stderr
