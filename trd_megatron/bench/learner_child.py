"""A child of `trd bench learner`: one side with one model, which takes a step of training when the parent says so.

The parent sends a Job; the child answers Ready, then a Turn for every "go" (the first warms up) and a Profile for "profile".
"""

import contextlib
import gc
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trd_megatron.bench.learner_profile import Profile, profile
from trd_megatron.bench.memory import GPUMemory, HostMemory
from trd_megatron.config import Config
from trd_megatron.learner.packing import Sample

TrainStep = Callable[[], tuple[float, float]]  # the next step; returns loss and gradient norm


@dataclass(frozen=True)
class Job:
    """adapters: a file with the adapters at the start, which `ours` writes before it is ready and `peer` reads."""

    side: str
    model: Path
    samples: list[Sample]
    config: Config
    threads: int
    adapters: Path


@dataclass(frozen=True)
class Ready:
    """The model is loaded. memory: bytes held now, over what was there before it."""

    memory: int


@dataclass(frozen=True)
class Turn:
    """One step. memory: bytes at the highest moment of the steps so far, over what was there before the model was loaded."""

    seconds: float
    memory: int
    loss: float
    grad_norm: float


@contextlib.contextmanager
def ours(job: Job) -> Iterator[TrainStep]:
    from trd_megatron.learner.parallel import process_group, setup
    from trd_megatron.learner.train import Trainer

    learner, number = job.config.learner, 0
    with process_group(learner.device):
        trainer = Trainer(job.config, job.model, None, setup(learner))
        save_file({one.names[0]: one.parameter.detach() for one in trainer.optimizer.trained}, job.adapters)

        def step() -> tuple[float, float]:
            nonlocal number
            number += 1
            sums, norm = trainer.update(job.samples, learner.learning_rate, number)
            return sums.loss / sums.tokens, norm

        yield step


@contextlib.contextmanager
def peer(job: Job) -> Iterator[TrainStep]:
    from trd_megatron.bench import learner_peer

    learner = job.config.learner
    model = learner_peer.load(job.model, learner)
    start = load_file(job.adapters)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start.pop(name.removeprefix("base_model.model.").replace(".default", "")))
    assert not start, f"adapters that the peer does not have: {sorted(start)}"
    optimizer = learner_peer.make_optimizer(model, learner)
    yield lambda: learner_peer.train_step(model, optimizer, job.samples, learner)


SIDES = {"ours": ours, "peer": peer}
IMPORTED = {"ours": "trd_megatron.learner.train", "peer": "trd_megatron.bench.learner_peer"}  # before memory is first read


def serve(job: Job, connection: Connection) -> None:
    torch.set_num_threads(job.threads)
    cuda = job.config.learner.device == "cuda"
    importlib.import_module(IMPORTED[job.side])
    gc.collect()
    memory = GPUMemory() if cuda else HostMemory()
    with SIDES[job.side](job) as step:
        gc.collect()
        memory.reset()  # loading may have held tensors twice; training is what is measured
        connection.send(Ready(memory.peak()))
        while True:
            wanted = connection.recv()
            reply: Turn | Profile = profile(step) if wanted == "profile" else _turn(step, memory, cuda)
            if cuda:
                torch.cuda.empty_cache()  # the GPU is for one side at a time
            connection.send(reply)


def _turn(step: TrainStep, memory: HostMemory | GPUMemory, cuda: bool) -> Turn:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss, norm = step()  # numbers on the host: the GPU is through with what they need
    if cuda:
        torch.cuda.synchronize()
    return Turn(time.perf_counter() - start, memory.peak(), loss, norm)
