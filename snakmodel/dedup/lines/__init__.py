"""Lines that occur often in a whole corpus: their keys, their counts per shard, and those above a limit."""
