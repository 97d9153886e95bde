"""experiment=evaluate through the command line: a model that was never trained here, problems of both kinds, and a kill."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from trd_megatron import cli

PROBLEMS = [
    {"problem_id": "sum", "problem": "What is 2 + 3?", "answer": "5"},
    {"problem_id": "pair", "problem": "Which (x, y) solves x = 1, y = 2?", "answer": "(1, 2)"},
    {"problem_id": "add", "problem": "Add two numbers.", "tests": {"inputs": ["1 2\n"], "outputs": ["3\n"]}},
]
SETTINGS = ("evaluate.samples=4", "evaluate.max_response_tokens=24", "evaluate.shard_size=2", "verify.code.allow_unsandboxed=true")


def arguments(folder: Path) -> list[str]:
    given = ["experiment=evaluate", "model.path=builtin:tiny-qwen3", f"evaluate.benchmarks=[{folder / 'mixed.jsonl'}]"]
    return ["run", *given, f"run_dir={folder / 'run'}", *SETTINGS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, PROBLEMS)))
    return tmp_path


def drawn(folder: Path) -> list[Any]:
    columns = ["problem_id", "sample_index", "response_ids", "verdict", "seed"]
    return pq.read_table(folder / "run/eval/base/mixed.parquet", columns=columns).to_pylist()


def test_a_model_is_evaluated_and_a_kill_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trd(folder: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["trd", *arguments(folder)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert not stop.value.code, captured.err
        return captured.err

    assert "report: done" in trd(folder)
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        ".lock",
        "config.yaml",
        "eval",
        "report",
        "report.html",
        "report.json",
    ]
    summary = json.loads((folder / "run/eval/summary.json").read_text())
    assert set(summary) == {"base"}
    found = summary["base"]["mixed"]
    assert (found["problems"], found["k"], found["samples"], len(found["pass_curve"])) == (3, 4, 12, 4)
    assert found["sampling"] == {
        "temperature": 0.6, "top_p": 0.95, "top_k": -1, "max_prompt_tokens": 4096, "max_response_tokens": 24, "seed": 0
    }  # fmt: skip
    assert found["engines"][0]["name"] == "local" and found["engines"][0]["torch"]
    assert {"math", "code", "trd_megatron"} == {name for grader in found["graders"] for name in grader}
    assert all(row["verdict"] == "no_answer" for row in drawn(folder))  # a random model: no box and no program, but everything is graded
    page = (folder / "run/report.html").read_text()
    assert "evaluation report" in page and "builtin:tiny-qwen3" in page and 'aria-label="Pass@k"' in page
    assert "KL" not in page.split("<h2>Settings</h2>")[0]
    report = json.loads((folder / "run/report.json").read_text())
    assert report["benchmarks"][0]["base"]["pass_curve"] == found["pass_curve"]
    assert trd(folder).count("done before, skipped") == 2

    whole = drawn(folder)
    (folder / "run").rename(folder / "whole")
    process = subprocess.Popen(
        [sys.executable, "-m", "trd_megatron.cli", *arguments(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parts = folder / "run/eval/base/.mixed.parts"
    deadline = time.monotonic() + 120
    while not (parts / "part-00001.parquet").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    kept = {path.name: path.stat().st_ino for path in parts.glob("part-*.parquet")}
    assert 2 <= len(kept) < 6
    trd(folder)
    assert drawn(folder) == whole
    assert not parts.exists()
