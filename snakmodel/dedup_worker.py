"""What a pool's processes have in common: the server that they are forked from imports this, and so loads it once.

CAUTION: only that server may import it, since it prepares the kernel when it is imported.
"""

from snakmodel import dedup_buckets, dedup_filter, dedup_signatures
from snakmodel.minhash import Parameters, engine

__all__ = ["dedup_buckets", "dedup_filter", "dedup_signatures"]

engine(Parameters())
