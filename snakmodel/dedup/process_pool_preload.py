"""What a pool's processes have in common: the server that they are forked from imports this, and so loads it once.

CAUTION: only that server may import it, since it prepares the kernel when it is imported.
"""

import gc

from snakmodel.dedup import buckets, signatures
from snakmodel.dedup import filter as dedup_filter
from snakmodel.dedup.minhash.hasher import engine
from snakmodel.dedup.minhash.parameters import Parameters

__all__ = ["buckets", "dedup_filter", "signatures"]

engine(Parameters(b=4, r=15))  # given both, it need not load SciPy to find them
gc.freeze()  # what is here stays shared: the collector of a forked process does not write to it
