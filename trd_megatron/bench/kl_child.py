"""A child of `trd bench kl`: one side at one number of tokens, called when the parent says so.

The parent sends a Job; the child answers Ready, then a Turn for every message (the first call warms up), or Failed, and ends
with the connection.
"""

import contextlib
import gc
import importlib
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from trd_megatron.bench.kl_sides import SIDES, load_inputs, touch

# The child is started with this and the connection's file descriptor: importing torch comes second.
COMMAND = "from trd_megatron import processes; processes.die_with_parent(); from trd_megatron.bench import kl_child; kl_child.main()"


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


@dataclass(frozen=True)
class Failed:
    error: str  # one line


class HostMemory:
    """Growth of this process's resident set in bytes, by Linux's own high-water mark (some 100 KiB off, it counts per processor)."""

    def __init__(self) -> None:
        """Raises OSError where the mark cannot be reset or read."""
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._high_water_mark()

    def peak(self) -> int:
        return self._high_water_mark() - self._before

    @staticmethod
    def _high_water_mark() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise OSError("/proc/self/status has no VmHWM")


class GPUMemory:
    """Growth of what PyTorch has allocated on the GPU, in bytes."""

    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before


def _serve(job: Job, connection: Connection) -> None:
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


def main() -> None:
    """Serves the parent at the connection whose file descriptor is the only argument."""
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(OSError):  # a wish: where memory runs out, Linux is to end this process and not the parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        _serve(connection.recv(), connection)
    except EOFError:  # the parent is through
        return
    except Exception as error:
        connection.send(Failed(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]))
