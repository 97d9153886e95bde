"""Which runs a --multirun makes, and what they are called."""

from pathlib import Path

import pytest

from trd_megatron import sweep
from trd_megatron.config import load
from trd_megatron.errors import UserError


def labels(*overrides: str) -> list[str]:
    return [member.label for member in sweep.members(overrides)[1]]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the user's own runs/ lie."""
    monkeypatch.chdir(tmp_path)


def test_every_combination_is_a_run_with_a_folder_of_its_own(tmp_path: Path) -> None:
    folder, runs = sweep.members(["experiment=smoke", "method=trd,forward_kl", "seed=range(0,2)", f"run_dir={tmp_path}"])
    assert folder == tmp_path
    assert [run.label for run in runs] == ["trd-seed0", "trd-seed1", "forward_kl-seed0", "forward_kl-seed1"]
    assert [(run.config.method.name, run.config.seed) for run in runs] == [("trd", 0), ("trd", 1), ("forward_kl", 0), ("forward_kl", 1)]
    for run in runs:
        assert run.run_dir.path == tmp_path / run.label == Path(run.config.run_dir)


def test_labels_are_safe_names() -> None:
    assert labels("experiment=smoke", "learner.learning_rate=1e-4,2e-3") == ["learning_rate0.0001", "learning_rate0.002"]
    assert labels("experiment=smoke", "model.path=a/b,../c") == ["a_b", "c"]
    assert labels("experiment=smoke", "learner.trainable=lora,full", "seed=3") == ["lora", "full"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=smoke", "seed=1"], "--multirun needs a setting with several values, e.g. method=trd,forward_kl or seed=0,1,2"),
        (["experiment=smoke", "method=trd,trdd"], "no method named 'trdd': did you mean trd?"),
        (["experiment=smoke", "seed=1,1"], "two runs would be called seed1: give each value once"),
        (["experiment=smoke", "learnr.epochs=1,2"], "unknown key learnr.epochs"),
        (["experiment=opsd_qwen3_8b", "task=math,code"], "these runs would lie in runs/opsd_qwen3_8b_math, runs/opsd_qwen3_8b_code, ...: "),
    ],
)
def test_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        sweep.members(overrides)
    assert str(error.value).startswith(message)


def test_a_single_runs_folder_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: smoke\n")
    with pytest.raises(UserError, match=r"holds a single run: choose another run_dir=PATH for --multirun$"):
        sweep.members(["experiment=smoke", "seed=0,1", f"run_dir={tmp_path}"])


def test_several_values_need_the_option() -> None:
    with pytest.raises(UserError, match=r"^seed has several values: `trd run --multirun` makes a run of each$"):
        load(["experiment=smoke", "seed=0,1"])
