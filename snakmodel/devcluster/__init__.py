"""A real Slurm on one machine, for rehearsals and tests."""
