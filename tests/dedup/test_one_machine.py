import pickle
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from run_contract.errors import UserError
from snakmodel.dedup.minhash.parameters import Parameters
from snakmodel.dedup.one_machine import deduplicate
from tests.conftest import PROJECT
from tests.dedup_run import ENVIRONMENT, clusters, corpus, kept, labels, whole

RECIPE = "--local --split train --column text --seed 42 --batch_size 4096 --num_perm 64 --threshold 0.85"
TEXT = "en lang tekst med mange ord"


def command(module: str, folder: Path, *words: str, first: Path | None = None) -> str:
    """What `python -m module` prints, run in a folder, with another folder first on Python's path."""
    environment = {**ENVIRONMENT, "PYTHONPATH": str(first)} if first else ENVIRONMENT
    argv = [sys.executable, "-m", module, *words]
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def demo() -> list[str]:
    """The demonstration's documents."""
    files = sorted((PROJECT / "demo/text").rglob("*.txt"))
    return [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]


@dataclass(frozen=True)
class Reference:
    """What text-dedup's own command made of a dataset in FOLDER/in."""

    folder: Path
    documents: list[str]
    clusters: set[frozenset[int]]
    rows: set[str]
    survivors: int


@pytest.fixture(scope="module", params=["generated", "demo"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """`python -m text_dedup.minhash` on generated near-duplicates and on the demonstration's text."""
    folder = tmp_path_factory.mktemp(request.param)
    documents = corpus(200) if request.param == "generated" else demo()
    numbers = list(range(len(documents)))
    datasets.Dataset.from_dict({"text": documents, "number": numbers}).save_to_disk(str(folder / "in"))
    words = ["--path", "in", "--output", "reference", *RECIPE.split(), *flags_for(request.param)]
    command("text_dedup.minhash", folder, *words, "--num_proc", "1", "--debug")
    found = pickle.loads((folder / "reference/uf.pkl").read_bytes())
    made = datasets.load_from_disk(str(folder / "reference"))
    joined = clusters(found.find(number) if number in found.parent else number for number in numbers)
    return Reference(folder, documents, joined, set(made["text"]), len(made))


def flags_for(name: str) -> list[str]:
    """Single lines have near-duplicates only by shorter n-grams."""
    return ["--ngram", "2", "--min_length", "3", "--hash_func", "xxh3"] if name == "demo" else []


def name_of(reference: Reference) -> str:
    return "demo" if "demo" in reference.folder.name else "generated"


def test_the_chain_finds_the_clusters_of_text_dedup(tmp_path: Path, reference: Reference) -> None:
    """Clusters and survivors of the four steps are those of the reference command; the lowest number survives."""
    given = {"ngram": 2, "min_length": 3, "hash_func": "xxh3"} if name_of(reference) == "demo" else {}
    stats = whole(tmp_path, reference.documents, 3, 7, Parameters(short_docs="drop", **given))
    assert len(reference.clusters) > 20
    assert clusters(labels(tmp_path)) == reference.clusters
    assert len(kept(tmp_path)) == stats["kept"] == reference.survivors
    assert all(label <= number for number, label in enumerate(labels(tmp_path)))


def test_the_command_drops_in_for_text_dedup(reference: Reference) -> None:
    """The published command line gives the same clusters, as many rows, all columns, and the summary."""
    words = [
        "--path",
        "in",
        "--output",
        "ours",
        *RECIPE.split(),
        *flags_for(name_of(reference)),
        "--num_proc",
        "2",
        "--debug",
    ]
    printed = command("snakmodel.dedup", reference.folder, *words, "--idx_column", "number")
    made = datasets.load_from_disk(str(reference.folder / "ours"))
    table = parquet.read_table(reference.folder / "ours/clusters.parquet")
    found = table.column("cluster").to_pylist()
    assert clusters(found) == reference.clusters
    assert len(made) == reference.survivors
    assert made["number"][:] == [number for number, label in enumerate(found) if number == label]
    assert made["text"][:] == [reference.documents[number] for number in made["number"]]
    assert made.features == datasets.load_from_disk(str(reference.folder / "reference")).features
    assert table.column("document").to_pylist() == table.column("number").to_pylist() == list(range(len(found)))
    lines = dict(line.split(":") for line in printed.splitlines() if line.count(":") == 1)
    summary = {name.strip(): value.strip() for name, value in lines.items()}
    assert (summary["Before"], summary["After"]) == (str(len(found)), str(len(made)))
    assert all(summary[step].endswith("s") for step in ("Loading", "MinHashing", "Clustering", "Filtering", "Saving"))
    assert sorted(path.name for path in reference.folder.glob(".*")) == []


def test_the_command_drops_in_for_the_published_version(tmp_path: Path, text_dedup_0_3_1: Path) -> None:
    """The rows that `--compat text-dedup-0.3.1` keeps are exactly those that text-dedup 0.3.1's own command keeps."""
    documents = [text.upper() if number % 17 == 0 else text for number, text in enumerate(corpus(100))]
    datasets.Dataset.from_dict({"text": documents, "n": range(len(documents))}).save_to_disk(str(tmp_path / "in"))
    words = ["--path", "in", *RECIPE.split(), "--output"]
    command("text_dedup.minhash", tmp_path, *words, "theirs", first=text_dedup_0_3_1)
    command("snakmodel.dedup", tmp_path, *words, "ours", "--compat", "text-dedup-0.3.1")
    ours, theirs = (datasets.load_from_disk(str(tmp_path / name)) for name in ("ours", "theirs"))
    assert ours.to_list() == theirs.to_list()
    assert 50 < len(ours) < 400


def run(folder: Path, data: Any, *words: str) -> Any:
    """Save a dataset, deduplicate it in this process with one worker, and load the result."""
    data.save_to_disk(str(folder / "in"))
    given = ["--path", str(folder / "in"), "--local", "--output", str(folder / "out"), "--column", "text"]
    deduplicate([*given, "--num_perm", "64", "--num_proc", "1", *words])
    return datasets.load_from_disk(str(folder / "out"))


def test_splits_features_and_slices(tmp_path: Path) -> None:
    """A split of a DatasetDict, chosen columns of any type, and a file of which only some rows count come out whole."""
    labels_ = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features(
        {"text": datasets.Value("large_string"), "kind": labels_, "tags": [{"x": datasets.Value("int8")}]}
    )
    rows = {"text": [TEXT, TEXT + " til", TEXT], "kind": [0, 1, 1], "tags": [[], [{"x": 3}], [{"x": 4}, {"x": 5}]]}
    data = datasets.Dataset.from_dict(rows, features=features)
    both = datasets.DatasetDict({"train": data, "test": data.select([1])})
    made = run(tmp_path, both, "--split", "train")
    assert made.features == features
    assert made.to_list() == data.select([0, 1]).to_list()
    with pytest.raises(UserError, match=r"no --split, but there are the splits 'train', 'test'"):
        run(tmp_path, both)
    with pytest.raises(UserError, match=r"--split dev, but there are the splits 'train', 'test'"):
        run(tmp_path, both, "--split", "dev")


def test_files_that_datasets_reads(tmp_path: Path) -> None:
    """Without --local the path is load_dataset's: a folder of JSON lines or parquet, also a slice of one."""
    table = pa.table({"text": [TEXT, "kort", TEXT, f"{TEXT} og flere", "kort"], "n": range(5)})
    for kind, expected, split in (("json", [0, 3], "train"), ("parquet", [1, 2, 3], "train[1:4]")):
        folder = tmp_path / kind
        folder.mkdir()
        if kind == "json":
            table.to_pandas().to_json(folder / "a.json", orient="records", lines=True)
        else:
            parquet.write_table(table, folder / "a.parquet")
        words = ["--path", str(folder), "--split", split, "--cache_dir", str(tmp_path / "cache"), "--num_proc", "1"]
        policy = ["--short_docs", "exact"] if kind == "parquet" else []
        deduplicate([*words, "--column", "text", "--output", str(tmp_path / "out" / kind), *policy])
        assert datasets.load_from_disk(str(tmp_path / "out" / kind))["n"][:] == expected


def test_short_documents_follow_the_version(tmp_path: Path) -> None:
    """0.4.0 drops short documents, 0.3.1 collapses them into one, and --short_docs overrides both."""
    data = datasets.Dataset.from_dict({"text": ["kort", TEXT, "kort", "andet", TEXT]})
    assert run(tmp_path, data)["text"][:] == [TEXT]
    assert run(tmp_path, data, "--compat", "text-dedup-0.3.1")["text"][:] == ["kort", TEXT]
    assert run(tmp_path, data, "--short_docs", "exact")["text"][:] == ["kort", TEXT, "andet"]


def test_dropped_documents_have_no_cluster(tmp_path: Path) -> None:
    """clusters.parquet says null for a short document that was dropped."""
    run(tmp_path, datasets.Dataset.from_dict({"text": ["kort", TEXT, TEXT]}), "--debug")
    assert parquet.read_table(tmp_path / "out/clusters.parquet")["cluster"].to_pylist() == [None, 1, 1]


def test_an_empty_dataset_stays_empty(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No rows in, no rows out, with the features; a folder without files, which `datasets` cannot open, is named."""
    data = datasets.Dataset.from_dict({"text": [TEXT], "n": [1]}).select([])
    data.save_to_disk(str(tmp_path / "in"), num_shards=1)
    words = ["--local", "--column", "text", "--num_proc", "1", "--output", str(tmp_path / "out")]
    deduplicate(["--path", str(tmp_path / "in"), *words])
    made = datasets.load_from_disk(str(tmp_path / "out"))
    assert (len(made), made.features) == (0, data.features)
    assert "Before                          : 0\n" in capfd.readouterr().out
    data.save_to_disk(str(tmp_path / "none"))
    with pytest.raises(UserError, match="none has no rows"):
        deduplicate(["--path", str(tmp_path / "none"), *words])


def test_verified_links(tmp_path: Path) -> None:
    """--verify_jaccard compares the texts of the dataset itself and says how many pairs it checked."""
    data = datasets.Dataset.from_dict({"text": [TEXT, TEXT.upper(), TEXT + " her"] * 3})
    made = run(tmp_path, data, "--verify_jaccard", "--threshold", "0.9", "--ngram", "1")
    assert made["text"][:] == [TEXT, TEXT + " her"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"txt": [TEXT]}, r"no column 'text'; its columns are 'txt'; did you mean"),
        ({"text": [1, 2]}, r"column 'text' holds int64; a column of strings is needed"),
        ({"text": [[TEXT]]}, r"column 'text' holds list.*; a column of strings is needed"),
        ({"text": [TEXT] * 7 + [None, TEXT]}, r"row 7 of column 'text' is null"),
    ],
)
def test_columns_that_are_no_text(tmp_path: Path, rows: dict[str, list[Any]], message: str) -> None:
    """A missing column, one of another type and nulls are errors that name column and row; nothing is published."""
    with pytest.raises(UserError, match=message):
        run(tmp_path, datasets.Dataset.from_dict(rows))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    """A lone surrogate cannot come in by JSON; bytes of one in an Arrow file are named with their row."""
    (tmp_path / "json").mkdir()
    (tmp_path / "json/a.json").write_text('{"text": "en to \\ud800 tre"}\n')
    words = [
        "--column",
        "text",
        "--num_proc",
        "1",
        "--output",
        str(tmp_path / "out"),
        "--cache_dir",
        str(tmp_path / "c"),
    ]
    with pytest.raises(UserError, match="surrogate pair in string is invalid"):
        deduplicate(["--path", str(tmp_path / "json"), "--split", "train", *words])
    good = pa.array([TEXT, "xxx"])
    offsets, bytes_ = good.buffers()[1:]
    wrong = bytes_.to_pybytes().replace(b"xxx", "\ud800".encode("utf-8", "surrogatepass"))
    bad = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(wrong))
    with pytest.raises(UserError, match=r"row 1 of column 'text' is not valid UTF-8 \(.* at byte 0; a lone surrogate"):
        run(tmp_path, datasets.Dataset(pa.table({"text": bad})))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hash_bits 128", "--hash_bits 128: only 64 is supported"),
        ("--num_proc 0", "--num_proc 0: must be 1 or more"),
        ("--b 3", "b = 3"),
        ("--b 10 --r 10", "b = 10"),
        ("--threshold 1.5", "threshold = 1.5"),
        ("--idx_column no", "--idx_column no: the columns are 'text'"),
    ],
)
def test_flags_without_a_meaning(tmp_path: Path, words: str, message: str) -> None:
    """What cannot be done as asked is refused before anything is read or written."""
    with pytest.raises(UserError, match=message):
        run(tmp_path, datasets.Dataset.from_dict({"text": [TEXT]}), *words.split())
    assert not (tmp_path / "out").exists()


def test_outputs_that_would_be_lost(tmp_path: Path) -> None:
    """A folder that is no dataset is not replaced, nor is the input; an earlier result is."""
    data = datasets.Dataset.from_dict({"text": [TEXT, TEXT]})
    assert len(run(tmp_path, data)) == len(run(tmp_path, data)) == 1
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/important.txt").write_text("x")
    with pytest.raises(UserError, match="exists and is not a dataset"):
        run(tmp_path, data, "--output", str(tmp_path / "notes"))
    for folder in (tmp_path / "in", tmp_path):
        with pytest.raises(UserError, match="would replace the input"):
            run(tmp_path, data, "--output", str(folder))
    assert (tmp_path / "notes/important.txt").exists()


def test_a_path_that_is_no_dataset(tmp_path: Path) -> None:
    """A folder that is not there, one that save_to_disk did not write, and a cut off Arrow file are named."""
    (tmp_path / "empty").mkdir()
    words = ["--local", "--column", "text", "--output", str(tmp_path / "out"), "--num_proc", "1"]
    for name in ("absent", "empty"):
        with pytest.raises(UserError, match=f"{name}.* cannot be read: .*Give a folder that save_to_disk wrote"):
            deduplicate(["--path", str(tmp_path / name), *words])
    datasets.Dataset.from_dict({"text": [TEXT] * 50}).save_to_disk(str(tmp_path / "in"))
    (file,) = (tmp_path / "in").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="is not a complete Arrow stream"):
        deduplicate(["--path", str(tmp_path / "in"), *words])


INSTANT = datetime(2020, 2, 29, 12)
SOURCES: dict[str, tuple[Any, list[Any]]] = {
    "struct": (pa.struct([("url", pa.string()), ("at", pa.timestamp("us"))]), [{"url": "a", "at": INSTANT}, None]),
    "list": (pa.list_(pa.string()), [["a", None], []]),
    "bytes": (pa.binary(), [b"\xff\x00", None]),
    "timestamp": (pa.timestamp("ns", "UTC"), [INSTANT, None]),
    "string": (pa.string(), ["a", None]),
    "float": (pa.float64(), [float("inf"), None]),
    "nulls": (pa.null(), [None, None]),
}


@pytest.mark.parametrize("whole_file", [True, False])
def test_columns_beside_the_text_are_carried_as_they_are(tmp_path: Path, whole_file: bool) -> None:
    """Whatever `source` holds, and other columns of every kind; read from the dataset's file or from a part of it."""
    words = [f"ord{number}" for number in range(30)]
    texts = [" ".join(words), " ".join(words[::-1]), " ".join(words), "nej"]
    for kind, (arrow_type, values) in SOURCES.items():
        others = {name: pa.array(both * 2, type_) for name, (type_, both) in SOURCES.items()}
        table = pa.table({"text": texts, "source": pa.array(values * 2, arrow_type), **others})
        data = datasets.Dataset(table)
        folder = tmp_path / kind
        data.save_to_disk(str(folder / "in"))
        given = str(folder / "in")
        if not whole_file:
            shuffled = datasets.load_from_disk(given).select([3, 0, 1, 2])
            shuffled.save_to_disk(str(folder / "part"))
            given = str(folder / "part")
        argv = ["--path", given, "--local", "--output", str(folder / "out"), "--column", "text", "--num_proc", "1"]
        deduplicate([*argv, "--short_docs", "keep"])
        made = datasets.load_from_disk(str(folder / "out")).with_format("arrow")[:]
        wanted = table.take([0, 1, 3] if whole_file else [3, 0, 1])
        assert made.schema.types == table.schema.types
        assert made.to_pydict() == wanted.to_pydict()
