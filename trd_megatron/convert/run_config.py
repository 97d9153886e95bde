"""What is written beside a Megatron checkpoint, so that nobody types an architecture: Megatron-Bridge's run_config.yaml, with
Megatron-LM's flags in it."""

from pathlib import Path
from typing import Any

import torch
import yaml

from trd_megatron.convert.architecture import Architecture
from trd_megatron.run_dir import versions

RUN_CONFIG = "run_config.yaml"


def write(
    folder: Path, architecture: Architecture, dtype: torch.dtype, tensor_model_parallel_size: int, *, source: str, tokenizer: str
) -> None:
    """Writes run_config.yaml: `model` and `tokenizer` as Megatron-Bridge 0.6 instantiates them, and `trd_megatron`, where the weights come
    from. tokenizer: the folder that has one."""
    flags = " ".join(megatron_lm_flags(architecture, tensor_model_parallel_size))
    content = {
        "model": bridge_model(architecture, dtype, tensor_model_parallel_size),
        "tokenizer": {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": tokenizer,
        },
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False},
        "trd_megatron": {"source": source, "versions": versions(), "megatron_lm_flags": flags},
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
            "moe_aux_loss_coeff": a.experts.aux_loss_coefficient,
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


def megatron_lm_flags(architecture: Architecture, tensor_model_parallel_size: int) -> list[str]:
    """The architecture as command-line flags of Megatron-LM. Its --use-checkpoint-args would not carry all of it over."""
    a, rope = architecture, architecture.rope
    flags = [
        f"--num-layers {a.num_layers} --hidden-size {a.hidden_size} --ffn-hidden-size {a.ffn_hidden_size}",
        f"--num-attention-heads {a.num_attention_heads} --kv-channels {a.head_dim}",
        f"--max-position-embeddings {a.max_position_embeddings} --seq-length {a.max_position_embeddings}",
        f"--padded-vocab-size {a.padded_vocab_size(tensor_model_parallel_size)}",
        f"--position-embedding-type {'yarn' if rope.kind == 'yarn' else 'rope'} --rotary-base {rope.theta:.0f}",
        f"--normalization RMSNorm --norm-epsilon {a.norm_eps:g} --swiglu --disable-bias-linear",
        "--attention-dropout 0 --hidden-dropout 0",
    ]
    if a.num_query_groups != a.num_attention_heads:
        flags.append(f"--group-query-attention --num-query-groups {a.num_query_groups}")
    if rope.kind == "llama3":
        flags.append(f"--use-rope-scaling --rope-scaling-factor {rope.factor:g}")
    if rope.kind == "yarn":
        flags.append(
            f"--rotary-scaling-factor {rope.factor:g} --yarn-original-max-position-embeddings {rope.original_max_position_embeddings}"
        )
        flags.append(f"--yarn-beta-fast {rope.beta_fast:g} --yarn-beta-slow {rope.beta_slow:g}")
        flags.append(f"--{'' if rope.truncate else 'no-'}yarn-correction-range-round-to-int --no-rope-fusion")
        if rope.mscales is not None:
            flags.append(f"--mscale {rope.mscales[0]:g} --mscale-all-dim {rope.mscales[1]:g}")
    if a.qkv_bias:
        flags.append("--add-qkv-bias")
    if a.qk_norm:
        flags.append("--qk-layernorm")
    if not a.tied_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    if a.experts is not None:
        flags.append(f"--num-experts {a.experts.count} --moe-router-topk {a.experts.per_token}")
        flags.append(f"--moe-ffn-hidden-size {a.experts.ffn_hidden_size} --moe-router-load-balancing-type aux_loss")
        flags.append(f"--moe-aux-loss-coeff {a.experts.aux_loss_coefficient:g}")
        if not a.experts.normalized:
            flags.append("--moe-router-pre-softmax")
    return flags
