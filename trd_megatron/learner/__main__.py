"""What torchrun starts: one rank of the learner. `python -m trd_megatron.learner TRAIN_FOLDER`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from trd_megatron.processes import die_with_parent


def main(folder: Path) -> None:
    """Trains, or scores, as job.json says. In training rank 0 prints one JSON line per step."""
    import megatron.core

    from trd_megatron.config import from_dict
    from trd_megatron.errors import UserError
    from trd_megatron.learner import versions
    from trd_megatron.learner.job import ERROR, Job
    from trd_megatron.learner.parallel import process_group, setup
    from trd_megatron.learner.score_rank import score
    from trd_megatron.learner.train import NonFiniteError, StoppedError, train
    from trd_megatron.run_dir import write_json

    def on_step(metrics: dict[str, Any]) -> None:
        if parallel.is_main:
            print(json.dumps(metrics), flush=True)

    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and (folder / ERROR).exists():
        sys.exit(1)  # a restart would only find the same again
    job = Job.read(folder)
    config = from_dict(job.config)
    teacher = None if job.teacher_path is None else Path(job.teacher_path)
    try:
        versions.check(megatron.core.__version__)
        with process_group(config.learner.device):
            parallel = setup(config.learner)
            samples, student = job.samples(folder), Path(job.student_path)
            if job.work == "score":
                score(config.learner, folder, samples, student, parallel)
            else:
                train(config, folder, samples, student, teacher, parallel, on_step, job.epistemic_ids, job.objective)
    except StoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except (UserError, NonFiniteError) as error:  # the stage reads it from this file
        write_json(folder / ERROR, {"kind": type(error).__name__, "message": str(error)})
        raise


if __name__ == "__main__":
    die_with_parent()
    main(Path(sys.argv[1]))
