"""What the learner's layers are made of on this machine: chosen here and nowhere else. Imports no Megatron, so that `trd doctor` can ask.

With Transformer Engine: its linear layers, RMSNorm, attention (packed, thd) and fused RoPE, and fp8. Without: Megatron's own linear layers,
PyTorch's rms_norm and scaled_dot_product_attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from packaging.version import Version

from trd_megatron.config import LearnerConfig
from trd_megatron.convert.architecture import Architecture
from trd_megatron.errors import UserError

if TYPE_CHECKING:
    from trd_megatron.learner.parallel import Parallel

OLDEST_TRANSFORMER_ENGINE = "2.1"


@dataclass(frozen=True)
class Recipe:
    """One value of learner.fp8: Megatron's name and number format for it, and what it needs (Transformer Engine's recipe checks)."""

    megatron: str
    number_format: str
    token_multiple: int  # of the tokens that a linear layer sees on one rank
    size_multiple: int  # of the inputs and outputs of a linear layer on one rank
    transformer_engine: str  # oldest version
    compute_capability: tuple[int, int]  # oldest GPU

    def check(self, name: str, version: str, capability: tuple[int, int]) -> None:
        """Raises UserError if this Transformer Engine or GPU lacks the recipe."""
        if Version(version) < Version(self.transformer_engine):
            raise UserError(
                f"learner.fp8={name} needs Transformer Engine {self.transformer_engine} or newer, not {version}: set learner.fp8=none"
            )
        if capability < self.compute_capability:
            needed, found = (".".join(map(str, one)) for one in (self.compute_capability, capability))
            raise UserError(
                f"learner.fp8={name} needs a GPU of compute capability {needed} or newer, not {found}: choose another recipe or none"
            )


FP8_RECIPES = {
    "delayed": Recipe("delayed", "hybrid", 16, 16, "2.1", (8, 9)),
    "current": Recipe("tensorwise", "hybrid", 16, 16, "2.2", (8, 9)),
    "blockwise": Recipe("blockwise", "e4m3", 128, 128, "2.3", (9, 0)),
    "mxfp8": Recipe("mxfp8", "e4m3", 32, 32, "2.1", (10, 0)),
}


@dataclass(frozen=True)
class Installed:
    """What is importable beside Megatron-Core."""

    transformer_engine: str | None  # version
    apex: bool  # its CUDA extensions; PyPI's apex is another project
    wgrad_fusion: bool  # Apex's fused_weight_gradient_mlp_cuda

    @staticmethod
    def find() -> Installed:
        try:
            version: str | None = metadata.version("transformer-engine")
        except metadata.PackageNotFoundError:
            version = None
        if not _has_torch_extension():  # the package alone is no Transformer Engine for PyTorch
            version = None
        return Installed(version, util.find_spec("amp_C") is not None, util.find_spec("fused_weight_gradient_mlp_cuda") is not None)


def _has_torch_extension() -> bool:
    """Whether Transformer Engine's extension for PyTorch lies where Transformer Engine looks for it. Imports nothing."""
    spec = util.find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return False
    root = Path(spec.origin).parent
    return any(True for folder in (root.parent, root, root / "wheel_lib") for _ in folder.glob("transformer_engine_torch*.so"))


@dataclass(frozen=True)
class Stack:
    """The choice."""

    transformer_engine: bool
    fp8: Recipe | None
    gradient_accumulation_fusion: bool  # weight gradients are added to the distributed optimizer's buffers inside the products
    notes: tuple[str, ...]  # what a GPU run goes without, one line each


def choose(config: LearnerConfig, installed: Installed) -> Stack:
    """Raises UserError if what the configuration names is not there."""
    cuda = config.device == "cuda"
    version = installed.transformer_engine
    usable = version is not None and Version(version) >= Version(OLDEST_TRANSFORMER_ENGINE)
    engine = cuda and config.dtype == "bfloat16" and usable and config.transformer_impl != "local"
    found = "is not installed" if version is None else f"{version} is older than {OLDEST_TRANSFORMER_ENGINE}"
    if not engine and config.transformer_impl == "transformer_engine":
        raise UserError(f"learner.transformer_impl=transformer_engine, but Transformer Engine {found}: install it, or set it to auto")
    if not engine and config.fp8 != "none":
        raise UserError(f"learner.fp8={config.fp8}, but Transformer Engine {found}: install it, or set learner.fp8=none")
    if cuda and not engine and config.context_parallel_size > 1:  # PyTorch's attention would hold every score of a piece at once
        raise UserError("learner.context_parallel_size above 1 needs Transformer Engine's attention on cuda (bfloat16): set it to 1")
    recipe = FP8_RECIPES.get(config.fp8)
    if recipe is not None:
        assert version is not None
        recipe.check(config.fp8, version, torch.cuda.get_device_capability() if torch.cuda.is_available() else recipe.compute_capability)
    notes = []
    if cuda and not engine:
        chosen = f"learner.transformer_impl={config.transformer_impl}, learner.dtype={config.dtype}"
        why = chosen if usable else f"Transformer Engine {found}"
        notes.append(f"{why}: layers are Megatron's local ones, with PyTorch's rms_norm and scaled_dot_product_attention")
    if cuda and version is None and not installed.apex:
        notes.append("neither Transformer Engine nor Apex is installed: AdamW is PyTorch's")
    full = cuda and config.trainable == "full" and config.dtype != "float64"  # when Megatron's optimizer trains
    fusion = full and installed.wgrad_fusion  # Megatron asks for Apex's extension even where Transformer Engine does the work
    if full and not fusion:
        notes.append("Apex's fused_weight_gradient_mlp_cuda is not installed: weight gradients are added up in a step of their own")
    return Stack(engine, recipe if engine else None, fusion, tuple(notes))


def check_shapes(config: LearnerConfig, architecture: Architecture, model: str) -> None:
    """Raises UserError if the layers of `model` do not have the sizes that fp8 needs, or if none of them would be in fp8."""
    if config.fp8 == "none":
        return
    if 2 * config.fp8_bf16_layers >= architecture.num_layers:
        raise UserError(
            f"learner.fp8_bf16_layers={config.fp8_bf16_layers} leaves no layer of {model} in fp8, which has {architecture.num_layers}: "
            "lower it"
        )
    multiple = FP8_RECIPES[config.fp8].size_multiple
    tp = config.tensor_model_parallel_size
    for name, (inputs, outputs) in architecture.projections().items():
        cut = (inputs, outputs // tp) if name not in ("o_proj", "down_proj") else (inputs // tp, outputs)
        for size in cut:
            if size % multiple:
                raise UserError(
                    f"learner.fp8={config.fp8} needs layer sizes that {multiple} divides; {name} of {model} has {size} on a rank: "
                    "choose another recipe or learner.fp8=none"
                )


def token_multiple(config: LearnerConfig, parallel: Parallel) -> int:
    """What the tokens of a context-parallel rank must be divisible by: sequence parallelism and fp8 cut them into equal, aligned parts."""
    aligned = FP8_RECIPES[config.fp8].token_multiple if config.fp8 != "none" else 1
    return aligned * (parallel.tp_size if parallel.sequence_parallel else 1)


def precision(config: LearnerConfig) -> str:
    """Which layers compute in what, for a reader."""
    adapters = "adapters' weights" if config.trainable == "lora" else "the optimizer's copy of the weights"
    if config.fp8 == "none":
        return f"{config.dtype}; {adapters} and the KL's statistics at least float32"
    ends = f", but for {config.fp8_bf16_layers} layers at each end" if config.fp8_bf16_layers else ""
    recipe = FP8_RECIPES[config.fp8]
    return (
        f"linear layers in fp8 ({config.fp8} scaling, {recipe.number_format}){ends}; attention, norms, embedding, output layer and "
        f"adapters' products in bfloat16; {adapters} and the KL's statistics in float32"
    )
