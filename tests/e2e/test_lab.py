"""task=lab through the command line, on the lab's student with random weights: what it writes is mostly wrong, and all stages go on."""

import json
import re
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
    "experiment=lab", "model.path=builtin:lab-student", "data.world=lab_mini", "data.train_problems=20",
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


def test_runs_of_a_sweep_share_what_they_have_in_common_and_come_out_as_single_runs_do(trd: Trd, tmp_path: Path) -> None:
    settings = [*SETTINGS, "method=trd,forward_kl"]
    written = trd("run", "--multirun", *settings, f"run_dir={tmp_path / 'sweep'}")
    assert written.count("  rollout: done in") == 1
    assert written.count("  rollout: done before, skipped") == 3
    assert written.count("  train: done in") == 2
    runs = [tmp_path / "sweep" / label for label in ("trd", "forward_kl")]
    for shared in ("problems/part-00000.parquet", "rollouts/part-00000.parquet", "eval/base/test.parquet"):
        assert len({(run / shared).stat().st_ino for run in runs}) == 1
    assert manifest(runs[0] / "rollouts") == manifest(runs[1] / "rollouts")
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "forward_kl" in page

    trd("run", *SETTINGS, "method=forward_kl", f"run_dir={tmp_path / 'alone'}")
    losses = [
        [json.loads(line)["loss"] for line in (run / "train/metrics.jsonl").read_text().splitlines()]
        for run in (runs[1], tmp_path / "alone")
    ]
    assert losses[0] == losses[1]
    responses = [pq.read_table(run / "eval/student/test.parquet")["response"].to_pylist() for run in (runs[1], tmp_path / "alone")]
    assert responses[0] == responses[1]

    again = trd("run", "-m", *settings, f"run_dir={tmp_path / 'sweep'}")
    assert again.count("done before, skipped") == len(re.findall(r"^  \S+: done", again, re.M)) == 20
    changed = trd("run", "-m", *SETTINGS, "method=trd,forward_kl", "rollout.temperature=0.5", f"run_dir={tmp_path / 'sweep'}")
    assert changed.count("  rollout: done in") == 1
    assert {path.name.split("-")[0] for path in (runs[1] / "stale").iterdir()} >= {"rollout", "train"}


def test_the_teacher_is_evaluated_too_if_it_is_asked_for(trd: Trd, tmp_path: Path) -> None:
    settings = [*SETTINGS, "mode=opd", "teacher.path=builtin:lab-teacher", "method=forward_kl", f"run_dir={tmp_path}"]
    assert "evaluate/teacher" not in trd("plan", *settings)
    assert "evaluate/teacher: done in" in trd("run", *settings, "evaluate.teacher=true")
    models = {
        name: set(pq.read_table(tmp_path / f"eval/{name}/test.parquet")["model"].to_pylist()) for name in ("base", "teacher", "student")
    }
    assert models == {"base": {"builtin:lab-student"}, "teacher": {"builtin:lab-teacher"}, "student": {"hf"}}
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    assert set(summary) == {"base", "teacher", "student", "comparison"}
    assert summary["teacher"]["test"]["problems"] == 4
    assert "evaluate/teacher" in [stage["stage"] for stage in json.loads((tmp_path / "report.json").read_text())["stages"]]
    assert "44 samples graded, 0 verdicts changed" in trd("grade", str(tmp_path))  # 20 rollouts, 8 of each model
    again = trd("run", *settings)
    assert again.count("done before, skipped") == 6, again
