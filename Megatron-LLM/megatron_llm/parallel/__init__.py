"""Ranks: their process groups, how parameters are sharded over them, and which layouts fit a model."""
