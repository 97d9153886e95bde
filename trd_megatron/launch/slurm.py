"""What we ask Slurm itself."""

import os
import subprocess
from collections.abc import Sequence


def do_not_repeat() -> None:
    """In a Slurm job: takes it out of the queue for good once it has ended, since the same input would fail again."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        subprocess.run(["scontrol", "update", f"JobId={job}", "Requeue=0"], check=False)


def cancel(jobs: Sequence[str]) -> None:
    """Takes these jobs (their ids) out of the queue."""
    if jobs:
        subprocess.run(["scancel", *jobs], check=False)
