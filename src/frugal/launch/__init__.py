"""Launching runs: jobs with a snapshot of the code, a local queue, Slurm."""
