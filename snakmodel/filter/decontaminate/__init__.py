"""The step `decontaminate`: documents that share a run of words with items of evaluation files."""
