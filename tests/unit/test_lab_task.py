"""task=lab where the pipeline meets it: source, prompts, marker, grader, models, and what does not fit together."""

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from trd_megatron import cli, pipeline
from trd_megatron.builtin_models import resolve_model
from trd_megatron.chat import Chat, teacher_prompt_ids
from trd_megatron.config import Config, VerifyConfig, load
from trd_megatron.data.lab import load_lab
from trd_megatron.errors import UserError
from trd_megatron.lab_models import STUDENT, TEACHER
from trd_megatron.lab_text import EOS, PAD, WAIT, WORDS
from trd_megatron.prompts import EPISTEMIC_WORDS, epistemic_words
from trd_megatron.records import PROBLEM
from trd_megatron.run_dir import RunDir
from trd_megatron.stages import prepare
from trd_megatron.verify.grader import Grader, kind

LAB = ("experiment=lab", "task=lab", "model.path=builtin:lab-student")


def configured(*overrides: str) -> Config:
    return load([*LAB, "data.train_problems=3", "data.test_problems=2", *overrides])


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(resolve_model("builtin:lab-student"), "chat", {})


@pytest.mark.parametrize("world", ["lab", "lab_mini", "lab_control"])
def test_the_source_gives_the_configured_world(world: str) -> None:
    problems, figures = prepare.collect(configured(f"data.world={world}", "seed=5"))
    assert problems == load_lab(world, 3, 2, 5)
    assert figures == {}


def test_another_world_makes_the_problems_stale_and_only_the_labs(tmp_path: Path) -> None:
    def fingerprint(*overrides: str) -> str:
        config = load([*overrides, f"run_dir={tmp_path}/run"])
        return next(
            work for work in pipeline.works(config, RunDir(config.run_dir, config.name)) if work.name == "prepare"
        ).folder.fingerprint

    assert fingerprint(*LAB) == fingerprint(*LAB, "data.world=lab") != fingerprint(*LAB, "data.world=lab_mini")
    assert fingerprint("experiment=smoke") == fingerprint("experiment=smoke", "data.world=lab_mini")


@pytest.mark.parametrize(
    ("mode", "refine", "vanilla"),
    [
        ("opsd", "P {problem} I {attempt} R {reference} A", "P {problem} R {reference} A"),
        ("opd", "P {problem} I {attempt} A", "P {problem} A"),
    ],
)
def test_teacher_prompts(chat: Chat, mode: str, refine: str, vanilla: str) -> None:
    config = configured(*(["mode=opd", "teacher.path=builtin:lab-teacher"] if mode == "opd" else []))
    problem = prepare.load(config)[0]
    words = {"problem": problem["problem"], "reference": problem["reference_solution"], "attempt": "s1 3 # 1 2 ANS 2"}
    for attempt, template in ((words["attempt"], refine), (None, vanilla)):
        ids = teacher_prompt_ids(config, chat, problem, attempt)
        assert ids is not None
        assert chat.decode(ids, special=True) == template.format(**words)


def test_an_attempt_over_the_budget_is_cut_with_the_notice(chat: Chat) -> None:
    config = configured("refine.max_prompt_tokens=50")
    ids = teacher_prompt_ids(config, chat, prepare.load(config)[0], " ".join(["s1"] * 72))
    assert ids is not None
    assert len(ids) == 50
    assert "s1 [... truncated ...] R s1" in chat.decode(ids)


def test_the_budgets_hold_everything_that_can_be_written(chat: Chat) -> None:
    config = load(LAB)
    for world in ("lab", "lab_control"):
        for problem in load_lab(world, 300, 0, 0):
            attempt = " ".join(["s1"] * config.rollout.max_response_tokens)
            ids = teacher_prompt_ids(config, chat, problem, attempt)
            assert ids is not None
            assert "truncated" not in chat.decode(ids)


def test_the_epistemic_token_is_the_tasks(chat: Chat) -> None:
    assert epistemic_words("math") == epistemic_words("code") == EPISTEMIC_WORDS
    assert chat.epistemic_ids("lab") == [WORDS.index(WAIT)]
    other = Chat(resolve_model("builtin:tiny-qwen3"), "chat", {})
    assert len(other.epistemic_ids("math")) > 10
    with pytest.raises(UserError, match=r"cannot encode 'Wait': task, data and model must fit"):
        chat.epistemic_ids("math")


def test_the_grader_takes_chains_among_other_problems() -> None:
    def problem(**fields: Any) -> dict[str, Any]:
        return dict.fromkeys(PROBLEM.names) | {"problem_id": "p"} | fields

    chain, math = problem(task="lab", answer="3"), problem(task="math", answer="3")
    unknown = problem(task="lab")
    assert [kind(each) for each in (chain, math, unknown)] == ["lab", "math", None]
    items = [
        (chain, "ANS 3"), (math, r"\boxed{3}"), (chain, r"\boxed{3}"), (chain, "ANS 3 WAIT ANS 4"), (math, r"\boxed{4}"), (unknown, "ANS 3")
    ]  # fmt: skip
    with Grader(VerifyConfig(timeout_s=60)) as grader:
        found = [verdict and verdict.verdict for verdict in grader.grade(items)]
        assert found == ["pass", "pass", "no_answer", "fail", "fail", None]
        assert list(grader.facts({"lab"})) == ["trd_megatron"]
        assert list(grader.facts({"lab", "math"})) == ["trd_megatron", "math"]


@pytest.mark.parametrize(("name", "settings"), [("lab-student", STUDENT), ("lab-teacher", TEACHER)])
def test_models_made_here(name: str, settings: dict[str, Any]) -> None:
    folder = resolve_model(f"builtin:{name}")
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in settings if key != "seed"} == {key: value for key, value in settings.items() if key != "seed"}
    assert (config["vocab_size"], config["pad_token_id"], config["eos_token_id"]) == (30, WORDS.index(PAD), WORDS.index(EOS))
    assert resolve_model(f"builtin:{name}") == folder


def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = count()

    def refused(*arguments: str) -> str:
        run = tmp_path / str(next(numbers))
        monkeypatch.setattr(sys, "argv", ["trd", "run", *arguments, f"run_dir={run}"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert not list(run.glob("rollouts/part-*"))
        return capsys.readouterr().err.splitlines()[-1]

    of_lab = "model.path=builtin:lab-student"
    assert "cannot encode 'Wait': task, data and model must fit" in refused("experiment=smoke", of_lab)
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"problem": "3 s1 # seven", "answer": "3", "reference_solution": "s1 3", "split": "train"}))
    overrides = ("data=file", f"data.path={own}", "data.test_problems=0", "evaluate.benchmarks=[]", "learner.held_out_samples=1")
    assert "cannot encode 'seven': task, data and model must fit" in refused(*LAB, *overrides)
    assert "has another vocabulary than model.path=builtin:lab-student" in refused(
        *LAB, "mode=opd", "teacher.path=builtin:tiny-qwen3-teacher"
    )
