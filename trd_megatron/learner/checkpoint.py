"""Checkpoints of what is trained and its optimizer state in Megatron's distributed format (torch_dist).

train/checkpoints/step_<n>/ appears whole or not at all: it is written under another name and renamed. Tensors are stored
under Hugging Face names with their global shapes, so a run goes on under any tensor- or data-parallel size.
"""

import os
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async

from trd_megatron.convert.safe_metadata import read_metadata
from trd_megatron.learner.checkpoint_files import STATE, file_sizes, read_state, step_folder
from trd_megatron.learner.optimizer import Optimizer
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.trained import Trained
from trd_megatron.run_dir import write_json


def _sharded(prefix: str, tensor: torch.Tensor, one: Trained, dp_rank: int, parallel: Parallel) -> dict[str, ShardedTensor]:
    offsets = [] if one.shard_dim is None else [(one.shard_dim, parallel.tp_rank, parallel.tp_size)]
    replica = (0, 0 if one.shard_dim is not None else parallel.tp_rank, dp_rank)
    # The vocabulary's padding depends on the number of ranks.
    padded = one.entry is not None and one.entry.kind == "vocab"
    return {
        prefix + name: ShardedTensor.from_rank_offsets(
            prefix + name, part.contiguous(), *offsets, replica_id=replica, allow_shape_mismatch=padded
        )
        for name, part in one.split(tensor).items()
    }


def _state_dict(optimizer: Optimizer, parallel: Parallel) -> dict[str, Any]:
    """What is trained, from every rank, and Adam's state of this rank's share, as sharded tensors."""
    state: dict[str, Any] = {}
    for index, one in enumerate(optimizer.trained):
        state |= _sharded("", one.parameter.data, one, parallel.dp_cp_rank, parallel)
        if index in optimizer.masters:
            for name, moment in optimizer.moments(index).items():
                state |= _sharded(f"{name}.", moment, one, 0, parallel)
    return state


def save(checkpoints: Path, loop_state: dict[str, Any], optimizer: Optimizer, parallel: Parallel) -> None:
    """Writes step_<loop_state["step"]>. Every rank calls it."""
    target = step_folder(checkpoints, loop_state["step"])
    temporary = checkpoints / f".{target.name}.tmp"
    if parallel.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    # Megatron would start a manager process for this queue, which outlives a killed rank; saving here and now needs none.
    filesystem_async._results_queue = queue.Queue()
    with parallel.megatron_device():
        dist_checkpointing.save(_state_dict(optimizer, parallel), str(temporary))
    dist.barrier()
    if parallel.is_main:
        write_json(temporary / STATE, loop_state | {"files": file_sizes(temporary)})
        os.replace(temporary, target)
    dist.barrier()


def load(checkpoints: Path, step: int, optimizer: Optimizer, parallel: Parallel) -> dict[str, Any]:
    """Restores what is trained and the optimizer in place; returns the loop state. Every rank calls it."""
    folder = step_folder(checkpoints, step)
    loop_state = read_state(checkpoints, step)
    read_metadata(folder)  # refuses what Megatron's own loader would unpickle unchecked
    with parallel.megatron_device():
        loaded = dist_checkpointing.load(_state_dict(optimizer, parallel), str(folder))
    with torch.no_grad():
        for index, one in enumerate(optimizer.trained):
            one.parameter.copy_(one.join({name: loaded[name] for name in one.names}))
            if index in optimizer.masters:
                for name, moment in optimizer.moments(index).items():
                    moment.copy_(one.join({key: loaded[f"{name}.{key}"] for key in one.names}))
    optimizer.restored(loop_state["step"])
    return loop_state
