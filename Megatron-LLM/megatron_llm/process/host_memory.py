"""Where training computes on the CPU, memory that a step frees is kept for the next one, in huge pages.

A step allocates and frees the same activations and gradients again and again. glibc gives large blocks back to the
kernel at once, which hands out zeroed pages anew, a fault for each 4 KiB.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def keep_freed() -> None:
    """To be called before the first large tensor. Other C libraries than glibc are left as they are."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first large allocation
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
