"""data.filter: which trajectories are trained on, by the verdicts of y_o and y_r."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trd_megatron.config import load
from trd_megatron.errors import UserError
from trd_megatron.records import REFINED, TRAJECTORY
from trd_megatron.run_dir import RunDir, shard_path, write_parquet
from trd_megatron.stages import prepare, train

# (y_o passed, y_r passed); an aborted y_r was not graded
PAIRS = ((True, True), (True, False), (False, True), (False, False), (None, True), (False, None), (True, None))


def row(index: int, passed: bool | None, **more: Any) -> dict[str, Any]:
    return {
        "problem_id": "p", "sample_index": index, "prompt": "?", "prompt_ids": [65], "response": "A", "response_ids": [66],
        "response_logprobs": [-1.0], "finish_reason": "stop", "abort_reason": None, "passed": passed, "verdict": None,
        "extracted_answer": None, "model": "m", "engine": "local", "weight_version": 0, "seed": index, **more,
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    run_dir = RunDir(tmp_path, "smoke")
    problem = {"problem_id": "p", "task": "math", "problem": "1 + 1?", "starter_code": None, "answer": "2", "reference_solution": None}
    monkeypatch.setattr(prepare, "read", lambda run_dir: {"p": problem})
    refined = [
        row(index, after, initial_response="A", initial_passed=before) | ({"finish_reason": "abort"} if index == 6 else {})
        for index, (before, after) in enumerate(PAIRS)
    ]
    write_parquet(shard_path(run_dir.rollouts, 0), [row(index, before) for index, (before, _) in enumerate(PAIRS)], TRAJECTORY)
    write_parquet(shard_path(run_dir.refined, 0), refined, REFINED)
    return run_dir


@pytest.mark.parametrize(
    ("method", "kept", "expected", "filtered"),
    [
        ("trd", "all", [0, 1, 2, 3, 4, 5], 0),
        ("trd", "fail", [2, 3, 5], 3),
        ("trd", "succ", [0, 1], 4),
        ("trd", "fail_to_succ", [2], 5),
        ("forward_kl", "fail", [2, 3, 5], 4),
        ("forward_kl", "succ", [0, 1, 6], 4),
    ],
)
def test_filters_go_by_the_verdicts(run_dir: RunDir, method: str, kept: str, expected: list[int], filtered: int) -> None:
    config = load(["experiment=smoke", f"run_dir={run_dir.path}", f"method={method}", f"data.filter={kept}"])
    left_out = Counter(aborted=0, filtered=0, over_budget=0)
    rows = train.build_samples(config, run_dir, left_out)
    assert [one["sample_index"] for one in rows] == expected
    assert left_out == {"aborted": method == "trd", "filtered": filtered, "over_budget": 0}


def test_a_filter_that_leaves_nothing_says_so(run_dir: RunDir) -> None:
    write_parquet(shard_path(run_dir.rollouts, 0), [row(index, None) for index in range(len(PAIRS))], TRAJECTORY)
    config = load(["experiment=smoke", f"run_dir={run_dir.path}", "data.filter=succ"])
    with pytest.raises(UserError, match=r"^data\.filter=succ leaves no trajectory to train on: it drops 6; set data\.filter=all$"):
        train.write(config, run_dir, run_dir.train)


def test_too_few_are_left_to_hold_some_out(run_dir: RunDir) -> None:
    config = load(["experiment=smoke", f"run_dir={run_dir.path}", "data.filter=succ"])
    with pytest.raises(UserError, match=r"^2 trajectories to train on \(data\.filter=succ drops 4\), of which learner\.held_out_samples="):
        train.run(config, run_dir, run_dir.train)


def test_repaired_samples_need_a_method_that_repairs() -> None:
    with pytest.raises(UserError, match=r"data\.filter=fail_to_succ .* method=forward_kl .* set data\.filter=fail, or method=trd$"):
        load(["experiment=smoke", "method=forward_kl", "data.filter=fail_to_succ"])
    with pytest.raises(UserError, match=r"data\.filter=passed: must be one of all, fail, succ, fail_to_succ"):
        load(["experiment=smoke", "data.filter=passed"])
