"""The training loop: samples in, checkpoints, metrics.jsonl and summary.json out. Runs on every rank."""

import math
import random
import signal
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from trd_megatron.config import Config, LearnerConfig
from trd_megatron.convert.architecture import Architecture
from trd_megatron.errors import UserError
from trd_megatron.learner import checkpoint
from trd_megatron.learner.checkpoint_files import best_step, damage, prune, saved_steps
from trd_megatron.learner.diagnostics import Sums, perplexity, probabilities
from trd_megatron.learner.distributed_optimizer import build_optimizer
from trd_megatron.learner.flops import peak_tflops, training_flops
from trd_megatron.learner.job import Objective
from trd_megatron.learner.log import METRICS, Log
from trd_megatron.learner.lora import Adapters
from trd_megatron.learner.memory import peak_memory
from trd_megatron.learner.model import Model
from trd_megatron.learner.optimizer import learning_rate
from trd_megatron.learner.packing import Sample
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.step import Step
from trd_megatron.learner.teacher import Teacher
from trd_megatron.run_dir import write_json

SUMMARY = "summary.json"


def split_held_out(samples: list[Sample], held_out: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training samples, fixed held-out batch). The choice depends on the seed and the samples' order alone."""
    chosen = set(random.Random(seed).sample(range(len(samples)), held_out))
    return [s for i, s in enumerate(samples) if i not in chosen], [samples[i] for i in sorted(chosen)]


def schedule(count: int, config: Config) -> list[list[int]]:
    """Indices of the training samples of each step: a seeded shuffle per epoch; the last batch of an epoch may be smaller."""
    size = config.learner.global_batch_size
    steps: list[list[int]] = []
    for epoch in range(config.learner.epochs):
        order = list(range(count))
        random.Random(f"{config.seed}/{epoch}").shuffle(order)
        steps += [order[start : start + size] for start in range(0, count, size)]
    return steps[: config.learner.max_steps]


class NonFiniteError(RuntimeError):
    """Loss or gradient norm is not finite; nothing was updated."""


class StoppedError(RuntimeError):
    """SIGTERM came: everything is saved, the next start goes on."""


class _StopSignal:
    """Notes SIGTERM, which schedulers send before they take a machine away, until a step has ended."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel, self._received = parallel, False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self._received = True

    def requested(self) -> bool:
        """Whether any rank was told to stop; the same answer on all, who must all ask."""
        flag = torch.tensor(int(self._received), device=self._parallel.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def _newest_whole(checkpoints: Path, parallel: Parallel) -> int:
    """The newest saved step whose files are all there, 0 if there is none. Says which ones it leaves aside."""
    for step in reversed(saved_steps(checkpoints)):
        wrong = damage(checkpoints, step)
        if wrong is None:
            return step
        if parallel.is_main:
            print(f"step {step} is not used: {wrong}", file=sys.stderr, flush=True)
    return 0


def _last_step(scheduled: int, decay_from: int | None, learner: LearnerConfig) -> int:
    """The step at which training ends."""
    return scheduled if decay_from is None else min(scheduled, decay_from + learner.decay_steps)


def _peak(config: Config, parallel: Parallel) -> float | None:
    """TFLOP/s that one device could do; None: not known."""
    if config.learner.peak_tflops is not None or parallel.device.type == "cpu":
        return config.learner.peak_tflops
    return peak_tflops(torch.cuda.get_device_name(parallel.device), "fp8" if config.learner.fp8 != "none" else config.learner.dtype)


def _most_memory(parallel: Parallel) -> float:
    """GiB that the rank with the highest peak so far has held; the same on all ranks, who must all ask."""
    peak = torch.tensor(peak_memory(parallel.device) / 2**30, dtype=torch.float64, device=parallel.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return float(peak)


def _save_for_replay(
    folder: Path, error: Exception, state: dict[str, Any], batch: list[Sample], rate: float, trainer: "Trainer", parallel: Parallel
) -> None:
    """failed/: the weights and moments before the step, its batch and its learning rate."""
    failed = folder / "failed"
    checkpoint.Saver(failed, trainer.optimizer, parallel).save(state)
    if parallel.is_main:
        write_json(failed / "step.json", {"error": str(error), "lr": rate, "samples": [_row(sample) for sample in batch]})


def _row(sample: Sample) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, array) else value for name, value in vars(sample).items()}


class Trainer:
    """Student, teacher and optimizer on this rank."""

    def __init__(
        self,
        config: Config,
        student_path: Path,
        teacher_path: Path | None,
        parallel: Parallel,
        epistemic_ids: Sequence[int] = (),
        objective: Objective = "distill",
    ) -> None:
        """teacher_path None: OPSD, or no teacher at all with objective "sft". Raises UserError if a model does not fit."""
        learner = config.learner
        self.config, self.parallel = config, parallel
        full = learner.trainable == "full"
        Architecture.from_hf(student_path).check_student(str(student_path))
        self.student = Model(student_path, learner, parallel, trainable=full)
        adapters = None if full else Adapters(self.student, learner.lora, config.seed)
        self.measure = "nll" if objective == "sft" else "kl"  # what the held-out batch is measured by
        self.teacher: Teacher | None = None
        if objective == "sft":
            assert teacher_path is None
        elif adapters is not None and teacher_path is None:
            self.teacher = Teacher(self.student, self.student, adapters)
        else:  # another model, or a frozen copy of the student's starting weights
            model = Model(teacher_path or student_path, learner, parallel, offloaded=learner.teacher_offload)
            self.teacher = Teacher(model, self.student, None, offload=learner.teacher_offload)
        trained = self.student.trained() if adapters is None else adapters.trained()
        self.optimizer = build_optimizer(self.student, trained, learner, parallel)
        self.step = Step(self.student, self.teacher, adapters, config, list(epistemic_ids))

    def update(self, batch: list[Sample], rate: float, number: int) -> tuple[Sums, float]:
        """Optimizer step `number`; returns the batch's sums and the gradient norm before clipping. Raises NonFiniteError."""
        sums = self.step.run(batch, backward=True, number=number, before_last_backward=self.optimizer.before_last_backward)
        with record_function("optimizer"):
            self.optimizer.reduce_gradients()
            norm = self.optimizer.gradient_norm()
        if not (math.isfinite(sums.loss) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            names = ", ".join(f"{sample.problem_id}/{sample.sample_index}" for sample in batch)
            raise NonFiniteError(f"loss {sums.loss}, gradient norm {norm}: not finite, nothing was updated; samples: {names}")
        with record_function("optimizer"):
            self.optimizer.step(rate, norm)
        return sums, norm

    def model_flops(self, batch: list[Sample]) -> int:
        """Of one update on the global batch, all ranks together."""
        lora = None if self.config.learner.trainable == "full" else self.config.learner.lora
        teacher = None if self.teacher is None else self.teacher.model.architecture
        return training_flops(self.student.architecture, teacher, lora, batch)

    def held_out(self, batch: list[Sample]) -> tuple[float, dict[str, float]]:
        """Of the fixed batch: mean unclipped divergence (sft: negative log-likelihood) per response token, and of sft the mean
        probability of the responses of each source. Raises NonFiniteError."""
        sums = self.step.run(batch, backward=False)
        if not math.isfinite(sums.kl):
            raise NonFiniteError(f"the held-out {self.measure.upper()} is {sums.kl}: lower learner.learning_rate, or look at {METRICS}")
        return sums.kl / sums.tokens, {} if sums.sample_logprobs is None else probabilities(batch, sums.sample_logprobs)


def train(
    config: Config,
    folder: Path,
    samples: list[Sample],
    student_path: Path,
    teacher_path: Path | None,
    parallel: Parallel,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
    epistemic_ids: Sequence[int] = (),
    objective: Objective = "distill",
    last_held_out: int = 0,
) -> dict[str, Any]:
    """Trains on `samples` and writes into `folder` (train/); goes on from the newest checkpoint there. Returns the summary.

    Per step, besides the means of diagnostics.py: model_tflops, the model TFLOP/s that one device achieved (flops.py; without
    the held-out KL); mfu, its share of the device's peak, None where that is not known; memory_gib, the highest peak of a rank
    so far; tokens_per_second, of the student's sequences over all ranks.

    last_held_out: the last so many samples are the fixed batch (0: learner.held_out_samples are drawn), of which there must be more
    in all. Raises NonFiniteError, and UserError if a model does not fit, no sample has a source of learner.decay_when, or Weights & Biases
    refuses.
    """
    started = time.monotonic()
    trainer = Trainer(config, student_path, teacher_path, parallel, epistemic_ids, objective)
    if parallel.is_main:
        print(f"optimizer: {trainer.optimizer.name}", file=sys.stderr, flush=True)
    saver = checkpoint.Saver(folder / "checkpoints", trainer.optimizer, parallel, background=config.learner.async_checkpoint)
    try:
        return _train(config, folder, samples, trainer, saver, on_step, started, last_held_out)
    except NonFiniteError:  # the same on every rank: what was saved before is kept
        saver.finish()
        raise


def _train(
    config: Config,
    folder: Path,
    samples: list[Sample],
    trainer: Trainer,
    saver: checkpoint.Saver,
    on_step: Callable[[dict[str, Any]], None],
    started: float,
    last_held_out: int,
) -> dict[str, Any]:
    learner, checkpoints, parallel = config.learner, saver.checkpoints, trainer.parallel
    if last_held_out:
        training, fixed = samples[:-last_held_out], samples[-last_held_out:]
    else:
        training, fixed = split_held_out(samples, learner.held_out_samples, config.seed)
    unknown = sorted(set(learner.decay_when) - {sample.source for sample in fixed})
    if unknown:
        raise UserError(f"learner.decay_when.{unknown[0]}: no held-out sample has that source")
    steps = schedule(len(training), config)

    def published(state: dict[str, Any]) -> None:
        prune(checkpoints, learner.keep_checkpoints, best_step(state, checkpoints))

    done = _newest_whole(checkpoints, parallel)
    if done:
        state = {"decay_from": None} | checkpoint.load(checkpoints, done, trainer.optimizer, parallel)
    else:
        kl, _ = trainer.held_out(fixed)
        # of objective sft these are the negative log-likelihood: what the best step is chosen by
        state = {"step": 0, "kl_before": kl, "held_out_kl": {"0": kl}, "tokens": 0, "seconds": 0.0, "decay_from": None}
    lora = {"rank": learner.lora.rank, "alpha": learner.lora.alpha, "base": config.model.path}
    state["lora"] = lora if learner.trainable == "lora" else None
    earlier_seconds = state["seconds"]
    stop, peak = _StopSignal(parallel), _peak(config, parallel)
    with Log(folder, done, config, active=parallel.is_main) as log:
        while state["step"] < _last_step(len(steps), state["decay_from"], learner):
            begun = time.monotonic()
            number = state["step"] + 1
            rate = learning_rate(learner, number, len(steps), state["decay_from"])
            batch = [training[i] for i in steps[number - 1]]
            try:
                sums, norm = trainer.update(batch, rate, number)
            except NonFiniteError as error:
                saver.finish()
                _save_for_replay(folder, error, state, batch, rate, trainer, parallel)
                raise NonFiniteError(f"{error}; {folder / 'failed'} keeps the step for a replay") from None
            last = number == _last_step(len(steps), state["decay_from"], learner)
            metrics: dict[str, Any] = {"step": number, **sums.metrics(), "grad_norm": norm, "lr": rate}
            metrics |= {"response_tokens": sums.tokens, "samples": len(batch)}
            metrics["memory_gib"] = _most_memory(parallel)  # also waits for every rank's optimizer: what comes next is the step's time
            seconds = time.monotonic() - begun
            achieved = trainer.model_flops(batch) / seconds / dist.get_world_size() / 1e12
            metrics |= {"model_tflops": achieved, "mfu": achieved / peak if peak else None}
            tokens = sum(len(sample.student_prompt_ids) + sample.response_tokens for sample in batch)
            metrics |= {"tokens_per_second": tokens / seconds, "seconds": seconds}
            if last or number % learner.eval_interval == 0:
                kl, reached = trainer.held_out(fixed)
                metrics[f"held_out_{trainer.measure}"] = state["held_out_kl"][str(number)] = kl
                metrics |= {f"held_out_probability/{source}": value for source, value in reached.items()}
                good = learner.decay_when and all(reached[source] >= bound for source, bound in learner.decay_when.items())
                if good and state["decay_from"] is None:
                    state["decay_from"] = number
            state |= {"step": number, "tokens": state["tokens"] + sums.tokens}
            state["seconds"] = earlier_seconds + time.monotonic() - started
            log.write(metrics)
            stopping = stop.requested() and not last
            if last or stopping or number % learner.checkpoint_interval == 0:
                saver.save(state, published)
            else:
                saver.poll()
            if last or stopping:
                saver.finish()
            on_step(metrics)
            if stopping:
                raise StoppedError(f"asked to stop (SIGTERM): step {number} is saved")

    before, after = state["kl_before"], state["held_out_kl"][str(state["step"])]
    summary = {
        f"{trainer.measure}_fixed_batch_before": before,
        f"{trainer.measure}_fixed_batch_after": after,
        "steps": state["step"],
        "tokens": state["tokens"],
        "seconds": state["seconds"],
        "best_step": best_step(state, checkpoints),
        "training_samples": len(training),
        "held_out_samples": len(fixed),
    }
    if learner.decay_when:
        summary["decay_from"] = state["decay_from"]
    if trainer.measure == "nll":
        summary |= {"perplexity_fixed_batch_before": perplexity(before), "perplexity_fixed_batch_after": perplexity(after)}
    if parallel.is_main:
        write_json(folder / SUMMARY, summary)
    return summary
