"""Near-deduplication by MinHash, one module a step."""
