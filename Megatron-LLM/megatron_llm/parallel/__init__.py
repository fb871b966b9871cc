"""Ranks: their groups, how parameters are sharded, and which layouts fit."""
