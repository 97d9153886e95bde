"""The learner under torchrun: ranks that are killed, asked to stop, or find a checkpoint cut short go on to the same weights."""

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch

from tests import tiny
from trd_megatron.config import Config, load, to_dict
from tests.checkpoints import read_tensors
from trd_megatron.learner.checkpoint_files import saved_steps, step_folder
from trd_megatron.learner.job import SAMPLES, Job, run_all, run_ranks
from trd_megatron.learner.packing import Sample
from trd_megatron.records import SAMPLE
from trd_megatron.run_dir import write_parquet

STEPS = 6


def random_samples() -> list[Sample]:
    draw = random.Random(5)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(259) for _ in range(draw.randrange(low, high))]

    return [Sample(f"p{i}", 0, ids(3, 20), ids(5, 45), ids(1, 25)) for i in range(4 * STEPS + 4)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Writes a training job of six steps over two data-parallel ranks into a folder and returns its configuration."""
    student = tiny.make("qwen3", tmp_path_factory.mktemp("student"))
    config = load(["experiment=smoke"])
    learner = replace(config.learner, data_parallel_size=2, checkpoint_interval=2, eval_interval=3, keep_checkpoints=9, learning_rate=1e-2)
    synchronous = replace(config, learner=learner)

    def write(folder: Path, background: bool = False) -> Config:
        config = replace(synchronous, learner=replace(learner, async_checkpoint=background))
        folder.mkdir()
        write_parquet(folder / SAMPLES, [asdict(sample) for sample in random_samples()], SAMPLE)
        Job(to_dict(config), str(student), None, [3, 5]).write(folder)
        return config

    return write


@pytest.fixture(scope="module")
def whole(job: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "train"
    config = job(folder)
    assert [metrics["step"] for metrics in run_ranks(folder, config.learner)] == [1, 2, 3, 4, 5, 6]
    return folder


def same(folder: Path, whole: Path) -> None:
    one, other = (read_tensors(step_folder(path / "checkpoints", STEPS)) for path in (folder, whole))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def launchers() -> list[psutil.Process]:
    """torchrun, below this process."""
    return [p for p in psutil.Process().children() if "trd_megatron.learner.torchrun" in p.cmdline()]


def ranks() -> list[psutil.Process]:
    """The learner's rank processes below this one."""
    return [rank for launcher in launchers() for rank in launcher.children()]  # without the writers that they fork


@pytest.mark.parametrize("background", [False, True])
def test_a_killed_rank_is_started_again(background: bool, job: Callable[..., Config], whole: Path, tmp_path: Path) -> None:
    config = job(tmp_path / "train", background)
    seen = []
    for metrics in run_ranks(tmp_path / "train", config.learner):
        seen.append(metrics["step"])
        if seen == [1, 2, 3]:
            max(ranks(), key=lambda p: p.pid).kill()
    assert seen[:3] == [1, 2, 3]
    assert 3 in seen[3:] or 4 in seen[3:4], seen
    same(tmp_path / "train", whole)


def test_sigterm_saves_the_step_and_the_next_start_goes_on(job: Callable[..., Config], whole: Path, tmp_path: Path) -> None:
    config = job(tmp_path / "train", background=True)
    running = run_ranks(tmp_path / "train", config.learner)
    assert next(running)["step"] == 1
    [launcher] = launchers()  # as a scheduler does; it passes the signal on
    launcher.send_signal(signal.SIGTERM)
    with pytest.raises(Exception, match="exit code"):
        list(running)
    stopped_at = saved_steps(tmp_path / "train" / "checkpoints")[-1]
    assert stopped_at < STEPS
    assert "SIGTERM" in (tmp_path / "train" / "learner.log").read_text()
    again = [metrics["step"] for metrics in run_ranks(tmp_path / "train", config.learner)]
    assert again == list(range(stopped_at + 1, STEPS + 1))
    same(tmp_path / "train", whole)


def test_a_checkpoint_that_was_cut_short_is_left_aside(job: Callable[..., Config], whole: Path, tmp_path: Path) -> None:
    config = job(tmp_path / "train")
    subprocess.run(["cp", "-r", f"{whole}/.", str(tmp_path / "train")], check=True)
    checkpoints = tmp_path / "train" / "checkpoints"
    assert saved_steps(checkpoints) == [2, 4, 6]
    for step in (4, 6):
        largest = max(step_folder(checkpoints, step).glob("*.distcp"), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size - 1)
    assert [metrics["step"] for metrics in run_ranks(tmp_path / "train", config.learner)] == [3, 4, 5, 6]
    assert "step 6 is not used" in (tmp_path / "train" / "learner.log").read_text()
    same(tmp_path / "train", whole)


def test_jobs_of_one_group_of_ranks_are_trained_as_if_each_were_alone(job: Callable[..., Config], whole: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    configs = [job(folder) for folder in folders]
    seen = [(number, metrics["step"]) for number, metrics in run_all(folders, configs[0].learner)]
    assert seen == [(number, step) for number in (0, 1) for step in range(1, STEPS + 1)]
    for folder in folders:
        same(folder, whole)
