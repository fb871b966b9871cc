"""Checks that a run will work on this cluster, before anything is submitted."""
