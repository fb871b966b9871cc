"""The step `quality`: the measures, the rules at their borders, the column, the counts and the calibration."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from run_contract.errors import UserError
from snakmodel.dedup.minhash.compile_cache import cache_folder
from snakmodel.filter.__main__ import make_parser
from snakmodel.filter.quality import calibrate, characters, measures, rules, threshold_file
from snakmodel.filter.quality.step import COLUMN, Measurer, QualityStep
from snakmodel.filter.shard import filter_shard
from snakmodel.shards.arrow_stream import open_stream, write_stream
from tests.filter import quality_reference as plain

DANISH = rules.Thresholds(stop_words=rules.STOP_WORDS["da"])
PIECES = (
    *(
        "og",
        "at",
        "den",
        "ål",
        "Ærø",
        "a",
        "b",
        "1",
        "12",
        "café",
        "x" * 31,
        "😀",
        "#",
        "##",
        "-",
        "•",
        "…",
        "...",
        "....",
        ".",
    ),
    *(
        "ja.",
        "nej!",
        "hvad?",
        '"så."',
        "(så.)",
        "»så.«",
        "。",
        "؟",
        "{",
        "[1]",
        "[",
        "[]",
        "[edit]",
        "[citation needed]",
        "[٣]",
    ),
    *(
        "lorem ipsum",
        "Lorem Ipsum er.",
        "JavaScript",
        "java[2]script.",
        "Cookie policy",
        "use coo\u212aies",
        "en to tre fire.",
    ),
    *("\x00", "\x1f", "\u200b", "İ", "a b c d e f g h i j k l."),
)
SPACES = (
    " ",
    " ",
    " ",
    "\n",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r",
    "\t",
    "\v",
    "\f",
    "\x1c",
    "\x85",
    "\xa0",
    "\u2028",
    "\u3000",
    "",
)


def documents(count: int, seed: int = 3) -> list[str]:
    """Random documents of few different pieces, so that words, lines and paragraphs recur; some are very short."""
    made = []
    generator = random.Random(seed)
    for _ in range(count):
        pieces = generator.choices(PIECES, k=generator.randint(1, 12))
        spaces = generator.choices(SPACES, k=generator.randint(1, 6))
        words = [
            generator.choice(pieces) + generator.choice(spaces) for _ in range(generator.choice((0, 1, 2, 5, 20, 80)))
        ]
        made.append(generator.choice(("", "", "\n", " ", "\n\n ")) + "".join(words))
    return made


def measured(texts: list[str], thresholds: rules.Thresholds = DANISH) -> list[dict[str, int]]:
    found = Measurer(thresholds).measure(pa.array(texts, pa.large_string())).measures
    return [dict(zip(measures.NAMES, row, strict=True)) for row in found.tolist()]


def failed(text: str, **thresholds: Any) -> list[str]:
    """The rules that a document fails of those that are given; all others are off."""
    off = {rule.name: None for rule in rules.RULES}
    step = QualityStep(dataclasses.replace(DANISH, **{**off, **thresholds}))
    found: list[str] = run(step, [text])[0].column(COLUMN)[0].as_py()
    return found


def run(step: QualityStep, texts: list[str]) -> tuple[Any, dict[str, Any]]:
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string()), "source": ["s"] * len(texts)})
    after, counts = step.run(batch)
    assert after.schema == step.schema(batch.schema)
    after.validate(full=True)
    return after, counts


def shard(path: Path, texts: list[str], size: int, kind: Any = None) -> Path:
    kind = kind or pa.large_string()
    sources = [f"s{number % 3}" for number in range(len(texts))]
    columns = {"text": pa.array(texts, kind), "source": pa.array(sources), "url": pa.array(range(len(texts)))}
    table = pa.table(columns)
    write_stream(path, table.schema, table.to_batches(max_chunksize=size))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    with open_stream(path) as reader:
        found: list[dict[str, Any]] = reader.read_all().to_pylist()
        return found


@pytest.mark.parametrize("seed", range(4))
def test_measures_equal_the_plain_reference(seed: int) -> None:
    """Every measure of random documents is what plain Python finds, with settings as published and with others."""
    loose = dataclasses.replace(
        DANISH,
        c4_line_stopped=seed % 2 == 0,
        c4_line_citations=seed < 2,
        c4_line_javascript=seed > 1,
        c4_line_min_words=None if seed == 3 else 2,
        c4_line_max_word_length=30 if seed else None,
        c4_line_policy=("nej",),
        fineweb_short_line=3,
    )
    for thresholds in (DANISH, loose):
        texts = documents(500, seed)
        for text, found in zip(texts, measured(texts, thresholds), strict=True):
            assert found == plain.measures(text, thresholds), repr(text)


def test_cleaned_lines_equal_the_plain_reference() -> None:
    """The kept lines, and the counts of the others, are what plain Python finds."""
    for thresholds in (DANISH, dataclasses.replace(DANISH, c4_line_stopped=False, c4_line_min_words=None)):
        texts = documents(500, 11)
        found = Measurer(thresholds).measure(pa.array(texts))
        expected = [plain.kept_lines(text, thresholds) for text in texts]
        assert found.cleaned.to_pylist() == [text for _, _, text in expected]
        assert [dict(zip(measures.LINE_NAMES, row, strict=True)) for row in found.lines.tolist()] == [
            lines for _, lines, _ in expected
        ]


def test_slices_and_kinds_of_strings_are_the_same() -> None:
    """A slice of an array of either kind of strings gives the measures of its own documents."""
    texts = documents(40)
    whole = Measurer(DANISH).measure(pa.array(texts)).measures
    for kind in (pa.string(), pa.large_string()):
        part = Measurer(DANISH).measure(pa.array(texts, kind)[7:23])
        assert (part.measures == whole[7:23]).all()
    assert len(Measurer(DANISH).measure(pa.array([], pa.string())).measures) == 0


def test_long_words_and_words_without_spaces_between() -> None:
    """N-grams of words longer than the table of powers are compared too, and "ab c" has the 5-grams of "a bc"."""
    long_words = [letter * 2000 for letter in "abcdefg"]
    text = " ".join([*long_words, *long_words])
    assert measured([text])[0]["repeated_5_grams"] == 10_000
    assert measured(["a b c d e ab c d e x"])[0] == plain.measures("a b c d e ab c d e x", DANISH)


def letters(n: int, times: int) -> str:
    """The first n letters as words, so many times: 4 n - 1 characters if it is two times."""
    return " ".join("abcdefghij"[:n] * times)


BORDERS: list[tuple[str, float, str, str]] = [
    ("gopher_min_words", 3, "en to tre ...", "en to ... ###"),
    ("gopher_max_words", 3, "en to tre ...", "en to tre fire"),
    ("gopher_min_mean_word_length", 3, "ål åben - - -", "ål øre"),
    ("gopher_max_mean_word_length", 3, "ål åben", "ål åbent"),
    ("gopher_max_hashes", 0.5, "#ord ord", "#ord #ord ord"),
    ("gopher_max_ellipses", 0.5, "ord... ord", "ord... … ord"),
    ("gopher_max_bullet_lines", 0.5, "- et\n to", "- et\n • to\n tre"),
    ("gopher_max_ellipsis_lines", 0.5, "et... \nto", "et...\nto… \ntre"),
    ("gopher_min_alphabetic_words", 0.5, "ål 1", "ål 1 2"),
    ("gopher_min_stop_words", 2, "og på bordet", "og Og OG og, og"),
    ("gopher_max_repeated_lines", 0.25, "a\na\nb\nc", "a\na\nb"),
    ("gopher_max_repeated_paragraphs", 0.25, "a\n\na\n\nb\n\nc", "a\n\na\n\nb"),
    ("gopher_max_repeated_line_characters", 0.4, "åå\nåå", "ååå\nååå"),
    ("gopher_max_repeated_paragraph_characters", 0.4, "åååå\n\nåååå", "ååååå\n\nååååå"),
    ("gopher_max_top_2_gram", 0.5, "a b a b 1234", "a b a b 123"),
    ("gopher_max_top_3_gram", 0.5, "a b c a b c 12345678", "a b c a b c 123"),
    ("gopher_max_top_4_gram", 0.5, "a b c d a b c d 123456789012", "a b c d a b c d 123"),
    *((f"gopher_max_repeated_{n}_grams", n / (4 * n - 1), letters(n, 2), letters(n, 3)) for n in range(5, 11)),
    ("c4_min_sentences", 2, "Det er et. Det er to.", "Det er et og to.\nDet er ..."),
    ("c4_max_lorem_ipsum_lines", 0, "Lorem og ipsum er her.", "Her er Lorem Ipsum."),
    ("c4_max_curly_bracket_lines", 0, "Der er ingen } her.", "Der er en { her."),
    ("fineweb_min_lines", 1, ".", " \n\t\n"),
    ("fineweb_min_stopped_lines", 0.5, "ja.\nnej", "ja. \nnej"),
    ("fineweb_max_short_lines", 0.5, "å" * 30 + "\n" + "å" * 31, "å" * 30),
    ("fineweb_max_repeated_line_characters", 0.25, "a\na\nbb", "a\na\nb"),
    ("fineweb_max_newlines", 0.5, "a\nb", "a\nb\n"),
]
"""A rule, a threshold, a document just on the side that passes, and one that fails."""


@pytest.mark.parametrize(("rule", "threshold", "passes", "fails"), BORDERS)
def test_each_rule_at_its_border(rule: str, threshold: float, passes: str, fails: str) -> None:
    """A value that equals the threshold passes, and one beyond it fails."""
    assert failed(passes, **{rule: threshold}) == []
    assert failed(fails, **{rule: threshold}) == [rule]


def test_every_rule_has_a_border_case_and_a_threshold() -> None:
    """The rules are those that have thresholds, and each one's docstring names the measures that it uses."""
    names = [rule.name for rule in rules.RULES]
    assert {name for name, *_ in BORDERS} == set(names)
    assert names == [field.name for field in dataclasses.fields(rules.Thresholds)][: len(names)]
    source = Path(rules.__file__).read_text(encoding="utf-8")
    for rule in rules.RULES:
        docstring = source.split(f"    {rule.name}: ")[1].split('"""')[1]
        assert f"`{rule.measure}`" in docstring
        assert rule.per is None or f"per `{rule.per}`" in docstring
        assert docstring.startswith((rule.source, f"The list rule of {rule.source}"))


def test_empty_and_one_word_documents() -> None:
    """An empty document fails the rules that need something, and quotients of nothing fail no rule."""
    step = QualityStep(DANISH)
    after, _ = run(step, ["", " \n ", "ord", "ord uden linjeskift."])
    needs = ["gopher_min_words", "gopher_min_stop_words", "c4_min_sentences"]
    lists = after.column(COLUMN).to_pylist()
    assert lists[0] == [*needs, "fineweb_min_lines"]
    assert set(lists[1]) >= {*needs, "fineweb_min_lines"}
    assert lists[2] == [*needs, "fineweb_min_stopped_lines", "fineweb_max_short_lines"]
    assert "gopher_max_top_2_gram" in lists[3]


def test_stop_words_count_once_and_only_as_written() -> None:
    """A stop word counts once per document; another case or a comma makes it another word."""
    assert measured(["og og på Og på, at", "og", "øg"])[0]["stop_words"] == 3
    assert measured(["og på at det er"], dataclasses.replace(DANISH, stop_words=()))[0]["stop_words"] == 0


def good(number: int) -> str:
    """A document of eight lines, in words that look Danish, which passes all published rules."""
    generator = random.Random(number)
    syllables = (
        "blå",
        "bær",
        "grød",
        "hav",
        "is",
        "jord",
        "kål",
        "lys",
        "mel",
        "nord",
        "ost",
        "regn",
        "skov",
        "tå",
        "vand",
    )

    def word() -> str:
        return "".join(generator.choices(syllables, k=2))

    return "\n".join(f"En {word()} og {word()} på {word()} {word()} {word()} {word()}." for _ in range(8))


def test_mark_keeps_and_remove_drops(tmp_path: Path) -> None:
    """`mark` keeps all documents and columns; `remove` keeps those with an empty list; the counts add up."""
    texts = [good(number) if number % 3 else "kort" for number in range(30)]
    source = shard(tmp_path / "in.arrow", texts, 7)
    marked = filter_shard(source, tmp_path / "mark", [QualityStep(DANISH)])["steps"]["quality"]
    removed = filter_shard(source, tmp_path / "remove", [QualityStep(DANISH, remove=True)])["steps"]["quality"]
    all_rows = rows(tmp_path / "mark.arrow")
    assert [row["text"] for row in all_rows] == texts
    assert rows(tmp_path / "remove.arrow") == [row for row in all_rows if not row["quality"]]
    assert [row["url"] for row in rows(tmp_path / "remove.arrow")] == [n for n in range(30) if n % 3]
    assert (marked["documents"], marked["kept"], marked["failed"]) == (30, 30, 10)
    assert (removed["documents"], removed["kept"], removed["failed"]) == (30, 20, 10)
    assert removed["sources"]["s0"] == {"documents": 10, "kept": 0}
    assert (
        marked["rules"]
        == removed["rules"]
        == json.loads((tmp_path / "mark.json").read_text())["steps"]["quality"]["rules"]
    )
    for name, count in marked["rules"].items():
        assert count == sum(name in row["quality"] for row in all_rows)
    assert sum(count for reason, count in marked["lines"].items() if reason != "seen") == marked["lines"]["seen"] == 170


def test_results_do_not_depend_on_batches(tmp_path: Path) -> None:
    """Batches of any size, and both kinds of strings, give the same rows and counts."""
    texts = documents(300, 5)
    results = []
    for size, kind in ((1, pa.string()), (7, pa.large_string()), (300, pa.large_string())):
        source = shard(tmp_path / f"{size}.arrow", texts, size, kind)
        counts = filter_shard(source, tmp_path / f"{size}-out", [QualityStep(DANISH, clean_lines=True)])
        results.append((rows(tmp_path / f"{size}-out.arrow"), counts))
    assert results[0] == results[1] == results[2]


def test_clean_lines_changes_only_the_text(tmp_path: Path) -> None:
    """The text becomes the kept lines, while the rules see the whole text."""
    text = good(1) + "\nMenu\nLæs om JavaScript på siden her."
    source = shard(tmp_path / "in.arrow", [text], 1)
    filter_shard(source, tmp_path / "out", [QualityStep(DANISH, clean_lines=True)])
    filter_shard(source, tmp_path / "plain", [QualityStep(DANISH)])
    cleaned, whole = rows(tmp_path / "out.arrow")[0], rows(tmp_path / "plain.arrow")[0]
    assert cleaned == {**whole, "text": good(1)}


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    """A column `quality` that is there already is not replaced."""
    source = shard(tmp_path / "in.arrow", ["kort"], 1)
    filter_shard(source, tmp_path / "out", [QualityStep(DANISH)])
    with pytest.raises(UserError, match="has a column 'quality' already"):
        filter_shard(tmp_path / "out.arrow", tmp_path / "again", [QualityStep(DANISH)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds \\[1\\]; a mapping"),
        ("gopher_min_word: 5", "no threshold 'gopher_min_word'; did you mean 'gopher_min_words'\\? valid names are"),
        ("gopher_min_words: many", "gopher_min_words is 'many'; a number of at least 0, or null"),
        ("gopher_min_words: -1", "gopher_min_words is -1; a number"),
        ("gopher_min_words: true", "gopher_min_words is True; a number"),
        ("gopher_min_words: .nan", "gopher_min_words is nan; a number"),
        ("c4_line_stopped: 1", "c4_line_stopped is 1; true or false"),
        ("c4_line_min_words: 2.5", "c4_line_min_words is 2.5; a whole number of at least 0, or null"),
        ("fineweb_short_line: null", "fineweb_short_line is None; a whole number of at least 0 is needed"),
        ("stop_words: [to ord, og]", "stop_words is .*; a list of words without white space"),
        ("stop_words: og", "stop_words is 'og'; a list of words"),
        ("c4_line_policy: [1]", "c4_line_policy is \\[1\\]; a list of phrases"),
        ("stop_words: [og]", "gopher_min_stop_words is 2, but stop_words has 1; no document could pass"),
        ("gopher_min_words: 10\ngopher_max_words: 5", "gopher_min_words is 10, above gopher_max_words, which is 5"),
        ("{", "neither YAML nor JSON"),
    ],
)
def test_wrong_thresholds_are_refused(tmp_path: Path, content: str, message: str) -> None:
    """A wrong file is refused with the key, what was found and what is valid."""
    path = tmp_path / "thresholds.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        threshold_file.read(path, DANISH)


def test_thresholds_of_a_file(tmp_path: Path) -> None:
    """A file changes what it names; null switches a rule off; what is written is read back as the same."""
    path = tmp_path / "thresholds.yaml"
    path.write_text("gopher_min_words: 3\ngopher_max_words: null\nstop_words: [og, at]\n")
    found = threshold_file.read(path, DANISH)
    assert found == dataclasses.replace(DANISH, gopher_min_words=3, gopher_max_words=None, stop_words=("og", "at"))
    found = dataclasses.replace(found, gopher_max_hashes=1e-05)  # PyYAML takes JSON's form of it for a string
    path.write_text(json.dumps(rules.as_json(found)))
    assert threshold_file.read(path, rules.Thresholds()) == found
    with pytest.raises(UserError, match="does not exist"):
        threshold_file.read(tmp_path / "none", DANISH)
    assert threshold_file.defaults("fo").gopher_min_stop_words is None


def test_calibrated_thresholds_remove_the_percentile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each rule fails at most the percentile of the reference, a stricter one more; a second run writes the same."""
    texts = [good(number) + "\nslut" * (number % 10) for number in range(200)]
    reference = shard(tmp_path / "reference.arrow", texts, 50)
    candidates = shard(tmp_path / "candidates.arrow", documents(50), 50)
    output = tmp_path / "thresholds.json"
    words = f"calibrate --input {reference} --candidates {candidates} --output {output} --percentile 5"
    calibrate.run(make_parser().parse_args(words.split()))
    table = capsys.readouterr().out.splitlines()
    assert len(table) == len(rules.RULES) + 2
    assert table[0].split()[:3] == ["rule", "published", "calibrated"]
    first = output.read_bytes(), output.with_suffix(".png").read_bytes()
    calibrate.run(make_parser().parse_args(words.split()))
    assert first == (output.read_bytes(), output.with_suffix(".png").read_bytes())
    chosen = threshold_file.read(output, rules.Thresholds())
    found = Measurer(chosen).measure(pa.array(texts)).measures
    for rule in rules.RULES:
        threshold = getattr(chosen, rule.name)
        if rule.is_yes_or_no:
            assert threshold == getattr(DANISH, rule.name)
            continue
        assert rule.fails(found, threshold).mean() <= 0.05
        assert threshold in rule.values(found)
        stricter = threshold + (1e-9 if rule.is_minimum else -1e-9) * max(1, threshold)
        assert rule.fails(found, stricter).mean() > 0.05


def test_calibrate_refuses_what_is_wrong(tmp_path: Path) -> None:
    """A percentile out of range, an empty reference and an output that is a picture are refused."""
    empty = shard(tmp_path / "empty.arrow", [], 1)
    for flags, message in (
        (f"--output {tmp_path}/t.json --percentile 50", "--percentile is 50; a number from 0 to less than 50"),
        (f"--output {tmp_path}/t.json", "the reference corpus holds no document"),
        (f"--output {tmp_path}/t.png", "would be overwritten by the picture; name it t.json"),
    ):
        with pytest.raises(UserError, match=message):
            calibrate.run(make_parser().parse_args(f"calibrate --input {empty} {flags}".split()))


def test_command(tmp_path: Path) -> None:
    """The command writes the shard and prints its counts; the names of a rule and its threshold come from a file."""
    source = shard(tmp_path / "in.arrow", ["kort tekst her", good(1)], 1)
    (tmp_path / "t.yaml").write_text("gopher_min_words: 4\n")
    words = (
        f"quality --input {source} --output {tmp_path}/out --mode remove --thresholds {tmp_path}/t.yaml --language da"
    )
    done = subprocess.run([sys.executable, "-m", "snakmodel.filter", *words.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"]["quality"]["rules"]["gopher_min_words"] == 1
    assert [row["text"] for row in rows(tmp_path / "out.arrow")] == [good(1)]
    assert make_parser().parse_args(f"quality --input {source} --output x".split()).mode == "mark"


def test_the_kernel_has_a_cache_of_its_own(tmp_path: Path) -> None:
    """Its folder changes with its sources and with those of the MinHash kernel, of which it uses parts."""
    package = tmp_path / "package"
    package.mkdir()
    seen = [cache_folder([tmp_path]), cache_folder([tmp_path], "quality", package)]
    (package / "kernel.py").write_text("a = 1")
    seen.append(cache_folder([tmp_path], "quality", package))
    assert len(set(seen)) == 3
    assert [folder.name.split("-")[0] for folder in seen if folder] == ["minhash", "quality", "quality"]


def test_flags_of_characters_are_those_of_python() -> None:
    """The table agrees with Python's own tests, and the planes that it leaves out hold nothing."""
    table = characters.table()
    for point in [*range(0xD800), *range(0xE000, characters.POINTS)]:
        character, category = chr(point), unicodedata.category(chr(point))
        if point >= characters.ASSIGNED:
            assert category[0] not in "LPS"
            assert category != "Nd"
            continue
        flags = table[point]
        assert bool(flags & characters.SPACE) == character.isspace()
        assert bool(flags & characters.LETTER) == character.isalpha()
        assert bool(flags & characters.DIGIT) == (category == "Nd")
        assert bool(flags & characters.SYMBOL) == plain.is_symbol(character)
        assert bool(flags & characters.BREAK) == (len(f"a{character}b".splitlines()) == 2)


def test_stops_are_those_of_unicode() -> None:
    """The ends of sentences are Unicode's, as the package `regex` knows them; an older Unicode has fewer."""
    regex = pytest.importorskip("regex")
    known = {chr(point) for point in range(characters.ASSIGNED) if regex.match(r"\p{Sentence_Terminal}", chr(point))}
    assert known <= set(characters.stops())
    assert {".", "!", "?", "。", "؟"} <= known
