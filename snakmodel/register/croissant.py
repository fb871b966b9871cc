"""Describes the text of a run in Croissant, the JSON-LD vocabulary of MLCommons for datasets of machine learning.

The vocabulary: https://docs.mlcommons.org/croissant/docs/croissant-spec.html (version 1.0). The files that are
described are the Arrow shards from which the tokens were made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from snakmodel.config.data_card import UNKNOWN
from snakmodel.config.recipe import Recipe
from snakmodel.register.funnel import Flow
from snakmodel.register.sources import SourceFacts
from snakmodel.shards.arrow_stream import open_stream

_TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format",
    "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex",
    "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
)  # fmt: skip
"""The words of the vocabulary that stand for themselves."""
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS},
}
_FORMAT = "application/vnd.apache.arrow.stream"
_BLOCK = 1 << 22


def croissant(
    recipe: Recipe, facts: Sequence[SourceFacts], flows: Sequence[Flow], shards: Sequence[Path], run: Path
) -> dict[str, Any]:
    """The description, as JSON values. `shards` are the files that are described, below the folder `run`."""
    about = recipe.data_card
    title = (about and about.title) or recipe.name
    last = flows[-1]
    files = [_file(path, run) for path in shards]
    citations = "; ".join(one.cite for one in facts if one.cite)
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": title,
        "description": (about and about.description)
        or f"{last.kept} documents of text for the pre-training of language models, made by SnakModel Toolkit.",
        "license": _licences(facts),
        "url": next((one.url for one in facts if one.url), run.name),
        "version": "1.0.0",
        **({"datePublished": about.published} if about and about.published else {}),
        **({"citeAs": citations} if citations else {}),
        "isBasedOn": [_source(one) for one in facts],
        "distribution": files,
        "recordSet": [_records(shards[0], files)],
    }


def _licences(facts: Sequence[SourceFacts]) -> list[str]:
    return sorted({one.licence for one in facts}) or [UNKNOWN]


def _source(facts: SourceFacts) -> dict[str, Any]:
    known = {
        "name": facts.title or facts.name,
        "license": facts.licence,
        "url": facts.url,
        "version": facts.version,
        "citation": facts.cite,
    }
    return {"@type": "sc:Dataset", **{key: value for key, value in known.items() if value}}


def _file(path: Path, run: Path) -> dict[str, Any]:
    name = path.relative_to(run).as_posix()
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": path.name,
        "contentUrl": name,
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": _FORMAT,
        "sha256": sha256(path),
    }


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _records(shard: Path, files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record set of documents: a field per column that Croissant has a type for."""
    with open_stream(shard) as reader:
        schema = reader.schema
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"documents/{column.name}",
            "name": column.name,
            "description": _DESCRIPTIONS.get(column.name, f"The column {column.name} ({column.type})."),
            "dataType": kind,
            "source": {"fileObject": {"@id": files[0]["@id"]}, "extract": {"column": column.name}},
        }
        for column in schema
        if (kind := _type(column.type)) is not None
    ]
    return {
        "@type": "cr:RecordSet",
        "@id": "documents",
        "name": "documents",
        "description": f"One record per document; all {len(files)} files have the same columns.",
        "field": fields,
    }


_DESCRIPTIONS = {
    "text": "The text of the document.",
    "source": "The name of the source that the document came from.",
    "id": "The file below the data folder that the document came from, and its byte or row there.",
}


def _type(type_: Any) -> str | None:
    """The data type of a column in Croissant; None if it has none for it."""
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "sc:Text"
    if pa.types.is_boolean(type_):
        return "sc:Boolean"
    if pa.types.is_integer(type_):
        return "sc:Integer"
    if pa.types.is_floating(type_):
        return "sc:Float"
    return "sc:Date" if pa.types.is_temporal(type_) else None
