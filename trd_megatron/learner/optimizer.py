"""AdamW: gradients added up over ranks, clipped by their global norm, learning rate by warm-up and cosine.

The state (two moments; for parameters in half precision a float32 copy as well) is dealt over the data-parallel ranks, whole parameters
at a time (ZeRO stage 1, Rajbhandari et al. 2020): each rank updates its share and sends the others the result.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from trd_megatron.config import LearnerConfig
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.trained import Trained

_BUCKET = 32 * 2**20  # numbers that one collective sends


def learning_rate(config: LearnerConfig, step: int, total_steps: int) -> float:
    """Rate of step 1..total_steps: linear warm-up, then cosine down to min_learning_rate_ratio of the peak."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    low = config.min_learning_rate_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimizer:
    """torch's AdamW plus what parallel ranks need around it. Norms and biases (one dimension) do not decay."""

    def __init__(self, trained: list[Trained], config: LearnerConfig, parallel: Parallel) -> None:
        self.trained, self.config, self.parallel = trained, config, parallel
        load = [0] * parallel.dp_cp_size
        self.owners: list[int] = []  # data-parallel rank that updates each parameter
        for one in trained:
            self.owners.append(load.index(min(load)))
            load[self.owners[-1]] += one.parameter.numel()
        # What AdamW works on: the parameter itself, or its float32 copy.
        mine = (index for index, owner in enumerate(self.owners) if owner == parallel.dp_cp_rank)
        self.masters = {index: self._master(trained[index].parameter) for index in mine}
        by_decay = {decay: [m for m in self.masters.values() if (m.dim() > 1) == decay] for decay in (True, False)}
        groups = [{"params": ms, "weight_decay": config.weight_decay if decay else 0.0} for decay, ms in by_decay.items() if ms]
        self.adam = torch.optim.AdamW(groups, betas=(config.adam_beta1, config.adam_beta2)) if groups else None

    @staticmethod
    def _master(parameter: torch.nn.Parameter) -> Tensor:
        if parameter.dtype in (torch.float32, torch.float64):
            return parameter
        return parameter.detach().float().requires_grad_()

    def moments(self, index: int) -> dict[str, Tensor]:
        """Adam's state of a parameter of this rank's share, made (zeros) if it does not exist yet; a float32 copy comes along."""
        assert self.adam is not None
        master = self.masters[index]
        state = self.adam.state[master]
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        found = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        return found if master is self.trained[index].parameter else found | {"master": master.detach()}

    def restored(self, step: int) -> None:
        """To be called after a checkpoint's numbers were copied into `moments` and the parameters."""
        for index in self.masters:
            self.moments(index)
            assert self.adam is not None
            self.adam.state[self.masters[index]]["step"].fill_(step)

    def reduce_gradients(self) -> None:
        """Adds up what ranks hold in parts: partial sums over the tensor group, everything over the data group."""
        for one in self.trained:
            if one.parameter.grad is None:  # this rank was dealt no sample
                one.parameter.grad = torch.zeros_like(one.parameter)
        if self.parallel.tp_size > 1:
            _all_reduce([_gradient(one) for one in self.trained if one.partial], self.parallel.tp_group)
        if self.parallel.dp_cp_size > 1:
            _all_reduce([_gradient(one) for one in self.trained], self.parallel.dp_cp_group)

    def gradient_norm(self) -> float:
        """Global 2-norm; what tensor parallelism cuts is added over its group, what it replicates is counted once."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.parallel.device)
        for one in self.trained:
            squares[0 if one.shard_dim is None else 1] += torch.linalg.vector_norm(_gradient(one), dtype=torch.float64).square()
        if self.parallel.tp_size > 1:
            dist.all_reduce(squares[1:], group=self.parallel.tp_group)
        return math.sqrt(float(squares.sum()))

    def step(self, rate: float, norm: float) -> None:
        """Clips to clip_grad and updates. Gradients are cleared."""
        scale = min(1.0, self.config.clip_grad / norm) if norm else 1.0
        for index, master in self.masters.items():
            gradient = _gradient(self.trained[index])
            master.grad = gradient if master is self.trained[index].parameter else gradient.float()
            if scale < 1:
                master.grad.mul_(scale)
        if self.adam is not None:
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


def _all_reduce(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sums over the group, a bucket at a time."""
    for flat, tensors in _buckets(gradients):
        dist.all_reduce(flat, group=group)
        _unpack(flat, tensors)
