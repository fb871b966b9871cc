"""The launchers: for Slurm, for this machine, and for the steps that are run by hand."""
