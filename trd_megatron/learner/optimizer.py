"""AdamW: gradients added up over ranks, clipped by their global norm, learning rate by warm-up and cosine.

The state (two moments; for parameters in half precision a float32 copy as well) is dealt over the data-parallel ranks, whole parameters
at a time (ZeRO stage 1, Rajbhandari et al. 2020): each rank updates its share and sends the others the result. This is the
optimizer of adapters and of the CPU; distributed_optimizer.py is Megatron's, for every parameter on GPUs.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from trd_megatron.config import LearnerConfig
from trd_megatron.learner import fused
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.trained import Trained

_BUCKET = 32 * 2**20  # numbers that one collective sends


def learning_rate(config: LearnerConfig, step: int, total_steps: int, decay_from: int | None = None) -> float:
    """Rate of step 1..total_steps: linear warm-up, then cosine down to min_learning_rate_ratio of the peak.

    With learner.decay_when the peak stays until step `decay_from` (None: not reached yet), and the cosine has learner.decay_steps.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if decay_from is None and step <= warmup:
        return config.learning_rate * step / warmup
    if not config.decay_when:
        progress = (step - warmup) / max(total_steps - warmup, 1)
    else:
        progress = 0.0 if decay_from is None else (step - decay_from) / config.decay_steps
    low = config.min_learning_rate_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def deal_parameters(trained: list[Trained], ranks: int) -> list[int]:
    """The data-parallel rank that answers for each parameter; every rank gets about as many numbers."""
    load = [0] * ranks
    owners = []
    for one in trained:
        owners.append(load.index(min(load)))
        load[owners[-1]] += one.parameter.numel()
    return owners


class Optimizer:
    """AdamW plus what parallel ranks need around it. Norms and biases (one dimension) do not decay."""

    def __init__(self, trained: list[Trained], config: LearnerConfig, parallel: Parallel) -> None:
        self.trained, self.config, self.parallel = trained, config, parallel
        self.owners = deal_parameters(trained, parallel.dp_cp_size)  # who updates each parameter
        # What AdamW works on: the parameter itself, or its float32 copy.
        mine = (index for index, owner in enumerate(self.owners) if owner == parallel.dp_cp_rank)
        self.masters = {index: self._master(trained[index].parameter) for index in mine}
        by_decay = {decay: [m for m in self.masters.values() if (m.dim() > 1) == decay] for decay in (True, False)}
        groups = [{"params": ms, "weight_decay": config.weight_decay if decay else 0.0} for decay, ms in by_decay.items() if ms]
        self.dtype = self._master(trained[0].parameter).dtype
        betas = (config.adam_beta1, config.adam_beta2)
        self.adam = fused.adam(groups, betas, parallel.device, self.dtype) if groups else None

    @property
    def name(self) -> str:
        """What does the work, for logs."""
        return "nothing to update on this rank" if self.adam is None else fused.adam_name(self.adam)

    @staticmethod
    def _master(parameter: torch.nn.Parameter) -> Tensor:
        if parameter.dtype in (torch.float32, torch.float64):
            return parameter
        return parameter.detach().float().requires_grad_()

    def states(self) -> dict[int, dict[str, Tensor]]:
        """What this rank saves of the optimizer: parameter's index -> name -> tensor of the parameter's shape.

        Adam's two moments, and the float32 copy of a parameter in half precision. Every parameter is saved by one rank of the
        data-parallel group. Every rank calls it.
        """
        found = {}
        for index, master in self.masters.items():
            assert self.adam is not None
            found[index] = fused.moments(self.adam, master)
            if master is not self.trained[index].parameter:
                found[index]["master"] = master.detach()
        return found

    def restore(self, states: dict[int, dict[str, Tensor]], step: int) -> None:
        """Takes over what `states` had given after `step` updates; the parameters themselves are in place. Every rank calls it."""
        for index, own in self.states().items():
            for name, tensor in own.items():
                tensor.copy_(states[index][name])
        if self.adam is not None:
            fused.set_step(self.adam, step)

    def before_last_backward(self) -> None:
        """Called before the backward of the last micro-batch when every data-parallel rank has one. Nothing is sent early here."""

    def reduce_gradients(self) -> None:
        """Adds up what ranks hold in parts: partial sums over the tensor group, everything over the data group."""
        for one in self.trained:
            if one.parameter.grad is None:  # this rank was dealt no sample
                one.parameter.grad = torch.zeros_like(one.parameter)
        if self.parallel.tp_size > 1:
            all_reduce([_gradient(one) for one in self.trained if one.partial], self.parallel.tp_group)
        if self.parallel.dp_cp_size > 1:
            all_reduce([_gradient(one) for one in self.trained], self.parallel.dp_cp_group)

    def gradient_norm(self) -> float:
        """Global 2-norm; what tensor parallelism cuts is added over its group, what it replicates is counted once."""
        parts = [[_gradient(one) for one in self.trained if (one.shard_dim is not None) == cut] for cut in (False, True)]
        squares = torch.stack([fused.square_sum(gradients, self.parallel.device) for gradients in parts])
        if self.parallel.tp_size > 1:
            dist.all_reduce(squares[1:], group=self.parallel.tp_group)
        return math.sqrt(float(squares.sum()))

    def step(self, rate: float, norm: float) -> None:
        """Clips to clip_grad and updates. Gradients are cleared."""
        for index, master in self.masters.items():
            gradient = _gradient(self.trained[index])
            master.grad = gradient if master is self.trained[index].parameter else gradient.float()
        if self.adam is not None:
            if norm > self.config.clip_grad:
                fused.scale([master.grad for master in self.masters.values() if master.grad is not None], self.config.clip_grad / norm)
            for group in self.adam.param_groups:
                group["lr"] = rate
            self.adam.step()
        for index, master in self.masters.items():
            if master is not self.trained[index].parameter:
                master.grad = None
                self.trained[index].parameter.data.copy_(master.detach())
        if self.parallel.dp_cp_size > 1:
            self._share()
        self.zero_grad()

    def _share(self) -> None:
        """Every rank's updated parameters go to the others."""
        ranks = dist.get_process_group_ranks(self.parallel.dp_cp_group)
        for owner in range(self.parallel.dp_cp_size):
            owned = [one.parameter.data for one, by in zip(self.trained, self.owners, strict=True) if by == owner]
            for flat, tensors in _buckets(owned):
                dist.broadcast(flat, ranks[owner], group=self.parallel.dp_cp_group)
                _unpack(flat, tensors)

    def zero_grad(self) -> None:
        for one in self.trained:
            one.parameter.grad = None


def _gradient(one: Trained) -> Tensor:
    assert one.parameter.grad is not None
    return one.parameter.grad


def _buckets(tensors: list[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Tensors, in order, copied into flat pieces of about _BUCKET numbers (one tensor at least) and one dtype."""
    start = 0
    while start < len(tensors):
        end, size = start + 1, tensors[start].numel()
        while end < len(tensors) and tensors[end].dtype == tensors[start].dtype and size + tensors[end].numel() <= _BUCKET:
            size += tensors[end].numel()
            end += 1
        yield torch.cat([tensor.flatten() for tensor in tensors[start:end]]), tensors[start:end]
        start = end


def _unpack(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def all_reduce(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sums over the group, a bucket at a time."""
    for flat, tensors in _buckets(gradients):
        dist.all_reduce(flat, group=group)
        _unpack(flat, tensors)
