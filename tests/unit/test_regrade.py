"""`trd grade` on a run of smoke up to refine, and on an evaluation: labels, counts and scores follow; nothing else changes."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trd_megatron import pipeline, regrade
from trd_megatron.config import Config, from_dict, load
from trd_megatron.errors import UserError
from trd_megatron.run_dir import RunDir, origins, read_config

SMALL = ("rollout.shard_size=8", "refine.shard_size=8", "data.train_problems=20", "verify.timeout_s=60")
LABELS = ("passed", "verdict", "extracted_answer", "initial_passed")


def rewrite(path: Path, **columns: list[Any]) -> None:
    """Puts other values into a file, which keeps its metadata."""
    table = pq.read_table(path)
    for name, values in columns.items():
        position = table.schema.get_field_index(name)
        table = table.set_column(position, table.schema.field(position), pa.array(values, table.schema.field(position).type))
    pq.write_table(table, path)


def answers(run: Path) -> dict[str, str]:
    table = pq.read_table(run / "problems/part-00000.parquet")
    return dict(zip(table["problem_id"].to_pylist(), table["answer"].to_pylist(), strict=True))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def counts(run: Path, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / folder / "manifest.json").read_text())["counts"]
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn by a model that says nothing; afterwards the first 12 attempts and the last 9 rewrites are given the right answer."""
    run = tmp_path_factory.mktemp("graded") / "run"
    config = load(["experiment=smoke", f"run_dir={run}", *SMALL])
    pipeline.run(config, RunDir(run, "smoke"), until="refine")
    right = answers(run)
    for folder, chosen in (("rollouts", range(12)), ("refined", range(11, 20))):
        position = 0
        for path in sorted((run / folder).glob("part-*.parquet")):
            table = pq.read_table(path)
            ids, responses = table["problem_id"].to_pylist(), table["response"].to_pylist()
            for index, problem in enumerate(ids):
                if position + index in chosen:
                    responses[index] = rf"So it is \boxed{{{right[problem]}}}."
            rewrite(path, response=responses)
            position += len(ids)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def graded(run: Path, *overrides: str) -> regrade.Changes:
    config = from_dict(read_config(run), overrides, section="verify")
    return regrade.regrade(config, RunDir(run, config.name))


def test_labels_follow_and_nothing_else_changes(run: Path) -> None:
    before = {folder: rows(run / folder) for folder in ("rollouts", "refined")}
    assert {row["verdict"] for row in before["rollouts"]} == {"no_answer"}
    changes = graded(run)
    assert list(changes.lines()) == [("rollout", "no_answer", "pass", 12), ("refine", "no_answer", "pass", 9)]
    assert changes.samples == 40
    after = {folder: rows(run / folder) for folder in before}
    assert [row["passed"] for row in after["rollouts"]] == [True] * 12 + [False] * 8
    assert [row["passed"] for row in after["refined"]] == [False] * 11 + [True] * 9
    assert [row["initial_passed"] for row in after["refined"]] == [row["passed"] for row in after["rollouts"]]
    assert after["rollouts"][0]["extracted_answer"] == answers(run)[after["rollouts"][0]["problem_id"]]
    for folder, found in before.items():
        for old, new in zip(found, after[folder], strict=True):
            assert {k: v for k, v in old.items() if k not in LABELS} == {k: v for k, v in new.items() if k not in LABELS}
    assert (counts(run, "rollouts")["passed"], counts(run, "rollouts")["verdicts"]) == (12, {"pass": 12, "no_answer": 8})
    assert counts(run, "rollouts")["skipped_over_budget"] == 0
    assert counts(run, "refined")["unparsable_share"] == 11 / 20
    assert counts(run, "rollouts")["engines"][0]["name"] == "local"
    assert not (run / regrade.JOURNAL).exists()
    assert list(graded(run).lines()) == []


def test_a_graded_run_stays_finished_and_says_how_it_was_graded(run: Path) -> None:
    graded(run, "verify.timeout_s=45")
    [grader] = counts(run, "rollouts")["graders"]
    assert grader["math"]["timeout_s"] == 45
    assert origins(sorted((run / "refined").glob("*.parquet")))["graders"] == [grader]
    config = from_dict(read_config(run))
    assert config.verify.timeout_s == 45
    ran: list[str] = []
    pipeline.run(
        config, RunDir(run, "smoke"), until="refine", on_stage=lambda work, _, skipped: ran.append(work.name) if not skipped else None
    )
    assert ran == []


def test_an_interrupted_grading_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = regrade._grade_file
    done: list[str] = []

    def interrupted(file: Any, *rest: Any) -> Counter[tuple[str, str]]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(str(file.path.relative_to(run)))
        return whole(file, *rest)

    monkeypatch.setattr(regrade, "_grade_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graded(run)
    assert done == ["rollouts/part-00000.parquet", "rollouts/part-00001.parquet"]
    kept = json.loads((run / regrade.JOURNAL).read_text())["files"]
    assert list(kept) == done
    monkeypatch.setattr(regrade, "_grade_file", lambda file, *rest: done.append(str(file.path.relative_to(run))) or whole(file, *rest))
    assert list(graded(run).lines()) == [("rollout", "no_answer", "pass", 12), ("refine", "no_answer", "pass", 9)]  # of both attempts
    assert len(done) == len(set(done)) == 6


def test_other_settings_begin_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(regrade, "_recount", lambda work: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            graded(run)
    assert len(json.loads((run / regrade.JOURNAL).read_text())["files"]) == 6
    assert list(graded(run, "verify.timeout_s=45").lines()) == []  # all were graded again, and come out alike
    assert counts(run, "rollouts")["passed"] == 12


def test_a_failure_leaves_the_file_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / "rollouts/part-00000.parquet"
    before = path.read_bytes()
    monkeypatch.setattr(regrade, "_graded", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        graded(run)
    assert path.read_bytes() == before
    assert not list(run.rglob("*.tmp"))


def test_what_is_not_graded_stays_so(run: Path) -> None:
    path = run / "rollouts/part-00000.parquet"
    table = pq.read_table(path)
    rewrite(path, finish_reason=["abort"] * 2 + table["finish_reason"].to_pylist()[2:])
    graded(run)
    assert [row["verdict"] for row in rows(run / "rollouts")][:3] == [None, None, "pass"]


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'seed=2': only verify\.\* can be changed here"):
        graded(run, "seed=2")
    with pytest.raises(UserError, match=r"unknown key verify\.timeout: did you mean verify\.timeout_s"):
        graded(run, "verify.timeout=2")
    with pytest.raises(UserError, match="is not a run directory"):
        graded(tmp_path)
    with RunDir(run, "smoke").lock(), pytest.raises(UserError, match="another process works in"):
        graded(run)
    problems = run / "problems/part-00000.parquet"
    rewrite(problems, problem_id=[f"other-{n}" for n in range(len(pq.read_table(problems)))])
    with pytest.raises(UserError, match=r"part-00000\.parquet: its problem '.*' is not among the run's"):
        graded(run)
    for folder in ("rollouts", "refined"):
        shutil.rmtree(run / folder)
    with pytest.raises(UserError, match="holds no samples that were made with its settings"):
        graded(run)


def evaluation(path: Path) -> tuple[Config, RunDir]:
    problems = [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)]
    (path / "sums.jsonl").write_text("\n".join(map(json.dumps, problems)))
    settings = ("evaluate.samples=2", "evaluate.max_response_tokens=8", "evaluate.shard_size=4", "verify.timeout_s=60")
    overrides = ["experiment=evaluate", "model.path=builtin:tiny-qwen3", f"evaluate.benchmarks=[{path / 'sums.jsonl'}]", *settings]
    return load([*overrides, f"run_dir={path / 'run'}"]), RunDir(path / "run", "evaluate")


def test_scores_and_report_of_an_evaluation_follow(tmp_path: Path) -> None:
    config, run_dir = evaluation(tmp_path)
    pipeline.run(config, run_dir)
    file = run_dir.eval / "base/sums.parquet"
    assert pq.ParquetFile(file).num_row_groups == 2
    rewrite(file, response=[r"\boxed{1}"] * 8)  # right for the first problem
    summary = json.loads((run_dir.eval / "summary.json").read_text())
    assert summary["base"]["sums"]["avg_at_k"] == 0
    changes = regrade.regrade(config, run_dir)
    assert list(changes.lines()) == [("evaluate/base sums", "no_answer", "fail", 6), ("evaluate/base sums", "no_answer", "pass", 2)]
    after = json.loads((run_dir.eval / "summary.json").read_text())["base"]["sums"]
    assert (after["avg_at_k"], after["pass_at_k"], after["passed"]) == (25, 25, 2)
    kept = ("skipped_over_budget", "in_training", "source", "sampling", "engines")
    assert {key: after[key] for key in kept} == {key: summary["base"]["sums"][key] for key in kept}
    report = json.loads((run_dir.path / "report.json").read_text())
    assert report["benchmarks"][0]["base"]["avg_at_k"] == 25
    assert {work.folder.state() for work in pipeline.works(config, run_dir)} == {"done"}
