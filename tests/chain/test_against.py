"""Runs that are deduplicated against earlier runs: what is refused when they are planned, and what is in the keys."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from run_contract.errors import UserError
from run_contract.publish import write_json
from snakmodel.chain.stage import stage_key
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.dedup.__main__ import parse_arguments
from snakmodel.dedup.minhash.parameters import Parameters
from tests.dedup_run import corpus, signed_run
from tests.old_run import Run

AGAINST = ("dedup-buckets", "dedup-components")


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An earlier run with the settings of the recorded run, and a second one of other documents."""
    folder = tmp_path_factory.mktemp("earlier")
    for name, seed in (("one", 1), ("two", 2)):
        signed_run(folder / name, corpus(4, seed), 2, 2, Parameters())
    return folder


@pytest.fixture
def run(tmp_path: Path, settled: Path) -> Run:
    """A run beside which the earlier runs lie, planned without them."""
    found = Run(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(settled / name, tmp_path / name)
    return found


def keys(run: Run, *names: str, **dedup: Any) -> dict[str, tuple[str, ...]]:
    """The keys of the run if it is deduplicated against these runs, planned in a folder of its own."""
    run.recipe["dedup"] = {
        **run.recipe["dedup"],
        "against": [str(run.folder / name) for name in names],
        "cluster_size": False,
        "verify_jaccard": False,
        **dedup,
    }
    run.root = run.folder / "new"
    return dict(run.plan(dry=True).chain.keys)


def test_keys_follow_the_signatures_of_the_earlier_runs(run: Run) -> None:
    """Without earlier runs the keys are as ever. The order counts, and what lies in the signatures, but not the place.

    Only the stages that read the signatures, and those that follow, get other keys.
    """
    before = keys(run)
    plain = run.plan(dry=True).chain
    assert "--against" not in str([stage.tasks for stage in plain.stages])
    one, both, turned = keys(run, "one"), keys(run, "one", "two"), keys(run, "two", "one")
    changed = {name for name in before if before[name] != one[name]}
    assert changed >= {*AGAINST, "dedup-filter", "tokenize"}
    assert not changed & {"prepare", "dedup-signatures", "convert"}
    assert len({found[name] for found in (before, one, both, turned) for name in AGAINST}) == 8
    (run.folder / "one").rename(run.folder / "moved")
    assert keys(run, "moved") == one
    for shards, documents in ((3, corpus(4, 1)), (2, corpus(4, 1)[1:])):
        shutil.rmtree(run.folder / "moved")
        signed_run(run.folder / "moved", documents, shards, 2, Parameters())
        assert {name for name in AGAINST if keys(run, "moved")[name] == one[name]} == set()
    shutil.rmtree(run.folder / "moved")
    signed_run(run.folder / "moved", corpus(4, 1), 2, 2, Parameters())
    assert keys(run, "moved") == one


def test_a_change_of_an_earlier_run_is_named(run: Run) -> None:
    """A run that is planned already is refused when the signatures of an earlier run change, with what to redo."""
    run.recipe["dedup"]["against"] = [str(run.folder / "one")]
    with pytest.raises(UserError, match=r"Changed: dedup\.against: \[\] -> .*one'\].*--restart-from dedup-buckets"):
        run.plan()
    run.plan("dedup-buckets")
    assert run.plan().chain.keys == run.plan().chain.keys
    shutil.rmtree(run.folder / "one")
    signed_run(run.folder / "one", corpus(4, 3), 2, 2, Parameters())
    with pytest.raises(UserError, match=r"Changed: .*the runs in dedup\.against\. .*--restart-from dedup-buckets"):
        run.plan()


def test_the_commands_name_the_runs(run: Run) -> None:
    """In the order of the recipe; the folders are not part of what the keys digest."""
    keys(run, "two", "one", cluster_size=True)
    chain = run.plan(dry=True).chain
    for name in AGAINST:
        for task in chain[name].tasks:
            args = parse_arguments([*task.argv, *task.unkeyed][3:])
            assert args.against == [run.folder / "two", run.folder / "one"]
            assert str(run.folder / "two") not in task.argv


def test_cluster_sizes_reach_the_commands(run: Run) -> None:
    """With `cluster_size` components write the sizes and each filter reads its own; without it no command does."""
    before = keys(run)
    plain = run.plan(dry=True).chain
    assert not parse_arguments(plain["dedup-components"].tasks[0].argv[3:]).cluster_size
    assert "--sizes" not in str([stage.tasks for stage in plain.stages])
    after = keys(run, cluster_size=True)
    assert {name for name in before if before[name] != after[name]} >= {"dedup-components", "dedup-filter", "tokenize"}
    assert after["dedup-buckets"] == before["dedup-buckets"]
    chain = run.plan(dry=True).chain
    assert parse_arguments(chain["dedup-components"].tasks[0].argv[3:]).cluster_size
    for shard, task in enumerate(chain["dedup-filter"].tasks):
        args = parse_arguments(task.argv[3:])
        names = [str(path.relative_to(run.root)) for path in (args.removed, args.sizes)]
        assert names == [f"dedup/components/{kind}/shard-{shard:05d}.npy" for kind in ("removed", "sizes")]
        assert [one.only for one in task.inputs if one.stage == "dedup-components"] == [tuple(names)]


def outdated(folder: Path) -> None:
    """Another key of the stage: the run was planned anew, and its signatures are still those of before."""
    write_json(folder / "run.yaml", {"stage_keys": {"dedup-signatures": stage_key(["another"])}})


def signed_with(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        ranges = changes.pop("ranges", 2)
        signed_run(folder, corpus(4), 2, ranges, Parameters(**changes))

    return change


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (shutil.rmtree, r"dedup\.against: .*/one is not there\. Give the folder of a run"),
    "no run": (lambda run: (run / "shards.json").unlink(), r"dedup\.against: .*/one has no shards\.json"),
    "no signatures": (lambda run: shutil.rmtree(run / "dedup"), "lacks the signatures of 2 of its 2 shards"),
    "no markers": (lambda run: shutil.rmtree(run / "markers"), "lacks the signatures of 2 of its 2 shards"),
    "some signatures": (
        lambda run: (run / "dedup/signatures/shard-00001.sig").unlink(), r"1 of its 2 shards; .*shard-00001\.sig is"),
    "planned anew": (outdated, r"the signatures in .*/one are not those that its run\.yaml asks for"),
    "no record": (lambda run: (run / "run.yaml").unlink(), r"run\.yaml cannot be read as the record of a run"),
    "another n-gram": (signed_with(ngram=4), "there and here, ngram: 4 and 5"),
    "other ranges": (signed_with(ranges=3), "there and here, ranges: 3 and 2"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_run_that_cannot_be_used_is_refused(run: Run, mistake: str) -> None:
    """The message names the key, the run, what was found and what to do; nothing is written."""
    change, words = WRONG[mistake]
    change(run.folder / "one")
    with pytest.raises(UserError, match=words):
        keys(run, "two", "one")
    assert not run.root.exists()


def test_itself_twice_and_without_texts(run: Run) -> None:
    """A run is not deduplicated against itself, nor twice against one; verification needs the texts."""
    with pytest.raises(UserError, match=r"dedup\.against: .*/one is named twice"):
        keys(run, "one", "two", "one")
    with pytest.raises(UserError, match=r"dedup\.against: .*/new is this run itself"):
        keys(run, "one", "new")
    keys(run, "one", verify_jaccard=True)
    shutil.rmtree(run.folder / "one" / "arrow")
    keys(run, "one")
    with pytest.raises(UserError, match=r"needs the texts of .*/one, but arrow/shard-00000\.arrow is missing"):
        keys(run, "one", verify_jaccard=True)


def test_containers_see_the_earlier_runs(run: Run) -> None:
    """Their folders are bound like those of the other inputs."""
    from snakmodel.chain.containers import container_spec
    from snakmodel.config.cluster import Cluster, Resources

    keys(run, "one", "two")
    container = {"runtime": "docker", "image": "image"}
    config = Config(
        recipe=Recipe.model_validate(yaml.safe_load(yaml.safe_dump(run.recipe))),
        cluster=Cluster.model_validate({"container": container}),
    )
    resources = config.cluster.with_defaults(Resources())
    spec = container_spec(config, run.root, resources)
    assert spec is not None
    assert {f"{run.folder / name}:{run.folder / name}" for name in ("one", "two")} <= set(spec.binds)
