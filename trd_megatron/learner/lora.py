"""LoRA (Hu et al., 2021) with separate factors for q, k, v, o, gate, up and down on Megatron's fused layers.

Separate factors are what PEFT and the paper's reference train. Factor A is [rank, in], factor B is [out, rank]; B starts at
zero. How they are cut:
  column-parallel layer (q, k, v, gate, up): A replicated, B cut by rows as its layer is;
  row-parallel layer (o, down): A cut by columns as its layer is, B replicated.
Under sequence parallelism a replicated factor sees only its rank's part of the sequence, so its gradient is a partial sum;
such parameters are marked `partial` and optimizer.py adds them up over the tensor-parallel group.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from trd_megatron.config import LoraConfig
from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.mapping import fuse_qkv
from trd_megatron.learner.dropout import keep_mask, key
from trd_megatron.learner.model import Model
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.trained import Trained
from trd_megatron.run_dir import digest

PROJECTIONS = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}


class AdaptedLinear(torch.nn.Module):
    """A Megatron linear layer plus the adapters of the projections that it fuses."""

    def __init__(self, base: torch.nn.Module, prefix: str, kind: str, model: Model, config: LoraConfig, seed: int) -> None:
        super().__init__()
        self.base = base
        self.kind = kind
        self.enabled = True
        self.parallel: Parallel = model.parallel
        self.architecture: Architecture = model.architecture
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.row_keys: torch.Tensor | None = None  # [T]; None: nothing is dropped
        self.dtype = torch.promote_types(next(base.parameters()).dtype, torch.float32)
        self.column = kind in ("linear_qkv", "linear_fc1")
        sizes = [model.architecture.projections()[name.split(".")[1]] for name in PROJECTIONS[kind]]  # (inputs, outputs)
        width = sizes[0][0]
        tp = self.parallel.tp_size if self.column else 1
        self.outs = [out // tp for _, out in sizes]  # of every projection that the layer fuses, adapted or not
        adapted = [i for i, name in enumerate(PROJECTIONS[kind]) if name.split(".")[1] in config.targets]
        self.slots = adapted
        self.names = [f"{prefix}.{PROJECTIONS[kind][i]}" for i in adapted]
        place: dict[str, Any] = {"device": self.parallel.device, "dtype": self.dtype}
        self.a = torch.nn.ParameterList(self._initial_a(name, config.rank, width, seed) for name in self.names)
        self.b = torch.nn.ParameterList(torch.zeros(self.outs[i], config.rank, **place) for i in adapted)

    def _initial_a(self, name: str, rank: int, width: int, seed: int) -> torch.nn.Parameter:
        """Kaiming-uniform as in PEFT. Drawn in full from the layer's name, then cut, so that no layout changes it."""
        generator = torch.Generator().manual_seed(int(digest([seed, name])[:15], 16))
        bound = width**-0.5
        full = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
        if not self.column:
            full = full.chunk(self.parallel.tp_size, dim=1)[self.parallel.tp_rank].contiguous()
        return torch.nn.Parameter(full.to(self.parallel.device, self.dtype))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = self.base(x)
        if not self.enabled:
            return output, bias
        # The factors are float32 or float64; their products are made in the activations' precision, as the layer's own.
        if self.row_keys is None:
            inner = torch.nn.functional.linear(x, torch.cat(list(self.a)).to(x.dtype))  # [T or T / tp, 1, projections * rank]
        else:  # each adapter drops its own inputs, as in PEFT
            pairs = zip(self.names, self.a, strict=True)
            inner = torch.cat([torch.nn.functional.linear(self._dropped(x, name), a.to(x.dtype)) for name, a in pairs], dim=-1)
        if self.parallel.tp_size > 1:
            inner = self._exchange(inner)
        return output + torch.nn.functional.linear(inner, self._outer_weight().to(x.dtype)), bias

    def _outer_weight(self) -> torch.Tensor:
        """[out, projections * rank]: every B in columns of its own, its rows where the fused layer has them, times alpha / rank.

        One product then gives the whole update: putting the projections' parts together takes longer than multiplying the zeros.
        """
        rank, width = self.b[0].shape[1], sum(b.shape[1] for b in self.b)
        rows = [self.b[0].new_zeros(out, width) for out in self.outs]
        for place, (slot, b) in enumerate(zip(self.slots, self.b, strict=True)):
            rows[slot] = torch.nn.functional.pad(b, (place * rank, width - (place + 1) * rank))
        groups = self.architecture.num_query_groups // self.parallel.tp_size
        return self.scale * (fuse_qkv(rows, groups) if self.kind == "linear_qkv" else torch.cat(rows))

    def _dropped(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x [T or T / tp, 1, width or width / tp] with a share of its elements at 0 and the others scaled up."""
        assert self.row_keys is not None
        rows, rank = self.row_keys, self.parallel.tp_rank
        if self.column and self.parallel.sequence_parallel:
            rows = rows.chunk(self.parallel.tp_size)[rank]
        first = 0 if self.column else rank * x.shape[-1]
        columns = torch.arange(first, first + x.shape[-1], device=x.device)
        kept = keep_mask(rows, columns, key(name), self.dropout).unsqueeze(1)
        return x * kept / (1 - self.dropout)

    def _exchange(self, inner: torch.Tensor) -> torch.Tensor:
        """The communication of the layer itself, done on `rank` columns instead of the hidden size."""
        if self.column:
            if self.parallel.sequence_parallel:
                return gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True)
            return copy_to_tensor_model_parallel_region(inner)
        if self.parallel.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner)
        return reduce_from_tensor_model_parallel_region(inner)

    def trained(self) -> Iterator[Trained]:
        partial = self.parallel.sequence_parallel
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            yield Trained(a, (f"{name}.lora_A.weight",), None if self.column else 1, partial and self.column)
            yield Trained(b, (f"{name}.lora_B.weight",), 0 if self.column else None, partial and not self.column)


class Adapters:
    """All adapters of a student. `off()` turns the student into its own teacher (OPSD)."""

    def __init__(self, model: Model, config: LoraConfig, seed: int) -> None:
        self.layers: list[AdaptedLinear] = []
        for index, layer in enumerate(model.gpt.decoder.layers):
            for owner, kinds in ((layer.self_attention, ("linear_qkv", "linear_proj")), (layer.mlp, ("linear_fc1", "linear_fc2"))):
                for kind in kinds:
                    if not any(name.split(".")[1] in config.targets for name in PROJECTIONS[kind]):
                        continue
                    adapted = AdaptedLinear(getattr(owner, kind), f"model.layers.{index}", kind, model, config, seed)
                    setattr(owner, kind, adapted)
                    self.layers.append(adapted)

    def drop(self, row_keys: torch.Tensor | None) -> None:
        """Sets the keys of the positions [T] of the next forward and its backward, for dropout; None: no dropout."""
        for layer in self.layers:
            layer.row_keys = row_keys if layer.dropout else None

    def trained(self) -> list[Trained]:
        """Every factor, in the same order on every rank."""
        return [one for layer in self.layers for one in layer.trained()]

    def enable(self, enabled: bool) -> None:
        for layer in self.layers:
            layer.enabled = enabled
