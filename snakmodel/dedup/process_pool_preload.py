"""The modules that a pool's processes share.

The server from which the processes are forked imports this module, and so loads them once. CAUTION: only that server
may import it, since importing it prepares the kernel.
"""

import gc

from snakmodel.dedup import buckets, signatures
from snakmodel.dedup import filter as dedup_filter
from snakmodel.dedup.minhash.hasher import engine
from snakmodel.dedup.minhash.parameters import Parameters

__all__ = ["buckets", "dedup_filter", "signatures"]

engine(Parameters(b=4, r=15))  # with both given, SciPy need not be loaded to find them
gc.freeze()  # keeps the memory shared: the garbage collector of a forked process will not write to it
