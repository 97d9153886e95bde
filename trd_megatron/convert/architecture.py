"""The shape of a model, read from its Hugging Face config. Nothing is retyped by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, Literal

from trd_megatron.errors import UserError

SUPPORTED = ("llama", "qwen2", "qwen3", "qwen3_moe")


class UnsupportedError(UserError):
    """A model that is not one of SUPPORTED."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding as Megatron-Core computes it."""

    theta: float
    kind: Literal["default", "llama3", "yarn"] = "default"
    factor: float = 1.0  # of the two scalings
    # YaRN's; the attention factor follows from factor and mscales (Peng et al. 2023, https://arxiv.org/abs/2309.00071)
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscales: tuple[float, float] | None = None  # (mscale, mscale_all_dim)
    truncate: bool = True


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in place of every layer's MLP."""

    count: int
    per_token: int
    ffn_hidden_size: int  # of one expert
    normalized: bool  # the chosen experts' probabilities sum to 1
    aux_loss_coefficient: float  # of the load balancing loss, for who trains it


@dataclass(frozen=True)
class Architecture:
    """What Megatron's GPTModel needs to know. Sizes are full sizes, before tensor parallelism."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    experts: Experts | None = None

    @staticmethod
    def from_hf(folder: Path) -> "Architecture":
        """Reads config.json. Raises UserError if the model is not one of SUPPORTED or has a part that is not carried over."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        if not (folder / "config.json").is_file():
            found = "is a Megatron checkpoint: megatron-to-hf makes a model folder of it"
            megatrons = (folder / ".metadata").is_file() or (folder / "latest_checkpointed_iteration.txt").is_file()
            raise UserError(f"{folder} {found if megatrons else 'has no config.json: give a model folder in Hugging Face layout'}")
        try:
            config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError, StrictDataclassError) as error:
            raise UserError(f"{folder}/config.json cannot be used: {' '.join(str(error).split())[:300]}") from None
        kind = config.model_type
        if kind not in SUPPORTED:
            raise UnsupportedError(f"{folder}: architecture '{kind}' is not supported; supported: {', '.join(SUPPORTED)}")
        if config.hidden_act != "silu":
            raise UserError(f"{folder}: activation '{config.hidden_act}' is not supported, only silu")
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            raise UserError(f"{folder}: attention_bias and mlp_bias are not supported")
        if getattr(config, "use_sliding_window", False):
            raise UserError(f"{folder}: use_sliding_window is not supported")
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"{folder}: its weights are quantised; give the folder of the model in bfloat16 or float32")
        _check_sizes(config, folder)
        heads = config.num_attention_heads
        return Architecture(
            model_type=kind,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            num_attention_heads=heads,
            num_query_groups=config.num_key_value_heads or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            norm_eps=config.rms_norm_eps,
            rope=_rope(config.rope_parameters, folder),
            tied_embeddings=config.tie_word_embeddings,
            qkv_bias=kind == "qwen2",
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            experts=_experts(config, folder) if kind == "qwen3_moe" else None,
        )

    @property
    def mlp_columns(self) -> int:
        """Hidden size of a layer's MLP, or of each of its experts."""
        return self.ffn_hidden_size if self.experts is None else self.experts.ffn_hidden_size

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Vocabulary rounded up so that every rank holds the same number of rows."""
        return -(-self.vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size

    def tensor_parallel_sizes(self) -> list[int]:
        """The tensor_model_parallel_size values that divide heads, key/value heads and the MLP."""
        common = gcd(self.num_attention_heads, self.num_query_groups, self.mlp_columns)
        return [size for size in range(1, common + 1) if common % size == 0]

    def check_tensor_parallel_size(self, size: int, model: str, setting: str = "learner.tensor_model_parallel_size=") -> None:
        """Raises UserError that names the setting and says which sizes work."""
        if size not in self.tensor_parallel_sizes():
            works = ", ".join(map(str, self.tensor_parallel_sizes()))
            raise UserError(
                f"{setting}{size} does not divide the {model}'s {self.num_attention_heads} heads, "
                f"{self.num_query_groups} key/value heads and {self.mlp_columns} MLP columns; sizes that work: {works}"
            )

    def check_student(self, model: str) -> None:
        """Raises UserError that names `model` if the learner cannot train it."""
        if self.experts is not None:
            raise UserError(f"{model} has experts, which the learner does not train: choose a dense student (the teacher may have experts)")

    def projections(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of the matrices of one layer; with experts, those of one of them."""
        hidden, ffn = self.hidden_size, self.mlp_columns
        attention, kv = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        matrices = {"q_proj": (hidden, attention), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (attention, hidden)}
        return matrices | {"gate_proj": (hidden, ffn), "up_proj": (hidden, ffn), "down_proj": (ffn, hidden)}

    def layer_weights(self, experts: int) -> int:
        """Parameters in one layer's matrices, counting so many of its experts, if it has any."""
        sizes = {name: inputs * outputs for name, (inputs, outputs) in self.projections().items()}
        if self.experts is None:
            return sum(sizes.values())
        one = sum(sizes.pop(name) for name in ("gate_proj", "up_proj", "down_proj"))
        return sum(sizes.values()) + experts * one + self.experts.count * self.hidden_size  # the last are the router's

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """LoRA parameters on the targeted matrices (names of `projections`) of every layer."""
        projections = self.projections()
        return self.num_layers * rank * sum(sum(projections[name]) for name in targets)

    def parameter_count(self) -> int:
        """Parameters, embeddings included."""
        layer = self.layer_weights(self.experts.count if self.experts is not None else 0) + 2 * self.hidden_size
        if self.qkv_bias:
            layer += (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim
        if self.qk_norm:
            layer += 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


def _check_sizes(config: Any, folder: Path) -> None:
    head_dim, per_token = getattr(config, "head_dim", None), getattr(config, "num_experts_per_tok", None)
    if head_dim is not None and (head_dim < 2 or head_dim % 2):
        raise UserError(f"{folder}/config.json: head_dim is {head_dim}, not an even number above 0")
    if per_token is not None and not 0 < per_token <= config.num_experts:
        raise UserError(f"{folder}/config.json: num_experts_per_tok is {per_token}, there are {config.num_experts} experts")
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        if getattr(config, key) < 1:
            raise UserError(f"{folder}/config.json: {key} is {getattr(config, key)}, not a number above 0")
    groups = config.num_key_value_heads or config.num_attention_heads
    if groups < 1 or config.num_attention_heads % groups:
        raise UserError(f"{folder}/config.json: num_key_value_heads={groups} does not divide {config.num_attention_heads} heads")


def _rope(parameters: dict[str, Any], folder: Path) -> Rope:
    kind = parameters["rope_type"]
    theta, factor = float(parameters["rope_theta"]), float(parameters.get("factor") or 1.0)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{folder}: partial_rotary_factor is not supported")
    if kind == "default":
        return Rope(theta)
    if kind == "llama3":
        # Megatron-Core fixes the other three constants of this scaling.
        fixed = (parameters["low_freq_factor"], parameters["high_freq_factor"], parameters["original_max_position_embeddings"])
        if tuple(map(float, fixed)) != (1.0, 4.0, 8192.0):
            raise UserError(f"{folder}: llama3 rope scaling with {fixed} is not supported, only (1, 4, 8192)")
        return Rope(theta, "llama3", factor)
    if kind == "yarn":
        if parameters.get("attention_factor") is not None or parameters.get("factor") is None:
            raise UserError(f"{folder}: yarn rope scaling is supported with a factor and without an attention_factor of its own")
        mscales = (parameters.get("mscale"), parameters.get("mscale_all_dim"))
        return Rope(
            theta,
            "yarn",
            factor,
            original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
            beta_fast=float(parameters.get("beta_fast") or 32),
            beta_slow=float(parameters.get("beta_slow") or 1),
            mscales=(float(mscales[0]), float(mscales[1])) if mscales[0] and mscales[1] else None,
            truncate=parameters.get("truncate", True),
        )
    raise UserError(f"{folder}: rope scaling '{kind}' is not supported; supported: default, llama3, yarn")


def _experts(config: Any, folder: Path) -> Experts:
    if config.decoder_sparse_step != 1 or config.mlp_only_layers:
        raise UserError(f"{folder}: layers without experts (decoder_sparse_step, mlp_only_layers) are not supported")
    if config.num_experts_per_tok == 1 and config.norm_topk_prob:
        raise UserError(f"{folder}: norm_topk_prob with one expert per token is not supported")
    return Experts(
        config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.norm_topk_prob, config.router_aux_loss_coef
    )
