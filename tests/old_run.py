"""A run folder in the form that the version before wrote: fingerprints of samples, and no digests in its markers."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from snakmodel.chain.build import STAGES
from snakmodel.chain.plan import RunPlan, make_plan
from snakmodel.config.cluster import Cluster
from snakmodel.config.load import Config
from snakmodel.config.recipe import Recipe
from snakmodel.prepare.input_files import FilePart
from snakmodel.prepare.readers import Reading
from snakmodel.prepare.shard import prepare
from snakmodel.prepare.shard_writer import Cleaning
from snakmodel.run.markers import Marker, marker_path

DATA = Path(__file__).parent / "data"
MIDDLE = 120_000
"""A byte of a.txt in the second of the four shards that no sample of 64 KiB reaches."""


class Run:
    """A run of an earlier version: done up to dedup-filter, with tokens, in the form of its files."""

    def __init__(self, folder: Path) -> None:
        with tarfile.open(DATA / "old_run.tar.gz") as packed:
            packed.extractall(folder, filter="data")
        self.folder, self.root, self.text = folder, folder / "run", folder / "text"
        for name in ("run.yaml", "shards.json"):
            path = self.root / name
            path.write_text(path.read_text().replace("@FOLDER@", str(folder)))
        self.recipe: dict[str, Any] = yaml.safe_load((self.root / "run.yaml").read_text())["recipe"]

    def plan(
        self, *restart_from: str, stages: Sequence[str] = STAGES, dry: bool = False, check: bool = False
    ) -> RunPlan:
        config = Config(recipe=Recipe.model_validate(self.recipe), cluster=Cluster())
        with mock.patch("snakmodel.chain.plan.ask_engine", return_value=None):  # the base model is only a sketch of one
            return make_plan(config, self.root, stages, restart_from, dry=dry, check_inputs=check)

    def missing(self, *restart_from: str, check: bool = False) -> dict[str, list[int]]:
        """Stages of the done ones of which something is to be done again."""
        plan = self.plan(*restart_from, check=check)
        done = [path.name for path in (self.root / "markers").iterdir()]
        return {name: packs for name, packs in plan.missing.items() if packs and name in done}

    def make(self, plan: RunPlan, *shards: int) -> None:
        """Do what a prepare job does."""
        data = self.recipe["data"]
        for shard in shards:
            parts = [FilePart(**part) for part in json.loads(plan.paths.shards.read_text())["shards"][shard]]
            task = plan.chain["prepare"].tasks[shard]
            prepare(parts, self.root / f"arrow/shard-{shard:05d}", Reading(data["document"]), Cleaning())
            key = plan.chain.keys["prepare"][shard]
            Marker.of(self.root, key, task.outputs, task.counts).write(marker_path(self.root, "prepare", shard))

    def redact(self, at: int = MIDDLE, name: str = "a.txt") -> None:
        """Change a few bytes in place: as many bytes as before, in a document."""
        path = self.text / name
        content = bytearray(path.read_bytes())
        found = re.compile(rb" [a-z]{3}").search(content, at)
        assert found
        content[found.start() + 1 : found.end()] = b"xxx"
        path.write_bytes(content)
