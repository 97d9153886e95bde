"""AdamW on the adapters: gradients added up over ranks, clipped by their global norm, learning rate by warm-up and cosine."""

import math

import torch
import torch.distributed as dist

from trd_megatron.config import LearnerConfig
from trd_megatron.learner.lora import Factor
from trd_megatron.learner.parallel import Parallel


def learning_rate(config: LearnerConfig, step: int, total_steps: int) -> float:
    """Rate of step 1..total_steps: linear warm-up, then cosine down to min_learning_rate_ratio of the peak."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    low = config.min_learning_rate_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimizer:
    """torch's AdamW plus what parallel ranks need around it."""

    def __init__(self, factors: list[Factor], config: LearnerConfig, parallel: Parallel) -> None:
        self.factors, self.config, self.parallel = factors, config, parallel
        self.adam = torch.optim.AdamW(
            [factor.parameter for factor in factors],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )

    def reduce_gradients(self) -> None:
        """Adds up what ranks hold in parts: sequence-parallel shares over the tensor group, everything over the data group."""
        for factor in self.factors:
            if factor.parameter.grad is None:  # this rank was dealt no sample
                factor.parameter.grad = torch.zeros_like(factor.parameter)
        partial = [f.parameter.grad for f in self.factors if getattr(f.parameter, "sequence_parallel", False)]
        if self.parallel.tp_size > 1:
            _all_reduce(partial, self.parallel.tp_group)
        if self.parallel.dp_size > 1:
            _all_reduce([factor.parameter.grad for factor in self.factors], self.parallel.dp_group)

    def gradient_norm(self) -> float:
        """Global 2-norm; what tensor parallelism cuts is added over its group, what it replicates is counted once."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.parallel.device)
        for factor in self.factors:
            assert factor.parameter.grad is not None
            squares[0 if factor.shard_dim is None else 1] += factor.parameter.grad.double().square().sum()
        if self.parallel.tp_size > 1:
            dist.all_reduce(squares[1:], group=self.parallel.tp_group)
        return math.sqrt(float(squares.sum()))

    def step(self, rate: float, norm: float) -> None:
        """Clips to clip_grad and updates. Gradients are cleared."""
        if norm > self.config.clip_grad:
            for factor in self.factors:
                assert factor.parameter.grad is not None
                factor.parameter.grad.mul_(self.config.clip_grad / norm)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)


def _all_reduce(gradients: list[torch.Tensor | None], group: dist.ProcessGroup) -> None:
    """Sums over the group in one call."""
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients if g is not None])
    dist.all_reduce(flat, group=group)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients if g is not None]), strict=True):
        assert gradient is not None
        gradient.copy_(part.view_as(gradient))
