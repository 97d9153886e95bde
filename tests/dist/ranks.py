"""Runs a function on several ranks of this machine, over gloo on the CPU or over nccl on its GPUs, for tests."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["tests.dist.ranks", "transformers", "trd_megatron.learner.train"]


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120, device: str = "cpu") -> list[Any]:
    """Calls fn(rank, *args) in world_size new processes with the default group set up; returns the results by rank.

    device: cpu (gloo) or cuda (nccl; rank r on GPU r). Results must lie in host memory. fn must be a function of a module (it is found again by name), arguments and results must pickle. The first rank that
    raises or dies ends the others; the RuntimeError holds its traceback. TimeoutError when they take longer than timeout_s.
    """
    # Without a GPU ranks are forked from a process that has imported Megatron, and run nothing else: CUDA does not survive a fork.
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        ranks: dict[Connection, tuple[int, Any]] = {}
        results: dict[int, Any] = {}
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                store = os.path.join(folder, "store")
                process = context.Process(target=_main, args=(rank, world_size, device, store, timeout_s, sender, fn, args))
                process.start()
                sender.close()  # so that the death of the rank is an end of file here
                ranks[receiver] = (rank, process)
            deadline = time.monotonic() + timeout_s
            while len(results) < world_size:
                waiting = [receiver for receiver, (rank, _) in ranks.items() if rank not in results]
                ready = wait(waiting, max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"{len(waiting)} of {world_size} ranks did not end within {timeout_s} s")
                for receiver in ready:
                    assert isinstance(receiver, Connection)
                    rank, process = ranks[receiver]
                    try:
                        done, result = pickle.loads(receiver.recv_bytes())  # from our own child
                    except EOFError:
                        process.join()
                        raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}") from None
                    if not done:
                        raise RuntimeError(f"rank {rank} failed:\n{result}")
                    results[rank] = result
        finally:
            for receiver, (rank, process) in ranks.items():
                if len(results) < world_size and rank not in results:
                    process.terminate()
                process.join(10)
                if process.is_alive():
                    process.kill()
                    process.join()
                receiver.close()
    return [results[rank] for rank in range(world_size)]


def _main(
    rank: int,
    world_size: int,
    device: str,
    store: str,
    timeout_s: float,
    sender: Connection,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        torch.set_num_threads(1)
        place: dict[str, Any] = {"backend": "gloo"}
        if device == "cuda":
            torch.cuda.set_device(rank)
            place = {"backend": "nccl", "device_id": torch.device("cuda", rank)}
        dist.init_process_group(
            **place, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
        message = pickle.dumps((True, fn(rank, *args)))  # plain pickle: tensors as bytes, not as shared memory of a dying process
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # goes to the parent, which raises it
        message = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(message)
    sender.close()
