"""python jobs/submit_all.py as a user types it: what mistakes are answered with, and what a second run does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import yaml

from megatron_llm.tokenizer import hf_export
from snakmodel.config.sections import PROJECT

LINES = [f"Nummer {i} er en lille fin sætning om dag {i * 7} i haven." for i in range(200)]


class Desk:
    """A user's files: text, a recipe, a cluster.yaml, and a run's folder."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.text = folder / "text"
        self.text.mkdir()
        (self.text / "a.txt").write_text("\n".join(LINES) + "\n")
        self.root = folder / "runs" / "small"
        self.base = base
        self.recipe: dict[str, Any] = yaml.safe_load((PROJECT / "recipes" / "demo.yaml").read_text())
        self.recipe.update(name="small", model={"base": str(base)}, tokenizer={"file": str(base / "tokenizer.model")})
        self.recipe["data"] = {"path": str(self.text), "shards": 2}
        self.cluster: dict[str, Any] = {
            "runs": str(folder / "runs"),
            "logs": str(folder / "logs"),
            "scheduler": "local",
        }

    def submit(self, *flags: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(self.cluster))
        command = [sys.executable, "jobs/submit_all.py", "--recipe", str(self.folder / "recipe.yaml")]
        command += ["--cluster", str(self.folder / "cluster.yaml"), *flags]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)

    def refused(self, *flags: str) -> str:
        """Submit, and expect one clear error, no traceback and no marker; returns the error."""
        done = self.submit(*flags)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ")
        assert not (self.root / "markers").exists()
        return done.stderr


@pytest.fixture
def desk(tmp_path: Path, demo_base: Path) -> Desk:
    return Desk(tmp_path, demo_base)


def test_no_input_files(desk: Desk) -> None:
    """A folder without text is named, with what was looked for."""
    (desk.text / "a.txt").unlink()
    error = desk.refused()
    assert str(desk.text) in error
    assert ".txt" in error


def test_only_empty_files(desk: Desk) -> None:
    """A corpus of empty files is an error, not an empty model."""
    (desk.text / "a.txt").write_text("")
    assert "empty" in desk.refused()


def test_shares_formats_and_cleaning_of_a_recipe(desk: Desk) -> None:
    """What a recipe says of its sources reaches the tasks, and what is not read is noted before anything starts."""
    (desk.text / "b.jsonl").write_text("".join(json.dumps({"body": f" {line} "}) + "\n" for line in LINES))
    (desk.text / "notes.md").write_text("x")
    clean = {"trim": True, "min_characters": 20}
    desk.recipe["data"].update(sources=[{"a": 0.5}, "b"], key="body", clean=clean, errors="skip", seed=3)
    done = desk.submit("--only", "prepare")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [json.loads(path.read_text()) for path in sorted((desk.root / "arrow").glob("*.json"))]
    assert sum(one["sources"].get("b", {"documents": 0})["documents"] for one in counts) == len(LINES)
    assert 60 < sum(one["sources"].get("a", {"documents": 0})["documents"] for one in counts) < 140
    assert sum(one["trimmed"] for one in counts) == len(LINES)
    desk.recipe["data"]["sources"] = None
    said = desk.submit("--only", "prepare", "--dry-run", "--restart-from", "prepare").stdout
    assert f"note: {desk.text}: not read, as no kind of text that is known: 1: notes.md\n" in said
    assert f"note: {desk.text}: 2 file(s) of " in said
    assert " bytes are read, 1 other(s) not\n" in said


def test_the_encoding_of_a_recipe(desk: Desk) -> None:
    """UTF-16 stops the stage with the setting that helps; with it, every document is there, in one task a file."""
    text = (desk.text / "a.txt").read_text()
    (desk.text / "a.txt").write_bytes(text.encode("utf-16"))
    refused = desk.submit("--only", "prepare")
    assert (refused.returncode, "set data.encoding to utf-16" in refused.stderr) == (1, True), refused.stderr
    tasks = desk.root / "tasks" / "prepare.json"
    assert "--encoding" not in tasks.read_text()  # so the keys of tasks stay those of recipes without the setting
    desk.recipe["data"]["encoding"] = "utf-16"
    done = desk.submit("--only", "prepare", "--restart-from", "prepare")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--encoding" in tasks.read_text()
    (counts,) = [json.loads(path.read_text()) for path in sorted((desk.root / "arrow").glob("*.json"))]
    assert (counts["documents"], counts["characters"]) == (200, len(text) - 200)


def test_an_empty_file_among_others(desk: Desk) -> None:
    """An empty file is counted and does no harm."""
    (desk.text / "b.txt").write_text("")
    assert desk.submit("--only", "prepare").returncode == 0
    counts = [json.loads(path.read_text()) for path in sorted((desk.root / "arrow").glob("*.json"))]
    assert sum(one["documents"] for one in counts) == 200
    assert sum(one["empty_files"] for one in counts) == 1


def test_file_that_is_not_utf8(desk: Desk) -> None:
    """Bad bytes end the stage with the file and the place; nothing of that shard is published; `errors` helps."""
    (desk.text / "b.txt").write_bytes("blåbærgrød\n".encode() * 50 + "blåbær".encode("latin-1") + b"\n")
    done = desk.submit("--only", "prepare")
    assert done.returncode == 1
    assert f"{desk.text / 'b.txt'}" in done.stderr
    assert "UTF-8" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (desk.root / "arrow" / "shard-00001.arrow").exists()
    desk.recipe["data"]["errors"] = "skip"
    done = desk.submit("--only", "prepare", "--restart-from", "prepare")
    assert done.returncode == 0, done.stderr
    counts = [json.loads(path.read_text()) for path in sorted((desk.root / "arrow").glob("*.json"))]
    assert sum(one["skipped"] for one in counts) == 1


def test_names_of_every_kind(desk: Desk) -> None:
    """Names that are not UTF-8 or hold any character that means something elsewhere: read, counted, and printed as
    they are; so is the path of a run's folder, but for bytes and controls that batch files cannot hold.
    """
    names = [b"bl\xe5/\xe6.txt", b"bl\xe5/b\nc.txt", b"d/[red] :x: %j {z} $(e) `u`'\"\\*?.txt", b"d/\xe2\x80\xa8.txt"]
    raw = os.fsencode(desk.text) + b"/r\xe5 [/] %5a"
    for name in names:
        path = raw + b"/" + name
        Path(os.fsdecode(path)).parent.mkdir(parents=True, exist_ok=True)
        Path(os.fsdecode(path)).write_text("".join(f"{line}\n" for line in LINES))
    Path(os.fsdecode(raw + b"/d/n\xf8.pdf")).touch()
    desk.recipe["data"]["path"] = os.fsdecode(raw)
    (desk.folder / "recipe.yaml").write_text(yaml.safe_dump(desk.recipe))
    (desk.folder / "cluster.yaml").write_text(yaml.safe_dump(desk.cluster))
    command = [sys.executable, "jobs/submit_all.py", "--recipe", desk.folder / "recipe.yaml", "--only", "prepare"]
    command += ["--cluster", desk.folder / "cluster.yaml", "--run-dir"]
    root = desk.folder / "r [/] :x: %5a 'q' \"d\" $F *"
    done = subprocess.run([*command, root], cwd=PROJECT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"note: " + raw + b": not read, as no kind of text that is known: 1: d/n\xf8.pdf\n" in done.stdout
    counts = [json.loads(path.read_text()) for path in sorted((root / "arrow").glob("*.json"))]
    assert [{name: one["documents"] for name, one in shard["sources"].items()} for shard in counts] == [
        {"bl\\xe5": 400},
        {"d": 400},
    ]
    done = subprocess.run([*command, os.fsencode(desk.folder) + b"/r\xe5"], cwd=PROJECT, capture_output=True)
    assert done.returncode == 2
    assert b"has a name that is not UTF-8 or holds control characters" in done.stderr


def test_missing_base_model(desk: Desk) -> None:
    """A base model that is not there is named before anything runs."""
    desk.recipe["model"]["base"] = str(desk.folder / "none")
    error = desk.refused()
    assert f"{desk.folder / 'none'} is not a Hugging Face model folder" in error


def test_tokenizer_that_does_not_fit(desk: Desk) -> None:
    """A tokenizer with more pieces than the model has embeddings is refused, and so is a file of prose."""
    base = desk.folder / "narrow"
    shutil.copytree(desk.base, base)
    geometry = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**geometry, "vocab_size": 1000}))
    desk.recipe["model"]["base"] = str(base)
    error = desk.refused()
    assert "2000 pieces" in error
    assert "1000 embeddings" in error
    desk.recipe["model"]["base"] = str(desk.base)
    desk.recipe["tokenizer"]["file"] = str(desk.text / "a.txt")
    assert "not a SentencePiece model" in desk.refused()
    desk.recipe["tokenizer"]["type"] = "HuggingFaceTokenizer"
    assert "tokenizer_config.json: cannot be read" in desk.refused()
    (desk.text / "tokenizer_config.json").write_text("{}")
    assert "not a Hugging Face tokenizer.json" in desk.refused()


def test_tokens_from_a_tokenizer_json(desk: Desk) -> None:
    """The base model's tokenizer in Hugging Face's format, with EOD and BOS as the recipe says: SentencePiece's ids."""
    hf_export.save(desk.text, desk.base / "tokenizer.model", 128)
    desk.recipe["tokenizer"] = {
        "type": "HuggingFaceTokenizer", "file": str(desk.text / "tokenizer.json"), "prepend_bos": True
    }  # fmt: skip
    done = desk.submit("--until", "merge-tokens")
    assert done.returncode == 0, done.stderr
    corpus = desk.root / "tokens" / "corpus_text_document"
    manifest = json.loads(corpus.with_suffix(".json").read_text())
    assert (manifest["prepend_bos"], manifest["append_eod"], list(manifest["sources"])) == (True, True, ["text"])
    encode = sentencepiece.SentencePieceProcessor(model_file=str(desk.base / "tokenizer.model")).encode
    kept = [json.loads(line)["text"] for line in (desk.root / "text" / "corpus.jsonl").read_text().splitlines()]
    expected = [token for text in kept for token in (1, *encode(text), 2)]
    assert np.fromfile(corpus.with_suffix(".bin"), dtype="<u2").tolist() == expected


def test_run_made_by_another_recipe(desk: Desk) -> None:
    """A changed recipe is refused with the stages it touches and the way out, which redoes just those."""
    assert desk.submit("--until", "dedup-filter").returncode == 0
    before = (desk.root / "dedup" / "kept" / "shard-00000.arrow").stat().st_mtime_ns
    desk.recipe["dedup"]["threshold"] = 0.9
    done = desk.submit("--until", "dedup-filter")
    assert done.returncode == 2
    assert "dedup.threshold: 0.7 -> 0.9" in done.stderr
    assert "This touches: dedup-signatures, dedup-buckets" in done.stderr
    assert "--restart-from dedup-signatures" in done.stderr
    arrow = (desk.root / "arrow" / "shard-00000.arrow").stat().st_mtime_ns
    assert desk.submit("--until", "dedup-filter", "--restart-from", "dedup-signatures").returncode == 0
    assert (desk.root / "arrow" / "shard-00000.arrow").stat().st_mtime_ns == arrow
    assert (desk.root / "dedup" / "kept" / "shard-00000.arrow").stat().st_mtime_ns > before


def test_changed_input_is_noticed(desk: Desk) -> None:
    """Text added to an input file after the first submission is refused, not half taken in."""
    assert desk.submit("--only", "prepare").returncode == 0
    with (desk.text / "a.txt").open("a") as file:
        file.write("En ny linje.\n")
    done = desk.submit("--only", "prepare")
    assert done.returncode == 2
    assert "the input files" in done.stderr
    assert "--restart-from prepare" in done.stderr


def test_corrupt_marker(desk: Desk) -> None:
    """A marker that cannot be read is said, its task is done again, and no other."""
    assert desk.submit("--only", "prepare").returncode == 0
    marker = desk.root / "markers" / "prepare" / "00001.json"
    good = marker.read_bytes()
    marker.write_bytes(good[: len(good) // 2])
    done = desk.submit("--only", "prepare")
    assert done.returncode == 0
    assert "00001.json cannot be read; done again" in done.stdout
    assert marker.read_bytes() == good
    starts = [line for line in (desk.root / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert len(starts) == 3
    assert "Nothing to do" in desk.submit("--only", "prepare").stdout


def test_stage_whose_inputs_are_neither_done_nor_selected(desk: Desk) -> None:
    """Asking for a late stage alone says what is missing before it."""
    assert "tokenize waits for dedup-filter, of which 2 task(s) are not done" in desk.refused("--only", "tokenize")


def test_unknown_stage(desk: Desk) -> None:
    """A mistyped stage is answered with the nearest and all valid ones."""
    error = desk.refused("--from", "tokenise")
    assert "Did you mean tokenize?" in error


def test_second_launcher_is_told_who_holds_the_run(desk: Desk) -> None:
    """A launcher at work is named to the second one; the lock of a dead one is taken over."""
    desk.root.mkdir(parents=True)
    stat = Path(f"/proc/{os.getpid()}/stat").read_text().rsplit(")", 1)[1].split()[19]
    holder = {"host": os.uname().nodename, "pid": os.getpid(), "process_start": stat, "since": "now"}
    (desk.root / "lock").write_text(json.dumps(holder))
    assert f"in use by process {os.getpid()} on {os.uname().nodename}" in desk.refused()
    (desk.root / "lock").write_text(json.dumps({**holder, "process_start": "1"}))
    assert desk.submit("--only", "prepare").returncode == 0
    assert not (desk.root / "lock").exists()


def test_a_lock_from_another_host_is_only_taken_on_request(desk: Desk) -> None:
    """Whether a process on another host still runs cannot be seen from here: --steal-lock has to be said."""
    desk.root.mkdir(parents=True)
    holder = {"host": "login7", "pid": os.getpid(), "process_start": "1", "since": "2026-01-01 00:00:00"}
    (desk.root / "lock").write_text(json.dumps(holder))
    error = desk.refused()
    assert f"in use by process {os.getpid()} on login7 since 2026-01-01 00:00:00" in error
    assert "--steal-lock" in error
    assert json.loads((desk.root / "lock").read_text()) == holder
    assert desk.submit("--only", "prepare", "--steal-lock").returncode == 0
    assert not (desk.root / "lock").exists()
    assert not list(desk.root.glob(".lock*"))


def test_a_changed_number_of_shards(desk: Desk) -> None:
    """Other shards are other tasks under the same numbers: refused, with the stages and the way out."""
    assert desk.submit("--only", "prepare").returncode == 0
    desk.recipe["data"]["shards"] = 3
    done = desk.submit("--only", "prepare")
    assert done.returncode == 2
    assert "data.shards: 2 -> 3" in done.stderr
    assert "--restart-from prepare" in done.stderr


def test_dry_run_starts_nothing(desk: Desk) -> None:
    """--dry-run shows every stage and leaves no run behind."""
    done = desk.submit("--dry-run")
    assert done.returncode == 0
    assert "verify-export" in done.stdout
    assert not (desk.root / "run.yaml").exists()
    assert not (desk.root / "markers").exists()


def test_run_folder_that_cannot_be_made(desk: Desk) -> None:
    """A run's folder in an impossible place is one clear line."""
    (desk.folder / "file").write_text("")
    error = desk.refused("--run-dir", str(desk.folder / "file" / "run"))
    assert "cannot be written" in error
    assert "--run-dir" in error


@pytest.mark.parametrize("launcher", sorted(path.name for path in (PROJECT / "jobs").glob("[a-z]*.py")))
def test_help(launcher: str) -> None:
    """Every launcher explains itself."""
    done = subprocess.run([sys.executable, f"jobs/{launcher}", "--help"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    assert f"python jobs/{launcher}" in done.stdout
