"""A Megatron-Core GPTModel from a Hugging Face folder, and its hidden states."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from trd_megatron.config import LearnerConfig
from trd_megatron.convert.architecture import Architecture, Rope
from trd_megatron.learner.attention import SegmentedAttention
from trd_megatron.learner.packing import Packing
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.stack import Installed, Stack, choose
from trd_megatron.learner.trained import Trained, every_parameter
from trd_megatron.learner.weights import load_hf, load_megatron


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight with float32 statistics. Works under sequence parallelism, which Megatron's own torch norm refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Yarn(YarnRotaryEmbedding):
    """Megatron's, without its tables of sines and cosines: decoding alone reads them, and context parallelism would cut them."""

    def __init__(self, head_dim: int, rope: Rope, use_cpu_initialization: bool) -> None:
        super().__init__(
            head_dim,
            rotary_base=rope.theta,
            use_cpu_initialization=use_cpu_initialization,
            scaling_factor=rope.factor,
            original_max_position_embeddings=rope.original_max_position_embeddings,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            correction_range_round_to_int=rope.truncate,
        )

    def _set_cos_sin_cache(self, *args: Any, **kwargs: Any) -> None:
        pass


def transformer_config(
    architecture: Architecture, config: LearnerConfig, parallel: Parallel, stack: Stack, offloaded: bool = False
) -> TransformerConfig:
    """Megatron's configuration of this model on this layout. offloaded: its weights are not always on the device."""
    dtype = getattr(torch, config.dtype)
    granularities: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    fp8: dict[str, Any] = {}
    if stack.fp8 is not None:
        fp8 = {
            "fp8": stack.fp8.number_format,
            "fp8_recipe": stack.fp8.megatron,
            "fp8_amax_history_len": 1024,  # delayed scaling as Transformer Engine's own defaults have it
            "fp8_amax_compute_algo": "max",
            "disable_parameter_transpose_cache": offloaded,  # or the fp8 weights would stay on the device
            "tp_only_amax_red": True,  # data-parallel ranks have different numbers of micro-batches
            "first_last_layers_bf16": config.fp8_bf16_layers > 0,
            "num_layers_at_start_in_bf16": config.fp8_bf16_layers,
            "num_layers_at_end_in_bf16": config.fp8_bf16_layers,
        }
    experts: dict[str, Any] = {}
    if architecture.experts is not None:
        experts = {
            "num_moe_experts": architecture.experts.count,
            "moe_router_topk": architecture.experts.per_token,
            "moe_ffn_hidden_size": architecture.experts.ffn_hidden_size,
            # The softmax is float32's, as in transformers. Over the chosen experts alone, its values sum to 1.
            "moe_router_pre_softmax": not architecture.experts.normalized,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "allgather",  # every rank holds a part of every expert
        }
    megatron = TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=architecture.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp_size,
        context_parallel_size=parallel.cp_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # every weight is loaded
        use_cpu_initialization=parallel.device.type == "cpu",
        bias_dropout_fusion=False,
        bias_activation_fusion=parallel.device.type == "cuda",  # SwiGLU in one kernel, compiled by PyTorch
        masked_softmax_fusion=False,
        # Transformer Engine's fused RoPE knows no attention factor.
        apply_rope_fusion=stack.transformer_engine and architecture.rope.kind != "yarn",
        gradient_accumulation_fusion=stack.gradient_accumulation_fusion,
        persist_layer_norm=False,
        **granularities[config.recompute],
        **experts,
        **fp8,
    )
    if architecture.rope.kind == "yarn":
        # No fields of the configuration, but where they are, Megatron's attention multiplies sines and cosines with YaRN's factor.
        factor: Any = megatron
        factor.yarn_rotary_scaling_factor = architecture.rope.factor
        factor.yarn_mscale, factor.yarn_mscale_all_dim = architecture.rope.mscales or (None, None)
    return megatron


def block_spec(architecture: Architecture, stack: Stack) -> TransformerBlockSubmodules:
    """Megatron's own layer with our norm and our packed attention, or with Transformer Engine's modules.

    Transformer Engine's norms stay apart from the linear layers that follow, which it could fuse: the adapters need what lies between.
    Parameters have the same names either way.
    """
    norm: Any = RMSNorm
    count = architecture.experts.count if architecture.experts is not None else None
    spec = get_gpt_layer_local_spec(num_experts=count, qk_layernorm=architecture.qk_norm, normalization="RMSNorm")
    layer = spec.submodules
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    if count is not None:
        mlp = mlp.experts.submodules  # one expert's
        # This norm keeps its own name in checkpoints: with Transformer Engine too, no linear layer follows that could hold it.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        # Without Transformer Engine, Megatron-Core 0.16 forgets to say that its product for the router is not there.
        vars(moe_utils).setdefault("te_general_gemm", None)
    if stack.transformer_engine:
        from megatron.core.extensions import transformer_engine as te

        norm = te.TENorm
        attention.linear_qkv, attention.linear_proj = te.TEColumnParallelLinear, te.TERowParallelLinear
        mlp.linear_fc1, mlp.linear_fc2 = te.TEColumnParallelLinear, te.TERowParallelLinear
        attention.core_attention = te.TEDotProductAttention
    else:
        attention.core_attention = SegmentedAttention
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    if architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[spec] * architecture.num_layers, layer_norm=norm)


def gpt_model(architecture: Architecture, config: TransformerConfig, spec: TransformerBlockSubmodules, **stage: bool) -> GPTModel:
    """Megatron's model, its weights not set. stage: pre_process and post_process, of a pipeline stage that is not the only one."""
    a, rope = architecture, architecture.rope
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=a.padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=a.max_position_embeddings,
        share_embeddings_and_output_weights=a.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=rope.theta,
        rope_scaling=rope.kind == "llama3",
        rope_scaling_factor=rope.factor,
        **stage,
    )
    if rope.kind == "yarn":
        gpt.position_embedding_type = "yarn"
        gpt.rotary_pos_emb = Yarn(a.head_dim, rope, config.use_cpu_initialization)
    return gpt


class Model:
    """A GPTModel on this rank. Adapters are added to `gpt` by lora.py."""

    def __init__(
        self,
        folder: Path,
        config: LearnerConfig,
        parallel: Parallel,
        *,
        trainable: bool = False,
        offloaded: bool = False,
        checkpoint: Path | None = None,
    ) -> None:
        """Builds and loads. offloaded: see Teacher. checkpoint: the weights come from this Megatron checkpoint (torch_dist), the
        architecture from `folder` as ever. Raises UserError if the folder's config or weights do not fit.
        """
        self.architecture = Architecture.from_hf(folder)
        self.architecture.check_tensor_parallel_size(parallel.tp_size, str(folder))
        self.parallel = parallel
        stack = choose(config, Installed.find())
        megatron = transformer_config(self.architecture, config, parallel, stack, offloaded)
        self.gpt = gpt_model(self.architecture, megatron, block_spec(self.architecture, stack))
        if checkpoint is None:
            load_hf(self.gpt, parallel, folder)
        else:
            load_megatron(self.gpt, self.architecture, parallel, checkpoint)
        self.gpt.requires_grad_(trainable)
        self.gpt.to(parallel.device)

    def trained(self) -> list[Trained]:
        """Every parameter, in the same order on every rank."""
        return every_parameter(self.gpt, self.architecture, self.parallel.tp_size, self.parallel.sequence_parallel)

    @property
    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the output layer, [V_local, H]."""
        if self.architecture.tied_embeddings:
            return self.gpt.shared_embedding_or_output_weight()
        return self.gpt.output_layer.weight

    def hidden_states(self, packing: Packing) -> torch.Tensor:
        """Final hidden states of a packed batch, [T, H], gathered over sequence parallelism; T are the tokens that packing holds.

        The backward of the gather only cuts: the loss gives every rank the full gradient.
        """
        parameters = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=packing.cu_seqlens,
            cu_seqlens_kv=packing.cu_seqlens,
            # Paddings count as tokens, at the ends, where causal attention keeps them from the others.
            cu_seqlens_q_padded=packing.cu_seqlens if self.parallel.cp_size > 1 else None,
            cu_seqlens_kv_padded=packing.cu_seqlens if self.parallel.cp_size > 1 else None,
            max_seqlen_q=packing.max_length,
            max_seqlen_kv=packing.max_length,
        )
        # In evaluation nothing is recomputed: a forward without gradient would leave Transformer Engine's recomputation scales behind.
        self.gpt.train(torch.is_grad_enabled())
        hidden = self.gpt.embedding(input_ids=packing.ids.unsqueeze(0), position_ids=packing.positions.unsqueeze(0))
        if torch.is_grad_enabled():
            hidden.requires_grad_()  # recomputation only runs backward through inputs that want a gradient
        rotary = self.gpt.rotary_pos_emb(packing.max_length, packed_seq=True)
        if self.architecture.rope.kind == "yarn":
            rotary, _ = rotary  # attention takes the factor from the configuration
        hidden = self.gpt.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=parameters,
        )
        if self.parallel.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)
