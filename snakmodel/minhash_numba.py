"""How the MinHash kernel is compiled and where it is kept.

Numba keeps what it compiled in `NUMBA_CACHE_DIR` if that is set, else in `__pycache__` beside the source, else in the
user's cache folder, whichever can be written first; entries are told apart by processor, so machines of different
kinds may share a folder, and are published by rename, so any number of tasks may compile at once. Where there is no
such folder, or it is full, each process compiles for itself.
"""
# mypy: allow-untyped-decorators

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]
Longs = NDArray[np.uint64]
Numbers = NDArray[np.int64]

_OPTIONS = {"no_cfunc_wrapper": True, "error_model": "numpy"}

inner = njit(**_OPTIONS, no_cpython_wrapper=True)
"""For functions that only compiled ones call. CAUTION: an entry is renewed when the file of the function that was
compiled changes, but not when that of an inner function does: they belong into the same file."""


def compiled(function: Function) -> Function:
    """For functions that Python calls: without the interpreter's lock, kept on disk where that is possible."""
    try:
        dispatcher = njit(**_OPTIONS, nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder to write to
        dispatcher = njit(**_OPTIONS, nogil=True)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return dispatcher(*arguments)
        except OSError:  # the disk is full; by then the function is compiled
            return dispatcher(*arguments)

    return call  # type: ignore[return-value]


@intrinsic
def high_product(context: Any, left: Any, right: Any) -> Any:
    """The upper 64 bits of the product of two uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(value, wide) for value in arguments))
        return builder.trunc(builder.lshr(product, wide(64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate
