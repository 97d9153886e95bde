"""What is written beside a Megatron checkpoint, so that nobody types an architecture: Megatron-Bridge's run_config.yaml and
Megatron-LM's arguments."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import yaml

from trd_megatron.convert.architecture import Architecture
from trd_megatron.run_dir import versions

RUN_CONFIG = "run_config.yaml"


def write(folder: Path, architecture: Architecture, dtype: torch.dtype, tensor_model_parallel_size: int, source: str) -> None:
    """Writes run_config.yaml: `model` as Megatron-Bridge 0.6 instantiates it, and `trd_megatron`, where the weights come from."""
    content = {
        "model": bridge_model(architecture, dtype, tensor_model_parallel_size),
        "tokenizer": {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": source,
        },
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False},
        "trd_megatron": {"source": source, "versions": versions(), "megatron_lm_flags": " ".join(megatron_lm_flags(architecture))},
    }
    (folder / RUN_CONFIG).write_text(yaml.safe_dump(content, sort_keys=False, width=1000), encoding="utf-8")


def _symbol(name: str) -> dict[str, Any]:
    return {"_target_": name, "_call_": False}


def bridge_model(architecture: Architecture, dtype: torch.dtype, tensor_model_parallel_size: int) -> dict[str, Any]:
    """The arguments of Megatron-Bridge's GPTModelProvider."""
    a = architecture
    model: dict[str, Any] = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.head_dim,
        "vocab_size": a.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "should_pad_vocab": True,
        "seq_length": a.max_position_embeddings,
        "normalization": "RMSNorm",
        "layernorm_epsilon": a.norm_eps,
        "qk_layernorm": a.qk_norm,
        "gated_linear_unit": True,
        "activation_func": _symbol("torch.nn.functional.silu"),
        "add_bias_linear": False,
        "add_qkv_bias": a.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "share_embeddings_and_output_weights": a.tied_embeddings,
        "position_embedding_type": "yarn" if a.rope.kind == "yarn" else "rope",
        "rotary_base": a.rope.theta,
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": 1,
        "params_dtype": _symbol(str(dtype)),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }
    if a.rope.kind == "llama3":
        model |= {"rope_scaling": True, "rope_scaling_factor": a.rope.factor}
    if a.rope.kind == "yarn":
        model |= yarn(a)
    if a.experts is not None:
        model |= {
            "num_moe_experts": a.experts.count,
            "moe_router_topk": a.experts.per_token,
            "moe_ffn_hidden_size": a.experts.ffn_hidden_size,
            "moe_router_pre_softmax": not a.experts.normalized,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 1e-3,
            "moe_grouped_gemm": True,
            "moe_token_dispatcher_type": "alltoall",
        }
    return model


def yarn(architecture: Architecture) -> dict[str, Any]:
    """Megatron-Core's names for YaRN's settings, attributes of its TransformerConfig."""
    rope = architecture.rope
    mscale, mscale_all_dim = rope.mscales or (None, None)
    return {
        "yarn_rotary_scaling_factor": rope.factor,
        "yarn_original_max_position_embeddings": rope.original_max_position_embeddings,
        "yarn_beta_fast": rope.beta_fast,
        "yarn_beta_slow": rope.beta_slow,
        "yarn_mscale": mscale,
        "yarn_mscale_all_dim": mscale_all_dim,
        "yarn_correction_range_round_to_int": rope.truncate,
    }


def megatron_lm_args(architecture: Architecture, dtype: torch.dtype) -> Namespace:
    """Megatron-LM's arguments, by the names under which `--use-checkpoint-args` looks for them in a checkpoint."""
    a = architecture
    args: dict[str, Any] = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "group_query_attention": a.num_query_groups != a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.head_dim,
        "seq_length": a.max_position_embeddings,
        "max_position_embeddings": a.max_position_embeddings,
        "position_embedding_type": "yarn" if a.rope.kind == "yarn" else "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": a.rope.theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": a.rope.kind == "llama3",
        "rope_scaling_factor": a.rope.factor,
        "add_bias_linear": False,
        "add_qkv_bias": a.qkv_bias,
        "qk_layernorm": a.qk_norm,
        "swiglu": True,
        "squared_relu": False,
        "untie_embeddings_and_output_weights": not a.tied_embeddings,
        "normalization": "RMSNorm",
        "norm_epsilon": a.norm_eps,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
    }
    if a.experts is not None:
        args |= {
            "num_experts": a.experts.count,
            "moe_layer_freq": 1,
            "moe_router_topk": a.experts.per_token,
            "moe_ffn_hidden_size": a.experts.ffn_hidden_size,
            "moe_router_pre_softmax": not a.experts.normalized,
        }
    return Namespace(**args)


def megatron_lm_flags(architecture: Architecture) -> list[str]:
    """The same as command-line flags of Megatron-LM; `--use-checkpoint-args` alone does not carry all of them over."""
    a = architecture
    flags = [
        f"--num-layers {a.num_layers} --hidden-size {a.hidden_size} --ffn-hidden-size {a.ffn_hidden_size}",
        f"--num-attention-heads {a.num_attention_heads} --kv-channels {a.head_dim}",
        f"--max-position-embeddings {a.max_position_embeddings} --seq-length {a.max_position_embeddings}",
        f"--position-embedding-type {'yarn' if a.rope.kind == 'yarn' else 'rope'} --rotary-base {a.rope.theta:.0f}",
        f"--normalization RMSNorm --norm-epsilon {a.norm_eps} --swiglu --disable-bias-linear",
        "--attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 1",
    ]
    if a.num_query_groups != a.num_attention_heads:
        flags.append(f"--group-query-attention --num-query-groups {a.num_query_groups}")
    if a.rope.kind == "llama3":
        flags.append(f"--use-rope-scaling --rope-scaling-factor {a.rope.factor}")
    if a.qkv_bias:
        flags.append("--add-qkv-bias")
    if a.qk_norm:
        flags.append("--qk-layernorm")
    if not a.tied_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    if a.experts is not None:
        flags.append(f"--num-experts {a.experts.count} --moe-router-topk {a.experts.per_token}")
        flags.append(f"--moe-ffn-hidden-size {a.experts.ffn_hidden_size}")
        if not a.experts.normalized:
            flags.append("--moe-router-pre-softmax")
    return flags
