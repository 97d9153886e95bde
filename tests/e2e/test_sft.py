"""job=sft through the command line: a tiny model learns worked solutions."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.test_lab import Trd, manifest, trd  # noqa: F401
from trd_megatron.builtin_models import resolve_model
from trd_megatron.chat import Chat
from trd_megatron.prompts import student_prompt

SOLUTIONS = [("1+1", "One and one: \\boxed{2}"), ("2+2", "\\boxed{4}"), ("3+3", "Three twice, \\boxed{6}"), ("4+4", "\\boxed{8}")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"problem": f"{text} ({n})", "answer": "2", "reference_solution": solution} for n in range(5) for text, solution in SOLUTIONS]
    path = tmp_path / "solutions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(data: Path, run: Path) -> list[str]:
    return [
        "experiment=sft", "learner=cpu", "model.path=builtin:tiny-qwen3", f"data.path={data}", f"run_dir={run}", "data.test_problems=4",
        "learner.global_batch_size=4", "learner.learning_rate=1e-2", "learner.epochs=2", "learner.eval_interval=4",
        "learner.checkpoint_interval=4", "learner.held_out_samples=4", "rollout.max_prompt_tokens=200", "rollout.max_response_tokens=64",
        "learner.lora.rank=4",
    ]  # fmt: skip


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_worked_solutions_are_learned(trainable: str, trd: Trd, data: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    chosen = [*settings(data, run), f"learner.trainable={trainable}"]
    planned = trd("plan", *chosen, "--show-sample")
    assert "rollout" not in planned and "worked solutions" in planned
    written = trd("run", *chosen)
    assert "held-out perplexity" in written
    summary = json.loads((run / "train/summary.json").read_text())
    assert (summary["steps"], summary["training_samples"], summary["held_out_samples"]) == (8, 16, 4)
    assert summary["nll_fixed_batch_after"] < summary["nll_fixed_batch_before"] - 0.5
    chat = Chat(resolve_model("builtin:tiny-qwen3"), "chat", {})
    problems = {row["problem_id"]: row for row in pq.read_table(run / "problems/part-00000.parquet").to_pylist()}
    samples = pq.read_table(run / "train/samples.parquet").to_pylist()
    assert [problems[row["problem_id"]]["split"] for row in samples] == ["train"] * 16 + ["test"] * 4
    for row in samples:
        problem = problems[row["problem_id"]]
        assert row["student_prompt_ids"] == chat.prompt_ids(student_prompt("math", problem["problem"]))
        assert chat.decode(row["response_ids"], special=True) == problem["reference_solution"] + "<|im_end|>"
    assert (run / "adapter").exists() is (trainable == "lora")
    assert not (run / "eval").exists()
    report = json.loads((run / "report.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == ["prepare", "train", "export"]
    assert "Held-out loss" in (run / "report.html").read_text()
    again = trd("run", *chosen)
    assert again.count("done before, skipped") == (5 if trainable == "lora" else 4)


def test_solutions_over_the_budget_are_left_out_and_the_student_is_evaluated(trd: Trd, data: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    budgets = ["rollout.max_response_tokens=12", "evaluate.benchmarks=[test]", "evaluate.samples=1", "evaluate.max_response_tokens=8"]
    written = trd("run", *(text for text in settings(data, run) if not text.startswith("rollout.max_resp")), *budgets)
    assert "evaluate/student: done in" in written
    train = manifest(run / "train")["counts"]
    assert train["left_out_over_budget"] + train["training_samples"] + train["held_out_samples"] == 20
    assert train["left_out_over_budget"] == 10  # the longer of the solutions
    assert [stage["stage"] for stage in json.loads((run / "report.json").read_text())["stages"]][-2:] == [
        "evaluate/base",
        "evaluate/student",
    ]
