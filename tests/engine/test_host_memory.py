"""Memory that is freed is taken again without asking the kernel for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = (
    "import resource, torch\n"
    "from megatron_llm import host_memory\n"
    "{call}\n"
    "def faults():\n"
    "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
    "    torch.zeros(2**24)\n"
    "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
    "faults(); print(faults())\n"
)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's malloc is told to keep memory")
def test_freed_memory_is_used_again() -> None:
    """The second tensor of 64 MiB costs no page faults; without the call it costs all of them again."""
    counts = []
    for call in ("host_memory.keep_freed()", ""):
        code = FAULTS.format(call=call)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        counts.append(int(done.stdout))
    kept, given_back = counts
    assert kept < 16 < given_back, counts
