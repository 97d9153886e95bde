"""What torchrun starts: one rank of the learner. `python -m trd_megatron.learner FOLDER...`, the folders of jobs for so many ranks."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trd_megatron.processes import die_with_parent

if TYPE_CHECKING:
    from trd_megatron.learner.job import Job


def main(folders: Sequence[Path]) -> None:
    """Does the jobs (job.json) one after the other. In training rank 0 prints one JSON line per step."""
    import megatron.core

    from trd_megatron.config import from_dict
    from trd_megatron.errors import UserError
    from trd_megatron.learner import versions
    from trd_megatron.learner.job import ERROR, Job
    from trd_megatron.learner.parallel import process_group
    from trd_megatron.learner.train import NonFiniteError, StoppedError
    from trd_megatron.run_dir import write_json

    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and any((folder / ERROR).exists() for folder in folders):
        sys.exit(1)  # a restart would only find the same again
    jobs = [Job.read(folder) for folder in folders]
    device = from_dict(jobs[0].config).learner.device
    folder = folders[0]
    try:
        versions.check(megatron.core.__version__)
        with process_group(device):
            for number, (folder, job) in enumerate(zip(folders, jobs, strict=True)):
                _work(number, job, folder)
    except StoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except (UserError, NonFiniteError) as error:  # the stage reads it from this file
        write_json(folder / ERROR, {"kind": type(error).__name__, "message": str(error)})
        raise


def _work(number: int, job: "Job", folder: Path) -> None:
    from trd_megatron.config import from_dict
    from trd_megatron.learner.parallel import setup
    from trd_megatron.learner.score_rank import score
    from trd_megatron.learner.train import train

    def on_step(metrics: dict[str, Any]) -> None:
        if parallel.is_main:
            print(json.dumps({"job": number} | metrics), flush=True)

    config = from_dict(job.config)
    parallel = setup(config.learner)
    teacher = None if job.teacher_path is None else Path(job.teacher_path)
    samples, student = job.samples(folder), Path(job.student_path)
    if job.work == "score":
        score(config.learner, folder, samples, student, parallel)
    else:
        train(config, folder, samples, student, teacher, parallel, on_step, job.epistemic_ids, job.objective, job.held_out)


if __name__ == "__main__":
    die_with_parent()
    main([Path(name) for name in sys.argv[1:]])
