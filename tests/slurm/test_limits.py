"""How many shards an array element takes so that a chain fits into a queue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from run_contract.errors import UserError
from snakmodel.chain.stage import Stage
from snakmodel.slurm.limits import Limit, Limits, check_indices, shards_per_job
from tests import toy

WIDE = Limits(20001, 20001, (Limit("MaxJobCount", 200000, 0),), (), 10.0)


def limits(most: int, used: int = 0, array_size: int = 20001) -> Limits:
    return replace(WIDE, array_size=array_size, queue=(*WIDE.queue, Limit("MaxSubmit", most, used)))


def chain(shards: int) -> list[Stage]:
    return toy.two_stages(Path("/run"), shards)


@pytest.mark.parametrize(
    ("shards", "minimum", "bounds", "size"),
    [
        (10000, 1, WIDE, 1),  # everything fits
        (10000, 4, WIDE, 4),  # cluster.yaml's number is a minimum
        (60, 1, limits(20), 7),  # 9 + 9 + 1
        (60, 1, limits(121), 1),  # 60 + 60 + 1
        (60, 1, limits(120), 2),
        (60, 1, limits(40, used=19), 6),  # 10 + 10 + 1 beside 19
        (60, 1, limits(40, used=40), 15),  # a queue that is full now counts for three quarters
        (60, 1, limits(2), 60),  # the chain never fits: the largest stage does, beside its continuation
        (10000, 1, limits(100000, array_size=1001), 10),  # indices from 0 to 1000
        (3, 8, WIDE, 8),
    ],
)
def test_pack_size(shards: int, minimum: int, bounds: Limits, size: int) -> None:
    """The smallest size with which the chain fits, worked out by hand."""
    assert shards_per_job(chain(shards), minimum, bounds) == size


def test_stages_without_shards_alone_do_not_fit() -> None:
    """When what cannot be packed exceeds the queue, the largest stage is packed to fit alone and the rest follows."""
    first, second, last = chain(60)
    wide = replace(last, tasks=last.tasks * 30)
    assert shards_per_job([first, second, wide], 1, limits(20)) == 4  # 15 of 20, one place for the continuation


def test_a_limit_counts_only_its_own_stages() -> None:
    """Where one stage has a QOS of its own, its small limit packs that stage alone, and the others keep their room."""
    first, second, last = chain(60)
    own = Limit("MaxSubmit of QOS long", 10, 0, frozenset(["first"]))
    bounds = replace(WIDE, queue=(*WIDE.queue, own), running=(Limit("MaxJobs", 5, 0, frozenset(["first"])),))
    assert shards_per_job([first, second, last], 1, bounds) == 6
    assert shards_per_job([second, last], 1, bounds) == 1
    assert (bounds.width("first"), bounds.width("second")) == (5, None)


def test_indices_beyond_the_array_size_are_refused() -> None:
    """More elements than array indices is an error that names the stage, the bound and the remedy."""
    check_indices("first", 1001, True, replace(WIDE, array_size=1001))
    with pytest.raises(UserError, match=r"stage first has 1002 array elements.* up to 1000 \(MaxArraySize\).*run-dir"):
        check_indices("first", 1002, True, replace(WIDE, array_size=1001))
    with pytest.raises(UserError, match=r"dedup\.ranges"):
        check_indices("dedup-buckets", 1002, False, replace(WIDE, array_size=1001))
