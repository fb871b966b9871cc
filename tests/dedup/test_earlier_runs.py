import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from run_contract.errors import UserError
from run_contract.publish import write_json
from snakmodel.dedup.components import DROPPED, EARLIER
from snakmodel.dedup.minhash.parameters import SHORT_POLICIES, Parameters
from snakmodel.dedup.report import EARLIER_RUNS, report
from tests.dedup.test_jaccard import LOOSE, brute_force, drifting
from tests.dedup_run import (
    ENVIRONMENT,
    arrow_shards,
    corpus,
    join,
    kept,
    kept_sizes,
    labels,
    link,
    sign,
    signed_run,
    whole,
    write_shards,
)


def pieces(documents: list[str], random_: random.Random, runs: int) -> list[list[str]]:
    """Documents cut anywhere into consecutive pieces, of which some may be empty."""
    edges = [0, *sorted(random_.choices(range(len(documents) + 1), k=runs - 1)), len(documents)]
    return [documents[first:last] for first, last in pairwise(edges)]


def check_against_joint(folder: Path, documents: list[str], parameters: Parameters, verify: bool, seed: int) -> int:
    """Deduplicate the last piece of the documents against the others, and compare with one run over all of them.

    Returns the number of new documents that are removed in favour of one of an earlier run.
    """
    random_ = random.Random(seed)
    ranges, runs, shards = random_.randint(1, 5), random_.randint(2, 4), random_.randint(1, 4)
    whole(folder / "joint", documents, 3, ranges, parameters, verify)
    joint = labels(folder / "joint")
    *before, new = pieces(documents, random_, runs)
    earlier = [
        signed_run(folder / f"earlier-{number}", part, random_.randint(1, 3), ranges, parameters)
        for number, part in enumerate(before)
    ]
    stats = whole(folder / "new", new, shards, ranges, parameters, verify, earlier, with_sizes=True)
    first = len(documents) - len(new)
    sizes = Counter(label for label in joint if label != DROPPED)
    survivors = [number for number in range(first, len(documents)) if joint[number] == number]
    assert kept(folder / "new") == [documents[number] for number in survivors]
    assert kept_sizes(folder / "new") == [sizes[number] for number in survivors]
    expected = [
        label if label == DROPPED else label - first if label >= first else EARLIER - label for label in joint[first:]
    ]
    assert labels(folder / "new") == expected
    dropped, of_earlier = expected.count(DROPPED), sum(label <= EARLIER for label in expected)
    assert (stats["documents"], stats["kept"], stats["dropped"]) == (len(new), len(survivors), dropped)
    assert stats["duplicates"] == len(new) - len(survivors) - dropped
    assert stats["earlier"]["duplicates"] == of_earlier
    assert stats["duplicates"] == of_earlier + sum((size - 1) * count for size, count in stats["sizes"])
    assert dict(stats["sizes"]) == Counter(sizes[number] for number in survivors if sizes[number] > 1)
    return of_earlier


@pytest.mark.parametrize("policy", SHORT_POLICIES)
def test_removes_what_one_joint_run_removes(tmp_path: Path, policy: str) -> None:
    """For several splits into runs, shards and ranges: the kept documents, labels, sizes and counts of a joint run."""
    found = [
        check_against_joint(tmp_path / str(seed), corpus(24, seed), Parameters(short_docs=policy), False, seed)
        for seed in range(3)
    ]
    assert max(found) > 5


def test_verified_links_are_those_of_one_joint_run(tmp_path: Path) -> None:
    """With verify_jaccard, where the texts of the earlier runs are read; and the joint run is the brute force."""
    found = []
    for seed in range(3):
        documents = drifting(16, seed)
        found.append(check_against_joint(tmp_path / str(seed), documents, LOOSE, True, seed))
        expected, failing = brute_force(tmp_path / f"{seed}/joint", documents, LOOSE)
        assert labels(tmp_path / f"{seed}/joint") == expected
        assert failing > 10
    assert max(found) > 5


def test_an_earlier_document_connects_new_ones(tmp_path: Path) -> None:
    """A chain of documents, each of which resembles only its neighbours, is one cluster across the runs.

    The earlier document in its middle takes all new ones with it, also those that do not resemble it. It counts even if
    the earlier run removed it itself.
    """
    words = [f"ord{number}" for number in range(60)]
    chain = [" ".join(words[3 * step : 3 * step + 30]) for step in range(9)]
    exact = Parameters(num_perm=64, threshold=0.8, ngram=1, min_length=1, b=64, r=1)
    whole(tmp_path / "alone", [chain[0], chain[8]], 1, 1, exact, verify=True)
    assert len(kept(tmp_path / "alone")) == 2
    earlier = signed_run(tmp_path / "earlier", [chain[3], chain[4]], 1, 1, exact)
    new = [chain[8], chain[0], *chain[1:3], *chain[5:8], "noget helt andet"]
    stats = whole(tmp_path / "new", new, 2, 1, exact, True, [earlier], with_sizes=True)
    assert kept(tmp_path / "new") == ["noget helt andet"]
    assert labels(tmp_path / "new")[:7] == [EARLIER] * 7
    assert (stats["earlier"], stats["clusters"]) == ({"shards": 1, "documents": 2, "duplicates": 7}, 0)


def test_neither_order_of_work_nor_shards_change_bytes(tmp_path: Path) -> None:
    """Two runs, one of which does its steps twice, leave the same files."""
    documents = corpus(12, 1)
    earlier = signed_run(tmp_path / "earlier", documents[:40], 2, 3, Parameters())
    for name in ("a", "b"):
        whole(tmp_path / name, documents[40:], 2, 3, Parameters(), against=[earlier], with_sizes=True)
    link(tmp_path / "a", 2, 3, against=[earlier])
    join(tmp_path / "a", 2, 3, [earlier], with_sizes=True)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 2 + 4 + 6 + 2 + 8 + 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_the_report_names_earlier_runs(tmp_path: Path) -> None:
    """Duplicates of earlier documents are counted as such, by source, beside those within the run."""
    documents = corpus(12, 1)
    earlier = signed_run(tmp_path / "earlier", documents[:40], 2, 3, Parameters())
    stats = whole(tmp_path / "new", documents[40:], 2, 3, Parameters(), against=[earlier])
    found = report(arrow_shards(tmp_path / "new", 2), "text", tmp_path / "new/dedup/components", tmp_path / "report")
    assert found["earlier"] == stats["earlier"]
    matrix = json.loads((tmp_path / "report.json").read_text())["duplicates_of"]
    assert sum(matrix[EARLIER_RUNS].values()) == stats["earlier"]["duplicates"] > 0
    assert sum(sum(row.values()) for row in matrix.values()) == stats["duplicates"]
    assert (tmp_path / "report.png").stat().st_size > 1000


def lacks(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).unlink()


def sign_again(run: Path, ranges: int = 2, **changes: object) -> None:
    """Other parameters, under markers that say that all is well."""
    shutil.rmtree(run)
    signed_run(run, corpus(4), 2, ranges, Parameters(**changes))  # type: ignore[arg-type]


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "--against: .*/earlier is not there"),
    "no run": (lacks("shards.json"), r"--against: .*/earlier has no shards\.json\. Give the folder of a run"),
    "shards that are none": (lambda run: (run / "shards.json").write_text("[]"), "does not say the shards of a run"),
    "no signatures": (
        lambda run: shutil.rmtree(run / "dedup"), r"lacks the signatures of 2 of its 2 shards; .*shard-00000\.sig is"),
    "no marker": (lacks("markers/dedup-signatures/00001.json"), "of 1 of its 2 shards; .* no done marker markers"),
    "one shard is missing": (lacks("dedup/signatures/shard-00001.sig"), r"of 1 of its 2 shards; .*shard-00001\.sig is"),
    "more shards than signatures": (
        lambda run: write_json(run / "shards.json", {"shards": [[]] * 3}), "of 1 of its 3 shards; .* no done marker"),
    "a signature file that is cut off": (
        lambda run: (run / "dedup/signatures/shard-00000.sig").write_bytes(b"x"), r"shard-00000\.sig has 1 bytes"),
    "another threshold": (
        lambda run: sign_again(run, threshold=0.8), r"here, b: 5 and 4, r: 11 and 15, threshold: 0\.8 and 0\.85"),
    "another num_perm": (lambda run: sign_again(run, num_perm=128), "num_perm: 128 and 64"),
    "other bands": (lambda run: sign_again(run, b=3, r=3), "here, b: 3 and 4, r: 3 and 15"),
    "another n-gram": (lambda run: sign_again(run, ngram=4), "here, ngram: 4 and 5"),
    "another length": (lambda run: sign_again(run, min_length=4), "here, min_length: 4 and 5"),
    "another hash": (lambda run: sign_again(run, hash_func="xxh3"), "here, hash_func: xxh3 and sha1"),
    "another version": (lambda run: sign_again(run, compat="text-dedup-0.3.1"), "compat: text-dedup-0.3.1 and text-d"),
    "another policy": (lambda run: sign_again(run, short_docs="drop"), "here, short_docs: drop and exact"),
    "other ranges": (lambda run: sign_again(run, ranges=3), "here, ranges: 3 and 2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an earlier run and a new run that has its signatures."""
    folder = tmp_path_factory.mktemp("both")
    signed_run(folder / "earlier", corpus(4), 2, 2, Parameters())
    write_shards(folder / "new/arrow", corpus(5), 2)
    sign(folder / "new", 2, 2, Parameters())
    return folder


@pytest.mark.parametrize("mistake", WRONG)
def test_a_run_that_cannot_be_used_is_refused(both: Path, tmp_path: Path, mistake: str) -> None:
    """The message names the run, what was found and what is valid; nothing is written."""
    folder = shutil.copytree(both, tmp_path / "both")
    change, words = WRONG[mistake]
    change(folder / "earlier")
    with pytest.raises(UserError, match=words):
        link(folder / "new", 2, 2, against=[folder / "earlier"])
    with pytest.raises(UserError, match=words):
        join(folder / "new", 2, 2, [folder / "earlier"])
    assert not (folder / "new/dedup/buckets").exists()
    assert not (folder / "new/dedup/components").exists()


def test_a_run_is_named_once_and_is_not_the_run_itself(both: Path, tmp_path: Path) -> None:
    """Also by another path to the same folder."""
    (tmp_path / "link").symlink_to(both / "earlier")
    with pytest.raises(UserError, match="link is named twice"):
        link(both / "new", 2, 2, against=[both / "earlier", tmp_path / "link"])
    (tmp_path / "new").symlink_to(both / "new")
    with pytest.raises(UserError, match="new is this run itself"):
        link(both / "new", 2, 2, against=[both / "earlier", tmp_path / "new"])


def test_verification_needs_the_texts_of_the_signatures(both: Path, tmp_path: Path) -> None:
    """Texts that are gone, or that were made anew since, are refused; without verification they are not needed."""
    folder = shutil.copytree(both, tmp_path / "both")
    earlier = folder / "earlier"
    shutil.rmtree(earlier / "arrow")
    link(folder / "new", 2, 2, against=[earlier])
    with pytest.raises(UserError, match=r"needs the texts of .*/earlier, but arrow/shard-00000\.arrow is missing"):
        link(folder / "new", 2, 2, verify=True, against=[earlier])
    shutil.move(earlier / "dedup", tmp_path / "dedup")
    shutil.move(earlier / "markers/dedup-signatures", tmp_path / "markers")
    signed_run(earlier, [*corpus(4)[1:], "en anden tekst end den der var her"], 2, 2, Parameters())
    for name, saved in (("dedup", "dedup"), ("markers/dedup-signatures", "markers")):
        shutil.rmtree(earlier / name)
        shutil.move(tmp_path / saved, earlier / name)
    with pytest.raises(UserError, match=r"but arrow/shard-00000\.arrow is not what its signatures were made from"):
        link(folder / "new", 2, 2, verify=True, against=[earlier])


def test_links_of_another_set_of_runs_are_refused(both: Path, tmp_path: Path) -> None:
    """Components take only links that were made against the same runs."""
    folder = shutil.copytree(both, tmp_path / "both")
    link(folder / "new", 2, 2)
    with pytest.raises(UserError, match="made from other signature files"):
        join(folder / "new", 2, 2, [folder / "earlier"])
    link(folder / "new", 2, 2, against=[folder / "earlier"])
    with pytest.raises(UserError, match="made from other signature files"):
        join(folder / "new", 2, 2)


def test_command_line(both: Path, tmp_path: Path) -> None:
    """A mistake ends with one line and exit code 2; the documented commands give the result of the functions."""

    def command(step: str, *words: object) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "snakmodel.dedup", step, *map(str, words)]
        return subprocess.run(argv, capture_output=True, text=True, check=False, env=ENVIRONMENT)

    folder = shutil.copytree(both, tmp_path / "both")
    new, earlier = folder / "new", folder / "earlier"
    common = ["--signatures", new / "dedup/signatures", "--shards", 2]
    wrong = command("buckets", *common, "--range", 0, "--output", tmp_path / "x", "--against", tmp_path / "none")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    for part in range(2):
        output = new / f"dedup/buckets/range-{part:05d}"
        done = command("buckets", *common, "--range", part, "--output", output, "--against", earlier)
        assert done.returncode == 0, done.stderr
    joining = ["--buckets", new / "dedup/buckets", "--ranges", 2, "--output", new / "dedup/components"]
    done = command("components", *common, *joining, "--cluster_size", "--against", earlier)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["earlier"]["documents"] == 20
    lists = new / "dedup/components"
    shard = ["--input", new / "arrow/shard-00001.arrow", "--output", new / "dedup/kept/shard-00001"]
    shard += ["--removed", lists / "removed/shard-00001.npy", "--sizes", lists / "sizes/shard-00001.npy"]
    assert command("filter", *shard).returncode == 0
    assert len(kept_sizes(new)) == len(kept(new)) > 0
