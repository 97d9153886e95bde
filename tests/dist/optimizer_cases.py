"""What the ranks of the optimizer and checkpoint tests run."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from tests.dist import learner_cases
from tests.dist.learner_cases import Case, Layout, Steps, _whole, layout, start
from trd_megatron.learner import checkpoint, distributed_optimizer
from trd_megatron.learner.checkpoint_files import saved_steps
from trd_megatron.learner.distributed_optimizer import MegatronOptimizer
from trd_megatron.learner.train import Trainer, train

Trace = dict[str, Any]  # norms [steps], weights {name: the whole tensor}, early: buckets sent before backward had ended
BATCHES = [(0, 5), (5, 10), (10, 11), (11, 16), (16, 21)]  # the third has one sample: a second data-parallel rank has none


@contextmanager
def optimizer_is(megatron: bool) -> Iterator[None]:
    """Takes Megatron's optimizer or ours, whatever the device; buckets small enough for several."""
    with (
        mock.patch.object(distributed_optimizer, "uses_megatron", lambda *args: megatron),
        mock.patch.object(distributed_optimizer, "BUCKET", 3000),
    ):
        yield


def traced_steps(rank: int, built: list[Case], runs: list[tuple[Layout, dict[str, Any]]], rates: list[float]) -> list[list[Steps]]:
    """As in learner_cases, with the optimizers of a GPU: Megatron's where every parameter is trained."""
    with mock.patch.object(distributed_optimizer, "uses_megatron", lambda config, device: config.trainable == "full"):
        return learner_cases.traced_steps(rank, built, runs, rates)


def trainer_of(case: Case, place: Layout, megatron: bool) -> Trainer:
    _, config, _, student, teacher = case
    config = layout(config, *place)
    with optimizer_is(megatron):
        trainer = Trainer(config, student, teacher, start(config.learner))
    assert isinstance(trainer.optimizer, MegatronOptimizer) == megatron
    return trainer


def updates(rank: int, runs: list[tuple[Case, Layout, bool]]) -> list[Trace]:
    """One update per batch, each run with Megatron's optimizer or ours."""
    return [_updates(*run) for run in runs]


def _updates(case: Case, place: Layout, megatron: bool) -> Trace:
    trainer, early = trainer_of(case, place, megatron), 0
    norms = []
    reduce = trainer.optimizer.reduce_gradients

    def counting() -> None:
        nonlocal early
        if isinstance(trainer.optimizer, MegatronOptimizer):
            early += sum(bucket.grad_reduce_handle is not None for bucket in trainer.optimizer._ddp.bucket_groups)
        reduce()

    with mock.patch.object(trainer.optimizer, "reduce_gradients", counting):
        for number, (first, end) in enumerate(BATCHES, start=1):
            norms.append(trainer.update(case[2][first:end], 1e-2, number)[1])
    return {"norms": norms, "weights": _whole(trainer, lambda one: one.parameter), "early": early}


Saved = tuple[Case, Layout, bool, int, Path]


def save_after(rank: int, saves: list[Saved]) -> None:
    """Makes that many updates and saves a checkpoint."""
    for case, place, megatron, steps, folder in saves:
        trainer = trainer_of(case, place, megatron)
        for number, (first, end) in enumerate(BATCHES[:steps], start=1):
            trainer.update(case[2][first:end], 1e-2, number)
        checkpoint.Saver(folder, trainer.optimizer, trainer.parallel).save({"step": steps})


def go_on(rank: int, runs: list[tuple[Case, Layout, bool, Path]]) -> list[Trace]:
    """Loads the last checkpoint of a folder and makes the updates that are left."""
    traces = []
    for case, place, megatron, folder in runs:
        trainer, norms = trainer_of(case, place, megatron), []
        step = checkpoint.load(folder, saved_steps(folder)[-1], trainer.optimizer, trainer.parallel)["step"]
        for number, (first, end) in enumerate(BATCHES[step:], start=step + 1):
            norms.append(trainer.update(case[2][first:end], 1e-2, number)[1])
        traces.append({"norms": norms, "weights": _whole(trainer, lambda one: one.parameter)})
    return traces


def save_and_go_on(
    rank: int, saves: list[Saved], whole: list[tuple[Case, Layout, bool]], resumed: list[tuple[Case, Layout, bool, Path]]
) -> list[Trace]:
    """The three of them in one process group: uninterrupted runs, then resumed ones."""
    save_after(rank, saves)
    return updates(rank, whole) + go_on(rank, resumed)


def train_with(rank: int, case: Case, runs: list[tuple[Path, Layout, bool, dict[str, Any]]]) -> None:
    """The whole training loop, once into each folder, with Megatron's optimizer or ours."""
    _, config, samples, student, teacher = case
    for folder, place, megatron, changes in runs:
        placed = layout(config, *place, **changes)
        with optimizer_is(megatron):
            train(placed, folder, samples, student, teacher, start(placed.learner))


@contextmanager
def _slow_writers(gate: Path) -> Iterator[None]:
    """Writers of checkpoints start only when `gate` exists."""
    write = FileSystemWriterAsync.write_preloaded_data

    def wait(*args: Any, **kwargs: Any) -> None:
        while not gate.exists():
            time.sleep(0.01)
        write(*args, **kwargs)

    with mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", wait):
        yield


def save_while_training(rank: int, case: Case, place: Layout, megatron: bool, folder: Path) -> dict[str, Any]:
    """Two updates, of which the second is made while the writers of the first one's checkpoint stand still."""
    trainer = trainer_of(case, place, megatron)
    seen: dict[str, Any] = {"published": []}
    state = {"step": 1, "held_out_kl": {"0": 1.0}}
    trainer.update(case[2][:4], 1e-2, 1)
    seen["saved"] = _whole(trainer, lambda one: one.parameter)
    saver = checkpoint.Saver(folder, trainer.optimizer, trainer.parallel, background=True)
    with _slow_writers(folder / "gate"):
        saver.save(state, seen["published"].append)
    trainer.update(case[2][4:8], 1e-2, 2)
    state["held_out_kl"]["2"] = 2.0  # type: ignore[index]
    saver.poll()
    seen["during"] = saved_steps(folder)
    torch.distributed.barrier()
    if rank == 0:
        (folder / "gate").touch()
    saver.finish()
    seen["after"] = saved_steps(folder)
    return seen


def die_while_writing(rank: int, case: Case, folder: Path) -> None:
    """Saves step 1, then is killed while the writers of step 2 stand still; leaves their process ids in `folder`."""
    trainer = trainer_of(case, (1, False, 1), False)
    saver = checkpoint.Saver(folder, trainer.optimizer, trainer.parallel, background=True)
    saver.save({"step": 1})
    saver.finish()
    with _slow_writers(folder / "never"):
        saver.save({"step": 2})
    while len(writers := psutil.Process().children(recursive=True)) < 2:  # one process, and the ones that it forks for files
        time.sleep(0.01)
    (folder / "writers").write_text(" ".join(str(process.pid) for process in writers))
    os.kill(os.getpid(), 9)
