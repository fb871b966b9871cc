"""tools/build_index.py: what it writes, who takes it, and what a damaged or half-written index does."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from megatron_llm.data import gpt_dataset
from megatron_llm.data.gpt_dataset import Blend, GPTDataset
from megatron_llm.flags.parser import parse
from megatron_llm.training import batches
from run_contract.errors import InputsMissing, UserError
from tests.engine import engine_ranks
from tests.engine.data.test_gpt_dataset import corpus

SCRIPT = Path(__file__).parents[3] / "Megatron-LLM" / "tools" / "build_index.py"
SETTINGS = {
    "seq_length": 16,
    "seed": 5,
    "split": "80,15,5",
    "train_iters": 30,
    "global_batch_size": 8,
    "eval_interval": 10,
    "eval_iters": 2,
}


def command(folder: Path | None, data: object, **changes: object) -> list[str]:
    """The flags that decide the order of samples."""
    words = [str(part) for part in (data if isinstance(data, list) else [data])]
    values = {**SETTINGS, **changes, **({"index_path": folder} if folder else {})}
    return ["--data_path", *words, *(str(word) for name, value in values.items() for word in (f"--{name}", value))]


def run(argv: list[str]) -> tuple[object, str, str]:
    """Run the script in this process: exit code, output, errors."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [str(SCRIPT), *argv]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before
    return end.value.code, out.getvalue(), err.getvalue()


def opened(argv: list[str]) -> list[gpt_dataset.Samples | None]:
    """The training and validation samples as every rank of finetune.py gets them with these flags."""
    args = parse([*argv, "--save", "s", "--lr", "1e-3", "--micro_batch_size", "2"])
    size = args.training.global_batch_size
    assert size is not None
    return list(batches.datasets(args, size, batches.find_indices(args, size)))


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A corpus of 200 documents."""
    corpus(tmp_path / "x_text_document", 200, seed=3)
    return tmp_path / "x_text_document"


@pytest.fixture
def index(tmp_path: Path, prefix: Path) -> Path:
    """Its index, in a folder of its own."""
    assert run(command(tmp_path / "index", prefix))[0] == 0
    return tmp_path / "index"


def rows(samples: gpt_dataset.Samples | None) -> list[list[int]]:
    """All tokens."""
    assert samples is not None
    return [samples[k].tolist() for k in range(len(samples))]


def mapped(array: object) -> bool:
    """Whether an array is a memory map of a file."""
    return isinstance(array, np.memmap) or isinstance(getattr(array, "base", None), np.memmap)


def test_mapped_indices_are_those_of_memory(prefix: Path, index: Path) -> None:
    """Training and validation samples are the same from the folder, where all arrays are mapped, and from memory."""
    found, built = opened(command(index, prefix)), opened(command(None, prefix))
    for one, other in zip(found, built, strict=True):
        assert rows(one) == rows(other)
        assert isinstance(one, GPTDataset)
        assert isinstance(other, GPTDataset)
        for name in ("doc_idx", "sample_idx", "shuffle_idx"):
            assert mapped(getattr(one, name))
            assert not mapped(getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype
    names = {path.name.split("-")[0] for path in index.glob("*.json")}
    assert names == {"train", "valid", "test"}
    assert len(list(index.iterdir())) == 3 * 4


def test_a_blend_is_mapped_too(tmp_path: Path, prefix: Path) -> None:
    """The routes of a blend are read, not built, and lead to the same samples."""
    corpus(tmp_path / "y", 150, seed=4)
    data = [0.3, prefix, 0.7, tmp_path / "y"]
    assert run(command(tmp_path / "i", data))[0] == 0
    found, built = opened(command(tmp_path / "i", data)), opened(command(None, data))
    for one, other in zip(found, built, strict=True):
        assert isinstance(one, Blend)
        assert isinstance(other, Blend)
        assert mapped(one.dataset_index)
        assert mapped(one.dataset_sample_index)
        assert one.dataset_index.tolist() == other.dataset_index.tolist()
        assert one.dataset_sample_index.tolist() == other.dataset_sample_index.tolist()
        assert one[37].tolist() == other[37].tolist()


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"split": "81,14,5"}, {"seq_length": 17}, {"train_iters": 300}, {"global_batch_size": 80}]
)
def test_other_settings_do_not_match(prefix: Path, index: Path, change: dict[str, object]) -> None:
    """An index of another seed, split, length or number of samples is not taken: the error says what to run."""
    with pytest.raises(InputsMissing, match=r"no index of .* for train .* build it by tools/build_index.py"):
        opened(command(index, prefix, **change))


def test_other_data_do_not_match(tmp_path: Path, prefix: Path, index: Path) -> None:
    """The corpus written again with other documents, a blend of it, or the same under another name."""
    moved = tmp_path / "moved"
    for suffix in (".bin", ".idx"):
        moved.with_suffix(suffix).write_bytes(prefix.with_suffix(suffix).read_bytes())
    assert rows(opened(command(index, moved))[0]) == rows(opened(command(index, prefix))[0])
    with pytest.raises(InputsMissing):
        opened(command(index, [1, prefix]))
    corpus(prefix, 200, seed=4)
    with pytest.raises(InputsMissing):
        opened(command(index, prefix))


def test_beside_the_data(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --index_path the index goes beside the data and is found there; where there is none, a line says so."""
    opened(command(None, prefix))
    assert f"no index of the train samples in {prefix}.index: every rank builds it in" in capsys.readouterr().out
    assert run(command(None, prefix))[0] == 0
    found = opened(command(None, prefix))
    assert capsys.readouterr().out == ""
    assert isinstance(found[0], GPTDataset)
    assert mapped(found[0].doc_idx)


def test_what_is_there_is_left_alone(prefix: Path, index: Path) -> None:
    """The second run verifies and writes nothing."""
    before = {path.name: path.stat().st_ino for path in index.iterdir()}
    assert run(command(index, prefix))[1].count("is there already") == 3
    assert {path.name: path.stat().st_ino for path in index.iterdir()} == before


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "manifest"])
def test_a_damaged_index_is_an_error_and_is_built_again(prefix: Path, index: Path, damage: str) -> None:
    """Cut short, one bit wrong, gone or without a readable manifest: never trained on, and the script repairs it."""
    expected = {path.name: path.read_bytes() for path in index.iterdir()}
    array = next(index.glob("train-*.sample_idx.npy"))
    content = array.read_bytes()
    if damage == "cut":
        array.write_bytes(content[:-8])
    elif damage == "flip":
        array.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
    elif damage == "gone":
        array.unlink()
    else:
        next(index.glob("train-*.json")).write_text('{"files": 3}')
    with pytest.raises(UserError, match=r"the sample index .* is damaged: .* build it again with tools/build_index.py"):
        opened(command(index, prefix))
    code, output, _ = run(command(index, prefix))
    assert code == 0
    assert "is damaged" in output
    assert {path.name: path.read_bytes() for path in index.iterdir()} == expected


def test_builders_at_the_same_time(tmp_path: Path) -> None:
    """Four builders in one folder, one of them killed on its way: what they leave is what one alone writes."""
    prefix = tmp_path / "big"
    corpus(prefix, 60_000, seed=1)
    argv = command(tmp_path / "together", prefix, train_iters=20_000)
    builders = [subprocess.Popen([sys.executable, str(SCRIPT), *argv], stdout=subprocess.DEVNULL) for _ in range(4)]
    until = time.monotonic() + 600
    while not list(tmp_path.glob("together/.*.tmp-*")) and time.monotonic() < until:
        time.sleep(0.001)
    builders[0].kill()
    assert [builder.wait(timeout=600) for builder in builders[1:]] == [0] * 3
    assert run(command(tmp_path / "alone", prefix, train_iters=20_000))[0] == 0
    alone = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    together = {path.name: path.read_bytes() for path in (tmp_path / "together").iterdir() if path.name[0] != "."}
    assert together == alone


def test_arrays_without_their_manifest_are_no_index(prefix: Path, index: Path) -> None:
    """What a builder killed before its last rename leaves behind is not taken, and is built again."""
    manifest = next(index.glob("train-*.json"))
    manifest.unlink()
    with pytest.raises(InputsMissing):
        opened(command(index, prefix))
    assert run(command(index, prefix))[0] == 0
    assert manifest.exists()


def test_no_space_left(tmp_path: Path, prefix: Path) -> None:
    """A file that cannot be written whole is an error with the remedy, and nothing is left."""
    argv = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", sys.executable, str(SCRIPT)]
    more = command(tmp_path / "i", prefix, train_iters=300)
    done = subprocess.run([*argv, *more], capture_output=True, text=True)
    assert done.returncode == 74
    assert "no room for train-" in done.stderr
    assert "Free some space there" in done.stderr
    assert list((tmp_path / "i").iterdir()) == []


def test_mistakes(tmp_path: Path, prefix: Path) -> None:
    """No data, no global batch, a split without documents: one line, exit code 3 or 2."""
    code, _, errors = run(command(tmp_path / "i", tmp_path / "nothing"))
    assert (code, errors.count("\n")) == (3, 1)
    assert "nothing.idx does not exist" in errors
    argv = command(tmp_path / "i", prefix)
    where = argv.index("--global_batch_size")
    code, _, errors = run(argv[:where] + argv[where + 2 :])
    assert (code, errors.count("\n")) == (2, 1)
    assert "--global_batch_size is missing" in errors
    code, _, errors = run(command(tmp_path / "i", prefix, split="99,1,0", seq_length=2000))
    assert code == 2
    assert "--split 99,1,0 gives valid 2 of 200 documents" in errors
    assert not (tmp_path / "i").exists()


def test_a_test_split_too_small_to_read(tmp_path: Path, prefix: Path) -> None:
    """Training does not read the test split: one that fills no sample is said and left out."""
    code, output, _ = run(command(tmp_path / "i", prefix, split="80,20,0"))
    assert code == 0
    assert "no index for test:" in output
    assert "memory: up to" in output
    assert {path.name.split("-")[0] for path in (tmp_path / "i").iterdir()} == {"train", "valid"}


def test_training_with_an_index_is_training_without(tmp_path: Path, tiny_data: Path) -> None:
    """Two ranks that map the index report the same losses as two that build it in memory."""
    settings = {"seq_length": 32, "split": "90,10,0", "train_iters": 6, "eval_interval": 3}
    geometry = "--num_layers 1 --hidden_size 16 --num_attention_heads 2 --ffn_hidden_size 24 --no_tie_embed_logits"
    other = f"{geometry} --max_position_embeddings 64 --micro_batch_size 2 --lr 1e-3 --log_interval 1 --num_workers 1"
    assert run(command(tmp_path / "i", tiny_data, **settings))[0] == 0
    losses = []
    for folder in (None, tmp_path / "i"):
        save = tmp_path / f"save-{folder is None}"
        codes, text = engine_ranks.run(
            tmp_path, [*command(folder, tiny_data, **settings), *other.split(), "--save", save]
        )
        assert codes == [0, 0], text
        assert ("every rank builds it" in text) == (folder is None)
        records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
        losses.append([record.get("lm_loss", record.get("validation_loss")) for record in records])
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]
