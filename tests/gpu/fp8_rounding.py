"""The learner on the CPU with the operands of its layers' products rounded as an fp8 recipe does: where the bounds of fp8 come from.

Scales come from the largest element of what they hold for (delayed scaling takes an earlier one, and 1 at the start: `unscaled`).
Products, sums and everything else stay in float32.
"""

from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn.utils import parametrize

from tests.dist import learner_cases as cases
from trd_megatron.learner.train import Trainer

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Rounding(NamedTuple):
    """To a format, with a scale for each block [rows, columns] of the operand; None: all of it. whole: scales are powers of two."""

    format: torch.dtype
    block: tuple[int, int] | None = None
    whole: bool = False
    scaled: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        top = torch.finfo(self.format).max
        flat = x.detach().reshape(-1, x.shape[-1])
        rows, columns = self.block or flat.shape
        blocks = flat.reshape(len(flat) // rows, rows, -1, columns)
        scale = top / blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-30) if self.scaled else torch.ones(())
        if self.whole:
            scale = scale.log2().floor().exp2()
        return ((blocks * scale).clamp(-top, top).to(self.format).to(x.dtype) / scale).reshape(x.shape)


class Recipe(NamedTuple):
    activations: Rounding
    weights: Rounding
    gradients: Rounding


RECIPES = {
    "unscaled": Recipe(Rounding(E4M3, scaled=False), Rounding(E4M3, scaled=False), Rounding(E5M2, scaled=False)),
    "current": Recipe(Rounding(E4M3), Rounding(E4M3), Rounding(E5M2)),
    "blockwise": Recipe(Rounding(E4M3, (1, 128), True), Rounding(E4M3, (128, 128), True), Rounding(E4M3, (1, 128), True)),
    "mxfp8": Recipe(*[Rounding(E4M3, (1, 32), True)] * 3),
}


class _Rounded(torch.nn.Module):
    """The gradient goes through as it is."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.rounding(x) - x).detach()


def _round(trainer: Trainer, recipe: Recipe) -> None:
    def inputs(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_Rounded(recipe.activations)(arguments[0]), *arguments[1:])

    def outputs(module: Any, arguments: Any, output: tuple[Tensor, Any]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(recipe.gradients)

    decoders = {id(model): model.gpt.decoder for model in (trainer.student, trainer.teacher.model)}
    for decoder in decoders.values():
        for module in list(decoder.modules()):
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                parametrize.register_parametrization(module, "weight", _Rounded(recipe.weights))
                module.register_forward_pre_hook(inputs)
                module.register_forward_hook(outputs)


def traced_steps(rank: int, built: list[cases.Case], rates: list[float]) -> dict[str, list[cases.Steps]]:
    """As learner_cases.traced_steps on one rank, for each recipe."""
    return {
        name: [
            cases._traced_steps(case, (1, False, 1), {}, rates, lambda trainer, recipe=recipe: _round(trainer, recipe)) for case in built
        ]
        for name, recipe in RECIPES.items()
    }
