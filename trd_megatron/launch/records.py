"""What was launched (launch/jobs.json in the run directory), and where its jobs stand."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trd_megatron.errors import UserError
from trd_megatron.run_dir import LAUNCH, write_json

JOBS = "jobs.json"


class JobFailedError(RuntimeError):
    """A job did not end well; those after it were not begun."""


@dataclass(frozen=True)
class LaunchedJob:
    """id: the scheduler's. folder: of its scripts and logs. ended: how, if `trd launch` waited for it."""

    name: str
    id: str
    stages: Sequence[str]
    nodes: int
    gpus: int
    folder: str
    ended: str | None = None


@dataclass(frozen=True)
class Launched:
    """The jobs of the newest launch of a run. kind: of cluster.kind. folder: launch/ of the run directory."""

    kind: str
    folder: Path
    jobs: list[LaunchedJob]

    @staticmethod
    def read(run_path: Path) -> "Launched | None":
        """None: the run was not launched. Raises UserError if the record cannot be read."""
        file = run_path / LAUNCH / JOBS
        if not file.exists():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            return Launched(record["kind"], file.parent, [LaunchedJob(**job) for job in record["jobs"]])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{file} is damaged: remove it; the jobs themselves are not touched by that") from None

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / JOBS, {"kind": self.kind, "jobs": [asdict(job) for job in self.jobs]})

    def states(self) -> list[str]:
        """Of each job, in the scheduler's words."""
        return [job.ended or self._state(job.id) for job in self.jobs]

    def _state(self, job: str) -> str:
        if self.kind == "slurm":
            return slurm_state(job)
        if self.kind == "kubernetes":
            return _kubernetes_state(job)
        return "running, or cut off"


def slurm_state(job: str) -> str:
    """From sacct; where there is no accounting from squeue, and for jobs that ended in the last minutes from scontrol."""
    if shutil.which("squeue") is None:
        return "unknown: this machine has no Slurm"
    accounted = _ask(["sacct", "--noheader", "--parsable2", "--allocations", "--format=State,ExitCode", f"--jobs={job}"])
    if accounted:
        state, _, code = accounted.splitlines()[0].partition("|")
        return state.lower() if state in ("PENDING", "RUNNING", "COMPLETED") else f"{state.lower()}, exit code {code.split(':')[0]}"
    queued = _ask(["squeue", "--noheader", f"--jobs={job}", "--format=%T|%r"])
    if queued:
        state, _, reason = queued.splitlines()[0].partition("|")
        return f"{state.lower()} ({reason})" if state == "PENDING" else state.lower()
    shown = dict(word.split("=", 1) for word in _ask(["scontrol", "show", "job", job, "--oneliner"]).split() if "=" in word)
    if "JobState" not in shown:
        return "left the queue"
    state, code = shown["JobState"].lower(), shown.get("ExitCode", "?:?").split(":")[0]
    return state if state == "completed" else f"{state}, exit code {code}"


def _kubernetes_state(job: str) -> str:
    name = job.rpartition("___")[2]
    found = (
        _ask(["kubectl", "get", "trainjob", name, "--output", "jsonpath={.status.conditions[*].type}"]) if shutil.which("kubectl") else ""
    )
    return found.lower() or "unknown: kubectl does not find it"


def _ask(command: Sequence[str]) -> str:
    """What it prints; nothing if it fails, as it does where there is no such service."""
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""
