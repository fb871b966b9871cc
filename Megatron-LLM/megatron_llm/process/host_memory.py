"""Memory of training on the CPU: what one step frees is kept for the next one, in huge pages.

A step allocates and frees the same activations and gradients again and again. By default glibc returns large blocks to
the kernel at once, and the kernel then provides zeroed pages again, with one page fault per 4 KiB.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of mallopt, from glibc's malloc.h."""


def keep_freed() -> None:
    """Keep freed memory in this process. To be called before the first large tensor.

    With a C library other than glibc, malloc stays as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first large allocation
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
