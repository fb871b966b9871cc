"""Datasets of the Hub, which a server on this machine plays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from run_contract.errors import UserError
from snakmodel.collect.download import NotNow
from snakmodel.collect.fetch import fetch
from snakmodel.collect.hub import chosen_paths, parquet_files
from snakmodel.collect.places import Place
from snakmodel.collect.sources import Source
from tests.collect.loopback import Site

COMMIT = "a" * 40


@pytest.fixture
def hub(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The server, as the library's Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", site.address)
    template = site.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return site


def dataset(**keys: Any) -> Source:
    """A dataset of the Hub."""
    return Source(dataset="org/corpus", format="parquet", licence="unknown", **keys)


def describe(hub: Site, paths: list[str], revision: str = "main", digest: str | None = None) -> None:
    """Let the Hub know a dataset with these files, and perhaps their SHA-256."""
    lfs = {"lfs": {"size": 1, "sha256": digest, "pointerSize": 1}} if digest else {}
    info = {"id": "org/corpus", "sha": COMMIT, "siblings": [{"rfilename": path, **lfs} for path in paths]}
    json_type = "application/json"
    hub.add(f"/api/datasets/org/corpus/revision/{revision}", json.dumps(info).encode(), kind=json_type)
    hub.add("/api/datasets/org/corpus/auth-check", b"{}", kind=json_type)


def table(texts: list[str], key: str = "text") -> bytes:
    """A Parquet file of texts, with another column."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({key: texts, "url": [f"u{text}" for text in texts]}), sink, row_group_size=2)
    return bytes(sink.getvalue().to_pybytes())


def test_a_dataset(hub: Site, tmp_path: Path) -> None:
    """The Parquet files of the configuration arrive as they are, with the user's token, from the listing's commit."""
    files = {"da/da_part_0.parquet": table(["a", "b", "c"]), "da/da_part_1.parquet": table(["d"])}
    describe(hub, ["README.md", *files, "de/de_part_0.parquet"])
    for path, content in files.items():
        hub.add(f"/datasets/org/corpus/resolve/{COMMIT}/{path}", content)
    record = fetch(Place(tmp_path, "x"), dataset(config="da"))
    outputs = [(tmp_path / one["file"]).read_bytes() for one in record["outputs"]]
    assert outputs == [*files.values()]
    assert [one["documents"] for one in record["outputs"]] == [3, 1]
    assert [one["file"] for one in record["downloads"]] == [*files]
    downloads = [headers for path, headers in hub.requests if "/resolve/" in path]
    assert [headers["authorization"] for headers in downloads] == ["Bearer hf_secret"] * 2
    assert not [path for path, _ in hub.requests if "de_part" in path]
    asked = len(hub.requests)
    assert fetch(Place(tmp_path, "x"), dataset(config="da")) == record
    assert len(hub.requests) == asked


def test_an_interrupted_download_keeps_to_its_commit(hub: Site, tmp_path: Path) -> None:
    """The listing of the first attempt holds until the version in the file of sources changes."""
    describe(hub, ["a.parquet"])
    first = parquet_files(dataset(), tmp_path / "listing.json")
    describe(hub, ["a.parquet", "b.parquet"])
    assert parquet_files(dataset(), tmp_path / "listing.json") == first
    assert [*parquet_files(dataset(version="2"), tmp_path / "listing.json")] == ["a.parquet", "b.parquet"]


def test_the_branch_of_the_parquet_form(hub: Site, tmp_path: Path) -> None:
    """The branch's name has slashes."""
    describe(hub, ["da/partial-train/0000.parquet", "da/test/0000.parquet"], "refs%2Fconvert%2Fparquet")
    found = parquet_files(dataset(config="da", revision="refs/convert/parquet"), tmp_path / "listing.json")
    path = "da/partial-train/0000.parquet"
    assert found == {path: (f"{hub.address}/datasets/org/corpus/resolve/{COMMIT}/{path}", None)}


def test_checksums_of_the_hub(hub: Site, tmp_path: Path) -> None:
    """The Hub knows the SHA-256 of large files, and a file with another one is refused."""
    describe(hub, ["a.parquet"], digest="0" * 64)
    hub.add(f"/datasets/org/corpus/resolve/{COMMIT}/a.parquet", table(["a"]))
    with pytest.raises(
        UserError, match=r"has the sha256 .* and not the 0{64} that the file of sources or the Hub gives"
    ):
        fetch(Place(tmp_path, "x"), dataset())


def test_the_token_stays_with_the_hub(hub: Site, tmp_path: Path) -> None:
    """A redirect to another host, where the Hub keeps the files, does not carry the token along."""
    describe(hub, ["a.parquet"])
    elsewhere = hub.add("/elsewhere", table(["a"])).replace("127.0.0.1", "localhost")
    path = f"/datasets/org/corpus/resolve/{COMMIT}/a.parquet"
    hub.add(path, b"", statuses=[(302, {"Location": elsewhere})])
    assert fetch(Place(tmp_path, "x"), dataset())["documents"] == 1
    seen = dict(hub.requests)
    assert seen[path]["authorization"] == "Bearer hf_secret"
    assert "authorization" not in seen["/elsewhere"]


@pytest.mark.parametrize(
    ("keys", "paths", "expected"),
    [
        ({}, ["b.parquet", "a.parquet", "c.csv"], ["a.parquet", "b.parquet"]),
        ({"config": "da"}, ["da/1.parquet", "dansk/1.parquet"], ["da/1.parquet"]),
        ({"config": "da"}, ["da/train-0.parquet", "da/test-0.parquet"], ["da/train-0.parquet"]),
        ({"config": "da", "split": "test"}, ["da/train-0.parquet", "da/test-0.parquet"], ["da/test-0.parquet"]),
        ({"files": ["x/*.parquet"]}, ["x/y/1.parquet", "z/1.parquet"], ["x/y/1.parquet"]),
    ],
)
def test_which_files(keys: dict[str, Any], paths: list[str], expected: list[str]) -> None:
    """Configuration, split and patterns choose among the Parquet files."""
    assert chosen_paths(dataset(**keys), paths) == expected


def test_a_script_and_wrong_names() -> None:
    """A dataset with a script is told from one whose configuration is wrong."""
    with pytest.raises(UserError, match=r"loaded by a script, corpus\.py, .*Set `revision: refs/convert/parquet`"):
        chosen_paths(dataset(config="da"), ["README.md", "corpus.py"])
    with pytest.raises(UserError, match=r"no Parquet files for config 'dk' and split 'train'; it has da/1\.parquet\."):
        chosen_paths(dataset(config="dk"), ["da/1.parquet"])
    with pytest.raises(UserError, match="it has none at all"):
        chosen_paths(dataset(), ["data.csv"])


@pytest.mark.parametrize(
    ("path", "status", "code", "message"),
    [
        ("auth-check", 403, "GatedRepo", r"org/corpus is gated\. Ask for access on https://.*hf auth login"),
        ("revision/main", 404, "RepoNotFound", r"there is no dataset org/corpus on the Hub, or it is private"),
        ("revision/main", 404, "RevisionNotFound", r"org/corpus has no revision 'main'; valid are"),
    ],
)
def test_refused(hub: Site, tmp_path: Path, path: str, status: int, code: str, message: str) -> None:
    """A dataset that is gated, does not exist, or has no such revision."""
    describe(hub, ["a.parquet"])
    hub.files[f"/api/datasets/org/corpus/{path}"].statuses = [(status, {"X-Error-Code": code})]
    with pytest.raises(UserError, match=message):
        parquet_files(dataset(), tmp_path / "listing.json")
    assert not (tmp_path / "listing.json").exists()


def test_no_answer(hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that fails may work later; one that may not be asked is for the user."""
    describe(hub, [])
    hub.files["/api/datasets/org/corpus/revision/main"].statuses = [(500, {})] * 20
    with pytest.raises(NotNow, match="org/corpus: the Hub did not answer"):
        parquet_files(dataset(), tmp_path / "listing.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        parquet_files(dataset(), tmp_path / "listing.json")


def test_files_by_hand(tmp_path: Path) -> None:
    """Without a network, files that `hf download --local-dir` has put in place are taken; the text may have a key."""
    folder = tmp_path / ".collected" / "x" / "da"
    folder.mkdir(parents=True)
    (folder / "0.parquet").write_bytes(table(["a", "b", "c"], "body"))
    record = fetch(Place(tmp_path, "x"), dataset(config="da", key="body"), offline=True)
    made = pq.read_table(tmp_path / record["outputs"][0]["file"])
    assert made.to_pydict() == {"text": ["a", "b", "c"], "url": ["ua", "ub", "uc"]}
    assert record["downloads"][0]["url"] is None
    with pytest.raises(UserError, match=r"has no column 'text' of strings\. It has body \(string\), url \(string\)"):
        fetch(Place(tmp_path, "x"), dataset(config="da"), offline=True)
    (folder / "0.parquet").write_bytes(table(["a"])[:-20])
    with pytest.raises(UserError, match=r"0\.parquet: is no whole Parquet file"):
        fetch(Place(tmp_path, "x"), dataset(config="da"), offline=True)
