"""Compiles the kernel of lines, and keeps the compiled code as `minhash/compile_cache.py` does."""

from __future__ import annotations

from pathlib import Path

from snakmodel.dedup.minhash.compile_cache import Function, cache_folder, cache_roots, compiled_in, inner

__all__ = ["compiled", "inner"]

_FOLDER = cache_folder(cache_roots(), "lines", Path(__file__).parent)


def compiled(function: Function) -> Function:
    """Decorator for functions that Python calls; see `minhash/compile_cache.py`."""
    return compiled_in(_FOLDER, function)
