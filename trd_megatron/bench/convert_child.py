"""A child of `trd bench convert`: one conversion, as `trd convert` makes it.

The parent sends a Job; the child answers Ready once everything is imported, converts at "go", and answers Done.
"""

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from trd_megatron.convert import operations
from trd_megatron.learner.memory import peak_memory


@dataclass(frozen=True)
class Job:
    """operation: of convert/operations.py, with its arguments."""

    operation: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Ready:
    """memory: bytes at the highest moment of imports."""

    memory: int


@dataclass(frozen=True)
class Done:
    """memory: bytes at the highest moment of the process, imports and mapped libraries included."""

    seconds: float
    memory: int


def serve(job: Job, connection: Connection) -> None:
    cpu = torch.device("cpu")
    connection.send(Ready(peak_memory(cpu)))
    connection.recv()
    start = time.perf_counter()
    getattr(operations, job.operation)(**job.arguments)
    connection.send(Done(time.perf_counter() - start, peak_memory(cpu)))
