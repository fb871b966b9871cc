"""Arrow shards, the counts that must add up over them, and progress lines."""
