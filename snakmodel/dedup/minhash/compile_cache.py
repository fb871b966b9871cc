"""How the MinHash kernel is compiled, and where what was compiled is kept for the next task.

Numba numbers the files of its cache and writes the index before the code. So where tasks on processors of two kinds,
or of two versions of this program, compile at the same time in one folder, one may load the code of the other. Hence a
folder for each version of the sources, of Numba and of the processor; in it any number of tasks may compile at once,
since all write the same and publish it by rename. It lies in `NUMBA_CACHE_DIR` if that is set, else in `__pycache__`
beside this file, else in the user's cache folder, whichever can be written first. Where none can, or the disk is full
or a file damaged, a process compiles for itself.
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
"""For functions that only compiled ones call."""


def cache_roots() -> list[Path]:
    """Where the cache may lie, the best first."""
    given = [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else []
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return [*given, Path(__file__).parent / "__pycache__", user / "snakmodel"]


def processor() -> tuple[str, str]:
    """Its name and features as LLVM knows them; it does not tell the features of every kind."""
    try:
        return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    except RuntimeError:
        return binding.get_host_cpu_name(), ""


def cache_folder(roots: Sequence[Path]) -> Path | None:
    """The folder for these sources, this Numba and this processor in the first root that can be written."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
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
        folder = root / f"minhash-{digest.hexdigest()[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


_FOLDER = cache_folder(cache_roots())


def compiled(function: Function) -> Function:
    """For functions that Python calls: without the interpreter's lock, kept on disk where that is possible."""
    dispatcher = fresh = njit(**_OPTIONS, nogil=True)(function)
    if _FOLDER:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(_FOLDER)  # read when a function is decorated
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
    """The 8 bytes from data[at] on, uint8, as a little-endian uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        long = ir.IntType(64)
        start = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(start, [arguments[1]])
        return builder.load(builder.bitcast(place, long.as_pointer()), align=1)

    return types.uint64(data, types.uint64), generate
