"""Writes the data card of a run: its sources, and how many documents went through each stage."""
