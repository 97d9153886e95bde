"""Which Adam and which functions over many tensors are used where; the same numbers whichever."""

from typing import Any

import pytest
import torch
from megatron.core import optimizer as megatron
from megatron.core.optimizer import clip_grads

from trd_megatron.config import LearnerConfig
from trd_megatron.learner import fused
from trd_megatron.learner.distributed_optimizer import uses_megatron

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def found(monkeypatch: pytest.MonkeyPatch, module: str) -> type:
    """Makes Megatron's Adam one of `module`, as it is when that package is installed."""
    made: Any = type("FusedAdam", (torch.optim.SGD,), {"__module__": module, "__init__": lambda self, groups, betas: None})
    monkeypatch.setattr(megatron, "Adam", made)
    return made


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("transformer_engine.pytorch.optimizers.fused_adam", "Transformer Engine's FusedAdam"),
        ("apex.optimizers.fused_adam", "Apex's FusedAdam"),
        ("torch.optim.adamw", "PyTorch's AdamW (fused)"),
    ],
)
def test_the_fused_adam_that_is_installed_is_used_on_gpus(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = found(monkeypatch, module)
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.0}]
    used = fused.adam(groups, (0.9, 0.95), CUDA, torch.float32)
    assert fused.adam_name(used) == name
    assert isinstance(used, made) == (not module.startswith("torch"))
    exact = fused.adam(groups, (0.9, 0.95), CUDA, torch.float64)
    assert fused.adam_name(exact) == "PyTorch's AdamW (fused)"  # theirs have no kernels for float64
    plain = fused.adam(groups, (0.9, 0.95), CPU, torch.float32)
    assert fused.adam_name(plain) == "PyTorch's AdamW"
    assert isinstance(plain, torch.optim.AdamW)
    assert not plain.defaults["fused"]


@pytest.mark.parametrize("grouped", [False, True])
def test_the_number_of_steps_is_restored_where_the_optimizer_counts_it(grouped: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    adam: torch.optim.Optimizer = torch.optim.AdamW([parameter])
    if grouped:  # as Transformer Engine's and Apex's
        adam = torch.optim.Adam([parameter])
    assert set(fused.moments(adam, parameter)) == {"exp_avg", "exp_avg_sq"}
    fused.set_step(adam, 7)
    assert adam.param_groups[0].get("step") == (7 if grouped else None)
    if not grouped:
        assert adam.state[parameter]["step"] == 7
        parameter.grad = torch.ones(3)
        adam.step()
        assert adam.state[parameter]["step"] == 8


def test_installed_multi_tensor_functions_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(5, 3), torch.randn(7)]
    expected = torch.cat([tensor.flatten() for tensor in tensors]).double().square().sum()
    torch.testing.assert_close(fused.square_sum(tensors, CPU), expected)
    assert fused.square_sum([], CPU).item() == 0
    copies = [tensor.clone() for tensor in tensors]
    fused.scale(copies, 0.5)
    used = []

    def norm(chunk: int, noop: torch.Tensor, lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple[torch.Tensor, None]:
        used.append("norm")
        return torch.stack([tensor.norm() for tensor in lists[0]]).norm().reshape(1), None

    def scale(chunk: int, noop: torch.Tensor, lists: list[list[torch.Tensor]], factor: float) -> None:
        used.append("scale")
        for source, target in zip(*lists, strict=True):
            target.copy_(source * factor)

    monkeypatch.setattr(fused, "_package", lambda device, dtype: "Transformer Engine")
    monkeypatch.setattr(clip_grads, "l2_norm_impl", norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", scale)
    torch.testing.assert_close(fused.square_sum(tensors, CPU), expected, check_dtype=True, rtol=1e-6, atol=0)
    fused.scale(tensors, 0.5)
    assert used == ["norm", "scale"]
    for mine, theirs in zip(copies, tensors, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("trainable", "device", "dtype", "expected"),
    [
        ("full", CUDA, "bfloat16", True),
        ("full", CUDA, "float32", True),
        ("full", CUDA, "float64", False),
        ("lora", CUDA, "bfloat16", False),
        ("full", CPU, "float32", False),
    ],
)
def test_megatrons_optimizer_trains_every_parameter_on_gpus(trainable: str, device: torch.device, dtype: str, expected: bool) -> None:
    assert uses_megatron(LearnerConfig(trainable=trainable, dtype=dtype), device) == expected
