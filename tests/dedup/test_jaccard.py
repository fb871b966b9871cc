import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest

from run_contract.errors import UserError
from snakmodel.dedup.buckets import buckets
from snakmodel.dedup.jaccard import Texts, Verifier
from snakmodel.dedup.minhash.hasher import BandHasher
from snakmodel.dedup.minhash.parameters import Parameters
from snakmodel.dedup.signature_file import Corpus
from snakmodel.shards.arrow_stream import Rows
from tests.dedup_run import WORDS, arrow_shards, clusters, labels, link, plain_components, sign, whole, write_shards

LOOSE = Parameters(num_perm=32, threshold=0.7, ngram=2, b=16, r=2)
"""Bands so narrow that most of what they link is not similar enough."""


def drifting(families: int, seed: int) -> list[str]:
    """Documents that share many 2-grams, but mostly fewer than the threshold asks; some are copies, some short."""
    random_ = random.Random(seed)
    made = ["ja tak", "ja tak", "nej"]
    for _ in range(families):
        words = random_.choices(WORDS, k=30)
        for _ in range(6):
            made.append(" ".join(words))
            for _ in range(random_.randint(0, 4)):
                words[random_.randrange(len(words))] = random_.choice(WORDS)
    made += [made[5].upper(), made[5].replace(" ", "."), made[9] + " " + " ".join(made[9].split()[:2])]
    random_.shuffle(made)
    return made


def grams(text: str, parameters: Parameters) -> frozenset[str]:
    words = re.split(r"\W", text.lower())
    return frozenset(" ".join(words[i : i + parameters.ngram]) for i in range(len(words) - parameters.ngram + 1))


def brute_force(run: Path, documents: list[str], parameters: Parameters) -> tuple[list[int], int]:
    """The labels by comparing every pair that shares a key, and how many such pairs fail."""
    corpus = Corpus.open(run / "dedup/signatures", 3)
    sharing: dict[tuple[int, int], set[int]] = {}
    for file, base in zip(corpus.files, corpus.bases.tolist(), strict=False):
        for part in range(corpus.ranges):
            for hi, lo, row in file.read(part).tolist():
                sharing.setdefault((hi, lo), set()).add(base + row)
    pairs = {pair for bucket in sharing.values() for pair in itertools.combinations(sorted(bucket), 2)}
    passing = []
    for left, right in pairs:
        one, other = grams(documents[left], parameters), grams(documents[right], parameters)
        short = len(re.split(r"\W", documents[left])) < parameters.min_length
        if short or len(one & other) / len(one | other) >= parameters.threshold:
            passing.append((left, right))
    return plain_components(len(documents), passing), len(pairs) - len(passing)


@pytest.mark.parametrize("seed", range(3))
def test_verified_clusters_equal_brute_force(tmp_path: Path, seed: int) -> None:
    """The clusters are the connected components of all pairs that share a key and pass, however ranges are cut."""
    documents = drifting(40, seed)
    results, counts = [], []
    for ranges in (1, 5):
        stats = whole(tmp_path / str(ranges), documents, 3, ranges, LOOSE, verify=True)
        results.append(labels(tmp_path / str(ranges)))
        counts.append(stats["verified"])
        assert stats["verified"]["checked"] == stats["verified"]["kept"] + stats["verified"]["rejected"]
    expected, failing = brute_force(tmp_path / "1", documents, LOOSE)
    assert results[0] == results[1] == expected
    assert counts[0] == counts[1]
    assert failing > 50
    whole(tmp_path / "plain", documents, 3, 1, LOOSE)
    assert clusters(labels(tmp_path / "plain")) != clusters(expected)


def test_a_false_positive_of_banding_is_removed(tmp_path: Path) -> None:
    """Two documents of similarity 0.74 share a band at threshold 0.85: linked by bands alone, not when verified."""
    words = [f"ord{number}" for number in range(100)]
    hasher, random_ = BandHasher(Parameters()), random.Random(1)
    plain = " ".join(words)
    import pyarrow as pa

    for _ in range(2000):
        changed = list(words)
        for place in random_.sample(range(100), 3):
            changed[place] = f"nyt{random_.randrange(10**6)}"
        other = " ".join(changed)
        both = len(grams(plain, Parameters()) & grams(other, Parameters()))
        similarity = both / (2 * 96 - both)
        records, _ = hasher.records(pa.array([plain, other]), 0)
        if similarity < 0.76 and len(np.unique(records["hi"])) < len(records):
            break
    else:
        pytest.fail("no false positive found")
    assert similarity < 0.85
    stats = [whole(tmp_path / str(verify), [plain, other], 1, 1, Parameters(), verify) for verify in (False, True)]
    assert [one["kept"] for one in stats] == [1, 2]
    assert stats[1]["verified"]["rejected"] >= 1


def test_identical_documents_are_not_compared_pairwise(tmp_path: Path) -> None:
    """3,000 copies and 300 spellings of one set of n-grams take a comparison each, not one a pair."""
    text = " ".join(WORDS[:30])
    documents = [text] * 3000 + [text.replace(" ", sign) for sign in "abc,.;:-!?"[3:]] * 40
    stats = whole(tmp_path, documents, 2, 1, Parameters(), verify=True)
    assert stats["kept"] == 1
    assert stats["verified"]["checked"] == 4 * (len(documents) - 1)


def test_both_compatibilities_cut_their_own_words() -> None:
    """0.3.1 splits at letters beyond a-z and keeps capitals, as its signatures do."""
    described = {"threshold": 0.85, "ngram": 1, "min_length": 1}
    new, old = (
        Verifier(Texts([0], [], "text"), {**described, "compat": f"text-dedup-{version}"})
        for version in ("0.4.0", "0.3.1")
    )
    assert new.tokens("Rødgrød MED") == ["rødgrød", "med"]
    assert old.tokens("Rødgrød MED") == ["R", "dgr", "d", "MED"]


def test_other_texts_are_refused(tmp_path: Path) -> None:
    """Texts whose number of documents is not that of the signatures are named."""
    write_shards(tmp_path / "arrow", drifting(3, 1), 2)
    sign(tmp_path, 2, 1, LOOSE)
    write_shards(tmp_path / "arrow", drifting(2, 1), 2)
    with pytest.raises(UserError, match=r"shard-0000\d\.arrow has 9 documents, its signatures are of 12"):
        link(tmp_path, 2, 1, verify=True)
    assert not (tmp_path / "dedup/buckets/range-00000.npy").exists()


def test_verified_and_unverified_links_are_not_mixed(tmp_path: Path) -> None:
    """Components refuse links of which some ranges were verified and some not."""
    documents = drifting(10, 1)
    whole(tmp_path, documents, 2, 3, LOOSE, verify=True)
    buckets(tmp_path / "dedup/signatures", 2, 1, tmp_path / "dedup/buckets/range-00001")
    from tests.dedup_run import join

    with pytest.raises(UserError, match=r"range-00001\.npy: some ranges were verified"):
        join(tmp_path, 2, 3)


def test_documents_are_read_by_number(tmp_path: Path) -> None:
    """Numbers run through shards, batches and, in ranges of rows, through a single file."""
    documents = [f"tekst {number}" for number in range(50)]
    write_shards(tmp_path / "arrow", documents, 3)
    texts = Texts([0, 16, 33, 50], arrow_shards(tmp_path, 3), "text")
    assert [texts[number] for number in range(50)] == documents
    write_shards(tmp_path / "one", documents, 1)
    file = tmp_path / "one/shard-00000.arrow"
    texts = Texts([0, 20, 50], [Rows(file, 0, 20), Rows(file, 20, 50)], "text")
    assert [texts[number] for number in range(49, -1, -1)] == documents[::-1]
