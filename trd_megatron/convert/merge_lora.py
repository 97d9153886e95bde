"""A base model with an adapter merged into it: a Source."""

import torch

from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.mapping import Entry, entries, expected_shapes
from trd_megatron.convert.peft import Adapter
from trd_megatron.convert.source import Source
from trd_megatron.errors import UserError


class Merged:
    """weight + scale * B A, in float32 (float64 of float64 weights), rounded once to the dtype that is written."""

    def __init__(self, base: Source, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
        """Checks every name and shape before anything is computed. dtype None: the base's. Raises UserError if the adapter does not fit."""
        self.path, self.architecture, self.companions = base.path, base.architecture, base.companions
        self._base, self._adapter, self._dtype = base, adapter, dtype
        check_fits(adapter, base.architecture, str(base.path))

    def dtype(self, entry: Entry) -> torch.dtype:
        return self._dtype or self._base.dtype(entry)

    def read(self, entry: Entry) -> list[torch.Tensor]:
        return [self._merged(name, tensor) for name, tensor in zip(entry.hf, self._base.read(entry), strict=True)]

    def _merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if module in self._adapter.modules:
            wide = torch.promote_types(weight.dtype, torch.float32)
            a, b = (factor.to(wide) for factor in self._adapter.pair(module))
            return (weight.to(wide) + self._adapter.scale * (b @ a)).to(self._dtype or weight.dtype)
        return weight.to(self._dtype or weight.dtype)


def check_fits(adapter: Adapter, architecture: Architecture, base: str) -> None:
    """Raises UserError if a matrix that the adapter changes is not in the architecture, or has another shape there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(architecture):
        shapes |= zip(entry.hf, expected_shapes(entry, architecture), strict=True)
    for module in adapter.modules:
        name = f"{module}.weight"
        a, b = adapter.pair(module)
        if shapes.get(name) != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            has = f"is {shapes[name]}" if name in shapes else "does not exist"
            raise UserError(f"adapter {adapter.path} does not fit {base}: {name} {has} there, B A is {tuple(b.shape)} x {tuple(a.shape)}")
