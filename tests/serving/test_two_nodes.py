"""Servers of one role over two nodes of a job (`trd node`), here two processes on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

from trd_megatron.config import EngineConfig


def test_both_nodes_serve_and_end_with_the_run(sglang_engine: EngineConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["experiment=smoke", "engine=sglang_cpu", f"engine.python={sglang_engine.python}", "engine.student.data_parallel_size=2",
                 "rollout.samples_per_problem=4", "engine.max_outstanding=4", f"run_dir={run_dir}"]  # fmt: skip
    nodes = []
    for rank in (1, 0):  # in whatever order they come up
        place = {"TRD_NODES": "2", "TRD_NODE_RANK": str(rank), "TRD_HEAD": "127.0.0.1", "TRD_PORT": "29650"}
        command = [sys.executable, "-m", "trd_megatron.cli", "node", *arguments, "--stages", "prepare,rollout,refine"]
        nodes.append(subprocess.Popen(command, env=os.environ | place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [node.communicate(timeout=280)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    for stage in ("rollouts", "refined"):
        manifest = json.loads((run_dir / stage / "manifest.json").read_text())
        assert manifest["status"] == "done" and manifest["counts"]["samples"] == 96
    for log in (run_dir / "servers" / "student-0.log", run_dir / "servers" / "node-1" / "student-0.log"):
        assert log.read_text(errors="replace").count("POST /generate") > 20, log
    for place in (run_dir / "servers", run_dir / "servers" / "node-1"):
        assert json.loads((place / "servers.json").read_text()) == []  # all were stopped
