"""Everything that is said to Slurm and asked of it."""
