"""Launchers: on Slurm, on this machine, and by hand."""
