"""Input files that change, or only seem to, after a run was planned: what is noticed, and what is done again."""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from run_contract.errors import UserError
from snakmodel.prepare.digests import part_digest
from snakmodel.prepare.input_files import FilePart, plan_shards
from snakmodel.prepare.readers import Reading
from snakmodel.run.markers import READ, Marker, marker_path
from tests import prepare_reference
from tests.old_run import DATA, MIDDLE, Run


@pytest.fixture
def old(tmp_path: Path) -> Run:
    """As the earlier version left it."""
    return Run(tmp_path)


@pytest.fixture
def run(old: Run) -> Run:
    """The same run after all of its shards were prepared by this version, under the same keys."""
    plan = old.plan()
    old.make(plan, 0, 1, 2, 3)
    return old


def test_keys_of_a_run_are_those_that_were_recorded(tmp_path: Path) -> None:
    """Each task of the chain has the key that the version before the packages gave it, so old runs go on."""
    recorded = json.loads((DATA / "old_run_keys.json").read_text(encoding="utf-8"))
    assert {name: list(keys) for name, keys in Run(tmp_path).plan().chain.keys.items()} == recorded


def test_a_run_of_the_version_before_goes_on(old: Run) -> None:
    """Its keys are recognised, nothing of it is done again, and run.yaml keeps them."""
    before = yaml.safe_load((old.root / "run.yaml").read_text())["stage_keys"]
    assert old.missing() == {}
    assert yaml.safe_load((old.root / "run.yaml").read_text())["stage_keys"] == before
    assert old.missing(check=True) == {}


def test_touched_files_of_the_version_before(old: Run) -> None:
    """Files that are newer than the shards are compared with the documents in them: equal ones stay, others do not."""
    for path in (old.text / "a.txt", old.text / "b/c.jsonl"):
        path.touch()
    assert old.missing() == {}
    for path in old.text.rglob("*.*"):
        path.touch()
    assert old.missing() == {}
    old.redact()
    with pytest.raises(UserError, match=r"a\.txt: what begins in its bytes 104,154 to 208,309 is different") as error:
        old.plan()
    assert str(error.value).count("is different") == 1
    assert "text.export" not in str(error.value)
    assert old.missing("prepare")["prepare"] == [1]


def test_a_change_before_the_first_plan_of_this_version(old: Run) -> None:
    """What no fingerprint of the earlier version could see: the file is newer than the marker."""
    old.redact()
    with pytest.raises(UserError, match="This touches: prepare, dedup-signatures"):
        old.plan()
    assert old.missing("prepare")["prepare"] == [1]


def test_copied_and_touched_files_change_nothing(run: Run) -> None:
    """New times, new inodes, another folder: the digests are equal, so no key changes, with or without the flag."""
    shutil.copytree(run.text, run.folder / "copy")
    shutil.rmtree(run.text)
    (run.folder / "copy").rename(run.text)
    for path in run.text.rglob("*.*"):
        os.utime(path)
    keys = run.plan().chain.keys
    assert run.missing() == {}
    moved = run.folder / "other disk" / "text"
    shutil.copytree(run.text, moved, copy_function=shutil.copyfile)
    shutil.rmtree(run.text)
    run.recipe["data"]["path"] = str(moved)
    assert run.missing(check=True) == {}
    assert run.plan().chain.keys == keys


def test_only_touched_shards_are_done_again(run: Run) -> None:
    """A redaction in the middle of a file is noticed, named and refused; the way out redoes the one shard that read it.

    So are the signatures of that shard and what is made of all shards.
    """
    before = run.plan().chain.keys
    run.redact()
    with pytest.raises(UserError) as error:
        run.plan()
    assert "the input files: a.txt: what begins in its bytes 104,154 to 208,309 is different" in str(error.value)
    assert "--restart-from prepare" in str(error.value)
    assert run.missing("prepare") == {
        "prepare": [1],
        "dedup-signatures": [1],
        "dedup-buckets": [0, 1],
        "dedup-components": [0],
        "dedup-filter": [0, 1, 2, 3],
        "tokenize": [0, 1, 2, 3],
        "merge-tokens": [0],
    }
    plan = run.plan()
    run.make(plan, 1)
    assert "xxx" in (run.root / "arrow/shard-00001.arrow").read_bytes().decode(errors="replace")
    assert run.plan().chain.marker_problems("prepare") == [None] * 4
    os.utime(run.text / "a.txt")
    assert run.plan(check=True).chain.keys == plan.chain.keys
    assert sum(one != two for one, two in zip(before["prepare"], plan.chain.keys["prepare"], strict=True)) == 1


def test_a_change_that_is_undone(run: Run) -> None:
    """The old content under the old key: what was made of it counts again."""
    content = (run.text / "a.txt").read_bytes()
    run.redact()
    assert run.missing("prepare")["prepare"] == [1]
    (run.text / "a.txt").write_bytes(content)
    assert run.missing("prepare") == {}


def test_the_flag_sees_what_time_and_size_hide(run: Run) -> None:
    """A change with the time set back is only found by --check-inputs."""
    found = (run.text / "a.txt").stat()
    run.redact()
    os.utime(run.text / "a.txt", ns=(found.st_atime_ns, found.st_mtime_ns))
    assert run.missing() == {}
    with pytest.raises(UserError, match=r"a\.txt: what begins in its bytes 104,154 to 208,309 is different"):
        run.plan(check=True)


def test_a_document_across_a_border(run: Run) -> None:
    """Bytes of the next range that belong to a document which begins before it are this shard's, and only its."""
    path = run.text / "a.txt"
    content = bytearray(path.read_bytes())
    border = 208_309
    content[border - 10 : border + 10] = b"a" * 20
    path.write_bytes(content)
    plan = run.plan("prepare")
    run.make(plan, *plan.missing["prepare"])
    content[border + 5] = ord("b")
    path.write_bytes(content)
    assert run.missing("prepare")["prepare"] == [1]


def test_files_that_grow_shrink_come_and_go(run: Run) -> None:
    """Borders stay: only the shards in which something is different are done again, and the documents are all there."""
    path = run.text / "a.txt"
    with path.open("a") as file:
        file.write("en ny linje til sidst i filen\n")
    (run.text / "b/d.txt").write_text("en ny fil\n")
    with pytest.raises(UserError, match=r"the input files: b/d\.txt is new, a\.txt has 410,355 bytes, not 410,325"):
        run.plan()
    assert run.missing("prepare")["prepare"] == [3]
    run.make(run.plan(), 3)
    content = path.read_bytes()
    path.write_bytes(content[:MIDDLE] + content[MIDDLE:].replace(b"\n" * 100, b"", 1))
    assert run.missing("prepare")["prepare"] == [1, 2, 3]
    (run.text / "b/d.txt").unlink()
    plan = run.plan("prepare")
    assert plan.missing["prepare"] == [1, 2, 3]
    run.make(plan, 1, 2, 3)
    assert "prepare" not in run.missing()
    fresh = plan_shards(run.text, None, 4, 1)
    kept = [[FilePart(**part) for part in parts] for parts in json.loads(plan.paths.shards.read_text())["shards"]]
    assert kept != fresh
    assert texts(kept) == texts(fresh)


def texts(shards: list[list[FilePart]]) -> list[str]:
    return [text for parts in shards for part in parts for text in prepare_reference.texts(part)]


def test_far_more_text_is_planned_afresh(run: Run) -> None:
    """Where one shard would become more than twice as large, all borders move."""
    (run.text / "b/d.txt").write_text("en ny linje\n" * 50_000)
    with pytest.raises(UserError, match=r"b/d\.txt is new"):
        run.plan()
    run.plan("prepare")
    shards = json.loads((run.root / "shards.json").read_text())["shards"]
    assert shards[0][0]["end"] == (410_325 + 6_293 + 600_000) // 4


def test_shards_that_nobody_has_read(run: Run) -> None:
    """Text that is corrected before its shard is prepared needs no leave: nothing was made of it."""
    for stage in ("prepare", "dedup-signatures", "dedup-filter"):
        marker_path(run.root, stage, 1).unlink()
    marker_path(run.root, "dedup-components", 0).unlink()
    run.redact()
    assert run.missing() == {
        "prepare": [1],
        "dedup-signatures": [1],
        "dedup-components": [0],
        "dedup-filter": [1],
    }


def test_a_lost_marker_hides_nothing(run: Run) -> None:
    """Where a shard's own marker is gone but its signatures are not, a change still gives it another key."""
    marker_path(run.root, "prepare", 1).unlink()
    run.redact()
    with pytest.raises(UserError, match=r"a\.txt: what begins in"):
        run.plan()
    assert run.missing("prepare")["dedup-signatures"] == [1]


def test_a_dry_run_remembers_nothing(run: Run) -> None:
    """It compares, and writes neither the plan nor what is known of the files."""
    os.utime(run.text / "a.txt")
    before = (run.root / "inputs.json").read_bytes()
    run.plan(dry=True)
    assert (run.root / "inputs.json").read_bytes() == before
    run.redact()
    assert run.plan("prepare", dry=True).missing["prepare"] == [1]
    assert (run.root / "inputs.json").read_bytes() == before


def test_tokenizer_and_base_model(run: Run) -> None:
    """A change that no sample reaches is found by the digest; a touch changes nothing."""
    path = run.root / "base/tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "note": ["x" * 100] * 4000}))
    run.plan("tokenize", "convert")
    path.touch()
    keys = run.plan().chain.keys
    content = path.read_bytes()
    path.write_bytes(content[:100_000] + b"y" + content[100_001:])
    with pytest.raises(UserError, match=r"tokenizer_config\.json is different"):
        run.plan()
    path.write_bytes(content)
    assert run.plan().chain.keys == keys


def test_a_weight_file_is_compared_with_what_convert_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files too large for the launcher to digest beforehand: the done marker of `convert` has the digest."""
    monkeypatch.setattr("snakmodel.chain.inputs._SMALL", 1000)
    weights = run.root / "base/model.safetensors"
    weights.write_bytes(bytes(1_000_000))
    plan = run.plan("convert")
    (run.root / "megatron/release").mkdir(parents=True)
    marker = Marker(plan.chain.keys["convert"][0], {}, {READ: {"model.safetensors": "f" * 32}})
    marker.write(marker_path(run.root, "convert", 0))
    weights.touch()
    with pytest.raises(UserError, match=r"model\.safetensors is different"):
        run.plan()
    from run_contract.publish import checksum

    marker.counts[READ]["model.safetensors"] = checksum(weights)
    marker.write(marker_path(run.root, "convert", 0))
    assert run.plan().chain.keys == plan.chain.keys
    content = bytearray(weights.read_bytes())
    content[300_000] = 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is different"):
        run.plan()


def test_what_is_remembered_must_be_understood(run: Run) -> None:
    """A damaged inputs.json is named, with what to do."""
    (run.root / "inputs.json").write_text("{")
    with pytest.raises(UserError, match=r"inputs\.json does not hold what is known of the input files"):
        run.plan()


@pytest.mark.parametrize("document", ["line", "blank-line", "file"])
def test_a_digest_changes_exactly_with_the_documents(tmp_path: Path, document: str) -> None:
    """Every byte of a file changed in turn: a part has another digest whenever its documents are different, and a
    changed letter of a line touches no part but the one in which the line begins.
    """
    path = tmp_path / "a.txt"
    content = b"en to\ntre\n\n\nfire fem seks\nsyv\n\notte\n \nni\nti"
    reading = Reading(document)
    borders = [0, 9, 10, 20, 31, 40, len(content)]
    parts = [FilePart(str(path), "s", start, end) for start, end in pairwise(borders)]

    def now(written: bytes) -> list[tuple[list[str], str]]:
        path.write_bytes(written)
        return [(texts_of(part, reading), part_digest(part, reading)) for part in parts]

    before = now(content)
    assert now(content) == before
    for at in range(len(content)):
        byte = b"x\n"[at % 2 : at % 2 + 1]
        after = now(content[:at] + byte + content[at + 1 :])
        for number, (one, two) in enumerate(zip(before, after, strict=True)):
            assert one[0] == two[0] or one[1] != two[1], (at, byte, number)
        if document == "line" and content[at] != ord("\n") and byte == b"x":
            assert sum(one[1] != two[1] for one, two in zip(before, after, strict=True)) <= 1, at


def texts_of(part: FilePart, reading: Reading) -> list[str]:
    return prepare_reference.texts(part, reading)
