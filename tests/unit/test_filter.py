"""data.filter: which trajectories are trained on."""

from pathlib import Path
from typing import Any

import pytest

from trd_megatron.config import load
from trd_megatron.errors import UserError
from trd_megatron.records import PROBLEM, REFINED, TRAJECTORY
from trd_megatron.run_dir import RunDir, shard_path, write_parquet
from trd_megatron.stages.train import build_samples, write

OUTCOMES = {"ff": (False, False), "fs": (False, True), "sf": (True, False), "ss": (True, True), "nf": (None, False), "fn": (False, None)}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """One sample of each outcome of (y_o, y_r); None was not graded."""
    run = RunDir(tmp_path / "run", "smoke")
    problems = [
        dict.fromkeys(PROBLEM.names)
        | {"problem_id": name, "task": "math", "problem": "1+1", "answer": "2", "source": "x", "split": "train"}
        for name in OUTCOMES
    ]
    write_parquet(shard_path(run.problems, 0), problems, PROBLEM)

    def row(name: str, passed: bool | None, ids: list[int]) -> dict[str, Any]:
        return {
            "problem_id": name, "sample_index": 0, "prompt": "", "prompt_ids": [1], "response": "2", "response_ids": ids,
            "response_logprobs": [0.0], "finish_reason": "stop", "abort_reason": None, "passed": passed, "verdict": None,
            "extracted_answer": None, "model": "m", "engine": "e", "weight_version": 0, "seed": 0,
        }  # fmt: skip

    write_parquet(shard_path(run.rollouts, 0), [row(name, before, [5]) for name, (before, _) in OUTCOMES.items()], TRAJECTORY)
    rewrites = [row(name, after, [6]) | {"initial_response": "2", "initial_passed": before} for name, (before, after) in OUTCOMES.items()]
    write_parquet(shard_path(run.refined, 0), rewrites, REFINED)
    return run


@pytest.mark.parametrize(
    ("chosen", "method", "kept"),
    [
        ("all", "trd", list(OUTCOMES)),
        ("fail", "trd", ["ff", "fs", "fn"]),
        ("succ", "trd", ["sf", "ss"]),
        ("fail_to_succ", "trd", ["fs"]),
        ("fail", "forward_kl", ["ff", "fs", "fn"]),
        ("succ", "reverse_kl", ["sf", "ss"]),
    ],
)
def test_subsets(chosen: str, method: str, kept: list[str], run_dir: RunDir) -> None:
    rows, left_out = build_samples(load(["experiment=smoke", f"method={method}", f"data.filter={chosen}"]), run_dir)
    assert [row["problem_id"] for row in rows] == kept
    assert {tuple(row["response_ids"]) for row in rows} == {(6,) if method == "trd" else (5,)}
    assert left_out["filtered"] == len(OUTCOMES) - len(kept)


def test_too_few_are_left(run_dir: RunDir) -> None:
    with pytest.raises(UserError, match=r"^1 trajectories to train on \(data\.filter=fail_to_succ leaves out 5\), of which "):
        write(load(["experiment=smoke", "data.filter=fail_to_succ"]), run_dir, run_dir.train)


def test_rewrites_are_needed() -> None:
    with pytest.raises(UserError, match=r"^data\.filter=fail_to_succ needs rewrites, and method=forward_kl trains on y_o"):
        load(["experiment=smoke", "method=forward_kl", "data.filter=fail_to_succ"])
