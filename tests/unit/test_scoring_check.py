"""Engine's against learner's log-probabilities: figures, bound, table, and what the command line makes of them."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trd_megatron import cli, scoring_check
from trd_megatron.config import load
from trd_megatron.engine.base import EngineFailedError, Generation
from trd_megatron.learner.score import Score
from trd_megatron.scoring_check import Bound, Drawn, Figures, compare, table, wrong

EXACT = Bound("maximum", 1e-3)
GOOD = Figures("student", "local", 0.6, 8, 512, 1e-6, 5e-6, 0.0, 1.0, None)


def drawn(temperature: float = 0.6, logprobs: tuple[float, ...] = (-1.0, -2.0)) -> Drawn:
    generations = [Generation([5, 6], logprobs, "length"), Generation([7], [-3.0], "stop"), Generation([], [], "stop")]
    return Drawn("student", "local", Path("model"), temperature, [[1], [2], [3]], generations)


SCORES = [Score([-1.1, -1.8], [5, 9]), Score([-3.0], [7]), Score([], [])]


def test_figures() -> None:
    figures = compare(drawn(0), SCORES)
    assert (figures.responses, figures.tokens) == (3, 3)
    assert figures.mean == pytest.approx(0.1)
    assert figures.maximum == pytest.approx(0.2)
    assert figures.signed == pytest.approx(0.1 / 3)  # the learner minus the engine
    assert figures.ratio == pytest.approx((0.904837 + 1.221403 + 1) / 3)
    assert figures.top_1 == pytest.approx(2 / 3)
    assert compare(drawn(0.6), SCORES).top_1 is None  # what was sampled need not be the engine's likeliest
    nothing = replace(drawn(), generations=[Generation([], [], "stop")])
    with pytest.raises(EngineFailedError, match="drew no token"):
        compare(nothing, SCORES[2:])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        compare(drawn(logprobs=(-1.0,)), SCORES)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ([], EXACT),
        (["learner.dtype=float64"], EXACT),
        (["learner.dtype=bfloat16"], Bound("mean", 0.05)),
        (["engine.dtype=bfloat16"], Bound("mean", 0.05)),
        (["engine=sglang", "engine.launch=false", "engine.student.urls=[http://a:1]", "engine.dtype=float32"], EXACT),
        (["engine=sglang", "engine.device=cuda", "engine.dtype=float32", "engine.teacher.fp8=true"], Bound("mean", 0.05)),
    ],
)
def test_the_bound_depends_on_the_precision(changes: list[str], bound: Bound) -> None:
    config = load(["experiment=smoke", *changes])
    assert Bound.of(config) == bound
    assert Bound.of(config, 0.2) == replace(bound, value=0.2)


def test_what_is_above_the_bound_is_told_in_one_line() -> None:
    assert wrong([GOOD], EXACT) is None
    high = replace(GOOD, role="teacher", engine="sglang", temperature=0.0, mean=0.01, maximum=0.3)
    message = wrong([GOOD, high], EXACT)
    assert message is not None
    assert message.startswith("teacher: the maximum difference of log-probabilities at temperature 0 is 0.3, above 0.001: ")
    assert "servers that you started yourself" in message
    assert message.endswith("--max-difference X, or --go-on")
    assert wrong([GOOD, high], Bound("mean", 0.05)) is None
    undefined = wrong([replace(GOOD, mean=float("nan"))], Bound("mean", 0.05))
    assert undefined is not None
    assert "servers" not in undefined  # the local engine has none


def test_the_extreme_case_is_computed_not_raised() -> None:
    figures = compare(drawn(logprobs=(-800.0, -float("inf"))), SCORES)
    assert figures.ratio == figures.maximum == float("inf")
    assert wrong([figures], EXACT) is not None


def test_table() -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table([GOOD, replace(GOOD, temperature=0.0, signed=-0.5, top_1=0.995)], EXACT))
    text = console.export_text()
    assert "the maximum may be 0.001" in text
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert lines == [
        ["student", "local", "temperature 0.6", "8", "512", "1e-06", "5e-06", "+0", "1.000000", "–"],
        ["student", "local", "greedy", "8", "512", "1e-06", "5e-06", "-0.5", "1.000000", "99.5 %"],
    ]


def doctor(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["trd", "doctor", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tools: Any = {"monkeypatch": monkeypatch, "capsys": capsys}
    figures = [replace(GOOD, mean=0.1, maximum=0.3)]
    monkeypatch.setattr(scoring_check, "check", lambda config, say: figures)
    code, out, err = doctor("--engine", "experiment=smoke", **tools)
    assert code == 1
    assert "0.3" in out  # the table comes all the same
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [err.rstrip().splitlines()[-1]]
    assert doctor("--engine", "experiment=smoke", "--max-difference", "0.4", **tools)[0] == 0
    code, _, err = doctor("--engine", "experiment=smoke", "--go-on", **tools)
    assert code == 0
    assert "going on all the same (--go-on): student: the maximum difference" in err
    for wrong_use in (["experiment=smoke"], ["--go-on"], ["--max-difference", "1"]):
        code, _, err = doctor(*wrong_use, **tools)
        assert code == 2
        assert "only with --engine" in err
    assert doctor("--engine", **tools)[0] == 2  # no experiment
