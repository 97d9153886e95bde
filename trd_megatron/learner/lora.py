"""LoRA (Hu et al., 2021) with separate factors for q, k, v, o, gate, up and down on Megatron's fused layers.

Separate factors are what PEFT and the paper's reference train. Factor A is [rank, in], factor B is [out, rank]; B starts at
zero. How they are cut:
  column-parallel layer (q, k, v, gate, up): A replicated, B cut by rows as its layer is;
  row-parallel layer (o, down): A cut by columns as its layer is, B replicated.
Under sequence parallelism a replicated factor sees only its rank's part of the sequence, so its gradient is a partial sum;
such parameters carry `sequence_parallel = True` and optimizer.py adds them up over the tensor-parallel group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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
from trd_megatron.learner.model import Model
from trd_megatron.learner.parallel import Parallel
from trd_megatron.run_dir import digest

PROJECTIONS = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Factor:
    """One trainable tensor of this rank and its place in the whole."""

    name: str  # Hugging Face's, e.g. model.layers.0.self_attn.q_proj.lora_A.weight
    parameter: torch.nn.Parameter
    shard_dim: int | None  # the dimension that tensor parallelism cuts; None: every rank holds all of it


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
        self.dtype = torch.promote_types(next(base.parameters()).dtype, torch.float32)
        self.names = [f"{prefix}.{name}" for name in PROJECTIONS[kind]]
        self.column = kind in ("linear_qkv", "linear_fc1")
        a = model.architecture
        attention, kv = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
        outs = {"linear_qkv": (attention, kv, kv), "linear_proj": (a.hidden_size,), "linear_fc2": (a.hidden_size,)}
        outs["linear_fc1"] = (a.ffn_hidden_size, a.ffn_hidden_size)
        width = {"linear_proj": attention, "linear_fc2": a.ffn_hidden_size}.get(kind, a.hidden_size)
        self.a = torch.nn.ParameterList(self._initial_a(name, config.rank, width, seed) for name in self.names)
        tp = self.parallel.tp_size if self.column else 1
        place: dict[str, Any] = {"device": self.parallel.device, "dtype": self.dtype}
        self.b = torch.nn.ParameterList(torch.zeros(out // tp, config.rank, **place) for out in outs[kind])
        if self.parallel.sequence_parallel:
            for parameter in self.a if self.column else self.b:
                parameter.sequence_parallel = True

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
        inner = torch.nn.functional.linear(x.to(self.dtype), torch.cat(list(self.a)))  # [T or T / tp, 1, projections * rank]
        if self.parallel.tp_size > 1:
            inner = self._exchange(inner)
        outer = [torch.nn.functional.linear(part, b) for part, b in zip(inner.chunk(len(self.b), -1), self.b, strict=True)]
        if self.kind == "linear_qkv":
            update = fuse_qkv(outer, groups=self.architecture.num_query_groups // self.parallel.tp_size, dim=-1)
        else:
            update = torch.cat(outer, dim=-1)
        return output + (self.scale * update).to(output.dtype), bias

    def _exchange(self, inner: torch.Tensor) -> torch.Tensor:
        """The communication of the layer itself, done on `rank` columns instead of the hidden size."""
        if self.column:
            if self.parallel.sequence_parallel:
                return gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True)
            return copy_to_tensor_model_parallel_region(inner)
        if self.parallel.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner)
        return reduce_from_tensor_model_parallel_region(inner)

    def factors(self) -> Iterator[Factor]:
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            yield Factor(f"{name}.lora_A.weight", a, None if self.column else 1)
            yield Factor(f"{name}.lora_B.weight", b, 0 if self.column else None)


class Adapters:
    """All adapters of a student. `off()` turns the student into its own teacher (OPSD)."""

    def __init__(self, model: Model, config: LoraConfig, seed: int) -> None:
        self.layers: list[AdaptedLinear] = []
        for index, layer in enumerate(model.gpt.decoder.layers):
            for owner, kinds in ((layer.self_attention, ("linear_qkv", "linear_proj")), (layer.mlp, ("linear_fc1", "linear_fc2"))):
                for kind in kinds:
                    adapted = AdaptedLinear(getattr(owner, kind), f"model.layers.{index}", kind, model, config, seed)
                    setattr(owner, kind, adapted)
                    self.layers.append(adapted)

    def factors(self) -> list[Factor]:
        """Every trainable tensor, in the same order on every rank."""
        return [factor for layer in self.layers for factor in layer.factors()]

    def enable(self, enabled: bool) -> None:
        for layer in self.layers:
            layer.enabled = enabled
