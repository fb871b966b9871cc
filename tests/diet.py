"""Corpora in the raw formats of the published run, served from this machine, and the recipe of a whole diet."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from snakmodel.config.sections import PROJECT

ENGLISH = "The other passengers had left the train before it reached the last station on the line to the sea. "
BOILERPLATE = "Vi bruger cookies til at forbedre din oplevelse på siden."
DIET_STAGES = [
    "collect", "prepare", "filter", "custom-count", "dedup-signatures", "dedup-buckets", "dedup-components",
    "dedup-filter", "dedup-report", "count-lines", "frequent-lines", "final-filter", "contamination-report", "tokenize",
    "merge-tokens", "data-card", "index",
]  # fmt: skip


def danish() -> list[str]:
    """The lines of the demonstration's text."""
    files = sorted((PROJECT / "demo" / "text").rglob("*.txt"))
    found = [line for path in files for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 60]
    assert len(found) > 1000
    return found


def write_corpora(folder: Path) -> dict[str, Any]:
    """Write one small corpus in each raw format, and return the file of sources that names them.

    The addresses begin with ADDRESS/. Some documents are English, hold personal data, are copies of documents of
    another corpus, have a line that is in many documents, or are an item of the evaluation file eval.jsonl.
    """
    lines, random_ = danish(), random.Random(15)
    some = [random_.sample(lines, 60) for _ in range(7)]
    some[1][:10] = some[0][:10]
    some[2][0] += " Skriv til karen.jensen@firma.dk eller ring på +45 33 12 34 56."
    some[3][::6] = [ENGLISH * 2] * len(some[3][::6])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "da.txt.gz").write_bytes(gzip.compress("".join(f"{line}\n" for line in some[0]).encode(), mtime=0))
    pages = "".join(
        f"<page><title>Side {n}</title><ns>0</ns><id>{n}</id><revision><id>{n}</id><timestamp>2024-01-0{n % 9 + 1}"
        f"T00:00:00Z</timestamp><text>'''{line}''' [[Danmark|et link]]</text></revision></page>\n"
        for n, line in enumerate(some[1])
    )
    wiki = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="da">\n{pages}</mediawiki>\n'
    (folder / "dawiki.xml.bz2").write_bytes(bz2.compress(wiki.encode()))
    with tarfile.open(folder / "ftspeech.tar.gz", "w:gz") as archive:
        speech = "".join(f"{line}\n" for line in some[2]).encode()
        member = tarfile.TarInfo("ftspeech/lm/ft_lm_train_data.txt")
        member.size = len(speech)
        archive.addfile(member, io.BytesIO(speech))
    with zipfile.ZipFile(folder / "gigaword.zip", "w") as packed:
        for number, line in enumerate(some[3]):
            packed.writestr(f"dagw/sektioner/retsinfo/retsinfo_{number}", f"{line}\n{BOILERPLATE}\n")
        packed.writestr("dagw/sektioner/retsinfo/README.md", "Not text.")
    with (folder / "news.jsonl").open("w", encoding="utf-8") as news:
        for number, line in enumerate(some[4]):
            date = f"{2014 + number % 10}-05-17"
            text = f"{line}\n{BOILERPLATE}"
            news.write(json.dumps({"text": text, "url": f"https://avis.dk/{number}", "date": date}) + "\n")
    with zipfile.ZipFile(folder / "Denmark.corpus.zip", "w") as packed:
        utterances = [{"id": str(n), "text": line} for n, line in enumerate([*some[5], "[deleted]"])]
        packed.writestr("Denmark.corpus/utterances.jsonl", "".join(json.dumps(one) + "\n" for one in utterances))
    tweets: list[dict[str, Any]] = [{"text": line, "lang": "da", "user": {"screen_name": "x"}} for line in some[6]]
    tweets += [{"delete": {"status": {"id": 1}}}, {"text": ENGLISH, "lang": "en", "user": {"screen_name": "y"}}]
    (folder / "tweets.bz2").write_bytes(bz2.compress("".join(json.dumps(one) + "\n" for one in tweets).encode()))
    with (folder / "eval.jsonl").open("w", encoding="utf-8") as items:
        items.writelines(json.dumps({"question": line, "answer": "ja"}) + "\n" for line in some[5][:3])
    known = {"licence": "cc-by-4.0", "citation": "Nobody 2026, Made for a test"}
    return {
        "bookshop": {"url": "ADDRESS/da.txt.gz", "format": "lines", **known},
        "dawiki": {"url": "ADDRESS/dawiki.xml.bz2", "format": "mediawiki", **known},
        "ftspeech": {"url": "ADDRESS/ftspeech.tar.gz", "format": "lines", "members": ["ftspeech/lm/*.txt"], **known},
        "gigaword": {
            "url": "ADDRESS/gigaword.zip",
            "format": "lines",
            "members": ["dagw/sektioner/**"],
            "skip": ["README*"],
            "min_characters": 3,
            **known,
        },
        "danewsroom": {"url": "ADDRESS/news.jsonl", "format": "jsonl", "columns": ["url", "date"], **known},
        "reddit": {"url": "ADDRESS/Denmark.corpus.zip", "format": "convokit", "leave_out": ["[deleted]"], **known},
        "twitter": {"url": "ADDRESS/tweets.bz2", "format": "tweets", "lang": "da", "licence": "unknown"},
    }


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder from this machine, and yield the address."""
    handler = partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    """The standard library's server of files, which logs nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


COUNT = """
import sys
import pyarrow as pa

with pa.ipc.open_stream(sys.argv[1]) as reader, pa.OSFile(sys.argv[2], "wb") as sink:
    schema = reader.schema.append(pa.field("words", pa.int64()))
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in reader:
            words = pa.array([len(text.split()) for text in batch.column("text").to_pylist()], pa.int64())
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, words], schema=schema))
"""
"""A user's own command: it counts the words of each document."""


def write_recipe(folder: Path, corpora: Path, sources: dict[str, Any], address: str, base: Path) -> Path:
    """Write the recipe of the whole diet, with all that it names, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(sources, sort_keys=False).replace("ADDRESS", address)
    (folder / "sources.yaml").write_text(text)
    (folder / "count.py").write_text(COUNT)
    (folder / "thresholds.yaml").write_text("gopher_min_words: 5\n")
    python = "{python}"
    recipe = yaml.safe_load((PROJECT / "recipes" / "demo.yaml").read_text())
    recipe["data"] = {
        "path": str(folder / "data"),
        "collect": str(folder / "sources.yaml"),
        "shards": 3,
        "keep": ["url?", "date?"],
        "where": "date is None or date >= 2016",
        "custom": [{"name": "count", "command": f"{python} {folder}/count.py {{input}} {{output}}"}],
    }
    recipe["filter"] = {
        "language": {"keep": "da", "rejected": True},
        "quality": {"mode": "mark", "thresholds": str(folder / "thresholds.yaml")},
        "pii": {"region": ["DK"], "national": ["dk.cpr"]},
    }
    recipe["dedup"].update(ranges=2, lines=20, cluster_size=True)
    recipe["decontaminate"] = {"against": [str(corpora / "eval.jsonl")], "ngram": 8, "mode": "remove"}
    recipe["text"] = {"export": False}
    recipe["data_card"] = {"title": "The diet"}
    recipe["model"]["base"], recipe["tokenizer"]["file"] = str(base), str(base / "tokenizer.model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe).replace(python, "python"))
    return folder / "recipe.yaml"


def outputs(run: Path) -> dict[str, bytes]:
    """The files of a run whose bytes are promised: all shards, tokens and the card, without the records of dates."""
    names = ("arrow", "filter", "custom", "dedup/kept", "filtered", "tokens", "card")
    files = [path for name in names for path in sorted((run / name).rglob("*")) if path.is_file()]
    assert not [path for path in files if ".tmp-" in str(path)], "a temporary was left behind"
    return {str(path.relative_to(run)): path.read_bytes() for path in files}
