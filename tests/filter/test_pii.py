"""The step `pii` of the filter: what becomes a placeholder, what stays, and what is told about it."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from run_contract.errors import UserError
from snakmodel.filter.pii import Find, Pii, add_flags, make_step, without_overlaps
from snakmodel.filter.pii_addresses import Emails, Ibans, IpAddresses
from snakmodel.filter.pii_national import NationalNumbers, module_names
from snakmodel.filter.pii_phones import PhoneNumbers
from snakmodel.filter.pii_support import INSTALL, ascii_digits
from snakmodel.shards.arrow_stream import SCHEMA, texts, write_stream
from snakmodel.shards.counts import MANY_SOURCES, MOST_SOURCES, merged

NATIONAL = ["dk.cpr", "se.personnummer", "no.fodselsnummer", "fi.hetu", "it.codicefiscale", "fr.nir", "es.nie"]


def step(*flags: str) -> Pii:
    """The step of a command line."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return make_step(parser.parse_args(flags))


DANISH = ("--region", "DK", "--national", *NATIONAL)


def batch_of(documents: list[str], sources: list[str | None] | None = None) -> Any:
    """A record batch of documents."""
    return pa.record_batch([documents, sources or ["a"] * len(documents)], schema=SCHEMA)


@pytest.fixture(scope="module")
def danish() -> Pii:
    """All kinds, with Danish phone numbers."""
    return step(*DANISH)


def cleaned(one: Pii, text: str) -> str:
    """What the step makes of one document."""
    return str(one.run(batch_of([text]))[0]["text"][0].as_py())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # e-mail: at the start and the end, in brackets and quotes, after punctuation, in links, with other letters
        ("ole@firma.dk", "<EMAIL>"),
        ("Skriv til ole.b_c+d-e@post.firma.co.uk.", "Skriv til <EMAIL>."),
        ("<ole@firma.dk>, (per@firma.dk) 'ida@firma.dk'", "<<EMAIL>>, (<EMAIL>) '<EMAIL>'"),
        ("mailto:ole@firma.dk?subject=hej", "mailto:<EMAIL>?subject=hej"),
        ("https://x.dk/?m=ole@firma.dk&n=1", "https://x.dk/?m=<EMAIL>&n=1"),
        ("mail:søren.ågård@blåbær.dk!", "mail:<EMAIL>!"),
        ("o'brien@firma.ie;ida@xn--blbr-roah.xn--p1ai", "<EMAIL>;<EMAIL>"),
        # IP addresses: with ports, prefixes, brackets
        ("fra 87.54.12.3:8080 og 87.54.0.0/16.", "fra <IP>:8080 og <IP>/16."),
        ("http://87.54.12.3/a [2a02:aa7::1]:80, 2001:4860:4860::8888", "http://<IP>/a [<IP>]:80, <IP>"),
        ("::ffff:87.54.12.3", "::ffff:<IP>"),
        # phone numbers: the Danish ways to write one, and others by their country code
        ("22334455", "<PHONE>"),
        ("Ring 22 33 44 55, 2233 4455 (22334455) eller 22-33-44-55!", "Ring <PHONE>, <PHONE> (<PHONE>) eller <PHONE>!"),
        ("+45 22 33 44 55/(+45) 2233 4455, 0045 22334455", "<PHONE>/<PHONE>, <PHONE>"),
        ("Tlf.:22334455 tel:+4522334455\n33445566", "Tlf.:<PHONE> tel:<PHONE>\n<PHONE>"),
        ("Sverige: +46 70 123 45 67, +1 425-882-8080", "Sverige: <PHONE>, <PHONE>"),
        (
            "Mobil 20181129, telefonnr.: 20181129, ring på 20181129",
            "Mobil <PHONE>, telefonnr.: <PHONE>, ring på <PHONE>",
        ),
        ("22 33 44 55 / 33 44 55 66", "<PHONE> / <PHONE>"),
        # IBAN: in groups and without, before words
        ("IBAN DK50 0040 0440 1162 43 OG SE4550000000058398257466.", "IBAN <IBAN> OG <IBAN>."),
        ("(dk5000400440116243)", "(<IBAN>)"),
        ("22 DK50 0040 0440 1162 43", "22 <IBAN>"),
        # CPR: with a dash the date is enough; ten digits need the checksum, 1 January or a word
        ("211062-5629", "<NATIONAL_ID>"),
        ("cpr.nr. 211062-0629, (211062 0629);21 10 62-0629", "cpr.nr. <NATIONAL_ID>, (<NATIONAL_ID>);<NATIONAL_ID>"),
        ("id 2110625629", "id <NATIONAL_ID>"),
        ("født 0101650001", "født <NATIONAL_ID>"),
        ("CPR-nummer: 2110620629", "CPR-nummer: <NATIONAL_ID>"),
        ("Ole,211062-5629,Vej 1", "Ole,<NATIONAL_ID>,Vej 1"),
        # other countries' numbers
        ("880320-0016 og 198803200016", "<NATIONAL_ID> og <NATIONAL_ID>"),
        ("19038440376 Når, 880320-0016 5år, å5 880320-0016", "<NATIONAL_ID> Når, <NATIONAL_ID> 5år, å5 <NATIONAL_ID>"),
        ("hetu 131052-308T, RCCMNL83S18D969H", "hetu <NATIONAL_ID>, <NATIONAL_ID>"),
        ("nir 2 95 10 99 126 111 93 et 3", "nir <NATIONAL_ID> et 3"),
        # digits of other scripts
        ("tlf ２２３３４４５５ og ٢٢ ٣٣ ٤٤ ٥٥", "tlf <PHONE> og <PHONE>"),
        ("２１１０６２-5629, ole２@firma.dk", "<NATIONAL_ID>, <EMAIL>"),
    ],
)
def test_what_becomes_a_placeholder(danish: Pii, text: str, expected: str) -> None:
    """The outputs are exact, and a second pass changes nothing."""
    assert cleaned(danish, text) == expected
    assert cleaned(danish, expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "bruger@vært, @navn, a @ b.dk, logo@2x.png, pakke@4.17.21, ole@firma, @firma.dk",
        "version 21.22.23.24, v1.2.3.4, udgave: 87.54.12.3, 1.2.3.4, 8.8.8.8, § 20.21.22.23",
        "10.0.0.1 192.168.1.20 127.0.0.1 192.0.2.99 999.54.12.3 87.54.12.3.4 a87.54.12.3",
        "fe80::1, ::1, 00:1a:2b:3c:4d:5e, 12:30:45, std::vector, 2001:db8::1, 2000:",
        "ordre 45678901, Ordrenr. 45678901",
        "CVR-nr. 22 33 44 55, fakturanummer: 45678901, EAN 0046701234567, SE-nr. 22334455",
        "22.334.455 kr., kr. 22334455, 22334455 kr, 22 334 455, 3,22334455, 22334455,75, 45678901 %",
        "2024-12-31, 31.12.2024, 24/12-2001, 20241231, 2001-2005, 2019/2020, kl. 20:24:12",
        "2 3 7 57 8 64, 22 3 3 44 5 5",
        "55.676098, 32.568337 og 55.676098 32.568337",
        "ISBN 978-87-02-12345-6, ISBN 9788702123456, 87-02-12345-6, ISSN 2233-4455",
        "https://x.dk/artikel/45678901?id=45678901#22334455, fil_22334455, x22334455",
        "DK50 0040 0440 1162 44, DK5, XX50 0040 0440 1162 43",
        "310262-1234, 2110620629, 211362-5629, 211062-56290, 1211062-5629, 211062-562",
        "880320-0018, 131052-308U, 12345",
        "⑧⑧③③④④⑤⑤ ²²³³⁴⁴⁵⁵",
        "",
        "Ingen hemmeligheder her, kun æøå og 42 får.",
    ],
)
def test_what_is_left_alone(danish: Pii, text: str) -> None:
    """Versions, prices, dates, orders, companies, books, places and links are not personal data."""
    before = batch_of([text])
    after, counts = danish.run(before)
    assert after["text"][0].as_py() == text
    assert after is before
    assert counts == {"changed": 0, "found": {}, "found_by_source": {}}


def test_numbers_with_a_check_digit_of_their_own_are_no_phone_numbers() -> None:
    """An ISBN would be a valid number in Sweden."""
    assert cleaned(step("--region", "SE", "NO"), "0-662-40299-5, 0-87927-963-X (+46 (0)8 391 50 00)") == (
        "0-662-40299-5, 0-87927-963-X (<PHONE>)"
    )


def test_overlaps() -> None:
    """The longest find stays, then that of the first kind, then the leftmost, in whatever order they were found."""
    finds = [Find(a - b, kind, a, b, name) for a, b, kind, name in [
        (0, 10, 4, "long"), (8, 12, 0, "cut off"), (12, 16, 3, "later kind"), (12, 16, 1, "kind"),
        (14, 18, 0, "kind first"),
        (20, 24, 2, "left"), (22, 26, 2, "right"), (26, 30, 2, "next"),
    ]]  # fmt: skip
    expected = ["long", "kind first", "left", "next"]
    for seed in range(5):
        random.Random(seed).shuffle(finds)
        assert [find.name for find in without_overlaps(finds)] == expected
    assert cleaned(step("--region", "SE", "--national", "se.personnummer"), "8803200016") == "<NATIONAL_ID>"


def test_kinds_can_be_left_out() -> None:
    """Only the kinds that are named are replaced; without a region only numbers with a plus sign are phone numbers."""
    text = "ole@firma.dk 87.54.12.3 22334455 +4522334455 DK5000400440116243 211062-5629"
    assert cleaned(step("--kinds", "email"), text) == text.replace("ole@firma.dk", "<EMAIL>")
    assert cleaned(step("--kinds", "phone", "ip"), text) == text.replace("87.54.12.3", "<IP>").replace(
        "+4522334455", "<PHONE>"
    )
    assert cleaned(step(), text) == "<EMAIL> <IP> 22334455 <PHONE> <IBAN> 211062-5629"
    assert cleaned(step(*DANISH), text) == "<EMAIL> <IP> <PHONE> <PHONE> <IBAN> <NATIONAL_ID>"
    assert cleaned(step("--region", "DK", "se"), "070-123 45 67, 22334455") == "<PHONE>, <PHONE>"


def test_counts_by_kind_and_source(danish: Pii) -> None:
    """National numbers are counted by their module, and documents of no source under a name of their own."""
    documents = ["a@b.dk, c@d.dk", "22334455", "intet", "211062-5629 a@b.dk"]
    after, counts = danish.run(batch_of(documents, ["web", "forum", "web", None]))
    assert counts == {
        "changed": 3,
        "found": {"dk.cpr": 1, "email": 3, "phone": 1},
        "found_by_source": {"web": {"email": 2}, "forum": {"phone": 1}, "(no source)": {"dk.cpr": 1, "email": 1}},
    }
    assert after["text"].to_pylist() == ["<EMAIL>, <EMAIL>", "<PHONE>", "intet", "<NATIONAL_ID> <EMAIL>"]
    plain, counts = danish.run(batch_of(documents).select(["text"]))
    assert counts["found_by_source"] == {}
    assert plain["text"].to_pylist() == after["text"].to_pylist()


def test_other_columns_and_types_stay(danish: Pii) -> None:
    """A `string` column stays one, and other columns and metadata pass through."""
    schema = pa.schema([("score", pa.float32()), ("text", pa.string())], {"who": "me"})
    batch = pa.record_batch([[0.5, 1.5], ["a@b.dk", "æ"]], schema=schema)
    after, _ = danish.run(batch)
    assert after.schema.equals(schema, check_metadata=True)
    assert after.to_pydict() == {"score": [0.5, 1.5], "text": ["<EMAIL>", "æ"]}


def test_independent_of_batches_and_bounded_sources() -> None:
    """Any cut into batches gives the same documents and counts, also with more sources than are counted apart."""
    rng = random.Random(0)
    words = [
        "a@b.dk",
        "22334455",
        "intet",
        "211062-5629",
        "87.54.12.3",
        "æøå",
        "２２３３４４５５",
        "DK5000400440116243",
    ]
    documents = [" ".join(rng.choices(words, k=rng.randrange(6))) for _ in range(MOST_SOURCES + 700)]
    sources: list[str | None] = [f"s{rng.randrange(MOST_SOURCES * 3)}" for _ in documents]
    results = []
    for size in (3, 100, len(documents)):
        one, found, total = step(*DANISH), [], {}
        for start in range(0, len(documents), size):
            after, counts = one.run(batch_of(documents, sources).slice(start, size))
            found += after["text"].to_pylist()
            total = merged(total, counts)
        results.append((found, total))
    assert all(result == results[0] for result in results)
    by_source = results[0][1]["found_by_source"]
    assert len(by_source) <= MOST_SOURCES + 1
    assert (MANY_SOURCES in by_source) == (len(by_source) > MOST_SOURCES)


PIECES = st.lists(
    st.one_of(
        st.sampled_from(["ole@firma.dk", "87.54.12.3", "2a02:aa7::1", "DK50 0040 0440 1162 43", "+45 22334455"]),
        st.sampled_from(["22 33 44 55", "211062-5629", "2110625629", "880320-0016"]),
        st.sampled_from(["RCCMNL83S18D969H", "2 95 10 99 126 111 93"]),
        st.text(alphabet="0123456789 .-/@:()+aXDKé٢２\n\u00a0", max_size=8),
        st.characters(codec="utf-8"),
    ),
    max_size=6,
).map("".join)  # fmt: skip


@given(PIECES)
@settings(max_examples=150, deadline=None)
def test_prefilters_miss_nothing(text: str) -> None:
    """Where a finder finds something among ASCII digits, its RE2 pattern matches."""
    text = ascii_digits(text)
    for finder in FINDERS:
        if list(finder.find(text)):
            assert pc.match_substring_regex(pa.array([text]), finder.prefilter)[0].as_py()


FINDERS = [Emails(), IpAddresses(), Ibans(), PhoneNumbers(["DK", "SE"]), NationalNumbers(NATIONAL)]


def run_command(*flags: str) -> subprocess.CompletedProcess[str]:
    """The whole command."""
    command = [sys.executable, "-m", "snakmodel.filter", "pii", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_tells_counts_and_no_values(tmp_path: Path) -> None:
    """Neither the output, nor the counts, nor standard output and error hold what was found."""
    documents = ["Ole: ole.olsen@firma.dk, 22 33 44 55", "Ida: 211062-5629, 87.54.12.3", "DK50 0040 0440 1162 43"]
    write_stream(tmp_path / "in.arrow", SCHEMA, [batch_of(documents, ["web", "web", "forum"])])
    done = run_command("--input", f"{tmp_path}/in.arrow", "--output", f"{tmp_path}/out", *DANISH)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["steps"]["pii"]["found"] == {"dk.cpr": 1, "email": 1, "iban": 1, "ip": 1, "phone": 1}
    assert told == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    expected = ["Ole: <EMAIL>, <PHONE>", "Ida: <NATIONAL_ID>, <IP>", "<IBAN>"]
    assert [one for part in texts(tmp_path / "out.arrow") for one in part] == expected
    everything = done.stdout + done.stderr + (tmp_path / "out.json").read_text(encoding="utf-8")
    everything += (tmp_path / "out.arrow").read_bytes().decode(errors="replace")
    for value in ("olsen", "22 33", "211062", "5629", "87.54", "0040", "22334455"):
        assert value not in everything


def test_a_module_that_stumbles_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error inside a module of python-stdnum means that this is no number; its words could repeat the text."""
    import stdnum.se.personnummer as module

    def stumble(number: str) -> str:
        raise KeyError(number)

    monkeypatch.setattr(module, "validate", stumble)
    assert cleaned(step("--national", "se.personnummer"), "880320-0016") == "880320-0016"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--national", "dk.cvp"], "did you mean dk.cvr or dk.cpr"),
        (["--national", "dk"], "did you mean dk.cpr or dk.cvr"),
        (["--national", "../os"], "not a module of python-stdnum"),
        (["--national", "util"], "not a module of python-stdnum that validates"),
        (["--region", "DNK"], "'DNK' is not a region"),
        (["--region", "45"], "codes of two letters"),
        (["--kinds", "emial"], "did you mean email"),
        (["--kinds", "national"], "needs --national"),
        (["--kinds", "email", "--national", "dk.cpr"], "does not name national"),
        (["--kinds", "email", "--region", "DK"], "does not name phone"),
    ],
)
def test_wrong_names(flags: list[str], message: str) -> None:
    """A wrong name is refused with those that are near, before anything is read."""
    with pytest.raises(UserError, match=message):
        step(*flags)


@pytest.mark.parametrize(
    ("hidden", "kind", "package"),
    [
        ("phonenumbers", "phone", "phonenumbers"),
        ("stdnum.iban", "iban", "python-stdnum"),
        ("stdnum", "national", "python-stdnum"),
    ],
)
def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, hidden: str, kind: str, package: str) -> None:
    """The message names the package and the command that installs it; kinds that do not need it work without."""
    monkeypatch.setitem(sys.modules, hidden, None)
    module_names.cache_clear()
    with pytest.raises(UserError) as told:
        make_step(Namespace(kinds=[kind], region=[], national=["dk.cpr"] if kind == "national" else []))
    assert f"the package {package}, which is not installed" in str(told.value)
    assert str(told.value).endswith(INSTALL)
    assert cleaned(step("--kinds", "email", "ip"), "a@b.dk") == "<EMAIL>"
