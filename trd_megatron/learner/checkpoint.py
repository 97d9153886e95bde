"""Checkpoints of the adapters and their optimizer state in Megatron's distributed format (torch_dist).

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
from trd_megatron.learner.checkpoint_files import STATE, read_state, step_folder
from trd_megatron.learner.lora import Factor
from trd_megatron.learner.optimizer import Optimizer
from trd_megatron.learner.parallel import Parallel
from trd_megatron.run_dir import write_json

ADAM = ("exp_avg", "exp_avg_sq")


def _sharded(key: str, tensor: torch.Tensor, factor: Factor, parallel: Parallel) -> ShardedTensor:
    offsets = [] if factor.shard_dim is None else [(factor.shard_dim, parallel.tp_rank, parallel.tp_size)]
    replica = (0, 0 if factor.shard_dim is not None else parallel.tp_rank, parallel.dp_rank)
    return ShardedTensor.from_rank_offsets(key, tensor, *offsets, replica_id=replica)


def _state_dict(factors: list[Factor], optimizer: Optimizer, parallel: Parallel) -> dict[str, Any]:
    """Adapter and Adam moments as sharded tensors; moments that do not exist yet are made (zeros), as a load target."""
    state: dict[str, Any] = {}
    for factor in factors:
        state[factor.name] = _sharded(factor.name, factor.parameter.data, factor, parallel)
        adam = optimizer.adam.state[factor.parameter]
        for name in ADAM:
            if name not in adam:
                adam[name] = torch.zeros_like(factor.parameter.data)
            state[f"{name}.{factor.name}"] = _sharded(f"{name}.{factor.name}", adam[name], factor, parallel)
    return state


def save(checkpoints: Path, loop_state: dict[str, Any], factors: list[Factor], optimizer: Optimizer, parallel: Parallel) -> None:
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
        dist_checkpointing.save(_state_dict(factors, optimizer, parallel), str(temporary))
    dist.barrier()
    if parallel.is_main:
        write_json(temporary / STATE, loop_state)
        os.replace(temporary, target)
    dist.barrier()


def load(checkpoints: Path, step: int, factors: list[Factor], optimizer: Optimizer, parallel: Parallel) -> dict[str, Any]:
    """Restores adapters and optimizer in place; returns the loop state. Every rank calls it."""
    folder = step_folder(checkpoints, step)
    loop_state = read_state(checkpoints, step)
    read_metadata(folder)  # refuses what Megatron's own loader would unpickle unchecked
    with parallel.megatron_device():
        loaded = dist_checkpointing.load(_state_dict(factors, optimizer, parallel), str(folder))
    with torch.no_grad():
        for factor in factors:
            factor.parameter.copy_(loaded[factor.name])
            adam = optimizer.adam.state[factor.parameter]
            for name in ADAM:
                adam[name].copy_(loaded[f"{name}.{factor.name}"])
            adam["step"] = torch.tensor(float(loop_state["step"]))
    return loop_state
