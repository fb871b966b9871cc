"""Retention: keeps the newest checkpoints, and those of every n-th iteration for ever; the others are deleted.

Nothing is deleted unless the newest checkpoint verifies.
"""

from __future__ import annotations

from pathlib import Path

from megatron_llm.checkpoint.folder import ITERATION, is_ours, problem
from run_contract.claim import attempt_name, check_claim
from run_contract.publish import remove


def prune(save_dir: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Delete this engine's checkpoints except the `keep_last` newest and those of every `keep_every`-th iteration (rank
    0).

    Without keep_last all stay. Raises Superseded when the claim belongs to another attempt.
    """
    found = {int(match[1]): path for path in save_dir.glob("iter_*") if (match := ITERATION.fullmatch(path.name))}
    ours = sorted(iteration for iteration, path in found.items() if is_ours(path))
    if keep_last is None or len(ours) <= keep_last:
        return
    dropped = [n for n in ours[:-keep_last] if not (keep_every and n % keep_every == 0)]
    newest = found[ours[-1]]
    if dropped and (reason := problem(newest)):
        print(f"no checkpoint is deleted: {newest} does not verify: {reason}", flush=True)
        return
    for iteration in dropped:
        check_claim()
        # renamed first: a half-deleted checkpoint under its final name would look like a damaged one
        aside = found[iteration].with_name(f".{found[iteration].name}.old-{attempt_name()}")
        found[iteration].rename(aside)
        remove(aside)
        print(f"deleted {found[iteration]} (--keep_last {keep_last})", flush=True)
