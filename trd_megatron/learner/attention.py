"""Core attention on PyTorch's scaled_dot_product_attention: causal, grouped queries, one call per packed segment."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trd_megatron.learner.packing import pieces


class SegmentedAttention(MegatronModule):
    """Attention that never crosses the border of a packed sequence.

    A drop-in for Megatron's core_attention with packed_seq_params (format thd). Under context parallelism every rank gathers all keys and
    values, its queries stay where they are: simple, and exact; Transformer Engine's attention passes them round instead.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.cp_size = config.context_parallel_size

    def forward(
        self,
        query: Tensor,  # [T, heads on this rank, head_dim]
        key: Tensor,  # [T, groups on this rank, head_dim]
        value: Tensor,  # [T, groups on this rank, head_dim]
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Returns [T, heads * head_dim]."""
        assert packed_seq_params is not None and packed_seq_params.cu_seqlens_q is not None
        cu_seqlens = packed_seq_params.cu_seqlens_q.cpu()
        if self.cp_size > 1:
            return self._of_pieces(query, key, value, cu_seqlens)
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(_heads_first(tensor).split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        return _tokens_first([scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts])

    def _of_pieces(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The same with this rank's two pieces of every segment (see packing.py): each attends to all keys up to its own last one."""
        group = parallel_state.get_context_parallel_group()
        gathered = torch.cat([pieces(cu_seqlens, self.cp_size, rank) for rank in range(self.cp_size)])  # position of each gathered row
        order = gathered.argsort().to(key.device)
        keys, values = (_heads_first(gather_from_sequence_parallel_region(t.contiguous(), group=group)[order]) for t in (key, value))
        queries, outputs, done = _heads_first(query), [], 0
        rank = parallel_state.get_context_parallel_rank()
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            size = (end - start) // (2 * self.cp_size)
            for piece in (rank, 2 * self.cp_size - 1 - rank):
                seen = (piece + 1) * size
                mask = torch.ones(size, seen, dtype=torch.bool, device=query.device).tril(seen - size)
                k, v = (tensor[:, :, start : start + seen] for tensor in (keys, values))
                outputs.append(scaled_dot_product_attention(queries[:, :, done : done + size], k, v, attn_mask=mask, enable_gqa=True))
                done += size
        return _tokens_first(outputs)


def _heads_first(tensor: Tensor) -> Tensor:
    """[T, heads, head_dim] as [1, heads, T, head_dim], a view."""
    return tensor.transpose(0, 1).unsqueeze(0)


def _tokens_first(outputs: list[Tensor]) -> Tensor:
    """Pieces [1, heads, n, head_dim], in order, as [T, heads * head_dim]."""
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).flatten(1)
