"""Everything that is sent to Slurm and asked of it: batch files, submissions, limits, job states and requeues."""
