"""The tables of docs/scaling.md: the paper's OPSD recipe with other models on more GPUs. `python tools/scaling_tables.py` prints them."""

from collections.abc import Iterator
from dataclasses import replace

from trd_megatron.capacity import plan, speed
from trd_megatron.capacity.fit import ROOM
from trd_megatron.capacity.gpus import GPUS
from trd_megatron.capacity.models import KNOWN
from trd_megatron.config import Config, load

MODELS = ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "Qwen/Qwen3-32B", "Qwen/Qwen3-235B-A22B")
COUNTS = (8, 64, 256, 1024)
SEQUENCES = 16  # a server should decode at once


def configuration(model: str, count: int) -> Config:
    """The recipe on `count` H100: as little tensor parallelism as fits, in learner and servers, and copies on the other GPUs."""
    config = load(["experiment=opsd_qwen3_8b", f"model.path={model}"])
    shape, gpu = KNOWN[model], GPUS[config.cluster.gpu]
    lengths = plan.lengths(config, "refine")
    for tp in (1, 2, 4, 8):
        servers = replace(config.engine.student, tensor_parallel_size=tp, data_parallel_size=max(count // tp, 1))
        if speed.serving(shape, servers, config.engine, gpu, lengths).sequences >= SEQUENCES:
            break
    for tp in (1, 2, 4, 8):
        copies = max(min(count // tp, config.learner.global_batch_size), 1)
        learner = replace(config.learner, tensor_model_parallel_size=tp, sequence_parallel=tp > 1, data_parallel_size=copies)
        if plan.needs(config, learner, shape, None).total <= ROOM * gpu.memory:
            break
    return replace(config, learner=learner, engine=replace(config.engine, student=servers))


def memory_rows() -> Iterator[list[str]]:
    """model, learner's TP, peak, what of it is weights and activations; server's TP, weights, sequences at once."""
    for model in MODELS:
        config, shape = configuration(model, 8), KNOWN[model]
        gpu = GPUS[config.cluster.gpu]
        held = plan.needs(config, config.learner, shape, None)
        served = speed.serving(shape, config.engine.student, config.engine, gpu, plan.lengths(config, "refine"))
        fits = "" if held.total <= ROOM * gpu.memory else " (does not fit)"
        yield [
            model.split("/")[1], str(config.learner.tensor_model_parallel_size), f"{held.total / 2**30:.0f}{fits}",
            f"{held.weights / 2**30:.1f}", f"{(held.activations + held.layer) / 2**30:.1f}",
            str(config.engine.student.tensor_parallel_size), f"{served.weights / 2**30:.1f}", f"{max(served.sequences, 0):.0f}",
        ]  # fmt: skip


def time_rows() -> Iterator[list[str]]:
    """model, GPUs, hours of rollout, refine, train and evaluate, all, GPU-hours, learner ranks, what most of the time goes to."""
    for model in MODELS:
        for count in COUNTS:
            config, shape = configuration(model, count), KNOWN[model]
            found = plan.stages(config, shape, None, GPUS[config.cluster.gpu])
            hours = {stage.name: stage.timing.seconds / 3600 for stage in found}
            slowest = max(found, key=lambda stage: stage.timing.seconds)
            trains = shape.experts is None
            cells = [f"{hours[name]:.2f}" if trains or name != "train" else "–" for name in hours]
            total = sum(value for name, value in hours.items() if trains or name != "train")
            yield [
                model.split("/")[1], f"{count:,}", *cells, f"{total:.2f}", f"{total * count:,.0f}",
                f"{config.learner.ranks}" if trains else "–", f"{slowest.name}: {slowest.timing.limit}",
            ]  # fmt: skip


def markdown() -> str:
    """Both tables."""
    memory = ["model", "learner TP", "peak, GiB", "weights", "activations", "server TP", "weights, GiB", "sequences at once"]
    times = [
        "model",
        "GPUs",
        "rollout, h",
        "refine, h",
        "train, h",
        "evaluate, h",
        "all, h",
        "GPU-hours held",
        "learner ranks",
        "most of it",
    ]
    return f"{_table(memory, memory_rows())}\n\n{_table(times, time_rows())}\n"


def _table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
