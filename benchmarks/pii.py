"""python benchmarks/pii.py [--documents 2000] [--peer-python VENV/bin/python] [--output benchmarks/results/pii.json]

The step `pii`: precision and recall per kind on generated text, and its speed, beside datatrove's PIIFormatter.

Names, addresses and numbers come from Faker with a fixed seed, and stand in real sentences, of `../shared/data` or else
of the demonstration. As many sentences hold what only looks like personal data: orders, prices, dates,
versions, ISBNs, coordinates, companies. A document counts as found only if the output is exact. datatrove runs in an
environment of its own (`--peer-python`, where `pip install datatrove` was typed), on the kinds that both know.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import phonenumbers
import pyarrow as pa
from faker import Faker
from stdnum.dk import cpr

from run_contract.entry_point import run_main
from snakmodel.config.sections import PROJECT
from snakmodel.filter.pii import PLACEHOLDERS, make_step

HELP_TEXT = PROJECT.parent / "shared" / "data" / "danish_help_text.txt.gz"
SETTINGS = {
    "danish": {"locales": ["da_DK"], "region": ["DK"], "national": ["dk.cpr"]},
    "nordic": {
        "locales": ["da_DK", "sv_SE", "no_NO", "fi_FI"],
        "region": ["DK", "SE", "NO", "FI"],
        "national": ["dk.cpr", "se.personnummer", "no.fodselsnummer", "fi.hetu"],
    },
}
LEADS = {
    "email": ["", "Skriv til ", "Mail: ", "Svar sendes til "],
    "ip": ["", "Logget fra ", "Serveren svarer på ", "IP: "],
    "phone": ["", "Ring på ", "Tlf. ", "Telefon: ", "Mobil ", "Kontakt Ida på "],
    "iban": ["", "IBAN ", "Overfør til ", "Konto: "],
    "national": ["", "CPR-nr. ", "Personnummer: ", "Borgeren "],
}
PEER = """
import json, sys, time
from datatrove.pipeline.formatters.pii import PIIFormatter
formatter = PIIFormatter(email_replacement="<EMAIL>", ip_replacement="<IP>")
documents = json.load(open(sys.argv[1]))
started = time.process_time()
found = [formatter.format(text) for text in documents]
json.dump({"seconds": time.process_time() - started, "texts": found}, open(sys.argv[2], "w"))
"""


def sentences() -> list[str]:
    """Lines of real Danish text, at least six words long."""
    if HELP_TEXT.is_file():
        text = gzip.decompress(HELP_TEXT.read_bytes()).decode()
    else:
        text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((PROJECT / "demo/text").rglob("*.txt")))
    return [line for line in text.split("\n") if line.count(" ") >= 5]


class Values:
    """Makes values of each kind, and such as only look like them."""

    def __init__(self, locales: list[str], seed: int) -> None:
        self.random = random.Random(seed)
        self.fakers = [Faker(locale) for locale in locales]
        self.regions = [locale[-2:] for locale in locales]
        for number, faker in enumerate(self.fakers):
            faker.seed_instance(seed + number)

    def email(self, faker: Any) -> str:
        """An address of a person or a company."""
        return str(self.random.choice([faker.email, faker.ascii_company_email, faker.free_email])())

    def ip(self, faker: Any) -> str:
        """A public address; Faker's IPv6 addresses are moved to the block that is in use in Europe."""
        block = f"2a0{self.random.randrange(16):x}"
        return (
            ":".join([block, *faker.ipv6().split(":")[1:]]) if self.random.random() < 0.2 else str(faker.ipv4_public())
        )

    def phone(self, faker: Any) -> str:
        """A number that phonenumbers takes for valid; Faker also makes some in ranges that no one has."""
        region = self.regions[self.fakers.index(faker)]
        while True:
            number = str(faker.phone_number())
            try:
                if phonenumbers.is_valid_number(phonenumbers.parse(number, region)):
                    return number
            except phonenumbers.NumberParseException:
                continue

    def iban(self, faker: Any) -> str:
        """An IBAN, half of them in groups of four."""
        number = str(faker.iban())
        return re.sub(r"(?<=\w)(?=(?:\w{4})+$)", " ", number[::-1])[::-1] if self.random.random() < 0.5 else number

    def national(self, faker: Any) -> str:
        """A number of the country; Faker has none for Denmark."""
        return self.cpr(faker) if faker is self.fakers[0] else str(faker.ssn())

    def cpr(self, faker: Any) -> str:
        """A CPR number: one in twenty without checksum, for 1 January; one in four without a dash."""
        unchecked = self.random.random() < 0.05
        while True:
            born = faker.date_of_birth(minimum_age=0, maximum_age=89)
            date = f"0101{self.random.randrange(60, 93)}" if unchecked else f"{born:%d%m%y}"
            digits = f"{date}{self.random.randrange(10000):04d}"
            right = cpr.get_birth_date(digits).year >= 1960 if unchecked else cpr.checksum(digits) == 0
            if cpr.is_valid(digits) and right:
                break
        return digits if self.random.random() < 0.25 else f"{digits[:6]}{self.random.choice('----- ')}{digits[6:]}"

    def negative(self) -> str:
        """Something with digits or an @ that is no personal data."""
        pick, faker = self.random, self.fakers[0]
        number = pick.randrange(10**7, 10**8)
        ways: list[Callable[[], str]] = [
            lambda: pick.choice(
                [f"ordre {number}", f"Ordrenr. {number}", f"faktura {number}", f"sagsnr. 2024-{number}"]
            ),
            lambda: pick.choice([f"{number} kr.", f"{number / 100:.2f} kr.", f"kr. {number:,}".replace(",", ".")]),
            lambda: faker.date(pick.choice(["%Y-%m-%d", "%d.%m.%Y", "%d-%m-%Y", "%d/%m/%Y", "%Y%m%d", "%d %m %Y"])),
            lambda: f"version {'.'.join(str(pick.randrange(40)) for _ in range(4))}",
            lambda: f"v{pick.randrange(9)}.{pick.randrange(20)}.{pick.randrange(20)}.{pick.randrange(20)}",
            lambda: pick.choice(["ISBN ", ""]) + str(faker.isbn13()),
            lambda: pick.choice(["ISBN ", ""]) + str(faker.isbn10()),
            lambda: f"{pick.uniform(54, 58):.6f}, {pick.uniform(8, 15):.6f}",
            lambda: pick.choice([f"CVR {number}", f"CVR-nr. {number}", f"EAN {faker.ean13()}"]),
            lambda: pick.choice([str(faker.ipv4_private()), str(faker.mac_address()), "billede@2x.png", "@bruger"]),
            lambda: f"{pick.randrange(1900, 2030)}-{pick.randrange(1900, 2030)}",
            lambda: f"https://firma.dk/artikel/{number}",
            lambda: f"{pick.randrange(1, 100)} {pick.randrange(100, 1000)} {pick.randrange(100, 1000)}",
            lambda: str(pick.randrange(10**9, 10**10)),
            lambda: " ".join(str(pick.randrange(1, 100)) for _ in range(6)),
        ]
        return pick.choice(ways)()


def documents(setting: dict[str, list[str]], count: int) -> list[tuple[str, str, str]]:
    """`count` documents per kind and as many without any: the kind or "", the text, and what it should become."""
    values = Values(setting["locales"], 15)
    plain = [line for line in sentences() if not re.search(r"[0-9@]", line)]
    found = []
    for kind in (*PLACEHOLDERS, *[""] * len(PLACEHOLDERS)):
        for number in range(count):
            words = values.random.choice(plain).split(" ")
            value = getattr(values, kind)(values.fakers[number % len(values.fakers)]) if kind else values.negative()
            lead = values.random.choice(LEADS[kind]) if kind else ""
            before, after = values.random.choice([("", ""), ("", "."), ("(", ")"), ("", ","), (": ", "")])
            place = values.random.randrange(len(words) + 1)
            text, expected = (
                " ".join([*words[:place], f"{before}{lead}{one}{after}", *words[place:]])
                for one in (value, PLACEHOLDERS.get(kind, value))
            )
            found.append((kind, text, expected))
    return found


def scores(labelled: list[tuple[str, str, str]], outputs: list[str], kinds: list[str]) -> dict[str, dict[str, float]]:
    """Precision and recall of each kind; a find is right if the whole document came out as it should."""
    right: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for (kind, _, expected), output in zip(labelled, outputs, strict=True):
        right[kind] += output == expected
        found.update({name: output.count(PLACEHOLDERS[name]) for name in kinds})
    return {
        kind: {
            "documents": (total := sum(one[0] == kind for one in labelled)),
            "recall": round(right[kind] / total, 4),
            "precision": round(right[kind] / max(found[kind], 1), 4),
        }
        for kind in kinds
    }


def ours(texts: list[str], **flags: Any) -> tuple[list[str], float]:
    """The outputs of the step, and its seconds of processor time."""
    step = make_step(Namespace(**{"kinds": None, "region": [], "national": [], **flags}))
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string()), "source": ["a"] * len(texts)})
    started = time.process_time()
    after, _ = step.run(batch)
    return after["text"].to_pylist(), time.process_time() - started


def peer(python: str, texts: list[str]) -> tuple[list[str], float]:
    """The outputs of datatrove's formatter, and its seconds of processor time, without imports."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.json", Path(folder) / "out.json"
        source.write_text(json.dumps(texts))
        subprocess.run([python, "-c", PEER, str(source), str(target)], check=True)
        found = json.loads(target.read_text())
    return found["texts"], found["seconds"]


def speed(python: str | None, rounds: int) -> dict[str, Any]:
    """MB/s on ordinary text, on text with a find in every few lines, and on a table of numbers; in turns."""
    lines = sentences()
    labelled = documents(SETTINGS["danish"], 400)
    rng = random.Random(1)
    corpora = {
        "ordinary": ["\n".join(lines[at : at + 20]) for at in range(0, len(lines), 20)],
        "a find in every sixth line": [
            "\n".join([*rng.choices(lines, k=16), *(rng.choice(labelled)[1] for _ in range(8))]) for _ in range(1000)
        ],
        "numbers only": [
            "\n".join(" ".join(str(rng.randrange(10 ** rng.randrange(1, 9))) for _ in range(10)) for _ in range(20))
            for _ in range(100)
        ],
    }
    danish = {key: SETTINGS["danish"][key] for key in ("region", "national")}
    found: dict[str, Any] = {}
    for name, texts in corpora.items():
        size = sum(len(text.encode()) for text in texts) / 1e6
        ways: dict[str, Callable[[], tuple[list[str], float]]] = {
            "all kinds, Danish": lambda texts=texts: ours(texts, **danish),
            "e-mail and IP": lambda texts=texts: ours(texts, kinds=["email", "ip"]),
        }
        if python:
            ways["datatrove, e-mail and IP"] = lambda texts=texts: peer(python, texts)
        turns: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, run in ways.items():
                turns[way].append(round(size / run()[1], 2))
        found[name] = {
            "megabytes": round(size, 2),
            "MB_per_second": {way: statistics.median(each) for way, each in turns.items()},
            "rounds": turns,
        }
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    packages = {name: version(name) for name in ("phonenumbers", "python-stdnum", "Faker", "pyarrow")}
    return {
        "load": round(os.getloadavg()[0], 1),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **packages,
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2000, help="documents per kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", help="the Python of an environment with datatrove")
    parser.add_argument(
        "--examples", type=int, default=0, help="print so many wrong outputs of each kind; all invented"
    )
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "pii.json")
    args = parser.parse_args()
    before = machine()
    quality: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        labelled = documents(setting, args.documents)
        texts = [text for _, text, _ in labelled]
        outputs, _ = ours(texts, region=setting["region"], national=setting["national"])
        quality[name] = scores(labelled, outputs, list(PLACEHOLDERS))
        wrong: Counter[str] = Counter()
        for (kind, text, expected), output in zip(labelled, outputs, strict=True):
            wrong[kind] += output != expected
            if output != expected and wrong[kind] <= args.examples:
                print(f"{name} {kind or 'nothing'}: {text}\n    {output}", file=sys.stderr)
        if args.peer_python and name == "danish":
            outputs, _ = peer(args.peer_python, texts)
            quality["datatrove, danish"] = scores(labelled, outputs, ["email", "ip"])
    found = {
        "sentences": HELP_TEXT.name if HELP_TEXT.is_file() else "demo/text",
        "quality": quality,
        "speed": speed(args.peer_python, args.rounds),
        "machine": before,
        "date": time.strftime("%F"),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_main(main)
