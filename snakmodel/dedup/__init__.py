"""Near-deduplication by MinHash, with one module per step."""
