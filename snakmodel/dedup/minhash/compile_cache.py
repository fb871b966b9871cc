"""Compiles the MinHash kernel, and keeps the compiled code on disk for the next task.

Numba numbers the files of its cache, and writes the index before the code. If tasks on two kinds of processors, or of
two versions of this program, compiled at the same time in one folder, one of them might load the code of the other.
Therefore each version of the sources, of Numba and of the processor has a folder of its own. Any number of tasks may
compile in it at once, since all of them write the same and publish it by rename. The folder lies in `NUMBA_CACHE_DIR`
if that is set, else in `__pycache__` beside this file, else in the user's cache folder: in the first of these that can
be written. If none can be written, the disk is full or a file is damaged, each process compiles for itself.
"""
# mypy: allow-untyped-decorators

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped]
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
"""Decorator for functions that are called only by compiled functions."""


def cache_roots() -> list[Path]:
    """The folders in which the cache may lie, the best one first."""
    given = [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else []
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return [*given, Path(__file__).parent / "__pycache__", user / "snakmodel"]


def processor() -> tuple[str, str]:
    """The name and the features of the processor, as LLVM knows them; the features are empty if they are unknown."""
    try:
        return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    except RuntimeError:
        return binding.get_host_cpu_name(), ""


def cache_folder(roots: Sequence[Path], kernel: str = "minhash", package: Path | None = None) -> Path | None:
    """The cache's folder for a kernel's sources, this Numba and this processor.

    The sources are those of this package and, for a kernel of another name, those of its own package. The folder lies
    in the first of the roots that can be written; None if there is none.
    """
    digest = hashlib.sha256()
    for folder in [Path(__file__).parent, *([package] if package else [])]:
        for source in sorted(folder.glob("*.py")):
            digest.update(source.read_bytes())
    about = (
        numba.__version__,
        binding.llvm_version_info,
        *processor(),
        numba.config.CPU_NAME,
        numba.config.CPU_FEATURES,
    )
    digest.update(repr(about).encode())
    for root in roots:
        folder = root / f"{kernel}-{digest.hexdigest()[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


_FOLDER = cache_folder(cache_roots())


def compiled(function: Function) -> Function:
    """Decorator for functions that Python calls.

    They run without the interpreter's lock, and their compiled code is kept on disk if possible.
    """
    return compiled_in(_FOLDER, function)


def compiled_in(folder: Path | None, function: Function) -> Function:
    """The compiled function, whose code is kept in this folder, as `cache_folder` gives it, if there is one."""
    dispatcher = fresh = njit(**_OPTIONS, nogil=True)(function)
    if folder:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)  # Numba reads it when it decorates
        try:
            dispatcher = njit(**_OPTIONS, nogil=True, cache=True)(function)
        finally:
            numba.config.CACHE_DIR = before

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal dispatcher
        try:
            return dispatcher(*arguments)
        except (OSError, EOFError, pickle.PickleError):  # the cache can be read or written no longer
            dispatcher = fresh
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


@intrinsic
def long_at(context: Any, data: Any, at: Any) -> Any:
    """The 8 bytes of `data` (uint8) that begin at data[at], as a little-endian uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        long = ir.IntType(64)
        start = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(start, [arguments[1]])
        return builder.load(builder.bitcast(place, long.as_pointer()), align=1)

    return types.uint64(data, types.uint64), generate
