"""Checkpoints of what is trained and its optimizer state in Megatron's distributed format (torch_dist).

train/checkpoints/step_<n>/ appears whole or not at all: it is written under another name and renamed when every rank has
written its part. Tensors are stored under Hugging Face names with their global shapes, so a run goes on under any tensor- or
data-parallel size. Files can be written in the background, by a process that each rank forks.
"""

import copy
import os
import pickle
import queue
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from trd_megatron import processes
from trd_megatron.convert.safe_metadata import check_checkpoint
from trd_megatron.learner.checkpoint_files import STATE, file_sizes, read_state, step_folder
from trd_megatron.learner.distributed_optimizer import AnyOptimizer
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.trained import Trained
from trd_megatron.run_dir import write_json


class _Handover:
    """What a rank's writer reports to the rank, through a file without a name.

    Megatron would start a manager process for it, which outlives a killed rank; a pipe would fill up while nobody reads it.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 closed with this object, when rank and writer have let go of it

    def put(self, report: Any) -> None:
        pickle.dump(report, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        try:
            return pickle.load(self._file)  # from our own child
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None  # the writer died; Megatron reports it


def _write(parent: int, write: Callable[..., None], *args: Any) -> None:
    """Runs in a forked process: writes this rank's files, and dies with the rank, as do the processes that it forks itself."""
    os.environ[processes.PARENT] = str(parent)
    processes.die_with_parent()
    os.register_at_fork(after_in_child=processes.die_with_parent)
    write(*args)


class Saver:
    """Writes the checkpoints of one folder, one at a time. Every rank makes one and calls it alike."""

    def __init__(self, checkpoints: Path, optimizer: AnyOptimizer, parallel: Parallel, *, background: bool = False) -> None:
        """background: `save` returns when the numbers are in host memory; the checkpoint appears in `poll` or `finish`."""
        self.checkpoints, self.optimizer, self.parallel, self.background = checkpoints, optimizer, parallel, background
        self._calls = AsyncCallsQueue()

    def save(self, loop_state: dict[str, Any], published: Callable[[dict[str, Any]], None] = lambda state: None) -> None:
        """Writes step_<loop_state["step"]>. When it has appeared, rank 0 calls `published` with the loop state."""
        self.finish()
        target = step_folder(self.checkpoints, loop_state["step"])
        temporary = self.checkpoints / f".{target.name}.tmp"
        state = copy.deepcopy(loop_state)  # training goes on changing it

        def publish() -> None:
            if self.parallel.is_main:
                write_json(temporary / STATE, state | {"files": file_sizes(temporary)})
                os.replace(temporary, target)
                published(state)
            dist.barrier()

        if self.parallel.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        filesystem_async._results_queue = _Handover()
        with self.parallel.megatron_device():
            tensors = _state_dict(self.optimizer.trained, self.optimizer.states(), self.parallel)
            request = dist_checkpointing.save(tensors, str(temporary), async_sharded_save=True)
            request.add_finalize_fn(publish)
            if self.background:
                self._calls.schedule_async_request(_dying_with_rank(request))
            else:
                request.execute_sync()

    def poll(self) -> None:
        """Lets a checkpoint appear that every rank has written meanwhile."""
        with self.parallel.megatron_device():
            self._calls.maybe_finalize_async_calls()

    def finish(self) -> None:
        """Waits until every checkpoint has appeared."""
        with self.parallel.megatron_device():
            self._calls.maybe_finalize_async_calls(blocking=True)


def _dying_with_rank(request: AsyncRequest) -> AsyncRequest:
    if request.async_fn is None:  # nothing to write on this rank
        return request

    def write(*args: Any) -> None:
        _write(rank, function, *args)

    rank, function = os.getpid(), request.async_fn
    return request._replace(async_fn=write)


def _sharded(prefix: str, tensor: torch.Tensor, one: Trained, replica: int, parallel: Parallel) -> dict[str, ShardedTensor]:
    offsets = [] if one.shard_dim is None else [(one.shard_dim, parallel.tp_rank, parallel.tp_size)]
    copy_of = (0, 0 if one.shard_dim is not None else parallel.tp_rank, replica)
    # The vocabulary's padding depends on the number of ranks.
    padded = one.entry is not None and one.entry.kind == "vocab"
    return {
        prefix + name: ShardedTensor.from_rank_offsets(
            prefix + name, part.contiguous(), *offsets, replica_id=copy_of, allow_shape_mismatch=padded
        )
        for name, part in one.split(tensor).items()
    }


def _state_dict(trained: list[Trained], states: dict[int, dict[str, torch.Tensor]], parallel: Parallel) -> dict[str, Any]:
    """What is trained, from every rank, and the optimizer's state of this rank's share, as sharded tensors."""
    state: dict[str, Any] = {}
    for index, one in enumerate(trained):
        state |= _sharded("", one.parameter.data, one, parallel.dp_cp_rank, parallel)
        for name, moment in states.get(index, {}).items():
            state |= _sharded(f"{name}.", moment, one, 0, parallel)
    return state


def load(checkpoints: Path, step: int, optimizer: AnyOptimizer, parallel: Parallel) -> dict[str, Any]:
    """Restores what is trained and the optimizer in place; returns the loop state. Every rank calls it."""
    folder = step_folder(checkpoints, step)
    loop_state = read_state(checkpoints, step)
    states = optimizer.states()
    wanted = _state_dict(optimizer.trained, states, parallel)
    check_checkpoint(folder, wanted)
    with parallel.megatron_device():
        loaded = dist_checkpointing.load(wanted, str(folder))
    with torch.no_grad():
        for index, one in enumerate(optimizer.trained):
            one.parameter.copy_(one.join({name: loaded[name] for name in one.names}))
            for name in states.get(index, {}):
                states[index][name] = one.join({key: loaded[f"{name}.{key}"] for key in one.names})
        optimizer.restore(states, loop_state["step"])
    return loop_state
