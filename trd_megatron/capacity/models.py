"""Shapes of models that the planner knows without their files, as their config.json on the hub has them."""

from trd_megatron.builtin_models import resolve_model
from trd_megatron.convert.architecture import Architecture, Experts, Rope
from trd_megatron.errors import UserError


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, groups: int, context: int = 40_960, theta: float = 1e6, *, tied: bool = False,
           experts: Experts | None = None) -> Architecture:  # fmt: skip
    kind = "qwen3" if experts is None else "qwen3_moe"
    sizes = (layers, hidden, ffn, heads, groups, 128, 151_936, context)
    return Architecture(kind, *sizes, 1e-6, Rope(theta), tied, qkv_bias=False, qk_norm=True, experts=experts)


KNOWN = {
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, 8, tied=True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 9728, 32, 8, tied=True),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3(36, 2560, 9728, 32, 8, 262_144, 5e6, tied=True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 12_288, 32, 8),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 25_600, 64, 8),
    "Qwen/Qwen3-235B-A22B": _qwen3(94, 4096, 12_288, 64, 4, experts=Experts(128, 8, 1536, True, 0.001)),
}


def is_here(path: str) -> bool:
    """Whether the model's files are on this machine."""
    try:
        resolve_model(path, download=False)
    except UserError:
        return False
    return True


def shape(path: str) -> Architecture:
    """Of the files where they are here, else from KNOWN. Raises UserError, as resolve_model does, if the model is in neither."""
    if path in KNOWN and not is_here(path):
        return KNOWN[path]
    return Architecture.from_hf(resolve_model(path, download=False))


def active_parameters(architecture: Architecture) -> int:
    """Parameters that a token is multiplied with: of the experts those that it is sent to, and the output layer."""
    experts = 0 if architecture.experts is None else architecture.experts.per_token
    return architecture.num_layers * architecture.layer_weights(experts) + architecture.vocab_size * architecture.hidden_size
