"""What is trained, rank by rank: LoRA factors or every parameter of the model, under the names of the Hugging Face tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.mapping import Entry, entries, fuse_local, shard_dim, split_local


@dataclass(frozen=True)
class Trained:
    """One trained parameter of this rank and the whole tensors that it holds parts of."""

    parameter: torch.nn.Parameter
    names: tuple[str, ...]  # Hugging Face's, e.g. model.layers.0.self_attn.q_proj.lora_A.weight; several for a fused layer
    shard_dim: int | None  # the dimension that tensor parallelism cuts; None: every rank holds all of it
    partial: bool  # each rank of the tensor-parallel group has a part of the gradient's sum
    entry: Entry | None = None  # of a parameter of the model itself
    groups: int = 0  # query groups on this rank, for a fused q, k, v
    heads: int = 0  # query heads on this rank

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """This rank's parts of `names` in a tensor of the parameter's shape (the parameter, its gradient, a moment)."""
        parts = [tensor] if self.entry is None else split_local(self.entry, tensor, self.heads, self.groups)
        return dict(zip(self.names, parts, strict=True))

    def join(self, parts: dict[str, Tensor]) -> Tensor:
        """The inverse of split."""
        ordered = [parts[name] for name in self.names]
        return ordered[0] if self.entry is None else fuse_local(self.entry, ordered, self.groups)


def every_parameter(gpt: torch.nn.Module, architecture: Architecture, tp_size: int, sequence_parallel: bool) -> list[Trained]:
    """All parameters of a GPTModel, in the order of the name table, the same on every rank."""
    parameters = dict(gpt.named_parameters())
    trained = []
    for entry in entries(architecture):
        name = entry.megatron
        # A norm sees a part of the sequence under sequence parallelism; the norms of q and k see this rank's heads only.
        partial = entry.kind == "replicated" and (sequence_parallel or "q_layernorm" in name or "k_layernorm" in name)
        groups, heads = architecture.num_query_groups // tp_size, architecture.num_attention_heads // tp_size
        trained.append(Trained(parameters[name], entry.hf, shard_dim(entry), partial and tp_size > 1, entry, groups, heads))
    return trained
