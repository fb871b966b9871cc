"""Memory that is freed is taken again without asking the kernel for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, torch
from megatron_llm.process import host_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
given_back = faults()
host_memory.keep_freed()
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's malloc is told to keep memory")
def test_freed_memory_is_used_again() -> None:
    """Of the page faults that tensors of 64 MiB cost again and again, less than a tenth are left after the call.

    Huge pages are switched off, so that there are many faults on every kernel, and the size of a page does not matter.
    There are forty tensors, since one or two of them may still be put in a place that was never used before.
    """
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back >= 40 * 64, "the kernel was not asked for the memory anew"
    assert kept < given_back / 10
