"""Runs on clusters: the jobs of a run, the schedulers that take them, and what every node of a job does."""
