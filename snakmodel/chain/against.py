"""The earlier runs in `dedup.against`, checked before anything of a run is planned."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from run_contract.errors import UserError
from snakmodel.chain.stage import stage_key
from snakmodel.config.recipe import Dedup
from snakmodel.run.paths import RunPaths

if TYPE_CHECKING:
    from snakmodel.dedup.earlier_runs import EarlierRun

_KEY = "dedup.against"


def earlier_runs(dedup: Dedup, root: Path) -> list[EarlierRun]:
    """The earlier runs that a recipe's section `dedup` names, for the run whose folder is `root`.

    Raises UserError if one is not there, is not complete, was made with other parameters or planned anew since, or if
    its texts are needed and gone.
    """
    if not dedup.against:
        return []
    from snakmodel.dedup.earlier_runs import SIGNATURES, open_runs  # imports pyarrow, so only when needed
    from snakmodel.dedup.minhash.parameters import Parameters
    from snakmodel.dedup.signature_file import refuse_others

    parameters = Parameters(**{field.name: getattr(dedup, field.name) for field in fields(Parameters)})
    here = {"parameters": parameters.described(), "ranges": dedup.ranges}
    runs = open_runs(dedup.against, root / SIGNATURES, _KEY)
    for run in runs:
        _refuse_outdated(run)
        refuse_others(run.files, here, _KEY)
        if dedup.verify_jaccard:
            run.texts(_KEY)
    return runs


def _refuse_outdated(run: EarlierRun) -> None:
    """Raise UserError if a run was planned anew, so that its signatures are still to be made again."""
    path = RunPaths(run.root).frozen
    try:
        planned = yaml.safe_load(path.read_text(encoding="utf-8"))["stage_keys"]["dedup-signatures"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{_KEY}: {path} cannot be read as the record of a run ({error!r}). Restore it") from error
    if planned != stage_key(run.keys):
        raise UserError(
            f"{_KEY}: the signatures in {run.root} are not those that its {path.name} asks for: the run was changed "
            "since. Finish its stage dedup-signatures first"
        )
