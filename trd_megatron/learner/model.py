"""A Megatron-Core GPTModel from a Hugging Face folder, and its hidden states."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors import SafetensorError, safe_open

from trd_megatron.config import LearnerConfig
from trd_megatron.convert.architecture import Architecture
from trd_megatron.convert.mapping import entries, expected_shapes, shard
from trd_megatron.errors import UserError
from trd_megatron.learner.attention import SegmentedAttention
from trd_megatron.learner.packing import Packing
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.trained import Trained, every_parameter


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight with float32 statistics. Works under sequence parallelism, which Megatron's own torch norm refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def transformer_config(architecture: Architecture, config: LearnerConfig, parallel: Parallel) -> TransformerConfig:
    """Megatron's configuration of this model on this layout."""
    dtype = getattr(torch, config.dtype)
    return TransformerConfig(
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
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        recompute_granularity="full" if config.recompute else None,
        recompute_method="uniform" if config.recompute else None,
        recompute_num_layers=1 if config.recompute else None,
        perform_initialization=False,  # every weight is loaded
        use_cpu_initialization=parallel.device.type == "cpu",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def layer_spec(architecture: Architecture) -> ModuleSpec:
    """Megatron's own layer with our norm and our packed attention in place of the ones that need a GPU."""
    spec = get_gpt_layer_local_spec(qk_layernorm=architecture.qk_norm, normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SegmentedAttention
    if architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


class Model:
    """A GPTModel on this rank. Adapters are added to `gpt` by lora.py."""

    def __init__(self, folder: Path, config: LearnerConfig, parallel: Parallel, *, trainable: bool = False) -> None:
        """Builds and loads. Raises UserError if the folder's config or weights do not fit."""
        self.architecture = Architecture.from_hf(folder)
        self.architecture.check_tensor_parallel_size(parallel.tp_size, str(folder))
        self.parallel = parallel
        a = self.architecture
        block = layer_spec(a)
        self.gpt = GPTModel(
            config=transformer_config(a, config, parallel),
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[block] * a.num_layers, layer_norm=RMSNorm),
            vocab_size=a.padded_vocab_size(parallel.tp_size),
            max_sequence_length=a.max_position_embeddings,
            share_embeddings_and_output_weights=a.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=a.rope_theta,
            rope_scaling=a.rope_factor is not None,
            rope_scaling_factor=a.rope_factor or 1.0,
        )
        self._load(folder)
        self.gpt.requires_grad_(trainable)
        self.gpt.to(parallel.device)
        self.gpt.train()  # recomputation is a training feature; there is no dropout

    def _load(self, folder: Path) -> None:
        parameters = dict(self.gpt.named_parameters())
        files = _tensor_files(folder)
        for entry in entries(self.architecture):
            tensors = []
            for name, shape in zip(entry.hf, expected_shapes(entry, self.architecture), strict=True):
                if name not in files:
                    raise UserError(f"{folder} has no tensor {name}: it does not fit its config.json")
                with safe_open(files[name], framework="pt") as file:
                    tensor = file.get_tensor(name)
                if tuple(tensor.shape) != shape:
                    raise UserError(f"{folder}: {name} has shape {tuple(tensor.shape)}, its config.json says {shape}")
                tensors.append(tensor)
            parameter = parameters.pop(entry.megatron)
            with torch.no_grad():
                parameter.copy_(shard(entry, tensors, self.architecture, self.parallel.tp_rank, self.parallel.tp_size))
        assert not parameters, f"parameters without a source: {sorted(parameters)}"

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
        """Final hidden states of a packed batch, [T, H], gathered over the sequence; T is packing's padded length.

        The backward of the gather only cuts: the loss gives every rank the full gradient.
        """
        parameters = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=packing.cu_seqlens,
            cu_seqlens_kv=packing.cu_seqlens,
            max_seqlen_q=packing.max_length,
            max_seqlen_kv=packing.max_length,
        )
        hidden = self.gpt.embedding(input_ids=packing.ids.unsqueeze(0), position_ids=packing.positions.unsqueeze(0))
        if torch.is_grad_enabled():
            hidden.requires_grad_()  # recomputation only runs backward through inputs that want a gradient
        hidden = self.gpt.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self.gpt.rotary_pos_emb(packing.max_length, packed_seq=True),
            packed_seq_params=parameters,
        )
        if self.parallel.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the headers of all safetensors files of the folder."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    return files
