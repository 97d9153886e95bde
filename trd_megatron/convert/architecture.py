"""The shape of a model, read from its Hugging Face config. Nothing is retyped by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from trd_megatron.errors import UserError

SUPPORTED = ("llama", "qwen2", "qwen3")


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
    rope_theta: float
    rope_factor: float | None  # Llama 3's scaling; None: plain RoPE
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool

    @staticmethod
    def from_hf(folder: Path) -> "Architecture":
        """Reads config.json. Raises UserError if the model is not one of SUPPORTED or has a part that is not carried over."""
        from transformers import AutoConfig

        try:
            config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}/config.json cannot be used: {str(error).splitlines()[0]}") from None
        kind = config.model_type
        if kind not in SUPPORTED:
            raise UserError(f"{folder}: architecture '{kind}' is not supported; supported: {', '.join(SUPPORTED)}")
        rope = config.rope_parameters
        factor = None
        if rope["rope_type"] == "llama3":
            # Megatron-Core fixes the other three constants of this scaling.
            fixed = (rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])
            if tuple(map(float, fixed)) != (1.0, 4.0, 8192.0):
                raise UserError(f"{folder}: llama3 rope scaling with {fixed} is not supported, only (1, 4, 8192)")
            factor = float(rope["factor"])
        elif rope["rope_type"] != "default":
            raise UserError(f"{folder}: rope scaling '{rope['rope_type']}' is not supported; supported: default, llama3")
        if config.hidden_act != "silu":
            raise UserError(f"{folder}: activation '{config.hidden_act}' is not supported, only silu")
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            raise UserError(f"{folder}: attention_bias and mlp_bias are not supported")
        if getattr(config, "use_sliding_window", False):
            raise UserError(f"{folder}: use_sliding_window is not supported")
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
            rope_theta=float(rope["rope_theta"]),
            rope_factor=factor,
            tied_embeddings=config.tie_word_embeddings,
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
        )

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Vocabulary rounded up so that every rank holds the same number of rows."""
        return -(-self.vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size

    def tensor_parallel_sizes(self) -> list[int]:
        """The tensor_model_parallel_size values that divide heads, key/value heads and the MLP."""
        common = gcd(self.num_attention_heads, self.num_query_groups, self.ffn_hidden_size)
        return [size for size in range(1, common + 1) if common % size == 0]

    def check_tensor_parallel_size(self, size: int, model: str) -> None:
        """Raises UserError that says which sizes work."""
        if size not in self.tensor_parallel_sizes():
            works = ", ".join(map(str, self.tensor_parallel_sizes()))
            raise UserError(
                f"learner.tensor_model_parallel_size={size} does not divide the {model}'s {self.num_attention_heads} heads, "
                f"{self.num_query_groups} key/value heads and {self.ffn_hidden_size} MLP columns; sizes that work: {works}"
            )

    def projections(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of the matrices of one layer."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        attention, kv = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        return {
            "q_proj": (hidden, attention),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (attention, hidden),
            "gate_proj": (hidden, ffn),
            "up_proj": (hidden, ffn),
            "down_proj": (ffn, hidden),
        }

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """LoRA parameters on the targeted matrices (names of `projections`) of every layer."""
        projections = self.projections()
        return self.num_layers * rank * sum(sum(projections[name]) for name in targets)

    def parameter_count(self) -> int:
        """Parameters, embeddings included."""
        layer = sum(inputs * outputs for inputs, outputs in self.projections().values()) + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size
