"""The step `decontaminate`: what matches, the three modes, the counts, and the report over shards."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from run_contract.errors import InputsMissing, UserError
from snakmodel.filter.__main__ import make_parser
from snakmodel.filter.decontaminate import grams, letters, tally
from snakmodel.filter.decontaminate.cut import without
from snakmodel.filter.decontaminate.grams import Grams
from snakmodel.filter.decontaminate.items import Evaluation, read
from snakmodel.filter.decontaminate.report import counts_of, run
from snakmodel.filter.decontaminate.step import Decontaminate, make
from snakmodel.filter.shard import filter_shard
from snakmodel.shards.arrow_stream import open_stream, write_stream
from tests.filter import decontaminate_reference as plain

REAL = next(
    (file for folder in Path(__file__).parents if (file := folder / "shared/data/danish_help_text.txt.gz").is_file()),
    None,
)
PIECES = ("a", "A", "b", "å", "a\u030a", "\ufb01", "fi", "ß", "ss", "Σ", "ς", "1", "１", "²", "\u00ad", "é", "É", "½")
GAPS = (" ", " ", " ", ", ", "\n", "-", "\u00b4", "_", "…", " \u200b ", "。", "'", "\u00ad ")
ITEM = "en to tre fire fem seks syv otte ni ti elleve tolv tretten fjorten"


def text(generator: random.Random, pieces: tuple[str, ...], most: int) -> str:
    """A random text of few different words, so that runs of words recur."""
    words = [
        "".join(generator.choices(pieces, k=generator.choice((1, 1, 2)))) for _ in range(generator.randint(0, most))
    ]
    return generator.choice(("", " ", "(")) + "".join(word + generator.choice(GAPS) for word in words)


def found(items: list[str], ngram: int, texts: list[str]) -> list[tuple[list[tuple[int, int]], set[tuple[int, int]]]]:
    """What `Grams` finds in each text, in the form of the reference."""
    result = Grams(items, ngram).find(pa.array(texts, pa.large_string()))
    answers: list[Any] = [([], set()) for _ in texts]
    place = []
    for document, _, _, begin, end in result.spans.tolist():
        place.append((document, len(answers[document][0])))
        answers[document][0].append((begin, end))
    for span, item in result.items.tolist():
        answers[place[span][0]][1].add((place[span][1], item))
    return answers


@pytest.mark.parametrize(("ngram", "seed"), [(1, 0), (2, 1), (3, 2), (8, 3), (9, 4), (13, 5), (13, 6)])
def test_spans_and_items_equal_the_plain_reference(ngram: int, seed: int) -> None:
    """In texts of few different words, spelled in many ways, spans and items are what plain Python finds."""
    generator = random.Random(seed)
    pieces = PIECES if ngram < 8 else ("a", "A", "ß", "ss")
    items = [text(generator, pieces, 3 * ngram + 2) for _ in range(12)]
    texts = [text(generator, pieces, 60) for _ in range(120)]
    texts += [f" {text(generator, PIECES, 9)} ".join(generator.choices(items, k=3)) for _ in range(40)]
    expected = [plain.contaminated(one, items, ngram) for one in texts]
    assert found(items, ngram, texts) == expected
    assert sum(bool(spans) for spans, _ in expected) > 20
    assert any(len(spans) > 1 for spans, _ in expected)


def test_real_text_equals_the_plain_reference() -> None:
    """Lines of real Danish as items of real documents, some of them shorter than n."""
    if REAL is None:
        pytest.skip("no shared/data/danish_help_text.txt.gz beside the project: there is no real text to compare on")
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        lines = [next(file).strip() for _ in range(3000)]
    generator = random.Random(1)
    items = generator.sample(lines, 40)
    texts = ["\n".join(generator.choices(lines + 10 * items, k=generator.randint(1, 8))) for _ in range(60)]
    for ngram in (8, 13):
        assert found(items, ngram, texts) == [plain.contaminated(one, items, ngram) for one in texts]


def test_every_character_is_spelled_as_documented() -> None:
    """The table of letters agrees with `unicodedata` on every code point."""
    entries, more = letters.tables()
    for point in (*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 0x1F)):
        entry, character = int(entries[point]), chr(point)
        if entry == letters.PASSED_OVER:
            assert plain.category(character) == "Cf"
            continue
        spelled = plain.words(character)
        if entry & letters.EXPANDED:
            at = entry - letters.EXPANDED
            told = "".join(map(chr, more[at + 1 : at + 1 + more[at]]))
        else:
            told = chr(entry) if entry else ""
        assert told == (spelled[0].spelling if spelled else ""), hex(point)


def test_equal_hashes_are_no_match() -> None:
    """Where the hash of a document's words is that of a gram, the letters still decide."""
    index = Grams([ITEM[:32]], 8)
    document = pa.array([ITEM[:32]])
    assert len(index.find(document).spans) == 1
    index._spelled[0] += 1
    assert len(index.find(document).spans) == 0


def test_more_matches_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing depends on the number of matches that are expected."""
    items, texts = [ITEM], [f"{ITEM} x " * 5, "intet", ITEM]
    expected = found(items, 8, texts)
    monkeypatch.setattr(grams, "_ROOM", 1)
    assert found(items, 8, texts) == expected == [plain.contaminated(one, items, 8) for one in texts]


@pytest.mark.parametrize(
    ("before", "span", "after", "expected"),
    [
        ("Se: ", "X", " og mere", "Se: og mere"),
        ("Se\n", "X", "\nog", "Se\nog"),
        ("Se ", "X", "\nog", "Se\nog"),
        ("Se\n\n", "X", " og", "Se\n\nog"),
        ("", "X", ". og", ". og"),
        ("", "X", "\n og", "og"),
        ("Se ", "X", "", "Se"),
        ("(", "X", ")", "()"),
        ("æ ", "Xå", " ø", "æ ø"),
        ("", "X", "", ""),
    ],
)
def test_white_space_around_a_cut(before: str, span: str, after: str, expected: str) -> None:
    """Of white space on both sides one side's is kept; punctuation stays."""
    begin = len(before.encode())
    assert without(before + span + after, [(begin, begin + len(span.encode()))]) == expected


def step(*flags: str) -> Decontaminate:
    args = make_parser().parse_args(["decontaminate", "--input", "x", "--output", "y", *flags])
    return make(args)


def jsonl(path: Path, *items: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def shard(path: Path, texts: list[str], size: int) -> Path:
    columns = {
        "text": pa.array(texts, pa.large_string()),
        "source": pa.array([f"s{number % 3}" for number in range(len(texts))]),
        "url": pa.array(range(len(texts))),
    }
    table = pa.table(columns)
    write_stream(path, table.schema, table.to_batches(max_chunksize=size))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    with open_stream(path) as reader:
        answer: list[dict[str, Any]] = reader.read_all().to_pylist()
        return answer


OTHER = "alpha beta gamma delta epsilon zeta eta theta iota"
TEXTS = [f"Spørgsmål: {ITEM.upper()}, svar", "intet", OTHER, f"{OTHER}!\nmidt\n{ITEM}\nslut", ITEM[:40]]


def test_mark_remove_and_cut(tmp_path: Path) -> None:
    """The three modes on the same shard: names in a column, documents gone, and spans gone."""
    against = [jsonl(tmp_path / "a.jsonl", {"q": ITEM}), jsonl(tmp_path / "b.jsonl", {"q": "x"}, {"q": OTHER})]
    source = shard(tmp_path / "in.arrow", TEXTS, 2)
    kept = {}
    for mode in ("mark", "remove", "cut"):
        flags = [] if mode == "mark" else ["--rejected", f"{tmp_path}/no-{mode}"]
        filter_shard(source, tmp_path / mode, [step("--against", *against, "--mode", mode, *flags)])
        kept[mode] = rows(tmp_path / f"{mode}.arrow")
    names = [["a.jsonl"], [], ["b.jsonl"], ["a.jsonl", "b.jsonl"], []]
    assert kept["mark"] == [{**row, "contaminated": name} for row, name in zip(rows(source), names, strict=True)]
    assert kept["remove"] == [row for row, name in zip(rows(source), names, strict=True) if not name]
    assert rows(tmp_path / "no-remove.arrow") == [row for row, name in zip(rows(source), names, strict=True) if name]
    assert [row["text"] for row in kept["cut"]] == ["Spørgsmål: , svar", "intet", "!\nmidt\nslut", TEXTS[4]]
    assert [row["url"] for row in kept["cut"]] == [0, 1, 3, 4]
    assert [row["text"] for row in rows(tmp_path / "no-cut.arrow")] == [OTHER]
    counts = json.loads((tmp_path / "cut.json").read_text())["steps"]["decontaminate"]
    assert (counts["hit"], counts["spans"], counts["emptied"]) == (3, 4, 1)
    assert counts["by_source"] == {"s0": {"documents": 2, "spans": 3}, "s2": {"documents": 1, "spans": 1}}
    assert counts["files"]["b.jsonl"] == {
        "items": 2,
        "whole": 1,
        "too_short": 1,
        "documents": 2,
        "spans": 2,
        "by_source": {"s0": 1, "s2": 1},
        "items_hit": 1,
        "hit_items": {"2": {"s0": 1, "s2": 1}},
        "further_items": {"documents": 0, "numbers": ""},
    }


def test_an_empty_shard_has_all_counts(tmp_path: Path) -> None:
    """A shard without documents has counts that can be added to those of others."""
    against = jsonl(tmp_path / "a.jsonl", {"q": ITEM})
    filter_shard(shard(tmp_path / "in.arrow", [], 2), tmp_path / "out", [step("--against", against)])
    filter_shard(shard(tmp_path / "in2.arrow", TEXTS, 2), tmp_path / "out2", [step("--against", against)])
    report(tmp_path, tmp_path / "out.json", tmp_path / "out2.json")
    told = json.loads((tmp_path / "report.json").read_text())
    assert (told["documents"], told["hit"], told["files"]["a.jsonl"]["items_hit"]) == (5, 2, 1)


def report(folder: Path, *counts: Path) -> str:
    flags = ["contamination", "--output", f"{folder}/report", "--counts", *map(str, counts)]
    run(make_parser().parse_args(flags))
    return (folder / "report.md").read_text(encoding="utf-8")


def test_counts_do_not_depend_on_shards_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the documents are cut, the report is the same, also where more items are hit than are counted apart."""
    monkeypatch.setattr(tally, "MOST_ITEMS", 4)
    generator = random.Random(4)
    items = [" ".join(generator.choices("abcdefgh", k=9)) for _ in range(20)]
    texts = [" x ".join(generator.choices(items, k=generator.randint(0, 3))) for _ in range(60)]
    against = [jsonl(tmp_path / "a.jsonl", *map(wrapped, items))]
    against.append(jsonl(tmp_path / "b.jsonl", wrapped(items[3]), wrapped("kort")))
    reports = []
    for cuts, size in (([0, 60], 60), ([0, 60], 7), ([0, 20, 33, 33, 60], 5)):
        outputs = []
        for first, stop in pairwise(cuts):
            table = shard(tmp_path / "all.arrow", texts, 60)
            with open_stream(table) as reader:
                part = reader.read_all().slice(first, stop - first)
            write_stream(tmp_path / "in.arrow", part.schema, part.to_batches(max_chunksize=size))
            outputs.append(tmp_path / f"out-{len(reports)}-{first}-{stop}")
            filter_shard(tmp_path / "in.arrow", outputs[-1], [step("--against", *against, "--ngram", "9")])
        reports.append(report(tmp_path, *(Path(f"{path}.json") for path in outputs)))
        reports.append((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert reports[0::2] == reports[:1] * 3
    assert reports[1::2] == reports[1:2] * 3
    told = json.loads(reports[1])["files"]["a.jsonl"]
    hits = {
        number: sum(item in one.split(" x ") for one in texts)
        for number, item in enumerate(items, 1)
        if any(item in one.split(" x ") for one in texts)
    }
    assert told["items_hit"] == len(hits) > 8
    assert {int(number): sum(one.values()) for number, one in told["hit_items"].items()} == dict(list(hits.items())[:4])
    assert tally.numbers_of(told["further_items"]["numbers"]) == list(hits)[4:]
    assert told["further_items"]["documents"] == sum(list(hits.values())[4:])
    assert f"{len(hits) - 4:,} further items were hit" in reports[0]
    share = 100 * len(hits) / 20
    assert f"| a.jsonl | 20 | 0 | 0 | {len(hits)} | {share:.2f} % |" in reports[0]


def wrapped(item: str) -> dict[str, Any]:
    return {"question": item}


def test_items_of_every_format_and_form(tmp_path: Path) -> None:
    """Lines, gzip and Parquet; lists and objects are searched for strings, and fields are joined in the given order."""
    item = {"id": 7, "question": "Hvad?", "choices": {"text": ["ja", "nej"], "label": ["A", "B"]}, "answer": None}
    jsonl(tmp_path / "a.jsonl", item)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n\xc3\xa6\n".replace(b"\xc3\xa6", b'{"question": "en"}')))
    pyarrow.parquet.write_table(pa.Table.from_pylist([item, {**item, "question": "Hvor?"}]), tmp_path / "c.parquet")
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    assert read(paths) == [
        Evaluation("a.jsonl", [1], ["Hvad? ja nej A B"]),
        Evaluation("b.jsonl.gz", [2], ["en"]),
        Evaluation("c.parquet", [1, 2], ["Hvad? ja nej A B", "Hvor? ja nej A B"]),
    ]
    chosen = read(paths, ["choices", "question"])
    assert [one.texts[0] for one in chosen] == ["ja nej A B Hvad?", "en", "ja nej A B Hvad?"]


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """As many folders as needed are part of the names."""
    paths = [Path(jsonl(tmp_path / folder / "test.jsonl", wrapped(ITEM))) for folder in ("mmlu", "arc")]
    assert [one.name for one in read(paths)] == ["mmlu/test.jsonl", "arc/test.jsonl"]
    with pytest.raises(UserError, match="twice"):
        read([paths[0], paths[0]])


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("a.jsonl", b'{"q": "en"}\n{"q": \n', [], "line 2 is not JSON"),
        ("a.jsonl", b'{"q": "\xff"}\n', [], "line 1 is not JSON in UTF-8"),
        ("a.jsonl", b'["q"]\n', [], "line 1 holds .* must be an object"),
        ("a.jsonl", b"\n", [], "holds no items"),
        ("a.jsonl", b"", [], "holds no items"),
        ("a.jsonl", b'{"q": "en to"}', [], "none of its 1 items has 8 words"),
        ("a.jsonl", b'{"question": "en"}', ["--fields", "questoin"], "did you mean question"),
        ("a.jsonl", b'{"q": "en"}', ["--fields", "q", "anwser"], "no evaluation file has this field"),
        ("a.jsonl.gz", b'{"q": "en"}', [], "damaged, or not what its name says"),
        ("a.parquet", b'{"q": "en"}', [], "damaged, or not what its name says"),
        ("a.csv", b"q", [], "evaluation files are .jsonl"),
    ],
)
def test_wrong_evaluation_files(tmp_path: Path, name: str, content: bytes, flags: list[str], message: str) -> None:
    """What is wrong with a file is said with the file, the line or the field, and what is valid."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        step("--against", str(tmp_path / name), *flags)


def test_wrong_flags_and_columns(tmp_path: Path) -> None:
    """Numbers and flags that make no sense are refused, as is a shard that was marked before."""
    against = jsonl(tmp_path / "a.jsonl", wrapped(ITEM))
    for flags, message in (
        (["--ngram", "0"], "from 1 to 100"),
        (["--rejected", "x"], "nothing for --rejected"),
    ):
        with pytest.raises(UserError, match=message):
            step("--against", against, *flags)
    with pytest.raises(InputsMissing, match="does not exist"):
        step("--against", f"{tmp_path}/b.jsonl")
    one = step("--against", against)
    with pytest.raises(UserError, match="already"):
        one.schema(one.schema(pa.schema([("text", pa.string())])))


def test_wrong_counts(tmp_path: Path) -> None:
    """The report refuses counts that cannot be added."""
    source = shard(tmp_path / "in.arrow", TEXTS, 2)
    for name, flags in (("a", []), ("b", ["--ngram", "9"]), ("c", [])):
        items = [wrapped(ITEM)] * (2 if name == "c" else 1)
        against = jsonl(tmp_path / "items.jsonl", *items)
        filter_shard(source, tmp_path / name, [step("--against", against, *flags)])
    for names, message in (("ab", "--ngram 13 and .* --ngram 9"), ("ac", "different evaluation"), ("aa", "twice")):
        with pytest.raises(UserError, match=message):
            report(tmp_path, *(tmp_path / f"{name}.json" for name in names))
    with pytest.raises(UserError, match="does not hold the counts"):
        counts_of(Path(jsonl(tmp_path / "d.json", {"steps": {}})))
    assert not (tmp_path / "report.json").exists()


def test_the_commands(tmp_path: Path) -> None:
    """Both commands as a user types them; a mistake is one line and exit code 2, and nothing is written."""
    against = jsonl(tmp_path / "a.jsonl", wrapped(ITEM))
    shard(tmp_path / "in.arrow", TEXTS, 2)

    def command(*flags: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "snakmodel.filter", *flags]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    files = ("--input", f"{tmp_path}/in.arrow", "--output", f"{tmp_path}/out", "--against", against)
    wrong = command("decontaminate", *files, "--fields", "answer")
    assert (wrong.returncode, wrong.stderr.count("\n"), (tmp_path / "out.json").exists()) == (2, 1, False)
    done = command("decontaminate", *files, "--mode", "cut")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    told = command("contamination", "--counts", f"{tmp_path}/out.json", "--output", f"{tmp_path}/report")
    assert told.returncode == 0, told.stderr
    assert "| a.jsonl | 1 | 0 | 0 | 1 | 100.00 % | 2 | 2 |" in told.stdout
