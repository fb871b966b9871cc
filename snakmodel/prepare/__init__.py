"""Turns raw text of any form into Arrow shards."""
