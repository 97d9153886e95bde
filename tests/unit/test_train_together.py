"""What the manifests of runs say that are trained together, when all goes well and when it does not."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trd_megatron import pipeline
from trd_megatron.config import Config, LearnerConfig, load
from trd_megatron.errors import UserError
from trd_megatron.run_dir import Manifest, RunDir
from trd_megatron.stages import train
from trd_megatron.stages.train import Prepared

STEPS = 2


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Stands in for the learner: each job has two steps and writes its summary; it dies in the job of this number."""
    state = {"dies_in": 99}

    def run_all(folders: Sequence[Path], config: LearnerConfig) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, folder in enumerate(folders):
            for step in range(1, STEPS + 1):
                yield number, {"step": step, "response_tokens": 1, "kl": 0.1, "seconds": 0.0}
                if number == state["dies_in"]:
                    raise KeyboardInterrupt
            (folder / "summary.json").write_text(json.dumps({"steps": STEPS, "folder": folder.parent.name}))

    monkeypatch.setattr(train, "run_all", run_all)
    return state


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Config, RunDir]]:
    monkeypatch.setattr(train, "write", lambda config, run_dir, folder: Prepared(folder, config.learner, STEPS, {"layers": "local"}))
    configs = [load(["experiment=smoke", f"seed={seed}"]) for seed in range(3)]
    return [
        (replace(config, run_dir=str(tmp_path / f"{index}")), RunDir(tmp_path / f"{index}", "smoke"))
        for index, config in enumerate(configs)
    ]


def status(runs: list[tuple[Config, RunDir]]) -> list[str]:
    manifests = [Manifest.read(run_dir.train) for _, run_dir in runs]
    return ["missing" if manifest is None else manifest.status for manifest in manifests]


def test_each_run_gets_its_own_summary(runs: list[tuple[Config, RunDir]], ranks: dict[str, int]) -> None:
    heard: list[str] = []
    pipeline.train_together(runs, lambda work, manifest, skipped: heard.append(work.run_dir.path.name))
    assert heard == ["0", "1", "2"]
    for index, (_, run_dir) in enumerate(runs):
        manifest = Manifest.read(run_dir.train)
        assert manifest is not None
        assert manifest.counts == {"steps": STEPS, "folder": f"{index}", "layers": "local"}
    pipeline.train_together(runs)  # nothing is left to do


def test_what_was_trained_before_an_interruption_is_kept(runs: list[tuple[Config, RunDir]], ranks: dict[str, int]) -> None:
    ranks["dies_in"] = 1
    with pytest.raises(KeyboardInterrupt):
        pipeline.train_together(runs)
    assert status(runs) == ["done", "running", "running"]
    paused = Manifest.read(runs[1][1].train)
    assert paused is not None and paused.seconds > 0
    ranks["dies_in"] = 99
    heard: list[str] = []
    pipeline.train_together(runs, lambda work, manifest, skipped: heard.append(work.run_dir.path.name))
    assert heard == ["1", "2"]
    assert status(runs) == ["done"] * 3


def test_an_error_names_its_run(
    runs: list[tuple[Config, RunDir]], ranks: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(config: Config, run_dir: RunDir, folder: Path) -> Prepared:
        raise UserError("too few trajectories")

    monkeypatch.setattr(train, "write", write)
    with pytest.raises(UserError, match=r"^.*/0: too few trajectories$"):
        pipeline.train_together(runs)
