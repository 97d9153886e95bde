"""Adam and the functions over many tensors at once: Transformer Engine's or Apex's where they are installed, else torch's.

The one place that chooses. Megatron-Core looks for Transformer Engine first, then for Apex; what it found is used here too.
"""

from typing import Any

import torch
from megatron.core import optimizer as megatron
from megatron.core.optimizer import clip_grads
from torch import Tensor

_PACKAGES = {"transformer_engine": "Transformer Engine", "apex": "Apex"}


def _package(device: torch.device, dtype: torch.dtype) -> str | None:
    """Whose kernels do the work; None: torch's own. Theirs know no CPU and no float64."""
    if device.type != "cuda" or dtype == torch.float64:
        return None
    return _PACKAGES.get(megatron.Adam.__module__.partition(".")[0])


def adam_name(adam: torch.optim.Optimizer) -> str:
    """Which Adam this is, for logs."""
    if isinstance(adam, torch.optim.AdamW):
        return "PyTorch's AdamW (fused)" if adam.defaults["fused"] else "PyTorch's AdamW"
    return f"{_PACKAGES[type(adam).__module__.partition('.')[0]]}'s {type(adam).__name__}"


def adam(groups: list[dict[str, Any]], betas: tuple[float, float], device: torch.device, dtype: torch.dtype) -> torch.optim.Optimizer:
    """AdamW over parameter groups of one dtype on one device."""
    if _package(device, dtype):
        return megatron.Adam(groups, betas=betas)  # decoupled weight decay is their default
    return torch.optim.AdamW(groups, betas=betas, fused=device.type == "cuda")


def moments(adam: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """exp_avg and exp_avg_sq of a parameter, made (zeros) if they do not exist yet."""
    state = adam.state[parameter]
    if not state:
        state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        if isinstance(adam, torch.optim.AdamW):  # the others count steps by group
            state["step"] = torch.tensor(0.0, device=parameter.device if adam.defaults["fused"] else "cpu")
    return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}


def set_step(adam: torch.optim.Optimizer, step: int) -> None:
    """Sets how many updates were made, after the moments were restored."""
    for group in adam.param_groups:
        if isinstance(adam, torch.optim.AdamW):
            for parameter in group["params"]:
                moments(adam, parameter)
                adam.state[parameter]["step"].fill_(step)
        else:
            group["step"] = step


def square_sum(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of all squares, a float64 tensor without dimensions."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    if _package(device, tensors[0].dtype):
        overflow = torch.zeros(1, dtype=torch.int, device=device)
        norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [tensors], False)
        return norm.double().square().sum()
    return torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]).square().sum()


def scale(tensors: list[Tensor], factor: float) -> None:
    """Multiplies all tensors in place."""
    if not tensors:
        return
    if _package(tensors[0].device, tensors[0].dtype):
        overflow = torch.zeros(1, dtype=torch.int, device=tensors[0].device)
        clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, overflow, [tensors, tensors], factor)
    else:
        torch._foreach_mul_(tensors, factor)
