"""Small random models of every supported architecture, with unequal sizes so that a transposed or swapped tensor cannot pass."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from trd_megatron.builtin_models import resolve_model

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-6,
}
MOE: dict[str, Any] = {
    "head_dim": 12, "tie_word_embeddings": False, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
ARCHITECTURES = {
    "llama": (LlamaConfig, {"head_dim": 12, "tie_word_embeddings": False}),
    "llama3-rope": (
        LlamaConfig,
        {
            "head_dim": 12,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-untied": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"head_dim": 12, "tie_word_embeddings": False}),
    "qwen3-yarn": (
        Qwen3Config,
        {
            "head_dim": 12,
            "tie_word_embeddings": True,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
        },
    ),
    "qwen3-moe": (Qwen3MoeConfig, MOE | {"norm_topk_prob": True}),
    "qwen3-moe-unnormalized": (Qwen3MoeConfig, MOE | {"norm_topk_prob": False}),
}  # fmt: skip


def make(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Saves a random model (no tokenizer of its own: the byte-level one of the built-in models) and returns its folder."""
    kind, extra = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**(SIZES | extra | changes)), dtype=torch.float32)
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a swap
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    for file in resolve_model("builtin:tiny-qwen3").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
