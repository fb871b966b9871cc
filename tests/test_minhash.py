import hashlib
import re
import struct

import numpy as np
import pytest

from snakmodel.minhash import RECORD, SHORT_POLICIES, BandHasher, Parameters
from snakmodel.publish import UserError

TEXT = "Rødgrød med fløde – det er DANSK, og det er svært at sige: æ ø å _ 1234 ...\u2028Ja!"

GOLDEN = [
    "5c7d6648eab378de45af43e5d4a6aa69",
    "1c324baeeeb61276bff92af9cec4a71d",
    "b7f05cfb807060ac6131aeadc13b2ae5",
    "233092655ae2913f16ddf1c47cd59f63",
    "ec8c2266f56768d58c425181bd58a65b",
]


def signature(text: str, parameters: Parameters) -> list[int]:
    """The signature by the published formula, in Python's unbounded integers."""
    prime = (1 << 61) - 1
    random = np.random.RandomState(42)
    a = random.randint(1, prime, size=parameters.num_perm, dtype=np.uint64).tolist()
    b = random.randint(0, prime, size=parameters.num_perm, dtype=np.uint64).tolist()
    tokens = re.split(r"\W", text.lower())
    count = max(1, len(tokens) - parameters.ngram + 1)
    grams = {" ".join(tokens[first : first + parameters.ngram]) for first in range(count)}
    hashes = [struct.unpack("<I", hashlib.sha1(gram.encode()).digest()[:4])[0] for gram in grams]
    return [min((h * x + y) % (1 << 64) % prime & 0xFFFFFFFF for h in hashes) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("parameters", [Parameters(), Parameters(num_perm=32, threshold=0.5, ngram=3, min_length=1)])
def test_signatures_follow_the_published_formula(parameters: Parameters) -> None:
    """Bands hold the values of the formula, as uint64 in big-endian order."""
    hasher = BandHasher(parameters)
    for text in (TEXT, "a b c d e", "x", TEXT * 3):
        if not hasher.is_short(text):
            values = [value for band in hasher.bands_of(text) for (value,) in struct.iter_unpack(">Q", band)]
            assert values == signature(text, parameters)[: hasher.bands * hasher.rows]


def test_bands_and_rows_of_the_recipe() -> None:
    """Threshold 0.85 with 64 permutations gives 4 bands of 15 rows."""
    hasher = BandHasher(Parameters())
    assert (hasher.bands, hasher.rows) == (4, 15)


def test_records_carry_keys_and_rows_in_document_order() -> None:
    """Equal texts have equal keys, bands of one document do not collide, and rows count from the first given."""
    records, short = BandHasher(Parameters()).records([TEXT, "for kort", TEXT], 7)
    assert records.dtype == RECORD
    assert records["row"].tolist() == [7] * 4 + [8] + [9] * 4
    keys = [(hi, lo) for hi, lo, _ in records.tolist()]
    assert keys[:4] == keys[5:]
    assert len(set(keys)) == 5
    assert short.tolist() == [8]


def test_keys_are_stable() -> None:
    """The key of a known document does not change from one version to the next (files on disk hold it)."""
    records, _ = BandHasher(Parameters(short_docs="collapse")).records(["en to tre fire fem", "kort"], 0)
    assert [f"{hi:016x}{lo:016x}" for hi, lo, _ in records.tolist()] == GOLDEN


@pytest.mark.parametrize("policy", SHORT_POLICIES)
def test_short_documents_follow_the_policy(policy: str) -> None:
    """`exact` links identical texts, `collapse` all, `keep` and `drop` none; every short document is counted."""
    texts = ["ja tak", "ja tak", "Ja tak", "", "a b c d", "a b c d e"]
    records, short = BandHasher(Parameters(short_docs=policy)).records(texts, 0)
    assert short.tolist() == [0, 1, 2, 3, 4]
    keys = {row: (hi, lo) for hi, lo, row in records[records["row"] < 5].tolist()}
    groups = {"exact": [{0, 1}, {2}, {3}, {4}], "collapse": [{0, 1, 2, 3, 4}], "keep": [], "drop": []}[policy]
    assert [{row for row in keys if keys[row] == key} for key in dict.fromkeys(keys.values())] == groups


def test_fingerprint_tells_parameters_apart() -> None:
    """Every parameter changes the fingerprint."""
    changed = [Parameters(), Parameters(num_perm=32), Parameters(threshold=0.8), Parameters(ngram=4)]
    changed += [Parameters(min_length=4), Parameters(short_docs="keep")]
    assert len({parameters.fingerprint() for parameters in changed}) == len(changed)
    assert Parameters().fingerprint() == Parameters().fingerprint()


@pytest.mark.parametrize(
    "wrong",
    [{"num_perm": 0}, {"threshold": 0.0}, {"threshold": 1.5}, {"ngram": 0}, {"min_length": -1}, {"short_docs": "x"}],
)
def test_meaningless_parameters_are_refused(wrong: dict[str, object]) -> None:
    """The message names the parameter and the value given."""
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name} = {re.escape(repr(value))}"):
        Parameters(**wrong)  # type: ignore[arg-type]
