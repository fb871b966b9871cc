"""The stage of the data card: what stands in its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from snakmodel.chain.card_stage import data_card
from snakmodel.chain.context import Context
from snakmodel.chain.inputs import Inputs
from snakmodel.config.cluster import Cluster
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.prepare.input_files import FilePart
from tests import toy


def test_a_source_that_is_collected_again(tmp_path: Path) -> None:
    """The days of the download do not change the key, so the same text does not make a new card; a licence does."""
    record: dict[str, Any] = {"name": "news", "source": {"licence": "cc0"}, "outputs": [], "documents": 1}
    record |= {"left_out": {}, "collected": "2026-01-01", "downloads": [{"file": "a.gz", "retrieved": "2026-01-01"}]}
    changes: dict[str, Any] = {"data": {"path": str(tmp_path)}, "data_card": {}}
    config = Config(recipe=Recipe.model_validate(toy.recipe(**changes)), cluster=Cluster())
    parts = [[FilePart(str(tmp_path / "news/a.txt"), "news", 0, 1)]]
    (tmp_path / ".collected").mkdir()

    def outside(**changed: Any) -> Any:
        (tmp_path / ".collected" / "news.json").write_text(json.dumps({**record, **changed}))
        return data_card(Context(config, tmp_path / "run", parts, Inputs(tmp_path / "run", {}, {}))).tasks[0].outside

    first = outside()
    again = [{"file": "a.gz", "retrieved": "2026-02-02", "etag": "x", "last_modified": "y"}]
    assert outside(collected="2026-02-02", downloads=again) == first
    assert outside(source={"licence": "unknown"}) != first
    assert outside(downloads=[{"file": "b.gz", "retrieved": "2026-01-01"}]) != first
