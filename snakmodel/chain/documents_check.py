"""What a plan can know of the documents: the columns that they keep, and whether the steps on them could work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from run_contract.errors import UserError
from snakmodel.chain.containers import container_spec
from snakmodel.chain.filter_stages import FILTER, FINAL_FILTER, check_custom, check_filter
from snakmodel.chain.stage import Chain
from snakmodel.config.load import Config
from snakmodel.config.recipe import Data
from snakmodel.prepare.input_files import Selection

if TYPE_CHECKING:
    from snakmodel.prepare.kept_columns import KeptColumn  # imports pyarrow


def check_documents(
    config: Config, root: Path, chain: Chain, missing: Sequence[str], kept: Sequence[KeptColumn]
) -> None:
    """Raise UserError if a step or a command on documents, of a stage in `missing`, could not work.

    A stage that runs in a container, where other packages may be installed than here, is not checked.
    """
    stages = {stage.name: config.cluster.with_defaults(stage.resources) for stage in chain.stages}
    here = [name for name in missing if container_spec(config, root, stages[name]) is None]
    if FILTER in here or FINAL_FILTER in here:
        check_filter(config.recipe, kept)
    for custom in config.recipe.data.custom:
        if custom.stage in here:
            check_custom(custom)


def planned_columns(data: Data, found: Selection) -> Sequence[KeptColumn]:
    """The columns that the shards keep beside the text, with their types.

    Raises UserError if the files do not have them so, or if `data.where` is no condition on them.
    """
    if data.keep is None:
        return expected_columns_of(data)
    from snakmodel.prepare.kept_columns import check_condition, kept_columns  # imports pyarrow, so only when needed

    kept = kept_columns(data.keep, found.files, data.encoding)
    check_condition(data.where, kept)
    return kept


def expected_columns_of(data: Data) -> Sequence[KeptColumn]:
    """The columns that the shards will keep beside the text, with the types that the recipe gives them.

    Raises UserError if `data.where` cannot be a condition on them.
    """
    if data.keep is None:
        if data.where is not None:
            raise UserError(f"data.where: {data.where!r} needs data.keep with the columns that it names")
        return ()
    from snakmodel.prepare.kept_columns import check_condition, expected_columns  # imports pyarrow

    kept = expected_columns(data.keep)
    check_condition(data.where, kept)
    return kept
