import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from run_contract.errors import InputsMissing, UserError
from snakmodel.dedup.components import DROPPED
from snakmodel.dedup.minhash.parameters import Parameters
from snakmodel.dedup.report import excerpt, report
from snakmodel.shards.arrow_stream import SCHEMA, write_stream
from tests.dedup_run import arrow_shards, corpus, join, labels, link, sign, whole, write_shards

PNG = b"\x89PNG\r\n\x1a\n"


def write_sources(run: Path, documents: list[tuple[str, str | None]], shards: int) -> None:
    """Shards of (text, source), two record batches each."""
    (run / "arrow").mkdir(parents=True)
    for shard in range(shards):
        chosen = documents[len(documents) * shard // shards : len(documents) * (shard + 1) // shards]
        halves = [chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]]
        batches = [
            pa.record_batch(
                [pa.array([text for text, _ in half], pa.large_string()), pa.array([s for _, s in half], pa.string())],
                schema=SCHEMA,
            )
            for half in halves
        ]
        write_stream(run / f"arrow/shard-{shard:05d}.arrow", SCHEMA, batches)


def reported(run: Path, shards: int) -> dict[str, Any]:
    report(arrow_shards(run, shards), "text", run / "dedup/components", run / "dedup/report")
    return json.loads((run / "dedup/report.json").read_text())  # type: ignore[no-any-return]


def test_report_equals_a_plain_count(tmp_path: Path) -> None:
    """Documents and bytes by source, the matrix and the clusters are those of a walk over all labels in Python."""
    random_ = random.Random(2)
    documents = [(text, random_.choice(["ærø", "b", "c"])) for text in corpus()]
    write_sources(tmp_path, documents, 3)
    sign(tmp_path, 3, 2, Parameters(short_docs="drop"))
    link(tmp_path, 3, 2)
    join(tmp_path, 3, 2)
    found = reported(tmp_path, 3)
    seen = labels(tmp_path)
    sums: dict[str, list[int]] = {}
    pairs: Counter[tuple[str, str]] = Counter()
    for number, (text, source) in enumerate(documents):
        kept = seen[number] == number
        add = [1, len(text.encode()), kept, kept * len(text.encode())]
        sums[source] = [a + b for a, b in zip(sums.get(source, [0] * 4), add, strict=True)]
        if not kept and seen[number] != DROPPED:
            pairs[documents[seen[number]][1], source] += 1
    assert {name: list(values.values()) for name, values in found["sources"].items()} == sums
    assert {(a, b): count for a, row in found["duplicates_of"].items() for b, count in row.items()} == pairs
    assert len(pairs) == 9
    sizes = Counter(label for label in seen if label != DROPPED)
    assert dict(map(tuple, found["sizes"])) == Counter(size for size in sizes.values() if size > 1)
    for cluster in found["largest_clusters"]:
        assert sizes[cluster["document"]] == cluster["size"]
        assert documents[cluster["document"]][0].startswith(cluster["excerpt"].removesuffix("…"))
    assert found["dropped"] == 30
    assert (tmp_path / "dedup/report.png").read_bytes().startswith(PNG)


def test_report_does_not_depend_on_shards(tmp_path: Path) -> None:
    """1 and 4 shards give the same JSON."""
    found = []
    for shards in (1, 4):
        whole(tmp_path / str(shards), corpus(20), shards, 2, Parameters())
        found.append(reported(tmp_path / str(shards), shards))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "sources", [["x"], [f"source {number} with quite a long name" for number in range(40)], [None]]
)
def test_report_of_one_many_and_no_sources(tmp_path: Path, sources: list[str | None]) -> None:
    """A picture is drawn of one source, of more than fit, and of documents that name none."""
    documents = [(text, sources[number % len(sources)]) for number, text in enumerate(corpus(20) * 2)]
    write_sources(tmp_path, documents, 2)
    sign(tmp_path, 2, 1, Parameters())
    link(tmp_path, 2, 1)
    join(tmp_path, 2, 1)
    found = reported(tmp_path, 2)
    assert len(found["sources"]) == len(sources)
    assert (tmp_path / "dedup/report.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("documents", [[], ["en to tre fire fem", "seks syv otte ni ti"]])
def test_report_without_duplicates(tmp_path: Path, documents: list[str]) -> None:
    """No documents, and documents of which none repeats another, are reported like any others."""
    whole(tmp_path, documents, 1, 1, Parameters())
    found = reported(tmp_path, 1)
    assert (found["documents"], found["removed"], found["largest_clusters"]) == (len(documents), 0, [])


def test_a_column_source_is_not_needed(tmp_path: Path) -> None:
    """Texts without a source are reported as one."""
    batch = pa.record_batch({"text": ["en to tre fire fem"] * 3})
    write_stream(tmp_path / "arrow.arrow", batch.schema, [batch])
    (tmp_path / "arrow").mkdir()
    (tmp_path / "arrow.arrow").rename(tmp_path / "arrow/shard-00000.arrow")
    sign(tmp_path, 1, 1, Parameters())
    link(tmp_path, 1, 1)
    join(tmp_path, 1, 1)
    assert reported(tmp_path, 1)["sources"] == {
        "(no source)": {"documents": 3, "bytes": 54, "kept_documents": 1, "kept_bytes": 18}
    }


def test_components_of_other_texts_are_refused(tmp_path: Path) -> None:
    """Missing components, and a number of documents that is not theirs, are errors; nothing is published."""
    write_shards(tmp_path / "arrow", corpus(4), 2)
    with pytest.raises(InputsMissing, match=r"stats\.json does not exist"):
        reported(tmp_path, 2)
    whole(tmp_path, corpus(4), 2, 1, Parameters())
    for documents in (corpus(3), corpus(5)):
        write_shards(tmp_path / "arrow", documents, 2)
        with pytest.raises(UserError, match=f"of 20 documents, the shards .* have {len(documents)}"):
            reported(tmp_path, 2)
    assert not (tmp_path / "dedup/report.json").exists()


def test_excerpts_are_one_short_line() -> None:
    """Line breaks and runs of spaces become one space; what is cut ends in an ellipsis."""
    assert excerpt(" a\n\n b\u2028c ") == "a b c"
    assert excerpt("ord " * 1000) == ("ord " * 40)[:160] + "…"
    assert excerpt("x" + " " * 10**6 + "y").endswith("…")
