"""A child of `trd bench kl`: one side at one number of tokens, called when the parent says so.

The parent sends a Job; the child answers Ready, then a Turn for every message (the first call warms up).
"""

import gc
import importlib
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from trd_megatron.bench.kl_sides import SIDES, load_inputs, touch
from trd_megatron.bench.memory import GPUMemory, HostMemory


@dataclass(frozen=True)
class Job:
    """folder: where write_inputs put the inputs. store: the ranks' meeting point, a file that is not there yet."""

    side: str
    tokens: int
    hidden: int
    vocab: int
    chunk: int
    dtype: str
    device: str
    threads: int
    folder: Path
    rank: int
    ranks: int
    store: Path


@dataclass(frozen=True)
class Ready:
    """The side's library is imported, the inputs are mapped, the ranks are connected."""


@dataclass(frozen=True)
class Turn:
    """One call. memory: bytes at the highest moment since the first call began, over what was there just before it."""

    seconds: float
    memory: int
    loss: float | None


def serve(job: Job, connection: Connection) -> None:
    torch.set_num_threads(job.threads)
    side, cuda = SIDES[job.side], job.device == "cuda"
    if side.module:
        importlib.import_module(side.module)
    inputs = load_inputs(job.folder, job.tokens, job.hidden, job.vocab, job.dtype, job.device, job.chunk, _group(job))
    connection.send(Ready())
    connection.recv()
    gc.collect()
    touch(inputs)
    memory = GPUMemory() if cuda else HostMemory()
    call = side.make(inputs)

    def turn() -> Turn:
        inputs.student_hidden.grad = None
        touch(inputs)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = call()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return Turn(seconds, memory.peak(), None if loss is None else float(loss))

    while True:
        done = turn()
        if cuda:
            torch.cuda.empty_cache()  # the GPU is for one side at a time
        connection.send(done)
        connection.recv()
        if cuda:
            turn()  # fills the cache again


def _group(job: Job) -> dist.ProcessGroup | None:
    """The ranks' group, its connections open."""
    if job.ranks == 1:
        return None
    dist.init_process_group("gloo", init_method=f"file://{job.store}", rank=job.rank, world_size=job.ranks)
    dist.all_reduce(torch.zeros(1))
    return dist.group.WORLD
