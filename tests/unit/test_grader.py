"""The grader picks math or code by the problem, keeps the order, and the stages store what it says. Real verifiers."""

import json
from pathlib import Path
from typing import Any

import pytest

from trd_megatron import preflight
from trd_megatron.config import CodeVerifyConfig, VerifyConfig, load
from trd_megatron.errors import UserError
from trd_megatron.records import PROBLEM
from trd_megatron.verify import sandbox
from trd_megatron.verify.grader import Grader, kind

SETTINGS = VerifyConfig(timeout_s=60, workers=2, code=CodeVerifyConfig(allow_unsandboxed=True))


def problem(**fields: Any) -> dict[str, Any]:
    return dict.fromkeys(PROBLEM.names) | {"problem_id": "p", "task": "math"} | fields


def program(text: str) -> str:
    return f"```python\n{text}\n```"


SUM = problem(answer="5")
UNKNOWN = problem()
ADD = problem(task="code", tests=json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]}))
PRINTS = "print(sum(map(int, input().split())))"


def test_kinds() -> None:
    assert [kind(each) for each in (SUM, UNKNOWN, ADD, problem(task="code"), problem(task="code", answer="x = 1"))] == [
        "math", None, "code", None, None
    ]  # fmt: skip


def test_math_and_code_in_one_order() -> None:
    items = [
        (SUM, r"\boxed{5}"), (ADD, program(PRINTS)), (UNKNOWN, r"\boxed{5}"), (ADD, program("print(4)")), (SUM, r"\boxed{6}"),
        (ADD, "no program"), (SUM, "no answer"), (ADD, program(PRINTS)),
    ]  # fmt: skip
    with Grader(SETTINGS) as grader:
        for _ in range(2):  # the processes live on
            verdicts = [verdict and verdict.verdict for verdict in grader.grade(items)]
            assert verdicts == ["pass", "pass", None, "fail", "fail", "no_answer", "no_answer", "pass"]
        assert list(grader.grade([])) == []


def test_a_caller_that_stops_early_leaves_the_grader_usable() -> None:
    with Grader(SETTINGS) as grader:
        started = grader.grade([(SUM, r"\boxed{5}"), (ADD, program(PRINTS)), (SUM, r"\boxed{6}")])
        first = next(started)
        assert first is not None and first.verdict == "pass"
        started.close()
        assert [verdict and verdict.verdict for verdict in grader.grade([(SUM, r"\boxed{6}"), (ADD, program(PRINTS))])] == ["fail", "pass"]


def test_answer_type_and_check_values_reach_the_verifier() -> None:
    with Grader(SETTINGS) as grader, pytest.raises(ValueError, match="answer_type"):
        list(grader.grade([(problem(answer="5", answer_type="poem"), r"\boxed{5}")]))


@pytest.mark.parametrize("tests", ["{", '{"inputs": [' + "1" * 5000 + "]}", "[]"])
def test_malformed_tests_are_an_error_of_ours(tests: str) -> None:
    with Grader(SETTINGS) as grader:
        (verdict,) = grader.grade([(problem(task="code", answer=None, tests=tests), "```python\nprint(1)\n```")])
    assert verdict is not None and verdict.verdict == "error"


def test_what_can_change_a_verdict_is_recorded() -> None:
    facts = Grader(SETTINGS).facts({"math", "code"})
    assert facts["math"]["timeout_s"] == 60 and facts["math"]["math-verify"]
    assert (facts["code"]["memory_mb"], facts["code"]["sandbox"]) == (1024, sandbox.level().name)
    assert set(Grader(SETTINGS).facts(set())) == {"trd_megatron"}


def test_code_without_a_sandbox_is_refused_before_anything_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "level", lambda: sandbox.Level("limits", "no user namespaces"))
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps({"problem": "Add.", "tests": ADD["tests"]}) + "\n")
    overrides = ["experiment=evaluate", "model.path=builtin:tiny-qwen3", f"evaluate.benchmarks=[{path}]"]
    with pytest.raises(UserError, match=r"no user namespaces.*verify\.code\.allow_unsandboxed=true"):
        preflight.check_grading(load(overrides))
    preflight.check_grading(load([*overrides, "verify.code.allow_unsandboxed=true"]))
    preflight.check_grading(load(["experiment=smoke"]))
