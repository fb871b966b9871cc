"""Several steps in one pass: the same as one after the other; and what is refused before a run starts."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from run_contract.errors import UserError
from snakmodel.config.sections import PROJECT
from snakmodel.filter.shard import filter_shard
from snakmodel.filter.steps import STEPS, check_steps, make_steps
from snakmodel.shards.arrow_stream import SCHEMA, open_stream, write_stream
from tests.filter.fasttext_files import write_model

WITH_SCORE = SCHEMA.append(pa.field("score", pa.float64()))
ITEM = "hvad hedder den by hvor den lange gule bus vender om aftenen"


def words(text: str) -> list[str]:
    """A command line as a list."""
    return text.split()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard of documents with scores, some of which hold an address or an evaluation item."""
    some = random.Random(7)
    rows: list[dict[str, Any]] = []
    for number in range(200):
        parts = [f"Dokument nummer {number} om bussen og byen.", "Den er her."]
        if number % 3 == 0:
            parts.append(f"Skriv til nr{number}@firma.dk.")
        if number % 5 == 0:
            parts.insert(1, ITEM)
        score = None if number % 7 == 0 else some.random()
        rows.append({"text": "\n".join(parts), "source": "abc"[number % 3], "score": score})
    table = pa.Table.from_pylist(rows, WITH_SCORE)
    write_stream(tmp_path / "in.arrow", table.schema, table.to_batches(17))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": ITEM}) + "\n")
    return tmp_path / "in.arrow"


def test_one_pass_is_the_same_as_several(shard: Path) -> None:
    """Documents, columns, order and counts of each step, in two orders, with a step that rejects."""
    folder = shard.parent
    where, pii = ["where", "--condition=score > 0.4"], words("pii --kinds email")
    against = ["decontaminate", "--against", str(folder / "eval.jsonl"), *words("--ngram 8")]
    cut = [*against, "--mode", "cut"]
    remove = [*against, "--mode", "remove", "--rejected", str(folder / "rejected")]
    for order in ([where, pii, cut], [remove, where, pii]):
        together = filter_shard(shard, folder / "once", make_steps([word for step in order for word in ("+", *step)]))
        rejected = (folder / "rejected.arrow").read_bytes() if order[0] is remove else b""
        source = shard
        counts: dict[str, Any] = {}
        for number, step in enumerate(order):
            alone = filter_shard(source, folder / f"step{number}", make_steps(["+", *step]))
            counts |= alone["steps"]
            source = folder / f"step{number}.arrow"
        assert together["steps"] == counts
        assert [*together["steps"]] == [step[0] for step in order]
        with open_stream(folder / "once.arrow") as once, open_stream(source) as last:
            assert once.read_all() == last.read_all()
        assert 0 < together["documents"] < 200
        assert together["documents"] == counts[order[-1][0]]["kept"]
        assert json.loads((folder / "once.json").read_text()) == together
        if rejected:
            assert (folder / "rejected.arrow").read_bytes() == rejected


def test_where_keeps_what_its_condition_says(shard: Path) -> None:
    """The documents are those that Python picks, and the counts by source are theirs."""
    with open_stream(shard) as reader:
        rows = reader.read_all().to_pylist()
    kept = [row for row in rows if row["source"] in ("a", "c") or row["score"] is None]
    made = make_steps(["+", "where", "--condition", "source in ['a', 'c'] or score is None"])
    counts = filter_shard(shard, shard.parent / "out", made)["steps"]["where"]
    with open_stream(shard.parent / "out.arrow") as reader:
        assert reader.read_all().to_pylist() == kept
    assert (counts["documents"], counts["kept"]) == (200, len(kept))
    assert {name: one["kept"] for name, one in counts["sources"].items()} == {
        name: sum(row["source"] == name for row in kept) for name in "abc"
    }


def test_a_condition_sees_what_steps_before_it_added(tmp_path: Path) -> None:
    """The schema goes from step to step: the order decides whether a column is there."""
    model = str(write_model(tmp_path / "m.bin"))
    mark = ["+", "language", "--keep", "da", "--mark", "--model", model]
    where = ["+", "where", "--condition=language == 'da' and language_probability > 0.5"]
    quality = ["+", *words("quality --mode mark")]
    found = check_steps([*mark, *quality, *where], WITH_SCORE)
    assert found.names == ["text", "source", "score", "language", "language_probability", "quality"]
    with pytest.raises(UserError, match=r"names the column 'language', but the columns there are text, source, score"):
        check_steps([*where, *mark], WITH_SCORE)
    assert check_steps([], SCHEMA) == SCHEMA


def test_old_lists_of_columns_go(tmp_path: Path) -> None:
    """The metadata of `datasets`, which names the columns, is dropped when a column is added."""
    write_model(tmp_path / "m.bin")
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": ITEM}) + "\n")
    schema = SCHEMA.with_metadata({"huggingface": "{}", "mine": "stays"})
    for step in (
        words("quality"),
        ["decontaminate", "--against", str(tmp_path / "eval.jsonl")],
        [*words("language --keep da --mark --model"), str(tmp_path / "m.bin")],
    ):
        assert check_steps(["+", *step], schema).metadata == {b"mine": b"stays"}


REFUSED = {
    "a language that the model does not have": ("language --keep dk --model MODEL", r"does not know the language 'dk'"),
    "a model that is not there": ("language --keep da --model absent.bin", r"absent\.bin"),
    "a model that is none": ("language --keep da --model EVAL", r"eval\.jsonl"),
    "a threshold that there is not": ("quality --thresholds THRESHOLDS", r"gopher_min_word.*gopher_min_words"),
    "thresholds that are not there": ("quality --thresholds absent.yaml", r"absent\.yaml"),
    "a region that there is not": ("pii --region XX", r"XX"),
    "a module that there is not": ("pii --national dk.cprr", r"dk\.cprr"),
    "national numbers without a module": ("pii --kinds national", r"needs --national"),
    "a region without phones": ("pii --kinds email --region DK", r"does not name phone"),
    "a kind that there is not": ("pii --kinds emial", r"'emial' is unknown; the kinds are email"),
    "evaluation files that are not there": ("decontaminate --against absent.jsonl", r"absent\.jsonl"),
    "a field that there is not": ("decontaminate --against EVAL --fields questoin", r"questoin"),
    "a run of no words": ("decontaminate --against EVAL --ngram 0", r"--ngram 0"),
    "a condition on no column": ("where --condition scroe>1", r"'scroe'.*did you mean score"),
    "a condition of another type": ("where --condition score>'a'", r"which holds double"),
    "a condition that is none": ("where --condition score>", r"where: 'score>' is no condition"),
    "a column that is there": ("quality + where --condition score>1 + quality --mode mark", r"has a column 'quality'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_a_run_starts(tmp_path: Path, case: str) -> None:
    """Wrong names, files and columns are named without a document."""
    write_model(tmp_path / "m.bin")
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": ITEM}) + "\n")
    (tmp_path / "t.yaml").write_text("gopher_min_word: 5\n")
    line, says = REFUSED[case]
    for name, file in (("MODEL", "m.bin"), ("EVAL", "eval.jsonl"), ("THRESHOLDS", "t.yaml")):
        line = re.sub(rf"\b{name}\b", str(tmp_path / file), line)
    with pytest.raises(UserError, match=says):
        check_steps(["+", *line.split()], WITH_SCORE)


def test_a_step_twice(shard: Path) -> None:
    """Two conditions are refused, because their counts could not be told apart; nothing is published."""
    steps = make_steps(["+", "where", "--condition=score > 0", "+", "where", "--condition=score < 1"])
    with pytest.raises(UserError, match="the step where is there twice"):
        filter_shard(shard, shard.parent / "out", steps)
    assert not list(shard.parent.glob("*out*"))


def test_two_outputs_of_one_path(shard: Path) -> None:
    """What is rejected may not be written over what is kept."""
    out = shard.parent / "out"
    line = ["+", "decontaminate", "--against", str(shard.parent / "eval.jsonl"), "--mode", "remove"]
    with pytest.raises(UserError, match="must be written to different paths"):
        filter_shard(shard, out, make_steps([*line, "--rejected", str(out)]))


def test_the_command_line(shard: Path) -> None:
    """`steps` runs the steps after each `+`; without one it names them, and a word that is no step is a usage error."""
    out = shard.parent / "out"
    base = [sys.executable, "-m", "snakmodel.filter", "steps", "--input", str(shard), "--output", str(out)]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*base, *more], capture_output=True, text=True, cwd=PROJECT)

    none = run()
    assert (none.returncode, none.stderr.count("\n")) == (2, 1)
    assert "steps needs at least one step: + STEP …, of decontaminate, lines, language" in none.stderr
    wrong = run("+", "were", "--condition=score > 0.5")
    assert wrong.returncode == 2
    assert "'were'" in wrong.stderr
    assert not out.with_suffix(".arrow").exists()
    good = run("+", "where", "--condition=-1<score", "+", "pii", "--kinds", "email")
    assert good.returncode == 0, good.stderr
    assert list(json.loads(good.stdout)["steps"]) == ["where", "pii"]
    assert set(STEPS) == {"decontaminate", "lines", "language", "pii", "quality", "where"}
