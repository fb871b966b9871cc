import functools
import gzip
import importlib.metadata
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from run_contract.errors import UserError
from snakmodel.dedup.minhash import compile_cache, text_dedup_engine
from snakmodel.dedup.minhash import hasher as minhash
from snakmodel.dedup.minhash.case_table import decoded, table
from snakmodel.dedup.minhash.hasher import BandHasher
from snakmodel.dedup.minhash.kernel import SLACK, minima, normalise
from snakmodel.dedup.minhash.kernel import keys as compute_keys
from snakmodel.dedup.minhash.parameters import KEY_POINTS, PRIME, RECORD, SHORT_POLICIES, Parameters, optimal_bands
from snakmodel.dedup.minhash.text_dedup_engine import ReferenceEngine, half_key
from tests.conftest import PROJECT

TEXT = "Rødgrød med fløde – det er DANSK, og det er svært at sige: æ ø å _ 1234 ...\u2028Ja!"
DANISH = next(
    (file for folder in PROJECT.parents if (file := folder / "shared/data/danish_help_text.txt.gz").is_file()), None
)
DEFAULT = Parameters()
NEW = [
    DEFAULT,
    Parameters(ngram=1, min_length=0, num_perm=16, b=2, r=8, hash_func="xxh3"),
    Parameters(ngram=3, min_length=1, num_perm=33, b=3, r=11),
    Parameters(ngram=8, min_length=2, num_perm=100, b=20, r=5, hash_func="xxh3"),
    Parameters(ngram=30, min_length=5, num_perm=1, b=1, r=1),
    Parameters(ngram=2, min_length=3, num_perm=120, threshold=0.5, hash_func="xxh3"),
]
OLD = [
    Parameters(compat="text-dedup-0.3.1", short_docs="collapse"),
    Parameters(compat="text-dedup-0.3.1", ngram=1, min_length=0, num_perm=16, b=2, r=8),
    Parameters(compat="text-dedup-0.3.1", ngram=8, min_length=2, num_perm=100, threshold=0.7),
]
PIECES = [
    *"ΣσςİıßIiǄẞK\u0307\u0301'·­.: ,_\n\0\u2028\x85٣५Ⅷªºﬀ漢字🎉👩‍👩‍👧ǅͅʰᾳ",
    "ΑΣ",
    "ΟΔΥΣΣΕΥΣ.",
    "Å",
    "ÆØÅ ",
    "ord ",
    "\U00010400",
    "\U000e0001",
]
"""Where lower-casing and splitting are not simple."""
GOLDEN = [
    "e92686190e21005eacfa3b7de3c81bb9",
    "f9e9470b63de7df7b06bbf541adce7c5",
    "8012588547c7537a23f18e0a618a0479",
    "d3fd2e4995fae5da262c9b36e2f6e085",
    "12280d48fcde7b36d99ff70c88c6baaf",
    "6cd2ce5d5f7fb28fe3a6c031c08746fd",
]

texts_ = st.lists(
    st.one_of(st.text(max_size=40), st.sampled_from(PIECES), st.text(st.sampled_from(PIECES[:20]), max_size=12)),
    max_size=12,
).map("".join)
thorough = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def array(texts: Sequence[str]) -> pa.Array:
    return pa.array(texts, pa.large_string())


def reference(texts: Sequence[str], parameters: Parameters) -> list[list[int]]:
    """The bands by text-dedup 0.4.0's own function, laid end to end, with its own way of drawing the permutations."""
    from text_dedup import minhash as original

    prime, size = np.uint64((1 << 61) - 1), (parameters.num_perm,)
    random = np.random.RandomState(original.SEED)
    drawn = random.randint(1, prime, size=size, dtype=np.uint64), random.randint(0, prime, size=size, dtype=np.uint64)
    function = functools.partial(
        original.embed_func,
        num_perm=parameters.num_perm,
        ngram_size=parameters.ngram,
        min_length=parameters.min_length,
        hashranges=ranges(parameters),
        permutations=drawn,
        hash_func={"sha1": original.sha1_hash, "xxh3": original.xxh3_32hash}[parameters.hash_func],
        dtype=np.uint64,
        max_hash=np.uint32((1 << 32) - 1),
        modulo_prime=prime,
    )
    return [values(function(text, 0)[original.SIGNATURE_COLUMN]) for text in texts]


def ranges(parameters: Parameters) -> list[tuple[int, int]]:
    bands, rows = parameters.banding()
    return [(band * rows, (band + 1) * rows) for band in range(bands)]


def values(bands: Sequence[bytes]) -> list[int]:
    return [value for band in bands for (value,) in struct.iter_unpack(">Q", band)]


def signed(texts: Sequence[str], parameters: Parameters) -> list[list[int]]:
    """The kernel's signatures, as far as the bands go."""
    bands, rows = parameters.banding()
    found = BandHasher(parameters).signatures(array(texts))
    assert found.shape == (len(texts), parameters.num_perm)
    return found[:, : bands * rows].tolist()  # type: ignore[no-any-return]


def test_the_kernel_runs() -> None:
    """The other tests compare the compiled kernel, not its stand-in."""
    assert type(minhash.engine(DEFAULT)).__name__ == "NumbaEngine"


@pytest.mark.parametrize("parameters", NEW, ids=str)
def test_signatures_are_those_of_text_dedup(parameters: Parameters) -> None:
    """On random Unicode of the whole range and on what is hard about it, for several parameters."""

    @thorough
    @given(st.lists(texts_, min_size=1, max_size=3))
    def compare(texts: list[str]) -> None:
        assert signed(texts, parameters) == reference(texts, parameters)

    compare()


@pytest.mark.parametrize("hash_func", ["sha1", "xxh3"])
def test_ngrams_of_every_length(hash_func: str) -> None:
    """Tokens of 0 to 1,300 bytes, among which lie all borders between ways of hashing, alone and mixed."""
    parameters = Parameters(ngram=1, min_length=1, num_perm=8, b=1, r=8, hash_func=hash_func)
    letters = "".join(chr(97 + place * 7 % 26) for place in range(1300))
    texts = [letters[:size] for size in range(1300)] + [" ".join(letters[: 37 * size % 1300] for size in range(40))]
    assert signed(texts, parameters) == reference(texts, parameters)


def normalised(text: str, *, lower: bool = True) -> str:
    """What the kernel makes of a document, without the separator at its end."""
    data = np.frombuffer(text.encode(), np.uint8)
    offsets, tokens = np.array([0, len(data)]), np.empty(2, np.int64)
    made, starts = np.zeros(len(data) * 3 // 2 + 1 + SLACK, np.uint8), np.empty(len(data) + 2, np.int64)
    normalise(data, offsets, table(lower), made, starts, tokens)
    return made[: starts[tokens[1]] - 1].tobytes().decode()


def test_every_code_point() -> None:
    """All of Unicode, alone and on both sides of a Σ, is lower-cased and split as Python's own functions do it."""
    points = np.array([point for point in range(0x110000) if not 0xD800 <= point < 0xE000], np.uint32)
    for pattern in ("{}\n", "aΣ{}\n", "aΣ{}b\n", "{}Σ\n", "a{}Σ\n"):
        before, after = pattern.split("{}")
        columns = [np.full(len(points), ord(letter), np.uint32) for letter in before]
        columns += [points, *(np.full(len(points), ord(letter), np.uint32) for letter in after)]
        text = decoded(np.stack(columns, axis=1).ravel())
        assert normalised(text) == re.sub(r"\W", " ", text.lower()), pattern
        if pattern == "{}\n":
            assert normalised(text, lower=False) == re.sub("[^A-Za-z_0-9]", " ", text)
            assert text.lower().lower() == text.lower()


@thorough
@given(st.text(st.sampled_from("ΣΣAaʰ.'\u0301ͅ 1İ"), max_size=30))
def test_final_sigma(text: str) -> None:
    """Σ depends on the nearest letters that are not ignorable, in both directions, within the document."""
    assert normalised(text) == re.sub(r"\W", " ", text.lower())


def test_residues_at_the_borders() -> None:
    """Products around multiples of 2⁶¹ - 1 and 2⁶⁴, which no text is likely to hit, are reduced as integers are."""
    prime, full = PRIME, 1 << 64
    products = [
        near + step for near in (0, prime, 2 * prime, 7 * prime, 8 * prime, 1 << 61, full) for step in range(-9, 10)
    ]
    offsets = np.array([product % full for product in products], np.uint64)
    found, tokens = np.empty((1, len(products)), np.uint32), np.array([0, 1])
    minima(np.array([1], np.uint32), tokens, 1, 0, np.zeros_like(offsets), offsets, found)
    assert found[0].tolist() == [product % full % prime & 0xFFFFFFFF for product in products]


def test_keys_at_the_borders() -> None:
    """Keys of extreme values, at extreme points too, are the polynomials in Python's unbounded integers."""
    highest = (1 << 32) - 1
    rows = np.array([[highest] * 6, [0] * 6, [0, highest, 0, highest, 1, 2], [1, 0, 0, 0, 0, 0]], np.uint32)
    for points in ((PRIME - 1, PRIME - 2), (1, 0), (2, PRIME // 2), KEY_POINTS):
        found = np.empty((len(rows) * 2, 5), np.uint32)
        nothing, tokens = np.empty(0, np.uint8), np.arange(len(rows) + 1)
        chosen = np.array(points, np.uint64)
        compute_keys(nothing, np.zeros(len(rows) + 1, np.int64), tokens, 0, -1, False, rows, 2, 3, chosen, 9, found)
        expected = [
            (*(half_key(band, row[3 * band : 3 * band + 3], point) for point in points), 9 + place)
            for place, row in enumerate(rows.tolist())
            for band in (0, 1)
        ]
        assert found.view(RECORD).ravel().tolist() == expected


def danish() -> list[str]:
    if DANISH is None:
        pytest.skip("no shared/data/danish_help_text.txt.gz beside the project: there is no real text to compare on")
    return gzip.decompress(DANISH.read_bytes()).decode().split("\n")


@pytest.mark.parametrize("parameters", [NEW[0], NEW[5]], ids=str)
def test_signatures_of_real_text(parameters: Parameters) -> None:
    """Danish lines and documents of many lines have text-dedup's signatures."""
    lines = danish()
    texts = lines[::8] + ["\n".join(lines[first : first + 300]) for first in range(0, len(lines), 5000)]
    assert signed(texts, parameters) == reference(texts, parameters)


def test_bands_and_rows_are_those_of_text_dedup() -> None:
    """Over a grid of thresholds and permutations; an explicit choice comes first."""
    from text_dedup.utils.analysis import optimal_param

    assert optimal_bands(0.85, 64) == (4, 15)
    for num_perm in (1, 2, 7, 16, 64, 100):
        for threshold in (0.01, 0.1, 0.3, 0.5, 0.625, 0.7, 0.8, 0.85, 0.9, 0.99, 1.0):
            assert optimal_bands(threshold, num_perm) == optimal_param(threshold, num_perm), (threshold, num_perm)
    hasher = BandHasher(Parameters(b=3, r=7))
    assert (hasher.bands, hasher.rows) == (3, 7)


WHEEL = """
import json, sys
import numpy as np
from text_dedup import minhash
texts, runs = json.load(sys.stdin)
answers = []
for num_perm, ngram, min_length, threshold, banding in runs:
    b, r = banding or minhash.optimal_param(threshold, num_perm)
    random = np.random.RandomState(minhash.SEED)
    pairs = [[random.randint(low, minhash.MERSENNE_PRIME, dtype=np.uint64) for low in (1, 0)] for _ in range(num_perm)]
    found = [
        minhash.embed_func(
            text, 0, num_perm=num_perm, ngram_size=ngram, min_length=min_length,
            hashranges=[(band * r, (band + 1) * r) for band in range(b)], permutations=np.array(pairs, np.uint64).T,
        )["__signatures__"]
        for text in texts
    ]
    answers.append([[b, r], [[int(v) for v in np.frombuffer(b"".join(bands), ">u8")] for bands in found]])
json.dump(answers, sys.stdout)
"""


def test_compatibility_with_0_3_1(text_dedup_0_3_1: Path) -> None:
    """Signatures, bands and rows are those of that version's own code, run from its wheel; so are the stand-in's."""
    texts = [TEXT, "", "øøø ø", "a_b-c d E_f é g", "x"]

    @thorough
    @given(st.lists(texts_, min_size=3, max_size=3))
    def collect(examples: list[str]) -> None:
        texts.extend(examples)

    collect()
    texts += danish()[::60] if DANISH else []
    runs = [(p.num_perm, p.ngram, p.min_length, p.threshold, p.b and [p.b, p.r]) for p in OLD]
    environment = {**os.environ, "PYTHONPATH": str(text_dedup_0_3_1)}
    output = subprocess.run(
        [sys.executable, "-c", WHEEL],
        input=json.dumps([texts, runs]),
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for parameters, (banding, expected) in zip(OLD, json.loads(output), strict=True):
        assert [*parameters.banding()] == banding
        assert signed(texts, parameters) == expected
        data, offsets = minhash.buffers(array(texts), 0)
        _, found = ReferenceEngine(parameters).sign(data, offsets)
        assert found[:, : banding[0] * banding[1]].tolist() == expected


def keys(records: NDArray[np.void]) -> list[tuple[int, int]]:
    return [(hi, lo) for hi, lo, _ in records.tolist()]


def test_records_carry_keys_and_rows_in_document_order() -> None:
    """Equal texts have equal keys, bands of one document do not collide, and rows count from the first given."""
    records, short = BandHasher(DEFAULT).records(array([TEXT, "for kort", TEXT]), 7)
    assert records.dtype == RECORD
    assert records["row"].tolist() == [7] * 4 + [8] + [9] * 4
    found = keys(records)
    assert found[:4] == found[5:]
    assert len(set(found)) == 5
    assert (short.dtype, short.tolist()) == (np.uint32, [8])


def test_a_key_is_its_whole_band() -> None:
    """Documents share the key of a band where all its values agree, and nowhere else, whatever the bands."""
    words = [f"ord{number}" for number in range(60)]
    texts = [" ".join([*words[:place], "andet", *words[place + 1 :]]) for place in range(0, 60, 2)] + [" ".join(words)]
    parameters = Parameters(num_perm=60, b=30, r=2, ngram=2)
    hasher = BandHasher(parameters)
    bands = hasher.signatures(array(texts)).reshape(len(texts), 30, 2)
    records, _ = hasher.records(array(texts), 0)
    found = [keys(records[records["row"] == row]) for row in range(len(texts))]
    shared = 0
    for one in range(len(texts)):
        for other in range(one):
            same = (bands[one] == bands[other]).all(axis=1).tolist()
            shared += sum(same)
            assert [a == b for a, b in zip(found[one], found[other], strict=True)] == same
    assert 0 < shared < 30 * len(texts) * (len(texts) - 1) / 2
    assert len({key for row in found for key in row}) == len(
        {(b, *v) for row in bands.tolist() for b, v in enumerate(map(tuple, row))}
    )


def test_keys_fill_the_whole_range() -> None:
    """Both halves are spread evenly, even with one row a band, which has only 2³² values."""
    texts = array([" ".join(f"{seed * number % 1009}" for number in range(20)) for seed in range(1, 1000)])
    for parameters in (DEFAULT, Parameters(num_perm=4, b=4, r=1)):
        records, _ = BandHasher(parameters).records(texts, 0)
        for half in ("hi", "lo"):
            counts = np.bincount((records[half] >> np.uint64(60)).astype(np.int64), minlength=16)
            assert counts.min() > len(records) / 32, (parameters, half, counts)
            assert counts.max() < len(records) / 8, (parameters, half, counts)


def test_keys_are_stable() -> None:
    """The key of a known document does not change from one version to the next (files on disk hold it)."""
    texts = array(["en to tre fire fem", "kort"])
    records = [BandHasher(Parameters(short_docs=policy)).records(texts, 0)[0] for policy in ("exact", "collapse")]
    assert [f"{hi:016x}{lo:016x}" for hi, lo in [*keys(records[0]), *keys(records[1][4:])]] == GOLDEN


@pytest.mark.parametrize("policy", SHORT_POLICIES)
def test_short_documents_follow_the_policy(policy: str) -> None:
    """`exact` links identical texts, `collapse` all, `keep` and `drop` none; every short document is counted."""
    texts = ["ja tak", "ja tak", "Ja tak", "", "\0", "a b c d", "a b c d e"]
    records, short = BandHasher(Parameters(short_docs=policy)).records(array(texts), 0)
    assert short.tolist() == [0, 1, 2, 3, 4, 5]
    found = {row: (hi, lo) for hi, lo, row in records[records["row"] < 6].tolist()}
    groups = {"exact": [{0, 1}, {2}, {3}, {4}, {5}], "collapse": [{0, 1, 2, 3, 4, 5}], "keep": [], "drop": []}[policy]
    assert [{row for row in found if found[row] == key} for key in dict.fromkeys(found.values())] == groups


@pytest.mark.parametrize("policy", SHORT_POLICIES)
@pytest.mark.parametrize("parameters", [NEW[0], NEW[3], OLD[1]], ids=str)
def test_the_stand_in_gives_the_same_records(parameters: Parameters, policy: str) -> None:
    """Without Numba every key is the same: text-dedup's own function, and the keys in plain Python."""
    parameters = Parameters(**{**parameters.described(), "short_docs": policy})
    texts = array([TEXT, *PIECES, "".join(PIECES), "kort", "", TEXT.upper() * 3, "én to tre fire fem"])
    data, offsets = minhash.buffers(texts, 0)
    stand_in = ReferenceEngine(parameters)
    expected = stand_in.keys(data, offsets, *stand_in.sign(data, offsets), 5)
    records, _ = BandHasher(parameters).records(texts, 5)
    assert records.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_arrow_arrays_of_any_kind(kind: pa.DataType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of an array, empty ones and any cut into slices for the kernel give the records of the whole."""
    texts = [f"{TEXT} {number}" if number % 3 else "x" * (number % 5) for number in range(200)]
    hasher = BandHasher(DEFAULT)
    whole, short = hasher.records(pa.array(texts, kind), 0)
    assert short.tolist() == list(range(0, 200, 3))
    for first, last in ((0, 200), (0, 0), (200, 200), (17, 18), (33, 150), (1, 200)):
        records, rows = hasher.records(pa.array(texts, kind)[first:last], first)
        assert records.tolist() == whole[(whole["row"] >= first) & (whole["row"] < last)].tolist()
        assert rows.tolist() == [row for row in short.tolist() if first <= row < last]
    for size in (1, 100, 1000):
        monkeypatch.setattr(minhash, "SLICE", size)
        assert hasher.records(pa.array(texts, kind), 0)[0].tolist() == whole.tolist()
    empty = pa.array([], kind)
    assert [len(found) for found in hasher.records(empty, 0)] == [0, 0]
    assert hasher.signatures(empty).shape == (0, 64)
    blank, _ = hasher.records(pa.array(["", "", ""], kind), 0)
    assert len(set(keys(blank))) == 1


def test_bytes_that_are_not_utf8_are_refused() -> None:
    """A lone surrogate, a cut-off letter and a null are errors, not reads beyond the buffer."""
    for bad in (b"\xed\xa0\x80", b"\xc3", b"\xf4\x90\x80\x80", b"a\xff"):
        content, offsets = b"god tekst" + bad, np.array([0, 9, 9 + len(bad)], np.int32)
        texts = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(content)])
        with pytest.raises(UserError, match="the 2 documents from row 7 on are not all valid UTF-8"):
            BandHasher(DEFAULT).records(texts, 7)
    with pytest.raises(ValueError, match="1 of the texts are null"):
        BandHasher(DEFAULT).records(pa.array(["a", None]), 0)


def test_a_giant_document() -> None:
    """50 MB in one document, and one of nothing but separators, have the signatures of their distinct n-grams."""
    line = "En giraf spiser ærlig talt hver dag 7 blå bær. "
    giant, small = line * (50_000_000 // len(line.encode())), line * 2
    found = BandHasher(DEFAULT).signatures(array([giant, small, "." * 3_000_000, "." * 5]))
    assert found[0].tolist() == found[1].tolist() == signed([small], Parameters(b=1, r=64))[0]
    assert found[2].tolist() == found[3].tolist()


def test_threads_share_a_hasher() -> None:
    """Batches hashed at the same time by four threads give what one after the other gives."""
    hasher = BandHasher(DEFAULT)
    batches = [array([f"{TEXT} {batch} {number}" for number in range(300)]) for batch in range(16)]
    together = threading.Barrier(4)

    def hashed(batch: int) -> list[tuple[int, int, int]]:
        if batch < 4:
            together.wait()
        return hasher.records(batches[batch], 0)[0].tolist()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(hashed, range(16))) == [hasher.records(batch, 0)[0].tolist() for batch in batches]


SUBPROCESS = """
import json, multiprocessing, sys
import pyarrow as pa
from snakmodel.dedup.minhash.hasher import BandHasher
from snakmodel.dedup.minhash.parameters import Parameters
found = [BandHasher(Parameters(ngram=n)).records(pa.array([sys.argv[1]]), 0)[0].tolist() for n in (5, 4)]
json.dump([found, "text_dedup" in sys.modules, multiprocessing.get_start_method(allow_none=True)], sys.stdout)
"""


@pytest.mark.parametrize("disabled", [False, True])
def test_without_numba(disabled: bool) -> None:
    """NUMBA_DISABLE_JIT gives the same records, saying so once; else text_dedup, which is slow, is not imported."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_DISABLE_JIT"}
    environment |= {"NUMBA_DISABLE_JIT": "1"} if disabled else {}
    command = [sys.executable, "-c", SUBPROCESS, TEXT]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found, imported, method = json.loads(result.stdout)
    expected = [BandHasher(Parameters(ngram=n)).records(array([TEXT]), 0)[0].tolist() for n in (5, 4)]
    assert [[tuple(record) for record in records] for records in found] == expected
    assert (imported, method) == ((True, "fork") if disabled else (False, None))
    assert result.stderr.count("Numba does not work here (RuntimeError: NUMBA_DISABLE_JIT is set)") == disabled


def test_numba_that_cannot_load(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An import that fails is explained, and the records come out the same."""
    expected = BandHasher(DEFAULT).records(array([TEXT, "kort"]), 0)[0].tolist()
    monkeypatch.setitem(sys.modules, "snakmodel.dedup.minhash.numba_engine", None)
    minhash.engine.cache_clear()
    try:
        assert BandHasher(DEFAULT).records(array([TEXT, "kort"]), 0)[0].tolist() == expected
        assert type(minhash.engine(DEFAULT)) is ReferenceEngine
    finally:
        minhash.engine.cache_clear()
    assert capsys.readouterr().err.count("Numba does not work here (ModuleNotFoundError") == 1


@pytest.mark.parametrize(
    ("missing", "said"), [("text_dedup", "text_dedup is not installed"), ("click", "click is not installed")]
)
def test_text_dedup_that_is_missing(monkeypatch: pytest.MonkeyPatch, missing: str, said: str) -> None:
    """Without text-dedup, or without a package that it imports, the fallback says what to install."""
    for name in [name for name in sys.modules if name.split(".")[0] == "text_dedup"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=re.escape(f"needs text-dedup 0.4.0, and {said}. Type: pip install")):
        text_dedup_engine.import_text_dedup()


def test_another_text_dedup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version has other clusters, and a package that is not there at all is named."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.4.1")
    with pytest.raises(UserError, match=r"and version 0\.4\.1 is installed"):
        text_dedup_engine.import_text_dedup()

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match="text-dedup is not installed"):
        text_dedup_engine.import_text_dedup()


def doubled(value: int) -> int:
    return value * 2


def test_a_cache_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no folder, the disk is full or a file is cut off, functions are compiled all the same."""
    from numba.core import caching

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_cache, "_FOLDER", None)
    assert compile_cache.compiled(doubled)(4) == 8
    monkeypatch.setattr(compile_cache, "_FOLDER", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(caching.IndexDataCacheFile, "_save_data", full)
        assert compile_cache.compiled(doubled)(4) == 8
    assert not list(tmp_path.rglob("*.nbc"))
    assert compile_cache.compiled(doubled)(4) == 8
    for suffix in ("nbc", "nbi"):
        (file,) = tmp_path.rglob(f"*.{suffix}")
        file.write_bytes(file.read_bytes()[:40])
        assert compile_cache.compiled(doubled)(4) == 8


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first root that can be written, apart for each kind of processor; nowhere if none can."""
    import numba

    (tmp_path / "file").touch()
    folder = compile_cache.cache_folder([tmp_path / "file", tmp_path / "a", tmp_path / "b"])
    assert folder is not None
    assert folder.parent == tmp_path / "a"
    assert folder == compile_cache.cache_folder([tmp_path / "a"])
    monkeypatch.setattr(numba.config, "CPU_NAME", "generic")
    other = compile_cache.cache_folder([tmp_path / "a"])
    assert other is not None
    assert (other.parent, other != folder) == (folder.parent, True)
    assert compile_cache.cache_folder([tmp_path / "file" / "x"]) is None
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "given"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    roots = [tmp_path / "given", PROJECT / "snakmodel/dedup/minhash/__pycache__", tmp_path / "user/snakmodel"]
    assert compile_cache.cache_roots() == roots


def test_fingerprint_tells_parameters_apart() -> None:
    """Every parameter changes the fingerprint; bands and rows given as they come out anyway do not."""
    changed = [Parameters(), Parameters(num_perm=65), Parameters(threshold=0.86), Parameters(ngram=4)]
    changed += [Parameters(min_length=4), Parameters(short_docs="keep"), Parameters(hash_func="xxh3")]
    changed += [Parameters(compat="text-dedup-0.3.1"), Parameters(b=4, r=14), Parameters(b=3, r=15)]
    assert len({parameters.fingerprint() for parameters in changed}) == len(changed)
    assert Parameters().fingerprint() == Parameters().fingerprint() == Parameters(b=4, r=15).fingerprint()
    assert (Parameters().described()["b"], Parameters().described()["r"]) == (4, 15)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_perm": 0},
        {"threshold": 0.0},
        {"threshold": 1.5},
        {"ngram": 0},
        {"min_length": -1},
        {"short_docs": "x"},
        {"compat": "text-dedup-0.2"},
        {"hash_func": "md5"},
        {"hash_func": "xxh3", "compat": "text-dedup-0.3.1"},
        {"b": 0, "r": 1},
        {"b": 4},
        {"b": 4, "r": 17},
    ],
    ids=str,
)
def test_meaningless_parameters_are_refused(wrong: dict[str, object]) -> None:
    """The message names the parameter and the value given."""
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"{name} = {re.escape(repr(value))}"):
        Parameters(**wrong)  # type: ignore[arg-type]


def test_a_kernel_is_compiled_anew_when_any_of_its_sources_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the compiled kernel is named by all sources beside it: none of them can change unnoticed."""
    copied = tmp_path / "minhash"
    shutil.copytree(Path(compile_cache.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compile_cache, "__file__", str(copied / "compile_cache.py"))
    seen = [compile_cache.cache_folder([tmp_path / "cache"])]
    sources = sorted(copied.glob("*.py"))
    assert {"kernel.py", "sha1.py", "xxh3.py", "case_table.py", "numba_engine.py"} <= {one.name for one in sources}
    for source in sources:
        source.write_text(source.read_text() + "# changed\n")
        seen.append(compile_cache.cache_folder([tmp_path / "cache"]))
    assert None not in seen
    assert len(set(seen)) == len(sources) + 1
