"""What is known of the sources of a run, and licences that forbid a public model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from run_contract.errors import UserError
from snakmodel.config.recipe import Recipe
from snakmodel.register.sources import record_path, refuse_private, source_facts
from tests.toy import recipe


def with_card(folder: Path, public: bool = True, **sources: Any) -> Recipe:
    """A recipe that says this of its sources."""
    push = {"public": public}
    return Recipe.model_validate(recipe(data={"path": str(folder)}, push=push, data_card={"sources": sources}))


def write_record(folder: Path, name: str, **entry: Any) -> None:
    """Write the record that `collect` leaves of a source."""
    path = record_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    downloads = [{"retrieved": "2026-01-31T10:00:00+00:00"}, {"retrieved": "2026-02-01T10:00:00+00:00"}]
    record = {"name": name, "source": entry, "collected": "2026-03-01T10:00:00+00:00", "downloads": downloads}
    path.write_text(json.dumps({**record, "outputs": [], "documents": 1, "left_out": {}}))


def test_facts_from_records_and_recipe(tmp_path: Path) -> None:
    """The record of `collect` is what is known, and what the recipe says counts more."""
    write_record(tmp_path, "web", url="https://a.dk/x.gz", licence="cc-by-4.0", citation="Nobody", version="2")
    write_record(tmp_path, "hub", dataset="a/b", licence=None)
    write_record(tmp_path, "many", urls=["https://b.dk/1", "https://b.dk/2"])
    settings = with_card(tmp_path, web={"licence": "cc0-1.0", "title": "The web"})
    web, hub, many, other = source_facts(settings, ["web", "hub", "many", "other"])
    assert (web.licence, web.title, web.url, web.version, web.cite) == (
        "cc0-1.0", "The web", "https://a.dk/x.gz", "2", "Nobody"
    )  # fmt: skip
    assert web.retrieved == "2026-02-01"
    assert (hub.licence, hub.url, hub.public) == ("unknown", "https://huggingface.co/datasets/a/b", True)
    assert many.url == "https://b.dk/1"
    assert (other.licence, other.url, other.collected) == ("unknown", None, None)


def test_a_record_that_is_none(tmp_path: Path) -> None:
    """The file is named, with the way out."""
    record_path(tmp_path, "web").parent.mkdir(parents=True)
    record_path(tmp_path, "web").write_text("{}")
    with pytest.raises(UserError, match=r"web\.json: is no record of a source\. Delete it, and fetch the source again"):
        source_facts(with_card(tmp_path), ["web"])


def test_licences_that_forbid_a_public_push(tmp_path: Path) -> None:
    """All such sources are named with their licences; private models and open licences pass."""
    write_record(tmp_path, "web", url="https://a.dk", licence="All rights reserved")
    closed = {"news": {"licence": "proprietary"}, "free": {"licence": "cc0-1.0"}}
    with pytest.raises(UserError) as error:
        refuse_private(with_card(tmp_path, **closed), ["free", "news", "web", "other"])
    assert "push.public is true, but the licence of a source forbids it" in str(error.value)
    assert "news (proprietary), web (All rights reserved). Leave" in str(error.value)
    assert "public: true" in str(error.value)
    refuse_private(with_card(tmp_path, public=False, **closed), ["free", "news", "web"])
    refuse_private(with_card(tmp_path, **closed), ["free", "other"])


def test_a_permission_overrules_a_licence(tmp_path: Path) -> None:
    """`public` in the recipe counts more than the name of the licence, in both directions."""
    write_record(tmp_path, "web", url="https://a.dk", licence="All rights reserved")
    allowed = {"news": {"licence": "proprietary", "public": True}, "web": {"licence": "x", "public": True}}
    refuse_private(with_card(tmp_path, **allowed), ["news", "web"])
    with pytest.raises(UserError, match=r"free \(cc0-1\.0\)"):
        refuse_private(with_card(tmp_path, free={"licence": "cc0-1.0", "public": False}), ["free"])


def test_many_sources_are_all_looked_at(tmp_path: Path) -> None:
    """The one closed source among thousands is found."""
    with pytest.raises(UserError, match=r"forbids it: s1999 \(private\)\. Leave"):
        refuse_private(with_card(tmp_path, s1999={"licence": "private"}), [f"s{number}" for number in range(2000)])
