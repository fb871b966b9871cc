"""The step `language`: the rule, what is kept, marked and rejected, and its counts."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from run_contract.errors import UserError
from snakmodel.filter.__main__ import make_parser
from snakmodel.filter.language import SAMPLE_CHARACTERS, WHITE_SPACE, LanguageStep, make_step
from snakmodel.filter.language_models import FastTextModel, read_model, shipped_model
from snakmodel.filter.shard import filter_shard
from snakmodel.shards.arrow_stream import write_stream

DANISH = "Vi skal en tur i skoven i morgen, hvis vejret holder."
ENGLISH = "The weather is nice today and we are going for a long walk."
SCHEMA = pa.schema([("text", pa.large_string()), ("source", pa.string()), ("number", pa.int64())])


@dataclass
class Scripted:
    """A model whose texts say what it answers: `da 0.7 anything`. Any other text has no label."""

    labels: list[str] = field(default_factory=lambda: ["da", "en", "sv"])
    gives_probability: bool = True
    asked: list[str] = field(default_factory=list)

    def predict(self, texts: Any) -> Any:
        """See `Model`."""
        self.asked += texts.to_pylist()
        labels, probabilities = np.full(len(texts), -1, np.int32), np.zeros(len(texts), np.float32)
        for row, text in enumerate(texts.to_pylist()):
            words = text.split()
            if words and words[0] in self.labels:
                labels[row], probabilities[row] = self.labels.index(words[0]), np.float32(words[1])
        return labels, probabilities


def shard(path: Path, texts: list[str], sources: list[str] | None = None, size: int = 1000) -> Path:
    """Write a shard in batches of so many documents."""
    rows = pa.table([texts, sources or ["a"] * len(texts), list(range(len(texts)))], schema=SCHEMA)
    write_stream(path, SCHEMA, rows.to_batches(max_chunksize=size))
    return path


def read(path: Path) -> Any:
    """All rows of a shard."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return reader.read_all()


def run(tmp_path: Path, texts: list[str], sources: list[str] | None = None, size: int = 1000, **form: Any) -> Any:
    """The table and the step's counts of a shard with these documents."""
    step = LanguageStep(form.pop("model", None) or Scripted(), form.pop("keep", frozenset({"da"})), **form)
    report = filter_shard(shard(tmp_path / "in.arrow", texts, sources, size), tmp_path / "out", [step])
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == report
    return read(tmp_path / "out.arrow"), report["steps"]["language"]


def test_the_probability_must_be_greater(tmp_path: Path) -> None:
    """A probability equal to the least one does not pass; the next greater number does. The label must be right."""
    more = np.nextafter(np.float32(0.5), np.float32(1))
    texts = ["da 0.5", f"da {more}", "da 0.9", "en 0.9", "nothing"]
    kept, counts = run(tmp_path, texts, min_probability=0.5)
    assert kept["number"].to_pylist() == [1, 2]
    assert (counts["documents"], counts["kept"], counts["judged"], counts["passed"]) == (5, 2, 5, 2)
    assert run(tmp_path, texts, min_probability=0.5, keep=frozenset({"da", "en"}))[1]["kept"] == 3


def test_the_text_is_trimmed_for_the_model_alone(tmp_path: Path) -> None:
    """The model sees what `str.strip` leaves; the document that is kept is unchanged."""
    model = Scripted()
    texts = [WHITE_SPACE + "da 0.9\u00a0x" + WHITE_SPACE, "\u3000", ""]
    kept, counts = run(tmp_path, texts, model=model)
    assert model.asked == [text.strip() for text in texts]
    assert kept["text"].to_pylist() == texts[:1]
    assert counts["empty"] == 2


def test_line_ends_count_as_spaces() -> None:
    """A document of several lines has the label and the probability of the same text on one line."""
    model = FastTextModel(read_model(shipped_model()))
    ends = ["\n", "\r\n", "\r", " "]
    found = model.predict(pa.array([f"{DANISH}{end}{ENGLISH}" for end in ends], pa.large_string()))
    assert len(set(found[0].tolist())) == len(set(found[1].tolist())) == 1


def test_columns_and_order_are_kept(tmp_path: Path) -> None:
    """What is kept and what is rejected are the rows of the input in their order, with all columns."""
    texts = ["da 0.9 é", "en 0.9", "da 0.1", "da 0.8\nx", ""]
    run(tmp_path, texts, rejected_path=tmp_path / "other")
    whole = read(tmp_path / "in.arrow")
    assert read(tmp_path / "out.arrow") == whole.take([0, 3])
    assert read(tmp_path / "other.arrow") == whole.take([1, 2, 4])


def test_lines(tmp_path: Path) -> None:
    """Lines that fail go to the rejected shard, and documents without a line left are dropped."""
    texts = ["da 0.9\nen 0.9\n da 0.8 \r\n", "en 0.7\n\nen 0.8", "da 0.7", "", "da 0.9\nda 0.8"]
    kept, counts = run(tmp_path, texts, list("abbac"), unit="line", rejected_path=tmp_path / "other")
    assert kept["text"].to_pylist() == ["da 0.9\n da 0.8 \r", "da 0.7", "da 0.9\nda 0.8"]
    assert kept["number"].to_pylist() == [0, 2, 4]
    other = read(tmp_path / "other.arrow")
    assert other["text"].to_pylist() == ["en 0.9\n", "en 0.7\n\nen 0.8", ""]
    assert other["number"].to_pylist() == [0, 1, 3]
    assert (counts["judged"], counts["passed"], counts["empty"]) == (11, 5, 3)
    assert counts["sources"]["a"] == {"documents": 2, "kept": 1}
    assert counts["labels"] == {"da": 5, "en": 3}


def test_marks(tmp_path: Path) -> None:
    """Marking keeps all documents, and adds the label and the probability."""
    found, counts = run(tmp_path, ["da 0.9", "en 0.25", "x"], mark=True)
    assert found["language"].to_pylist() == ["da", "en", None]
    assert found["language_probability"].to_pylist() == [pytest.approx(0.9), 0.25, 0.0]
    assert found.schema.field("language_probability").type == pa.float32()
    assert (counts["kept"], counts["passed"]) == (3, 1)


def test_marking_drops_only_stale_metadata(tmp_path: Path) -> None:
    """The schema's note for the library datasets lists its columns, and would be wrong."""
    step = LanguageStep(Scripted(), frozenset({"da"}), mark=True)
    assert step.schema(SCHEMA.with_metadata({"huggingface": "{}", "mine": "x"})).metadata == {b"mine": b"x"}
    with pytest.raises(UserError, match="has a column 'language' already, which this step would add"):
        step.schema(SCHEMA.append(pa.field("language", pa.string())))


def test_counts_add_up(tmp_path: Path) -> None:
    """Labels and histograms hold every document that has any text, and sources every document."""
    random = np.random.default_rng(3)
    texts = [f"{label} {random.random():.3f}" for label in random.choice(["da", "en", "sv", "?"], 500)] + [" "] * 7
    _, counts = run(tmp_path, texts, [*list("ab" * 253), "c"])
    filled = counts["judged"] - counts["empty"]
    assert (counts["judged"], counts["empty"]) == (507, 7)
    assert sum(counts["labels"].values()) == filled
    assert counts["labels"]["(none)"] == sum(text[0] == "?" for text in texts)
    assert list(counts["labels"].values()) == sorted(counts["labels"].values(), reverse=True)
    bins = counts["probabilities"]
    assert [len(bins[name]) for name in ("kept_languages", "other_languages")] == [20, 20]
    assert sum(bins["kept_languages"].values()) == counts["labels"]["da"]
    assert sum(sum(part.values()) for part in bins.values()) == filled
    assert sum(source["kept"] for source in counts["sources"].values()) == counts["kept"] == counts["passed"]


def test_a_probability_above_1_is_in_the_last_bin(tmp_path: Path) -> None:
    """fastText adds a little to each probability."""
    _, counts = run(tmp_path, ["da 1.00001", "da 0.9501", "da 0.9499"])
    assert counts["probabilities"]["kept_languages"]["0.95"] == 2


def test_samples(tmp_path: Path) -> None:
    """Up to three rejected documents per source, the first ones, cut to 80 characters; none of empty documents."""
    texts = ["en 0.9 " + "æ" * 100, "da 0.9", " ", "da 0.123456", "en 0.8", "x", "sv 0.7"]
    _, counts = run(tmp_path, texts, ["a", "a", "a", "a", "a", "b", "a"])
    assert list(counts["samples"]) == ["a", "b"]
    assert counts["samples"]["a"][0]["text"] == texts[0][:SAMPLE_CHARACTERS]
    assert counts["samples"]["a"][1] == {"text": "da 0.123456", "language": "da", "probability": 0.1235}
    assert [sample["text"] for sample in counts["samples"]["a"]][2:] == ["en 0.8"]
    assert counts["samples"]["b"] == [{"text": "x", "language": None, "probability": 0.0}]


@pytest.mark.parametrize("form", [{}, {"unit": "line"}, {"mark": True}], ids=str)
def test_batches_make_no_difference(tmp_path: Path, form: dict[str, Any]) -> None:
    """Rows and counts are the same whatever the sizes of the batches, and a step works for several shards."""
    random = np.random.default_rng(5)
    lines = [f"{label} {random.random():.2f}" for label in random.choice(["da", "en", "sv", "?"], 300)]
    texts = ["\n".join(lines[place : place + 3]) for place in range(298)]
    sources = random.choice(list("abcd"), 298).tolist()
    found = [run(tmp_path, texts, sources, size, **form) for size in (1, 7, 1000)]
    assert found[0] == found[1] == found[2]
    step = LanguageStep(Scripted(), frozenset({"da"}), **form)
    twice = [filter_shard(tmp_path / "in.arrow", tmp_path / "again", [step]) for _ in range(2)]
    assert twice[0] == twice[1]
    assert twice[0]["steps"]["language"] == found[0][1]


def test_a_slice_of_a_batch(tmp_path: Path) -> None:
    """A batch that is a part of another one, as an earlier step may give it, is judged by its own lines."""
    batch = pa.RecordBatch.from_arrays([["en 0.9\nx", "da 0.9\nen 0.7", "da 0.8"], ["a"] * 3, [0, 1, 2]], schema=SCHEMA)
    for unit, expected in (("line", ["da 0.9", "da 0.8"]), ("document", ["da 0.9\nen 0.7", "da 0.8"])):
        kept, _ = LanguageStep(Scripted(), frozenset({"da"}), unit=unit).run(batch.slice(1))
        assert kept["text"].to_pylist() == expected


def test_nothing_is_published_if_it_fails(tmp_path: Path) -> None:
    """A null in the last batch leaves neither the shard, nor the rejected one, nor counts."""
    path = shard(tmp_path / "in.arrow", ["da 0.9", "en 0.9", None], size=1)  # type: ignore[list-item]
    step = LanguageStep(Scripted(), frozenset({"da"}), rejected_path=tmp_path / "other")
    with pytest.raises(UserError, match="is null"):
        filter_shard(path, tmp_path / "out", [step])
    assert [path.name for path in tmp_path.iterdir()] == ["in.arrow"]


def test_flags_that_do_not_fit(tmp_path: Path) -> None:
    """Each refusal says what to change."""
    for least in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="must be at least 0 and less than 1"):
            LanguageStep(Scripted(), frozenset({"da"}), least)
    for form in ({"unit": "line"}, {"rejected_path": tmp_path / "other"}):
        with pytest.raises(UserError, match="leave out --unit line and --rejected"):
            LanguageStep(Scripted(), frozenset({"da"}), mark=True, **form)
    with pytest.raises(UserError, match="must be written to different paths"):
        run(tmp_path, ["da 0.9"], rejected_path=tmp_path / "out")
    args = make_parser().parse_args(["language", "--input", "i", "--output", "o", "--keep", "dan"])
    with pytest.raises(UserError, match=r"the model lid.176 does not know the language 'dan'; did you mean da\?"):
        make_step(args)
    pytest.importorskip("heliport")
    args = make_parser().parse_args(
        [
            "language",
            "--input",
            "i",
            "--output",
            "o",
            "--keep",
            "dan",
            "--model",
            "heliport",
            "--min_probability",
            "0.6",
        ]
    )
    with pytest.raises(UserError, match="leave the flag out"):
        make_step(args)


def test_the_command(tmp_path: Path) -> None:
    """As typed: Danish is kept, English goes to the rejected shard, and the counts are printed."""
    shard(tmp_path / "in.arrow", [DANISH, ENGLISH])
    command = [sys.executable, "-m", "snakmodel.filter", "language", "--input", tmp_path / "in.arrow", "--keep", "da"]
    flags = ["--output", tmp_path / "out", "--rejected", tmp_path / "other", "--min_probability", "0.6"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["documents"] == 1
    assert read(tmp_path / "out.arrow")["text"].to_pylist() == [DANISH]
    assert read(tmp_path / "other.arrow")["text"].to_pylist() == [ENGLISH]
