"""Process groups: who shares a layer (tensor parallel), a sequence (context parallel), a global batch (data parallel)."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed.rendezvous import rendezvous

from trd_megatron.config import LearnerConfig
from trd_megatron.learner.job import NODE_RANK


@dataclass(frozen=True)
class Parallel:
    """This process's place. Ranks are ordered with tensor parallelism innermost, then context, then data parallelism."""

    device: torch.device
    rank: int
    tp_size: int  # share every layer
    tp_rank: int
    tp_group: dist.ProcessGroup
    cp_size: int  # share every sequence
    cp_rank: int
    cp_group: dist.ProcessGroup
    dp_size: int  # share a global batch
    dp_rank: int
    # Ranks that hold the same weights: gradients are summed over them, the optimizer's state is dealt to them.
    dp_cp_size: int
    dp_cp_rank: int
    dp_cp_group: dist.ProcessGroup
    sequence_parallel: bool

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def megatron_device(self) -> AbstractContextManager[None]:
        """Surrounds Megatron calls that have device="cuda" written into them."""
        if self.device.type == "cpu":
            from trd_megatron.learner.cpu import cuda_means_cpu

            return cuda_means_cpu()
        return contextlib.nullcontext()


def _meeting_place() -> dict[str, Any]:
    """torchrun's store, with keys of this attempt alone: after a restart it still holds the addresses of the ranks that died.

    Over several nodes ranks are dealt node by node, so that tensor parallelism stays inside a node and rank 0 is on node 0, whose
    pipeline reads what it prints: torchrun's own order of nodes is that of their addresses.
    """
    store, rank, ranks = next(rendezvous("env://"))
    if NODE_RANK in os.environ:
        rank = int(os.environ[NODE_RANK]) * int(os.environ["LOCAL_WORLD_SIZE"]) + int(os.environ["LOCAL_RANK"])
    return {
        "store": dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store),
        "rank": rank,
        "world_size": ranks,
    }


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Joins the ranks that torchrun started, over gloo (cpu) or nccl (cuda)."""
    if device == "cpu":
        from trd_megatron.learner import cpu

        cpu.prepare()
        dist.init_process_group("gloo", **_meeting_place())
    else:
        local_rank = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank), **_meeting_place())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def setup(config: LearnerConfig) -> Parallel:
    """Builds Megatron's groups over the ranks of the process group; may be called again with another layout.

    Raises ValueError if the ranks are not tensor_model_parallel_size x context_parallel_size x data_parallel_size.
    """
    tp, cp, dp = config.tensor_model_parallel_size, config.context_parallel_size, config.data_parallel_size
    if dist.get_world_size() != config.ranks:
        raise ValueError(
            f"{dist.get_world_size()} ranks, but learner.tensor_model_parallel_size x context_parallel_size x data_parallel_size "
            f"= {tp} x {cp} x {dp}"
        )
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(0)  # only dropout would draw from it, and there is none
    return Parallel(
        device=torch.device("cpu") if config.device == "cpu" else torch.device("cuda", torch.cuda.current_device()),
        rank=dist.get_rank(),
        tp_size=tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=cp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_size=dp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_cp_size=dp * cp,
        dp_cp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        sequence_parallel=config.sequence_parallel,
    )
