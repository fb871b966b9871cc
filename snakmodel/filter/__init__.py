"""Filters of documents in Arrow shards: each shard is read once and passes through all steps that are asked for."""
