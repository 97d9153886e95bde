"""How the lab's bases are made: what is learned, what they are held to, and that they are made once."""

import dataclasses
import json
import multiprocessing
from itertools import islice
from pathlib import Path

import pytest

from trd_megatron import lab_pretraining
from trd_megatron.builtin_models import resolve_model
from trd_megatron.chat import Chat
from trd_megatron.config import from_dict, to_dict
from trd_megatron.data.lab import WORLDS, checks, part
from trd_megatron.errors import UserError
from trd_megatron.lab_pretraining import RECIPES
from trd_megatron.lab_text import Program
from trd_megatron.verify.lab import verify_lab


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_configurations(name: str) -> None:
    config = lab_pretraining.configuration(RECIPES[name])
    assert from_dict(to_dict(config)) == config
    assert config.learner.warmup_ratio * RECIPES[name].max_steps == lab_pretraining.EVERY
    assert set(RECIPES[name].good_enough) <= set(RECIPES[name].mix) | {"solve"}


@pytest.mark.parametrize("world", WORLDS.values(), ids=list(WORLDS))
def test_checks_are_right_and_held_out(world) -> None:  # type: ignore[no-untyped-def]
    examples = list(checks(world, ["solve", "refine_opsd", "vanilla_opsd"], 30))
    assert [example.kind for example in examples] == ["solve"] * 30 + ["refine_opsd"] * 30 + ["vanilla_opsd"] * 30
    for example in examples:
        program = Program.parse(example.prompt.split(" I ")[0].split(" R ")[0].removeprefix("P "))
        assert part(program) == "check"
        if not example.given:  # what follows given errors cannot end right
            assert verify_lab(example.response, str(world.values(program)[-1])).passed


def test_rows_are_texts_to_learn_and_then_the_checks() -> None:
    recipe = RECIPES["lab_control-base"]
    chat = Chat(resolve_model(recipe.start), "chat", {})
    rows = list(lab_pretraining.samples(recipe, chat, 50))
    assert len(rows) == 50 + 3 * lab_pretraining.CHECKS
    assert {row["source"] for row in rows[:50]} == {None}
    assert {row["source"] for row in rows[50:]} == set(recipe.good_enough)
    for row in rows:
        assert chat.decode(row["student_prompt_ids"], special=True).startswith("P ")
        assert chat.decode(row["response_ids"], special=True).endswith(" <eos>")
    given = [row for row in rows if chat.decode(row["student_prompt_ids"])[-2:] != " A"]
    assert given  # the beginning of a response that is not learned
    again = list(islice(lab_pretraining.samples(recipe, chat, 50), 50))
    assert again == rows[:50]


def test_the_label_follows_recipe_and_world() -> None:
    recipe = RECIPES["lab-base"]
    labels = {one.label for one in (recipe, dataclasses.replace(recipe, seed=1), dataclasses.replace(recipe, world="lab_mini"))}
    assert len(labels) == 3


def test_a_base_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRD_CACHE", str(tmp_path))
    monkeypatch.setattr(lab_pretraining, "EVERY", 2)
    monkeypatch.setattr(lab_pretraining, "CHECKS", 4)
    quick = dataclasses.replace(RECIPES["lab_mini-base"], max_steps=6, batch_size=4, good_enough={"solve": 1.0}, decay_steps=1)
    monkeypatch.setitem(RECIPES, "lab_mini-base", quick)
    path = "builtin:lab_mini-base"
    with pytest.raises(UserError, match=r"is not made yet: `trd run` pretrains it at its start"):
        resolve_model(path, download=False)
    with pytest.raises(UserError, match=r"did not become good enough in 6 steps: see .*metrics\.jsonl$"):
        resolve_model(path)
    monkeypatch.setitem(RECIPES, "lab_mini-base", dataclasses.replace(quick, good_enough={"solve": 0.0}))
    folder = resolve_model(path)
    summary = json.loads((folder / "pretraining" / "summary.json").read_text())
    assert (summary["decay_from"], summary["steps"]) == (2, 3)
    assert json.loads((folder / "pretraining" / "recipe.json").read_text())["good_enough"] == {"solve": 0.0}
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(path, download=False) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def _hold(name: str, cache: str, held, let_go) -> None:  # type: ignore[no-untyped-def]
    import os

    os.environ["TRD_CACHE"] = cache
    with lab_pretraining.alone(name):
        held.set()
        let_go.wait(30)


def test_another_process_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRD_CACHE", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=_hold, args=("lab-base", str(tmp_path), held, let_go))
    other.start()
    assert held.wait(60)
    waiting = context.Process(target=_hold, args=("lab-base", str(tmp_path), second := context.Event(), let_go))
    waiting.start()
    assert not second.wait(8)
    let_go.set()
    assert second.wait(30)
    other.join(30)
    waiting.join(30)
