"""What the ranks of the learner tests run. A module of its own: ranks find functions by name."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel

from tests.checkpoints import merge
from trd_megatron.config import Config, LearnerConfig
from trd_megatron.learner import checkpoint, cpu
from trd_megatron.learner.checkpoint_files import saved_steps
from trd_megatron.learner.distributed_optimizer import AnyOptimizer
from trd_megatron.learner.job import Objective
from trd_megatron.learner.model import Model
from trd_megatron.learner.optimizer import Optimizer
from trd_megatron.learner.packing import Cut, Sample, pack
from trd_megatron.learner.parallel import Parallel, setup
from trd_megatron.learner.train import NonFiniteError, Trainer, train
from trd_megatron.learner.trained import Trained

Case = tuple[str, Config, list[Sample], Path, Path | None]


def objective(samples: list[Sample]) -> Objective:
    """Samples without a teacher's prompt are for supervised training."""
    return "distill" if any(sample.teacher_prompt_ids for sample in samples) else "sft"


def start(config: LearnerConfig) -> Parallel:
    if config.device == "cpu":
        cpu.prepare()
    if config.fp8 != "none":
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()  # it would keep the layers of the models before, and their groups
    return setup(config)


def layout(config: Config, tp: int, sp: bool, dp: int, **changes: Any) -> Config:
    return replace(
        config,
        learner=replace(config.learner, tensor_model_parallel_size=tp, sequence_parallel=sp, data_parallel_size=dp, **changes),
    )


Layout = tuple[int, bool, int]  # tensor parallel size, sequence parallel, data parallel size
Figures = dict[str, list[tuple[float, ...]]]


def three_steps(rank: int, cases: list[Case], layouts: list[tuple[Layout, dict[str, Any]]]) -> list[Figures]:
    """Per layout (and changed learner settings): case -> per step (loss, kl, gradient norm, held-out KL), all in one process group."""
    return [{case[0]: _three_steps(case, place, changes) for case in cases} for place, changes in layouts]


def _three_steps(case: Case, place: Layout, changes: dict[str, Any]) -> list[tuple[float, ...]]:
    _, config, samples, student, teacher = case
    config = layout(config, *place, **changes)
    trainer = Trainer(config, student, teacher, start(config.learner))
    rows = []
    for step in range(3):
        batch = samples[5 * step : 5 * step + 5]
        sums, norm = trainer.update(batch, 1e-2, step + 1)
        rows.append((sums.loss / sums.tokens, sums.kl / sums.tokens, norm, trainer.held_out(samples[-4:])[0]))
    return rows


def poisoned(rank: int, case: Case, place: Layout) -> tuple[str, bool]:
    """One update with a NaN in one adapter: (the error's message, whether the other weights were left alone)."""
    _, config, samples, student, teacher = case
    config = layout(config, *place)
    trainer = Trainer(config, student, teacher, start(config.learner))
    with torch.no_grad():
        trainer.optimizer.trained[0].parameter[0, 0] = float("nan")
    before = [factor.parameter.clone() for factor in trainer.optimizer.trained]
    try:
        trainer.update(samples[:3], 1e-2, 1)
    except NonFiniteError as error:
        kept = all(torch.equal(a.nan_to_num(7), f.parameter.nan_to_num(7)) for a, f in zip(before, trainer.optimizer.trained, strict=True))
        return str(error), kept and all(factor.parameter.grad is None for factor in trainer.optimizer.trained)
    return "", False


def recomputed(rank: int, case: Case) -> tuple[int, int]:
    """How often a layer was set up for recomputation: in an update, in a measurement of the held-out KL."""
    _, config, samples, student, teacher = case
    trainer = Trainer(config, student, teacher, start(config.learner))
    original, calls = tensor_parallel.checkpoint, 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args)

    tensor_parallel.checkpoint = counted
    trainer.update(samples[:4], 1e-3, 1)
    in_update, calls = calls, 0
    trainer.held_out(samples[:4])
    return in_update, calls


def held_out(rank: int, case: Case, layouts: list[tuple[Layout, dict[str, Any]]]) -> list[tuple[float, dict[str, float]]]:
    """Per layout what the fixed batch, here all samples, is measured by before training."""
    _, config, samples, student, teacher = case
    found = []
    for place, changes in layouts:
        placed = layout(config, *place, **changes)
        found.append(Trainer(placed, student, teacher, start(placed.learner), objective=objective(samples)).held_out(samples))
    return found


def train_in(rank: int, case: Case, runs: list[tuple[Path, Layout]]) -> list[dict[str, Any]]:
    """The whole training loop, once into each folder; returns the summaries."""
    name, config, *rest = case
    return train_each(rank, [((name, layout(config, *place), *rest), folder) for folder, place in runs])


def train_each(rank: int, runs: list[tuple[Case, Path]]) -> list[dict[str, Any]]:
    """The whole training loop of each case, on its own layout, into its folder; returns the summaries."""
    summaries = []
    for (_, config, samples, student, teacher), folder in runs:
        place = start(config.learner)
        last_held_out = sum(sample.source is not None for sample in samples)
        of = objective(samples)
        summaries.append(train(config, folder, samples, student, teacher, place, objective=of, last_held_out=last_held_out))
    return summaries


def logits(rank: int, config: Config, folders: list[Path], ids: list[list[int]], layouts: list[Layout]) -> list[list[torch.Tensor]]:
    """Per layout and model: the base model's logits of each sequence, from one packed forward, gathered over the ranks."""
    results = []
    for place in layouts:
        placed = layout(config, *place)
        parallel = start(placed.learner)
        results += [_logits(Model(folder, placed.learner, parallel), parallel, ids) for folder in folders]
    return results


def _logits(model: Model, parallel: Parallel, ids: list[list[int]]) -> list[torch.Tensor]:
    packing = pack([one[:1] for one in ids], [one[1:] for one in ids], Cut(parallel.tp_size), parallel.device, [0] * len(ids))
    with torch.no_grad():
        local = model.hidden_states(packing) @ model.output_weight.T
        parts = [torch.empty_like(local) for _ in range(parallel.tp_size)]
        torch.distributed.all_gather(parts, local, group=parallel.tp_group)
    whole = torch.cat(parts, dim=-1)[:, : model.architecture.vocab_size]
    return list(whole[: sum(map(len, ids))].split([len(one) for one in ids]))


def student_against_merged(rank: int, config: Config, folder: Path, ids: list[list[int]], out: Path, place: Layout) -> list[torch.Tensor]:
    """Gives the adapters random weights, writes merged model and factors into `out`, returns the student's own logits."""
    tp = place[0]
    config = layout(config, *place)
    trainer = Trainer(config, folder, None, start(config.learner))
    factors = {}
    for factor in trainer.optimizer.trained:
        whole = torch.randn(factor.parameter.shape, generator=torch.Generator().manual_seed(rank)) * 0.1
        if factor.shard_dim is None:  # replicated: rank 0's values everywhere
            whole = torch.randn(factor.parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
        with torch.no_grad():
            factor.parameter.copy_(whole)
        parts = [torch.empty_like(whole) for _ in range(tp)]
        torch.distributed.all_gather(parts, whole, group=trainer.parallel.tp_group)
        factors[factor.names[0]] = whole if factor.shard_dim is None else torch.cat(parts, dim=factor.shard_dim)
    if rank == 0:
        merge(folder, factors, config.learner.lora.alpha, out / "merged")
        torch.save(factors, out / "factors.pt")
    return _logits(trainer.student, trainer.parallel, ids)


def train_and_score(rank: int, case: Case, folder: Path, place: Layout) -> list[torch.Tensor]:
    """The whole training loop into `folder`, then one more trainer that loads its last checkpoint: the student's logits of the samples."""
    _, config, samples, student, teacher = case
    config = layout(config, *place)
    train(config, folder, samples, student, teacher, start(config.learner))
    trainer = Trainer(config, student, teacher, start(config.learner))
    step = saved_steps(folder / "checkpoints")[-1]
    checkpoint.load(folder / "checkpoints", step, trainer.optimizer, trainer.parallel)
    return _logits(trainer.student, trainer.parallel, [s.student_prompt_ids + s.response_ids for s in samples])


Steps = dict[str, Any]  # loss [steps], gradients and adapters: per step {name: the whole tensor}


def traced_steps(rank: int, cases: list[Case], runs: list[tuple[Layout, dict[str, Any]]], rates: list[float]) -> list[list[Steps]]:
    """Per layout and case: len(rates) updates on batches of four samples. What the ranks hold in parts is put together."""
    return [[_traced_steps(case, place, changes, rates) for case in cases] for place, changes in runs]


def _traced_steps(
    case: Case, place: Layout, changes: dict[str, Any], rates: list[float], prepare: Callable[[Trainer], None] = lambda trainer: None
) -> Steps:
    _, config, samples, student, teacher = case
    config = layout(config, *place, **changes)
    trainer = Trainer(config, student, teacher, start(config.learner), epistemic_ids=[3, 5, 258], objective=objective(samples))
    prepare(trainer)
    trace: Steps = {"metrics": [], "loss": [], "gradients": [], "adapters": [_whole(trainer, lambda factor: factor.parameter)]}
    for step, rate in enumerate(rates):
        batch = samples[4 * step : 4 * step + 4]
        sums = trainer.step.run(batch, backward=True, number=step + 1, before_last_backward=trainer.optimizer.before_last_backward)
        trainer.optimizer.reduce_gradients()
        trace["loss"].append(sums.loss / sums.tokens)
        trace["metrics"].append(sums.metrics())
        trace["gradients"].append(_whole(trainer, _gradients(trainer.optimizer).__getitem__))
        trainer.optimizer.step(rate, trainer.optimizer.gradient_norm())
        trace["adapters"].append(_whole(trainer, lambda factor: factor.parameter))
    return trace


def _gradients(optimizer: AnyOptimizer) -> dict[Trained, torch.Tensor]:
    """This tensor-parallel rank's gradients; Megatron's optimizer has left every data-parallel rank pieces of them."""
    if isinstance(optimizer, Optimizer):
        return {one: one.parameter.grad for one in optimizer.trained if one.parameter.grad is not None}
    gradients = {}
    for index, one in enumerate(optimizer.trained):
        flat = torch.zeros(one.parameter.numel(), device=one.parameter.device)
        if index in optimizer._shards:
            part, shard = optimizer._shards[index]
            assert shard.grad is not None
            flat[part] = shard.grad
        torch.distributed.all_reduce(flat, group=optimizer.parallel.dp_cp_group)
        gradients[one] = flat.view_as(one.parameter)
    return gradients


def _whole(trainer: Trainer, of: Callable[[Trained], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> the tensor `of` gives for it, its parts joined over the tensor-parallel group, in host memory."""
    joined = {}
    for factor in trainer.optimizer.trained:
        for name, part in factor.split(of(factor).detach()).items():
            part = part.contiguous()
            parts = [torch.empty_like(part) for _ in range(trainer.parallel.tp_size)]
            torch.distributed.all_gather(parts, part, group=trainer.parallel.tp_group)
            joined[name] = part.clone() if factor.shard_dim is None else torch.cat(parts, dim=factor.shard_dim)
            if factor.entry is not None and factor.entry.kind == "vocab":
                joined[name] = joined[name][: trainer.student.architecture.vocab_size]
            joined[name] = joined[name].cpu()
    return joined


def modules(rank: int, case: Case) -> dict[str, tuple[list[str], list[str]]]:
    """After one update: name in the GPTModel -> (its class and the bases, the class of its last forward's fp8 recipe and the bases)."""
    _, config, samples, student, teacher = case
    trainer = Trainer(config, student, teacher, start(config.learner))
    trainer.update(samples[:4], 1e-3, 1)
    found = {}
    for name, module in trainer.student.gpt.named_modules():
        kinds = [type(module), type(module.fp8_meta["recipe"]) if getattr(module, "fp8", False) else object]
        bases, recipe = ([f"{one.__module__}.{one.__qualname__}" for one in kind.__mro__] for kind in kinds)
        found[name.replace(".base", "")] = (bases, recipe)  # an adapted layer's own module is what it wraps
    return found


def memory(rank: int, case: Case, changes: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Per changed learner settings: bytes on the GPU before the second update, and at its peak beyond them."""
    results = []
    for change in changes:
        _, config, samples, student, teacher = case
        config = layout(config, 1, False, 1, **change)
        trainer = Trainer(config, student, teacher, start(config.learner))
        trainer.update(samples, 1e-3, 1)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer.update(samples, 1e-3, 2)
        results.append((before, torch.cuda.max_memory_allocated() - before))
        del trainer
        gc.collect()
    return results
