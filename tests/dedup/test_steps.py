import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from run_contract.errors import InputsMissing, UserError
from run_contract.publish import write_json
from snakmodel.dedup.components import DROPPED
from snakmodel.dedup.filter import filter_shard
from snakmodel.dedup.minhash.parameters import Parameters
from snakmodel.dedup.signature_file import write_array
from snakmodel.dedup.signatures import signatures
from snakmodel.export_text import export_shard, read_counts
from snakmodel.shards.arrow_stream import NO_SOURCE, SCHEMA, Rows, open_stream, write_stream
from snakmodel.shards.counts import MANY_SOURCES, MOST_SOURCES, Amounts
from tests.dedup_run import (
    ENVIRONMENT,
    arrow_shards,
    corpus,
    join,
    keep,
    kept,
    kept_sizes,
    labels,
    link,
    sign,
    whole,
    write_shards,
)


def test_results_depend_neither_on_shards_nor_on_ranges(tmp_path: Path) -> None:
    """1, 3 and 16 shards with 1, 7 and 64 ranges give the same labels and the same kept documents."""
    documents = corpus()
    results = []
    for shards in (1, 3, 16):
        for ranges in (1, 7, 64):
            run = tmp_path / f"{shards}-{ranges}"
            stats = whole(run, documents, shards, ranges, Parameters())
            del stats["shards"]
            results.append((labels(run), kept(run), stats))
    assert all(result == results[0] for result in results)
    expected = [text for number, text in enumerate(documents) if results[0][0][number] == number]
    assert results[0][1] == expected


def test_short_documents_are_counted_under_every_policy(tmp_path: Path) -> None:
    """`exact` keeps one of each text, `collapse` one, `keep` all and `drop` none of the short documents."""
    documents = ["ja", "ja", "nej", "en lang tekst med mange ord", "", "en lang tekst med mange ord"]
    expected = {
        "exact": (["ja", "nej", documents[3], ""], 2, 0),
        "collapse": (["ja", documents[3]], 4, 0),
        "keep": (["ja", "ja", "nej", documents[3], ""], 1, 0),
        "drop": ([documents[3]], 1, 4),
    }
    for policy, (survivors, duplicates, dropped) in expected.items():
        stats = whole(tmp_path / policy, documents, 2, 3, Parameters(short_docs=policy))
        assert kept(tmp_path / policy) == survivors
        assert (stats["short_documents"], stats["duplicates"], stats["dropped"]) == (4, duplicates, dropped)
        assert stats["kept"] == len(survivors)
        assert stats["removed"] == duplicates + dropped
    assert labels(tmp_path / "drop") == [-1, -1, -1, 3, -1, 3]


def test_shards_without_documents_pass_through(tmp_path: Path) -> None:
    """Empty shards (a range that holds no document's first byte) are shards like any other."""
    stats = whole(tmp_path, ["en lang tekst med mange ord"], 3, 2, Parameters())
    assert stats["documents"] == stats["kept"] == 1
    assert kept(tmp_path) == ["en lang tekst med mange ord"]


def test_running_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """Every file of two runs is byte-identical, and a step that runs again replaces its output by the same bytes."""
    for name in ("a", "b"):
        whole(tmp_path / name, corpus(), 2, 3, Parameters())
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 2 + 4 + 6 + 2 + 4 + 4
    join(tmp_path / "a", 2, 3)
    keep(tmp_path / "a", 1)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()) == files


def test_filter_keeps_all_columns(tmp_path: Path) -> None:
    """Columns beside the text, and the features that `datasets` stores in the schema, survive the filter."""
    data = datasets.Dataset.from_dict({"text": ["en lang tekst med mange ord"] * 2 + ["x"], "url": ["u", "v", "w"]})
    (tmp_path / "arrow").mkdir()
    data.to_parquet(str(tmp_path / "x.parquet"))
    table = data.data.table
    write_stream(tmp_path / "arrow/shard-00000.arrow", table.schema, table.to_batches())
    sign(tmp_path, 1, 1, Parameters())
    link(tmp_path, 1, 1)
    join(tmp_path, 1, 1)
    assert keep(tmp_path, 0) == {"documents": 2, "removed": 1, "sources": {}}
    found = datasets.Dataset.from_file(str(tmp_path / "dedup/kept/shard-00000.arrow"))
    assert found.features == data.features
    assert found["url"][:] == ["u", "w"]


def rich_table(texts: list[str]) -> pa.Table:
    """Documents with an id and further columns of many types, some of which Arrow itself cannot filter."""
    numbers = list(range(len(texts)))
    nested = [{"url": f"u{n}", "tags": [f"t{n}", None] if n % 3 else None} if n % 5 else None for n in numbers]
    columns = {
        "id": pa.array([f"id-{n}" for n in numbers]),
        "text": pa.array(texts, pa.large_string()),
        "source": pa.array(["s" if n % 2 else "t" for n in numbers]),
        "nested": pa.array(nested),
        "map": pa.array([[("k", n)] for n in numbers], pa.map_(pa.string(), pa.int64())),
        "when": pa.array(numbers, pa.timestamp("ns", "UTC")),
        "category": pa.array([f"c{n % 3}" for n in numbers]).dictionary_encode(),
        "bytes": pa.array([bytes([n % 256]) for n in numbers]),
    }
    return pa.table(columns, metadata={"owner": "tests"})


@pytest.mark.parametrize("view", [False, True])
def test_filter_keeps_columns_of_any_type(tmp_path: Path, view: bool) -> None:
    """Nested columns, an id and the schema's metadata survive, with cluster sizes and without."""
    table = rich_table([*corpus(12), *["aldrig set før i denne tekst"] * 3])
    if view:
        table = table.append_column(
            "view", pa.array([f"a long string {n}" for n in range(len(table))], pa.string_view())
        )
    for shard in range(2):
        (tmp_path / "arrow").mkdir(exist_ok=True)
        part = table.slice(shard * 40, 40)
        write_stream(tmp_path / f"arrow/shard-{shard:05d}.arrow", table.schema, part.to_batches(9))
    sign(tmp_path, 2, 2, Parameters())
    link(tmp_path, 2, 2)
    join(tmp_path, 2, 2, with_sizes=True)
    chosen = [label == number for number, label in enumerate(labels(tmp_path))]
    expected = [row for row, wanted in zip(table.to_pylist(), chosen, strict=True) if wanted]
    assert 10 < len(expected) < 50
    for with_sizes in (False, True):
        found = []
        for shard in range(2):
            keep(tmp_path, shard, with_sizes)
            with open_stream(tmp_path / f"dedup/kept/shard-{shard:05d}.arrow") as reader:
                assert reader.schema.metadata == table.schema.metadata
                found += reader.read_all().to_pylist()
        sizes = [row.pop("cluster_size", None) for row in found]
        assert found == expected
        assert (None in sizes) is not with_sizes


def test_cluster_sizes_are_those_of_a_plain_count(tmp_path: Path) -> None:
    """Whatever the shards, ranges and policy; what nothing resembles has 1, and other bytes stay as they are."""
    documents = corpus(30)
    for policy in ("exact", "drop"):
        found = []
        for shards, ranges in ((1, 1), (4, 3)):
            run = tmp_path / f"{policy}-{shards}"
            whole(run, documents, shards, ranges, Parameters(short_docs=policy), with_sizes=True)
            counts = Counter(label for label in labels(run) if label != DROPPED)
            found.append(kept_sizes(run))
            assert found[-1] == [counts[number] for number in sorted(counts)]
            assert len(kept(run)) == len(counts)
            plain = tmp_path / f"{policy}-{shards}-plain"
            whole(plain, documents, shards, ranges, Parameters(short_docs=policy))
            for path in plain.rglob("*"):
                if path.is_file() and path.parent.name != "kept":
                    assert path.read_bytes() == (run / path.relative_to(plain)).read_bytes(), path
            assert not (plain / "dedup/components/sizes").exists()
        assert found[0] == found[1]
        assert {1, 2} < set(found[0])


def test_a_column_cluster_size_and_foreign_sizes_are_refused(run: Path) -> None:
    """A column of that name is not overwritten; sizes that are missing, foreign or of another number are named."""
    join(run, 3, 4, with_sizes=True)
    sizes = run / "dedup/components/sizes"
    shutil.copy(sizes / "shard-00001.json", sizes / "saved.json")
    shutil.copy(sizes / "shard-00000.json", sizes / "shard-00001.json")
    with pytest.raises(UserError, match=r"sizes/shard-00001\.npy was made for other texts than"):
        keep(run, 1, with_sizes=True)
    shutil.move(sizes / "saved.json", sizes / "shard-00001.json")
    write_array(sizes / "shard-00001.npy", np.array([1, 1]))
    with pytest.raises(UserError, match=r"holds 2 sizes for the \d+ documents kept; run dedup components again"):
        keep(run, 1, with_sizes=True)
    (sizes / "shard-00002.npy").unlink()
    with pytest.raises(InputsMissing, match=r"shard-00002\.npy missing"):
        keep(run, 2, with_sizes=True)
    table = pa.table({"text": ["en tekst"], "cluster_size": [4]})
    write_stream(run / "arrow/shard-00000.arrow", table.schema, table.to_batches())
    sign(run, 3, 4, Parameters())
    link(run, 3, 4)
    join(run, 3, 4, with_sizes=True)
    with pytest.raises(UserError, match=r"shard-00000\.arrow has a column 'cluster_size' already"):
        keep(run, 0, with_sizes=True)
    assert keep(run, 0)["documents"] == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished")
    whole(run, corpus()[:60], 3, 4, Parameters())
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with 3 shards and 4 ranges, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def test_signatures_of_other_parameters_are_refused(run: Path) -> None:
    """Signature files made with different flags, or cut into other ranges, name the two files and what differs."""
    arrow, signature = run / "arrow/shard-00001.arrow", run / "dedup/signatures/shard-00001"
    signatures(Rows(arrow), signature, "text", 4, Parameters(threshold=0.8))
    with pytest.raises(UserError, match=r"shard-00000.sig and .*shard-00001.sig .*different parameters.*0\.85.*0\.8"):
        link(run, 3, 4)
    signatures(Rows(arrow), signature, "text", 5, Parameters())
    with pytest.raises(UserError, match="different ranges: 4 and 5"):
        join(run, 3, 4)


def test_damaged_signature_files_are_refused(run: Path) -> None:
    """A file cut at any of many places, a flipped byte anywhere and a foreign file are errors that name the file."""
    path = run / "dedup/signatures/shard-00002.sig"
    content = path.read_bytes()
    for size in [*range(0, len(content), 61), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"shard-00002\.sig"):
            link(run, 3, 4)
    for position in range(0, len(content), 61):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(UserError, match=r"shard-00002\.sig"):
            link(run, 3, 4)


def test_other_numbers_of_shards_and_ranges_are_refused(run: Path) -> None:
    """Too few files are missing inputs; more files than told, and ranges beyond the cut, are errors."""
    with pytest.raises(InputsMissing, match=r"lacks 1 of 4 files, the first is shard-00003\.sig"):
        link(run, 4, 4)
    with pytest.raises(UserError, match=r"holds shard-00002\.sig although --shards is 2"):
        link(run, 2, 4)
    with pytest.raises(UserError, match=r"--range 4: .* 0 to 3"):
        link(run, 3, 5)
    with pytest.raises(UserError, match=r"--ranges 3: .* have 4"):
        join(run, 3, 3)
    (run / "dedup/buckets/range-00002.npy").unlink()
    with pytest.raises(InputsMissing, match=r"lacks 1 of 4 files, the first is range-00002\.npy"):
        join(run, 3, 4)


def test_links_of_other_texts_are_refused(run: Path) -> None:
    """Links are only joined with the signature files that they were made from."""
    write_shards(run / "arrow", corpus()[60:120], 3)
    sign(run, 3, 4, Parameters())
    with pytest.raises(UserError, match=r"range-00000\.npy was made from other signature files"):
        join(run, 3, 4)


def test_a_missing_or_foreign_removal_list_is_an_error(run: Path) -> None:
    """A shard is never filtered without its own list: absent, of another shard, of other texts, or cut off."""
    removed = run / "dedup/components/removed"
    target = run / "dedup/kept/again"
    with pytest.raises(UserError, match="made for other texts"):
        filter_shard(arrow_shards(run, 1)[0], removed / "shard-00001.npy", target)
    write_shards(run / "arrow", corpus()[:60], 4)
    with pytest.raises(UserError, match="made for other texts"):
        filter_shard(arrow_shards(run, 1)[0], removed / "shard-00000.npy", target)
    write_shards(run / "arrow", corpus()[:60], 3)
    list_ = removed / "shard-00000.npy"
    list_.write_bytes(list_.read_bytes()[:-2])
    with pytest.raises(UserError, match="damaged"):
        filter_shard(arrow_shards(run, 1)[0], list_, target)
    list_.unlink()
    with pytest.raises(InputsMissing, match=r"shard-00000\.npy missing"):
        filter_shard(arrow_shards(run, 1)[0], list_, target)
    assert not list((run / "dedup/kept").glob("*again*"))


def test_a_cut_off_arrow_file_is_refused(run: Path) -> None:
    """Arrow takes a stream that ends between batches for a whole one; here the end mark must be there."""
    path = run / "arrow/shard-00000.arrow"
    path.write_bytes(path.read_bytes()[: -len(b"\xff\xff\xff\xff\0\0\0\0")])
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        assert reader.read_all().num_rows == 20
    with pytest.raises(UserError, match="not a complete Arrow stream"):
        sign(run, 1, 4, Parameters())


def test_unknown_column_and_null_documents_are_refused(tmp_path: Path) -> None:
    """The message names the columns there are, or the row."""
    write_shards(tmp_path, ["a"], 1)
    with pytest.raises(UserError, match=r"no column 'txt'; its columns are 'text', 'source'; did you mean 'text'\?"):
        signatures(Rows(tmp_path / "shard-00000.arrow"), tmp_path / "x", "txt", 1, Parameters())
    batch = pa.record_batch([pa.array(["a", None], pa.large_string()), pa.array(["s", "s"])], schema=SCHEMA)
    write_stream(tmp_path / "null.arrow", SCHEMA, [batch])
    with pytest.raises(UserError, match="row 1 of column 'text' is null"):
        signatures(Rows(tmp_path / "null.arrow"), tmp_path / "x", "text", 1, Parameters())


def test_command_line(tmp_path: Path) -> None:
    """The four documented commands work in order; a missing input exits 3 with one line."""

    def command(step: str, **flags: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "snakmodel.dedup", step]
        words += [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        return subprocess.run(words, capture_output=True, text=True, check=False, env=ENVIRONMENT)

    write_shards(tmp_path / "arrow", ["en lang tekst med mange ord"] * 2, 1)
    arrow, work = tmp_path / "arrow/shard-00000.arrow", tmp_path / "dedup"
    name, shards = "shard-00000", work / "signatures"
    early = command("buckets", signatures=shards, shards=1, range=0, output=work / "buckets/range-00000")
    assert (early.returncode, early.stderr.count("\n")) == (3, 1)
    numbers = {"num_perm": 64, "threshold": 0.85, "ngram": 5, "min_length": 5, "ranges": 1, "short_docs": "exact"}
    results = [
        command("signatures", input=arrow, output=shards / name, column="text", **numbers),
        command("buckets", signatures=shards, shards=1, range=0, output=work / "buckets/range-00000"),
        command(
            "components", signatures=shards, buckets=work / "buckets", shards=1, ranges=1, output=work / "components"
        ),
        command("filter", input=arrow, removed=work / f"components/removed/{name}.npy", output=work / f"kept/{name}"),
    ]
    assert [result.returncode for result in results] == [0, 0, 0, 0], [result.stderr for result in results]
    assert json.loads((work / "components/stats.json").read_text())["kept"] == 1
    assert json.loads((work / f"kept/{name}.json").read_text()) == {
        "documents": 1,
        "removed": 1,
        "sources": {"even": 1},
    }


def test_a_giant_document(tmp_path: Path) -> None:
    """A document of 50 MB and one that differs in its last word are duplicates among small ones."""
    giant = " ".join(f"ord{number}" for number in range(4_700_000))
    assert len(giant) > 50_000_000
    stats = whole(tmp_path, ["en lang tekst med mange ord", giant, "kort", f"{giant} til"], 2, 2, Parameters())
    assert stats["largest_clusters"] == [{"size": 2, "document": 1}]
    assert kept(tmp_path) == ["en lang tekst med mange ord", giant, "kort"]


def test_a_hundred_thousand_identical_documents(tmp_path: Path) -> None:
    """One survives; verified, each is compared once a band with the first and not with every other."""
    documents = ["en lang tekst med mange ord"] * 100_000
    write_shards(tmp_path / "arrow", documents, 2, batch=20_000)
    sign(tmp_path, 2, 2, Parameters(num_perm=16, threshold=0.9))
    bands = Parameters(num_perm=16, threshold=0.9).banding()[0]
    for verify in (False, True):
        link(tmp_path, 2, 2, verify)
        stats = join(tmp_path, 2, 2)
        assert (stats["kept"], stats["clusters"], stats["sizes"]) == (1, 1, [(100_000, 1)])
    assert stats["verified"] == {"checked": bands * 99_999, "kept": bands * 99_999, "rejected": 0}
    assert [keep(tmp_path, shard)["documents"] for shard in range(2)] == [1, 0]


def test_too_many_sources_are_counted_together(tmp_path: Path) -> None:
    """Up to the limit by source, nulls and bytes that are no UTF-8 among them; beyond it only the sum is kept."""
    for sources in (MOST_SOURCES, MOST_SOURCES + 1):
        run = tmp_path / str(sources)
        (run / "removed").mkdir(parents=True)
        names: list[bytes | None] = [None, b"\xff", *(f"s{number}".encode() for number in range(sources - 2))] * 2
        column = pa.array(names, pa.binary()).view(pa.string())
        batches = pa.table({"text": pa.array(["x"] * len(names), pa.large_string()), "source": column}).to_batches(300)
        write_stream(run / "in.arrow", SCHEMA, batches)
        write_array(run / "removed.npy", np.array([0], np.uint32))
        about = {"documents": len(names), "removed": 1, "input": Rows(run / "in.arrow").identity()}
        write_json(run / "removed.json", about)
        counts = filter_shard(Rows(run / "in.arrow"), run / "removed.npy", run / "out")
        exported = export_shard(run / "out.arrow", run / "text")
        if sources == MOST_SOURCES:
            expected = {NO_SOURCE: 1, "\\xff": 2, **{f"s{number}": 2 for number in range(sources - 2)}}
        else:
            expected = {MANY_SOURCES: len(names) - 1}
        assert counts["sources"] == expected
        assert {name: one["documents"] for name, one in exported.sources.items()} == expected
        assert read_counts(run / "text.json") == exported


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_counts_are_bounded_however_they_are_cut(parts: int) -> None:
    """What the parts of a corpus sum up gives the corpus's own counts, below the limit and above."""
    for sources in (MOST_SOURCES, MOST_SOURCES + 1, 3 * MOST_SOURCES):
        total = Amounts()
        for part in range(parts):
            one = Amounts()
            for number in range(part, sources, parts):
                one.add(Amounts(1, 2, 3, {f"s{number}": {"documents": 1}}))
            total.add(one)
        assert total.documents == sources
        if sources > MOST_SOURCES:
            assert total.sources == {MANY_SOURCES: {"documents": sources}}
        else:
            assert total.sources == {f"s{number}": {"documents": 1} for number in range(sources)}
