"""A trained adapter out of a Megatron distributed checkpoint: as a PEFT folder, and merged into the base model."""

import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trd_megatron.convert.parameters import copy_companions, read_tensors
from trd_megatron.errors import UserError

_FACTOR = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight")


def read_factors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """LoRA factors of a checkpoint, whole, by name (model.layers.0.self_attn.q_proj.lora_A.weight -> [rank, in]).

    Needs no ranks and no Megatron: torch_dist is PyTorch's distributed checkpoint format. Raises UserError if it is damaged.
    """
    factors = read_tensors(checkpoint, lambda name: _FACTOR.fullmatch(name) is not None)
    if not factors:
        raise UserError(f"checkpoint {checkpoint} holds no adapter")
    return factors


def write_peft(factors: dict[str, torch.Tensor], rank: int, alpha: float, base: str, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as peft.PeftModel.from_pretrained reads them."""
    from peft import LoraConfig, TaskType

    targets = sorted({name.split(".")[-3] for name in factors})
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # annotated int, only ever divided by r
        lora_dropout=0.0,
        target_modules=targets,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merge(base: Path, factors: dict[str, torch.Tensor], scale: float, folder: Path) -> None:
    """Writes base + scale * B A as a Hugging Face folder, file by file, in the base's dtype (the sum is taken in float32).

    All names and shapes are checked before anything is written. Raises UserError if the adapter does not fit the base.
    """
    updates = {}
    for name, a in factors.items():
        if name.endswith("lora_A.weight"):
            updates[name.replace("lora_A.weight", "weight")] = (a, factors[name.replace("lora_A", "lora_B")])
    files = sorted(base.glob("*.safetensors"))
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name, (a, b) in updates.items():
        if shapes.get(name) != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise UserError(f"the adapter does not fit {base}: {name} is {shapes.get(name)}, B A is {tuple(b.shape)} x {tuple(a.shape)}")

    copy_companions(base, folder)
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            file_metadata = file.metadata()
        for name in tensors.keys() & updates.keys():
            a, b = updates[name]
            tensors[name] = (tensors[name].float() + scale * (b.float() @ a.float())).to(tensors[name].dtype)
        save_file(tensors, folder / path.name, metadata=file_metadata)
