"""A run whose server is killed, comes back, is stopped for 30 s, and whose client is killed: every sample is there exactly once."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from tests.serving.conftest import StudentServer

PROBLEMS, SAMPLES = 24, 20


def until(condition: Callable[[], bool], client: "subprocess.Popen[bytes] | None" = None, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert client is None or client.poll() is None, "the client ended too early"
        time.sleep(0.05)


def test_nothing_is_lost_or_doubled(student_server: StudentServer, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    journal = run_dir / "rollouts" / ".finished"
    command = [sys.executable, "-m", "trd_megatron.cli", "run", "experiment=smoke", f"run_dir={run_dir}", "--until", "rollout"]
    command += ["engine.kind=sglang", f"engine.student.urls=[{student_server.url}]", f"rollout.samples_per_problem={SAMPLES}"]
    command += ["engine.max_outstanding=2", "rollout.shard_size=50", "evaluate.benchmarks=[]"]

    def drawn() -> int:
        return journal.stat().st_size if journal.exists() else 0

    def more_than(size: int) -> Callable[[], bool]:
        return lambda: drawn() > size

    log = (tmp_path / "client.log").open("wb")
    client = subprocess.Popen(command, stderr=log)
    until(more_than(4000), client)
    pid = student_server.servers._servers[0].process.pid  # type: ignore[union-attr]
    os.killpg(pid, signal.SIGKILL)
    size = drawn()
    until(more_than(size + 2000), client)  # the same client goes on with the server that was started again
    pid = student_server.servers._servers[0].process.pid  # type: ignore[union-attr]
    os.killpg(pid, signal.SIGSTOP)
    try:
        time.sleep(1)
        size = drawn()
        time.sleep(29)
        assert drawn() == size
    finally:
        os.killpg(pid, signal.SIGCONT)
    until(more_than(size + 2000), client)
    client.kill()
    client.wait()
    assert drawn()
    again = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr[-3000:]
    table = [row for part in run_dir.glob("rollouts/part-*.parquet") for row in pq.read_table(part).to_pylist()]
    keys = Counter((row["problem_id"], row["sample_index"]) for row in table)
    assert len(keys) == PROBLEMS * SAMPLES and set(keys.values()) == {1}
    assert {row["finish_reason"] for row in table} <= {"stop", "length"}
    assert {row["weight_version"] for row in table} == {0}
    assert not journal.exists()
