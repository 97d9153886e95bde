"""Shorthands for what tests do with checkpoints."""

from pathlib import Path

import torch

from trd_megatron.convert import huggingface
from trd_megatron.convert.huggingface import HuggingFace
from trd_megatron.convert.merge_lora import Merged
from trd_megatron.convert.peft import Adapter
from trd_megatron.convert.torch_dist import TorchDist


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist folder."""
    checkpoint = TorchDist(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def adapter(factors: dict[str, torch.Tensor], alpha: float, path: Path = Path("adapter")) -> Adapter:
    modules = dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in factors)
    rank = next(factor.shape[0] for name, factor in factors.items() if "lora_A" in name)
    return Adapter(path, factors, frozenset(modules), alpha / rank, rank, alpha, "")


def merge(base: Path, factors: dict[str, torch.Tensor], alpha: float, folder: Path) -> None:
    huggingface.write(Merged(HuggingFace(base), adapter(factors, alpha)), folder, dtype=None)
