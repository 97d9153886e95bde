"""Core attention on PyTorch's scaled_dot_product_attention: causal, grouped queries, one call per packed segment."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention


class SegmentedAttention(MegatronModule):
    """Attention that never crosses the border of a packed sequence and never builds a mask.

    A drop-in for Megatron's core_attention with packed_seq_params (format thd).
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str, **kwargs: Any) -> None:
        super().__init__(config=config)

    def forward(
        self,
        query: torch.Tensor,  # [T, heads on this rank, head_dim]
        key: torch.Tensor,  # [T, groups on this rank, head_dim]
        value: torch.Tensor,  # [T, groups on this rank, head_dim]
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Returns [T, heads * head_dim]."""
        assert packed_seq_params is not None and packed_seq_params.cu_seqlens_q is not None
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        outputs = [
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            for q, k, v in zip(*(tensor.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        ]
        return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).flatten(1)
