"""`trd launch cluster=slurm` on a real Slurm that is started for these tests. `make test-slurm` installs it; needs root."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launching import Trd

SCRIPT = Path(__file__).with_name("one_machine.sh")
TRD = f"cluster.trd={sys.executable} -m trd_megatron.cli"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables that lead to a Slurm of this machine alone."""
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip("no Slurm here, or not root: run `make test-slurm`")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([str(SCRIPT), "start", str(folder)], check=True)
    yield {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    subprocess.run([str(SCRIPT), "stop", str(folder)], check=True)


def _ask(slurm: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=os.environ | slurm, capture_output=True, text=True, check=True).stdout.strip()


def _until(what: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _launch(trd: Trd, slurm: dict[str, str], run_dir: Path, *more: str) -> dict[str, str]:
    """{job: id}."""
    done = trd("launch", "experiment=smoke", "cluster=slurm", TRD, f"run_dir={run_dir}", *more, **slurm)
    assert done.returncode == 0, done.stderr
    return {job["name"]: job["id"] for job in json.loads((run_dir / "launch" / "jobs.json").read_text())["jobs"]}


def _step(run_dir: Path) -> int:
    metrics = run_dir / "train" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def _states(trd: Trd, slurm: dict[str, str], run_dir: Path) -> str:
    done = trd("status", str(run_dir), **slurm)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_smoke_runs_as_jobs_that_wait_for_each_other(trd: Trd, slurm: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ids = _launch(trd, slurm, run_dir)
    assert list(ids) == ["prepare", "rollout", "refine", "train", "evaluate"]
    assert f"afterok:{ids['train']}" in _ask(slurm, "squeue", "--noheader", f"--jobs={ids['evaluate']}", "--format=%E")
    assert "pending (Dependency)" in _states(trd, slurm, run_dir)
    _until(lambda: not _ask(slurm, "squeue", "--noheader"))
    shown = _states(trd, slurm, run_dir)
    assert shown.count("completed") == 5
    assert (run_dir / "report.html").exists()
    for folder in ("problems", "rollouts", "refined", "train", "hf", "eval/student"):
        assert json.loads((run_dir / folder / "manifest.json").read_text())["status"] == "done"
    logs = list((run_dir / "launch").rglob("log-trd-train_*.out"))
    assert len(logs) == 1 and "train: done" in logs[0].read_text() and "\x1b" not in logs[0].read_text()


def test_a_job_that_was_cancelled_goes_on_with_the_same_command(trd: Trd, slurm: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ids = _launch(trd, slurm, run_dir, "learner.epochs=40")
    _until(lambda: _step(run_dir) >= 8)
    _ask(slurm, "scancel", ids["train"])
    _until(lambda: not _ask(slurm, "squeue", "--noheader"))
    assert _states(trd, slurm, run_dir).count("cancelled, exit code") == 2  # and what waited for it
    reached = _step(run_dir)
    assert 8 <= reached < 200
    before = (run_dir / "train" / "metrics.jsonl").read_text().splitlines()[: reached - 1]
    _launch(trd, slurm, run_dir, "learner.epochs=40")
    _until(lambda: not _ask(slurm, "squeue", "--noheader"))
    lines = (run_dir / "train" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 201))
    assert lines[: reached - 1] == before
    assert json.loads((run_dir / "eval" / "student" / "manifest.json").read_text())["status"] == "done"


def test_a_job_that_is_preempted_or_fails_is_put_back_and_goes_on(trd: Trd, slurm: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ids = _launch(trd, slurm, run_dir, "learner.epochs=40")
    _until(lambda: _step(run_dir) >= 8)
    _ask(slurm, "scontrol", "requeue", ids["train"])  # as a preemption does
    _until(lambda: "Restarts=1" in _ask(slurm, "scontrol", "show", "job", ids["train"]))
    reached = _step(run_dir)
    _until(lambda: _step(run_dir) >= reached + 8)
    ranks = _ask(slurm, "pgrep", "-f", f"trd_megatron.cli node experiment=smoke learner.epochs=40 run_dir={run_dir}").split()
    _ask(slurm, "kill", "-9", *ranks)  # a crash: NeMo-Run's script puts the job back
    _until(lambda: "Restarts=2" in _ask(slurm, "scontrol", "show", "job", ids["train"]))
    _until(lambda: not _ask(slurm, "squeue", "--noheader"), 280)
    lines = (run_dir / "train" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 201))


def test_what_the_user_must_mend_is_not_tried_again(trd: Trd, slurm: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ids = _launch(trd, slurm, run_dir, f"data.path={tmp_path / 'missing.jsonl'}")
    _until(lambda: not _ask(slurm, "squeue", "--noheader"))
    shown = _ask(slurm, "scontrol", "show", "job", ids["prepare"])
    assert "JobState=FAILED" in shown and "Requeue=0 Restarts=0" in shown, shown
    assert "failed, exit code" in _states(trd, slurm, run_dir)
    [log] = (run_dir / "launch").rglob("log-trd-prepare_*.out")
    assert "missing.jsonl" in log.read_text()


def test_what_sbatch_refuses_is_one_line(trd: Trd, slurm: dict[str, str], tmp_path: Path) -> None:
    done = trd("launch", "experiment=smoke", "cluster=slurm", "cluster.partition=none_such", TRD, f"run_dir={tmp_path / 'run'}", **slurm)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "slurm refused" in done.stderr and "invalid partition" in done.stderr
