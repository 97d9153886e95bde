"""task=lab through the command line, on the lab's student with random weights: what it writes is mostly wrong, and all stages go on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from trd_megatron import cli
from trd_megatron.lab_models import lab_tokenizer
from trd_megatron.lab_text import WAIT, WORDS
from trd_megatron.verify.lab import first_error, verify_lab

SETTINGS = (
    "experiment=lab_distill", "task=lab", "model.path=builtin:lab-student", "data.world=lab_mini", "data.train_problems=20",
    "data.test_problems=4", "learner.global_batch_size=8", "learner.held_out_samples=4", "evaluate.samples=2",
)  # fmt: skip
Trd = Callable[..., str]


@pytest.fixture
def trd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Trd:
    """Runs a command, expects success, and gives what it wrote."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["trd", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert not stop.value.code, captured.err
        return captured.out + captured.err

    return call


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(path.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def test_trd_and_forward_kl_on_the_labs_problems(trd: Trd, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "|A|s1|" in trd("plan", *SETTINGS, f"run_dir={run}", "--show-sample")
    assert "report: done" in trd("run", *SETTINGS, f"run_dir={run}")
    problems = {row["problem_id"]: row for row in rows(run / "problems")}
    assert {row["task"] for row in problems.values()} == {"lab"}
    assert {row["source"] for row in problems.values()} == {"lab_mini"}
    decode = lab_tokenizer(256).decode
    refined = rows(run / "refined")
    assert len(refined) == 20
    for row in refined:
        problem = problems[row["problem_id"]]
        shown = [problem["problem"], "I", row["initial_response"], "R", problem["reference_solution"]]
        assert decode(row["prompt_ids"]).split() == ["P", *" ".join(shown).split(), "A"]
        assert row["verdict"] == verify_lab(row["response"], problem["answer"]).verdict
    assert set(manifest(run / "refined")["counts"]["graders"][0]) == {"trd_megatron"}
    assert json.loads((run / "train/job.json").read_text())["epistemic_ids"] == [WORDS.index(WAIT)]
    metrics = [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert 0 < metrics[0]["kl"] < 10
    report = json.loads((run / "report.json").read_text())
    assert report["by_reference"]["worked"]["problems"] == 20
    responses = {row["problem_id"]: row["response"] for row in rows(run / "rollouts")}
    for sample in report["samples"]:
        problem = problems[sample["problem_id"]]
        found = first_error(problem["problem"], problem["reference_solution"], responses[sample["problem_id"]])
        assert sample["first_wrong_step"] == (found and found[0] + 1)
    assert '<mark class="wrong">' in (run / "report.html").read_text()
    assert "train" in trd("status", str(run))
    assert "56 samples graded, 0 verdicts changed" in trd("grade", str(run))

    # Same rollouts, vanilla teacher, and of them those that failed.
    assert "done" in trd("run", *SETTINGS, f"run_dir={run}", "method=forward_kl", "data.filter=fail", "--until", "train")
    samples = pq.read_table(run / "train/samples.parquet").to_pylist()
    failed = [row for row in rows(run / "rollouts") if row["passed"] is False]
    assert manifest(run / "train")["counts"]["left_out_filtered"] == 20 - len(failed)
    assert len(samples) == len(failed) > 4
    for row in samples:
        problem = problems[row["problem_id"]]
        assert decode(row["teacher_prompt_ids"]) == f"P {problem['problem']} R {problem['reference_solution']} A"
        assert decode(row["student_prompt_ids"]) == f"P {problem['problem']} A"
    assert [row["response_ids"] for row in samples] == [row["response_ids"] for row in failed]
