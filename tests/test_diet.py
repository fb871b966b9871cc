"""From nothing to tokens on this machine: collected, filtered, deduplicated, decontaminated; killed and begun again."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from snakmodel.config.sections import PROJECT
from tests.diet import BOILERPLATE, DIET_STAGES, outputs, serving, write_corpora, write_recipe

Site = tuple[Path, dict[str, Any], str]
"""The folder of the corpora, the file of sources, and the address at which they are served."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """All corpora, served from this machine."""
    folder = tmp_path_factory.mktemp("www")
    sources = write_corpora(folder)
    with serving(folder) as address:
        yield folder, sources, address


def command(folder: Path, *more: str) -> list[str]:
    """The launcher's command line for the diet in a folder."""
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"runs": str(folder), "logs": str(folder / "logs")}))
    files = ["--recipe", str(folder / "recipe.yaml"), "--cluster", str(folder / "cluster.yaml")]
    where = ["--scheduler", "local", "--run-dir", str(folder / "run")]
    return [sys.executable, "jobs/submit_all.py", *files, *where, "--until", "index", *more]


def launch(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher to its end."""
    return subprocess.run(command(folder, *more), cwd=PROJECT, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, site: Site, demo_base: Path) -> Path:
    """The folder of a diet that nobody disturbed."""
    folder = tmp_path_factory.mktemp("diet")
    corpora, sources, address = site
    write_recipe(folder, corpora, sources, address, demo_base)
    dry = launch(folder, "--dry-run")
    assert dry.returncode == 0, dry.stdout + dry.stderr
    assert "to be collected" in dry.stdout
    assert not (folder / "data").exists()
    assert not (folder / "run" / "run.yaml").exists()
    done = launch(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    """The documents of a shard."""
    with pa.ipc.open_stream(str(path)) as reader:
        found: list[dict[str, Any]] = reader.read_all().to_pylist()
    return found


def test_the_documents_are_what_the_diet_leaves(finished: Path, site: Site) -> None:
    """English, personal data, copies, boilerplate, evaluation items and old dates are gone; columns have survived."""
    run = finished / "run"
    documents = [one for shard in sorted((run / "filtered").glob("shard-*.arrow")) for one in rows(shard)]
    texts = "\n".join(one["text"] for one in documents)
    assert len(documents) > 150
    assert "The other passengers" not in texts
    assert "karen.jensen" not in texts
    assert "<EMAIL>" in texts
    assert BOILERPLATE not in texts
    items = [json.loads(line)["question"] for line in (site[0] / "eval.jsonl").read_text().splitlines()]
    assert not any(item in texts for item in items)
    assert {one["source"] for one in documents} == set(yaml.safe_load((finished / "sources.yaml").read_text()))
    assert all(one["words"] > 0 and one["cluster_size"] >= 1 and isinstance(one["quality"], list) for one in documents)
    assert any(one["cluster_size"] > 1 for one in documents)
    news = [one for one in documents if one["source"] == "danewsroom"]
    assert news
    assert all(one["date"] >= "2016" and one["url"].startswith("https://avis.dk/") for one in news)
    assert len({one["id"] for one in documents}) == len(documents)
    rejected = [one for shard in sorted((run / "filter" / "rejected").glob("*.arrow")) for one in rows(shard)]
    assert any("The other passengers" in one["text"] for one in rejected)


def test_a_document_is_found_where_its_id_says(finished: Path) -> None:
    """The file and the byte in an id lead to the line that the document came from."""
    for one in rows(finished / "run" / "filtered" / "shard-00000.arrow")[:20]:
        name, position = one["id"].rsplit(":", 1)
        path = finished / "data" / name
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            line = file.read()[int(position) :].split(b"\n", 1)[0].decode()
        text = json.loads(line)["text"] if ".jsonl" in path.suffixes else line
        assert one["text"].split()[:3] == text.split()[:3]


def test_columns_lie_beside_the_tokens(finished: Path) -> None:
    """A row per sequence, in the order of the shards, with the id of its document."""
    run = finished / "run"
    found = rows(run / "tokens" / "corpus_text_document.columns.arrow")
    documents = [one["id"] for shard in sorted((run / "filtered").glob("shard-*.arrow")) for one in rows(shard)]
    assert [one["id"] for one in found] == documents
    manifest = json.loads((run / "tokens" / "corpus_text_document.json").read_text())
    assert sum(one["tokens"] for one in found) == manifest["tokens"]


def test_the_funnel_adds_up(finished: Path) -> None:
    """Each step gets what the one before it let through; the card and its Croissant description tell the sources."""
    import mlcroissant

    card = finished / "run" / "card"
    funnel = json.loads((card / "funnel.json").read_text())
    names = [one["name"] for one in funnel["steps"]]
    assert names == [
        "prepare", "filter: language", "filter: quality", "filter: pii", "custom-count", "dedup", "final-filter: lines",
        "final-filter: decontaminate", "tokenize",
    ]  # fmt: skip
    for before, now in zip(funnel["steps"], funnel["steps"][1:], strict=False):
        assert now["documents"] == before["kept"]
    assert funnel["steps"][1]["kept"] < funnel["steps"][1]["documents"]
    assert funnel["steps"][3]["details"]["found"] == {"email": 1, "phone": 1}
    text = (card / "data-card.md").read_text()
    assert "cc-by-4.0" in text
    assert "gopher_min_words: 5" in text
    assert str(finished) not in text
    described = mlcroissant.Dataset(str(card / "croissant.json")).metadata
    assert not described.ctx.issues.errors
    assert {one.name for one in described.record_sets[0].fields} >= {"text", "source", "id", "url", "words"}


def test_a_funnel_that_does_not_add_up_fails(finished: Path, tmp_path: Path) -> None:
    """Counts that were changed afterwards are noticed by the stage that reads them, and by the data card."""
    counts = finished / "run" / "filtered" / "shard-00001.json"
    before = counts.read_text()
    changed = json.loads(before)
    changed["steps"]["decontaminate"]["kept"] -= 1
    try:
        counts.write_text(json.dumps(changed))
        command = [sys.executable, "-m", "snakmodel.register", "--run_dir", str(finished / "run"), "--shards", "3"]
        more = ["--before", "filter", "custom/count", "--after", "filtered", "--documents", "filtered"]
        done = subprocess.run(
            [*command, *more, "--output", str(tmp_path / "card")], cwd=PROJECT, capture_output=True, text=True
        )
    finally:
        counts.write_text(before)
    assert done.returncode == 2
    assert "do not add up" in done.stderr
    assert not (tmp_path / "card").exists() or not list((tmp_path / "card").iterdir())


def test_nothing_is_done_twice(finished: Path) -> None:
    """The same command again finds that everything is done, though all sources are offline or not."""
    done = launch(finished)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing to do" in done.stdout


def test_before_the_text_is_there(tmp_path: Path, site: Site, demo_base: Path) -> None:
    """Preflight says what it could not check; by hand, too, the rest is planned when the text is collected."""
    corpora, sources, address = site
    write_recipe(tmp_path, corpora, {"bookshop": sources["bookshop"]}, address, demo_base)
    command(tmp_path)
    files = ["--recipe", str(tmp_path / "recipe.yaml"), "--cluster", str(tmp_path / "cluster.yaml")]
    where = ["--run-dir", str(tmp_path / "run"), "--scheduler", "local"]
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["data"] |= {"keep": None, "where": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    checked = subprocess.run(
        [sys.executable, "jobs/preflight.py", *files, *where], cwd=PROJECT, capture_output=True, text=True, timeout=600
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "not collected yet" in checked.stdout
    environment = {**os.environ, "RECIPE": files[1], "CLUSTER": files[3], "RUN_DIR": where[1], "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "sbatch/0.preprocess.sbatch", "collect", "prepare"],
        cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "run" / "arrow").glob("shard-*.arrow"))


def kill_at(stage: str, argv: list[str], run: Path) -> bool:
    """Start the launcher, and kill it with all that it started when a task of this stage has begun."""
    process = subprocess.Popen(
        argv, cwd=PROJECT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if list((run / "attempts" / stage).glob("*/*/start.json")) and not (run / "markers" / stage).exists():
            time.sleep(random.random() * 0.5)
            with_children = subprocess.run(
                ["pgrep", "-f", str(run.parent)], capture_output=True, text=True, check=False
            ).stdout.split()
            for one in {process.pid, *map(int, with_children)} - {os.getpid()}:
                try:
                    os.kill(one, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()
            return True
        time.sleep(0.02)
    process.wait()
    return False


def test_killed_anywhere_ends_in_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, finished: Path, site: Site, demo_base: Path
) -> None:
    """Killed with SIGKILL while it collects, and in three random stages, then run to the end: the same bytes."""
    seed = int.from_bytes(os.urandom(4), "little")
    random.seed(seed)
    corpora, sources, address = site
    folder = tmp_path_factory.mktemp("killed")
    write_recipe(folder, corpora, sources, address, demo_base)
    stages = sorted(["collect", *random.sample(DIET_STAGES[1:], 3)], key=DIET_STAGES.index)
    kills = [kill_at(stage, command(folder), folder / "run") for stage in stages]
    done = launch(folder)
    story = f"seed {seed}, killed at {list(zip(stages, kills, strict=True))}"
    assert done.returncode == 0, f"{story}\n{done.stdout}\n{done.stderr}"
    assert any(kills), story
    assert_same(outputs(folder / "run"), outputs(finished / "run"), folder, finished, story)


def assert_same(found: dict[str, bytes], expected: dict[str, bytes], folder: Path, other: Path, story: str) -> None:
    """Both runs have the same files with the same content, but for the names of their folders and the day."""
    assert set(found) == set(expected), story
    different = [
        name
        for name in found
        if found[name].replace(str(folder).encode(), b"") != expected[name].replace(str(other).encode(), b"")
    ]
    assert not different, f"{story}: {different}"
