"""What refine takes from rollouts, and what it says when nothing of them can be refined."""

from pathlib import Path
from typing import Any

import pytest

from trd_megatron.config import load
from trd_megatron.engine.engines import Engines
from trd_megatron.errors import UserError
from trd_megatron.records import TRAJECTORY
from trd_megatron.run_dir import RunDir, shard_path, write_parquet
from trd_megatron.stages import generate, prepare, refine


def row(index: int, abort_reason: str | None = None) -> dict[str, Any]:
    ids = [] if abort_reason else [65, 66]
    return {
        "problem_id": "p", "sample_index": index, "prompt": "?", "prompt_ids": [65], "response": "A" * len(ids), "response_ids": ids,
        "response_logprobs": [-1.0] * len(ids), "finish_reason": "abort" if abort_reason else "stop", "abort_reason": abort_reason,
        "passed": None, "verdict": None, "extracted_answer": None, "model": "m", "engine": "sglang", "weight_version": 0, "seed": index,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reasons", "budget", "said"),
    [
        (["http://a: HTTP 500: sick", "other"], 512, r"refined: 2 rollouts were aborted, the first because of http://a: HTTP 500: sick$"),
        ([None], 1, r"refined: 1 prompts are over refine\.max_prompt_tokens=1$"),
        ([None, "http://a: gone"], 1, r"refined: 1 prompts are over .*=1; 1 rollouts were aborted, the first because of http://a: gone$"),
    ],
)
def test_why_nothing_can_be_refined(
    reasons: list[str | None], budget: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(["experiment=smoke", f"run_dir={tmp_path}", f"refine.max_prompt_tokens={budget}"])
    run_dir = RunDir(tmp_path, "smoke")
    problem = {"problem_id": "p", "task": "math", "problem": "1 + 1?", "starter_code": None, "answer": "2", "reference_solution": None}
    monkeypatch.setattr(prepare, "read", lambda run_dir: {"p": problem})
    write_parquet(shard_path(run_dir.rollouts, 0), [row(i, reason) for i, reason in enumerate(reasons)], TRAJECTORY)
    with pytest.raises(UserError, match=said):
        refine.run(config, run_dir, run_dir.refined, Engines(config, tmp_path / "servers", print))


def test_rollouts_are_read_a_shard_at_a_time_and_only_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(3):
        write_parquet(shard_path(tmp_path, shard), [row(2 * shard), row(2 * shard + 1, "gone")], TRAJECTORY)
    read: list[str] = []
    read_columns = generate.read_columns

    def noted(path: Path, schema: Any, columns: Any) -> Any:
        read.append(path.name) if tuple(columns) == refine.READ else None
        return read_columns(path, schema, columns)

    monkeypatch.setattr(generate, "read_columns", noted)
    rows = generate.drawn(tmp_path, TRAJECTORY, 0, refine.READ)
    assert next(rows) == {k: v for k, v in row(0).items() if k in refine.READ}
    assert read == ["part-00000.parquet"]
    assert [r["abort_reason"] for r in rows] == ["gone", None, "gone", None, "gone"] and len(read) == 3
