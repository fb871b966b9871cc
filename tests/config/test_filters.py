"""The sections of a recipe about documents and their card: what is valid, and what is said of what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from run_contract.errors import UserError
from snakmodel.config import load as configuration
from snakmodel.config.data_card import forbids_public
from snakmodel.config.filters import CUSTOM_STAGE, Custom
from snakmodel.config.kept_columns import parsed
from snakmodel.config.recipe import Recipe
from tests.toy import recipe


def read(folder: Path, text: str) -> Recipe:
    """The recipe of a file that has these lines, and the smallest valid rest."""
    rest = {key: value for key, value in recipe().items() if key not in yaml.safe_load(text)}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(rest) + text)
    (folder / "cluster.yaml").write_text("{}")
    return configuration.load(folder / "recipe.yaml", folder / "cluster.yaml", []).recipe


def data(line: str) -> str:
    """A section `data` with one more line."""
    return f"data:\n  path: text\n  {line}\n"


def test_valid_sections(tmp_path: Path) -> None:
    """All settings at once are read as they are, and again after they were written down, as in run.yaml."""
    found = read(
        tmp_path,
        """
data:
  path: text
  keep: [url, "date?", score: float, "meta?": json]
  where: score > 0.5
  custom:
  - {name: count-2, command: "python 'my script.py' --in={input} --out={output}"}
filter:
  language: {keep: [da, no], min_probability: 0, unit: line, rejected: true}
  quality: {mode: remove, thresholds: t.yaml, clean_lines: true}
  pii: {kinds: [email, national], national: [dk.cpr]}
  where: source != 'x'
decontaminate: {against: [a.jsonl], ngram: 8, mode: cut, fields: [question]}
data_card:
  published: 2024-02-29
  sources: {a: {licence: cc0-1.0, retrieved: "2024-02-29", version: 1.0}, b: {licence: unknown, public: false}}
""",
    )
    assert [parsed(entry) for entry in found.data.keep or []] == [
        ("url", None, False), ("date", None, True), ("score", "float", False), ("meta", "json", True)
    ]  # fmt: skip
    assert found.filter.language is not None
    assert found.filter.language.keep == ["da", "no"]
    assert found.filter.any
    assert found.decontaminate is not None
    assert found.decontaminate.against[0].is_absolute()
    assert found.data_card is not None
    assert found.data_card.published == found.data_card.sources["a"].retrieved == "2024-02-29"
    assert found.data_card.sources["a"].version == "1.0"
    assert [one.stage for one in found.data.custom] == ["custom-count-2"]
    assert CUSTOM_STAGE.fullmatch(found.data.custom[0].stage)
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(found.model_dump(mode="json")))) == found


def test_what_is_absent(tmp_path: Path) -> None:
    """Without the sections there is no step, no card and no column; an empty card is a card."""
    found = read(tmp_path, "name: toy\n")
    assert not found.filter.any
    assert (found.decontaminate, found.data_card, found.data.keep) == (None, None, None)
    assert read(tmp_path, "data_card: {}\n").data_card is not None
    assert not read(tmp_path, "filter: {}\n").filter.any
    for step in ("language: {keep: da}", "quality: {}", "pii: {}", "where: 'a > 1'"):
        assert read(tmp_path, f"filter:\n  {step}\n").filter.any


WRONG: dict[str, tuple[str, str]] = {
    "a kept number": (data("keep: [5]"), r"data\.keep: found 5, expected the name of a column or NAME: TYPE"),
    "a kept list": (data("keep: [[x]]"), r"data\.keep: found \['x'\], expected the name"),
    "a kept null": (data("keep: [null]"), r"data\.keep: found None, expected the name"),
    "one word": (data("keep: x"), r"data\.keep: found 'x', expected a list"),
    "a column twice": (data("keep: ['x?', {x: int}]"), r"data\.keep: 'x' is there 2 times; name each column once"),
    "the text": (data("keep: [text]"), r"data\.keep: 'text' is a column that every shard has by itself; leave it out"),
    "the id": (data("keep: ['id?']"), r"data\.keep: 'id' is a column that every shard has"),
    "another type": (data("keep: [{x: integer}]"), r"data\.keep: x has the type 'integer'; the types are string, int,"),
    "no type": (data("keep: [{x: null}]"), r"data\.keep: x has the type None; the types are string"),
    "a list for a type": (data("keep: [{x: [int]}]"), r"data\.keep: x has the type \['int'\]; the types are"),
    "two columns in one": (data("keep: [{x: int, y: int}]"), r"data\.keep: found \{'x': 'int', 'y': 'int'\}, expected"),
    "a number for a name": (data("keep: [{5: int}]"), r"data\.keep: found \{5: 'int'\}, expected the name"),
    "no name": (data("keep: ['?']"), r"data\.keep: found '\?', expected the name"),
    "a minus sign": (data("keep: [-x]"), r"data\.keep: found '-x'; a name that begins with a minus sign"),
    "a condition that is a number": (data("where: 5"), r"data\.where: found 5"),
    "no language": ("filter: {language: {}}", r"filter\.language\.keep: missing"),
    "an empty list of languages": ("filter: {language: {keep: []}}", r"filter\.language: keep is empty; name the"),
    "a probability of 1": ("filter: {language: {keep: da, min_probability: 1}}", r"min_probability: found 1\. .*less"),
    "a negative probability": ("filter: {language: {keep: da, min_probability: -1}}", r"min_probability: found -1"),
    "marked and rejected": ("filter: {language: {keep: da, mode: mark, rejected: true}}", r"mode: mark keeps whole"),
    "marked lines": ("filter: {language: {keep: da, mode: mark, unit: line}}", r"filter\.language: mode: mark keeps"),
    "another unit": ("filter: {language: {keep: da, unit: lines}}", r"unit: found 'lines'\. .*'document' or 'line'"),
    "another mode": ("filter: {quality: {mode: drop}}", r"filter\.quality\.mode: found 'drop'\. .*'mark' or 'remove'"),
    "another kind": ("filter: {pii: {kinds: [emails]}}", r"filter\.pii\.kinds\.0: found 'emails'\. .*'email', 'ip'"),
    "one region": ("filter: {pii: {region: DK}}", r"filter\.pii\.region: found 'DK', expected a list"),
    "a mistyped step": ("filter: {langage: {keep: da}}", r"filter\.langage: unknown key\. Did you mean language\?"),
    "a mistyped setting": ("filter: {quality: {languag: da}}", r"filter\.quality\.languag: unknown key\. Did you mean"),
    "no evaluation file": ("decontaminate: {against: []}", r"decontaminate\.against: found \[\]"),
    "no evaluation files": ("decontaminate: {}", r"decontaminate\.against: missing"),
    "a run of no words": ("decontaminate: {against: [a], ngram: 0}", r"decontaminate\.ngram: found 0"),
    "too long a run": ("decontaminate: {against: [a], ngram: 101}", r"decontaminate\.ngram: found 101"),
    "another way": ("decontaminate: {against: [a], mode: drop}", r"decontaminate\.mode: found 'drop'"),
    "no licence": ("data_card: {sources: {a: {}}}", r"data_card\.sources\.a\.licence: missing"),
    "an empty licence": ("data_card: {sources: {a: {licence: ' '}}}", r"sources\.a\.licence: is empty; name the lic"),
    "a mistyped licence": ("data_card: {sources: {a: {license: x}}}", r"sources\.a\.license: unknown key\. Did you"),
    "a mistyped title": ("data_card: {titel: x}", r"data_card\.titel: unknown key\. Did you mean title\?"),
    "a word for a truth value": ("data_card: {sources: {a: {licence: x, public: maybe}}}", r"public: found 'maybe'"),
    "no date": ("data_card: {published: yesterday}", r"published: found 'yesterday'; write a date as YYYY-MM-DD"),
    "no such day": ("data_card: {published: '2023-02-29'}", r"published: found '2023-02-29'; write a date as"),
    "a short date": ("data_card: {sources: {a: {licence: x, retrieved: '20240229'}}}", r"retrieved: found '20240229'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values(tmp_path: Path, case: str) -> None:
    """The message names the file and the key, what was found and what is valid."""
    text, says = WRONG[case]
    with pytest.raises(UserError, match=rf"recipe\.yaml: .*{says}"):
        read(tmp_path, text)


CUSTOM: dict[str, tuple[Any, str]] = {
    "a capital": ({"name": "Count"}, r"custom\.0\.name: found 'Count'"),
    "a space": ({"name": "a b"}, r"custom\.0\.name: found 'a b'"),
    "a line end": ({"name": "a\n"}, r"custom\.0\.name: found 'a\\n'"),
    "a dash first": ({"name": "-a"}, r"custom\.0\.name: found '-a'"),
    "a long name": ({"name": "a" * 41}, r"custom\.0\.name: found 'aaa"),
    "no input": ({"command": "x {output}"}, r"custom\.0\.command: found 'x \{output\}', which does not name \{input\}"),
    "no output": ({"command": "x {input}"}, r"which does not name \{output\}; write \{input\} and \{output\} where"),
    "an open quote": ({"command": "x '{input} {output}"}, r"which is no command line: No closing quotation"),
    "no command": ({"command": ""}, r"custom\.0\.command: found '', which does not name"),
    "another unit": ({"per": "file"}, r"custom\.0\.per: found 'file'"),
    "a mistyped key": ({"nmae": "x"}, r"custom\.0\.nmae: unknown key\. Did you mean name\? Valid: name, command, per"),
}


@pytest.mark.parametrize("case", CUSTOM)
def test_wrong_commands(tmp_path: Path, case: str) -> None:
    """A command of the user's own has a name for its stage, and takes both paths."""
    change, says = CUSTOM[case]
    entry = {"name": "count", "command": "x {input} {output}", **change}
    with pytest.raises(UserError, match=rf"recipe\.yaml: data\..*{says}"):
        read(tmp_path, yaml.safe_dump({"data": {"path": "text", "custom": [entry]}}))


def test_two_commands_of_one_name(tmp_path: Path) -> None:
    """Their stages could not be told apart."""
    entry = Custom(name="count", command="x {input} {output}").model_dump()
    with pytest.raises(UserError, match=r"data\.custom: 'count' is the name of 2 commands; name each its own"):
        read(tmp_path, yaml.safe_dump({"data": {"path": "text", "custom": [entry, entry]}}))


@pytest.mark.parametrize(
    ("licence", "forbids"),
    [
        ("cc0-1.0", False),
        ("unknown", False),
        ("CC-BY-NC-4.0", False),
        ("Proprietary", True),
        ("All rights reserved", True),
        ("all-rights-reserved", True),
        ("private, for research", True),
        ("internal", True),
        ("no redistribution", True),
    ],
)
def test_licences_that_forbid_publication(licence: str, forbids: bool) -> None:
    """The name of a licence tells."""
    assert forbids_public(licence) is forbids
