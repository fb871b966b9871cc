"""The flags that decide what counts as a near-duplicate; both ways of running deduplication have them."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from snakmodel.dedup.minhash.parameters import COMPATIBILITIES, HASH_FUNCTIONS, Parameters


def add_parameters(parser: Any, num_perm: int, threshold: float) -> None:
    """Add the flags that decide what counts as a near-duplicate, with these defaults."""
    add = parser.add_argument
    add("--num_perm", type=int, default=num_perm, help="values in a signature (default %(default)s)")
    add("--threshold", type=float, default=threshold, help="Jaccard similarity (default %(default)s)")
    add("--ngram", type=int, default=5, help="tokens in an n-gram (default %(default)s)")
    add("--min_length", type=int, default=5, help="fewer tokens make a document short (default %(default)s)")
    add("--hash_func", type=str.lower, choices=HASH_FUNCTIONS, default="sha1", help="hash of an n-gram")
    add("--b", type=int, help="bands (default: the best for the threshold)")
    add("--r", type=int, help="values in a band (default: the best for the threshold)")
    add("--compat", choices=COMPATIBILITIES, default=COMPATIBILITIES[0], help="whose clusters")


def parameters_of(args: argparse.Namespace, **instead: Any) -> Parameters:
    """The parameters given as flags; `instead` replaces some. Raises UserError on values that make no sense."""
    return Parameters(**{**{field.name: getattr(args, field.name) for field in fields(Parameters)}, **instead})
