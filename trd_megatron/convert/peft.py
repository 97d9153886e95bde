"""LoRA adapters: out of the learner's checkpoints, and as PEFT folders."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trd_megatron.convert.huggingface import save
from trd_megatron.convert.torch_dist import TorchDist
from trd_megatron.convert.weight_files import check_dtype
from trd_megatron.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STATE = "state.json"  # of a checkpoint of the learner
_FACTOR = re.compile(r"(model\.layers\.\d+\..*\w+_proj|lm_head)\.lora_[AB]\.weight")
_PREFIX = "base_model.model."
# What PEFT's LORA can be beyond weight + scale * B A, by the key of adapter_config.json that switches it on.
_NOT_PLAIN = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias", "modules_to_save",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
_CHANGE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")  # what they take out of the base's weights is not saved


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates of a model's matrices: weight + scale * B A."""

    path: Path
    factors: dict[str, torch.Tensor]  # "<module>.lora_A.weight" -> [rank, in], "<module>.lora_B.weight" -> [out, rank]
    modules: frozenset[str]  # the changed matrices without .weight, e.g. model.layers.0.self_attn.q_proj
    scale: float
    rank: int
    alpha: float
    base: str  # the model it was trained on, as its maker named it

    @property
    def parameters(self) -> int:
        return sum(factor.numel() for factor in self.factors.values())

    def pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) of a module."""
        return self.factors[f"{module}.lora_A.weight"], self.factors[f"{module}.lora_B.weight"]


def read(path: Path) -> Adapter:
    """An adapter from a PEFT folder or from a checkpoint of the learner. Raises UserError if it is neither or damaged."""
    if (path / CONFIG).is_file():
        return read_peft(path)
    if (path / STATE).is_file():
        return read_checkpoint(path)
    raise UserError(
        f"{path} holds no adapter{_steps(path) or f': it has neither {CONFIG} (PEFT) nor {STATE} (a checkpoint of the learner)'}"
    )


def _steps(path: Path) -> str:
    steps = sorted(folder.name for folder in path.glob("step_*"))
    return f": give one of its {', '.join(steps)}" if steps else ""


def read_checkpoint(folder: Path) -> Adapter:
    """The adapter in train/checkpoints/step_<n>. Needs no ranks and no Megatron. Raises UserError if there is none or it is damaged."""
    if not (folder / STATE).is_file():
        raise UserError(f"{folder} is no checkpoint of the learner, it has no {STATE}{_steps(folder) or ': give train/checkpoints/step_N'}")
    settings = recorded(folder)
    if settings is None:
        raise UserError(f"checkpoint {folder} holds no adapter: every parameter was trained, or an earlier version saved it")
    rank, alpha = _rank_alpha(folder / STATE, settings, "rank", "alpha")
    return _adapter(folder, read_factors(folder), rank, alpha, str(settings.get("base") or ""), alpha / rank)


def recorded(folder: Path) -> dict[str, Any] | None:
    """rank, alpha and base of the adapter in a checkpoint of the learner; None if every parameter was trained. Raises UserError."""
    settings = _read_json(folder / STATE).get("lora")
    if settings is not None and not isinstance(settings, dict):
        raise UserError(f"{folder / STATE}: lora is {settings!r}: copy the checkpoint again")
    return settings


def read_factors(folder: Path) -> dict[str, torch.Tensor]:
    """LoRA factors of a checkpoint of the learner, whole, by name. Raises UserError if there are none or they are damaged."""
    checkpoint = TorchDist(folder)
    factors = {name: checkpoint.read(name) for name in checkpoint.tensors if _FACTOR.fullmatch(name)}
    if not factors:
        raise UserError(f"checkpoint {folder} holds no adapter")
    return factors


def _adapter(path: Path, factors: dict[str, torch.Tensor], rank: int, alpha: float, base: str, scale: float) -> Adapter:
    modules = dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in factors)
    for module in modules:
        for name in (f"{module}.lora_A.weight", f"{module}.lora_B.weight"):
            if name not in factors:
                raise UserError(f"{path} has no {name}: copy the adapter again")
    for name, factor in factors.items():
        if factor.ndim != 2 or factor.shape[1 if "lora_B" in name else 0] != rank:
            raise UserError(f"{path}: {name} has shape {tuple(factor.shape)}, which is no factor of rank {rank}: copy the adapter again")
        check_dtype(path, name, str(factor.dtype).removeprefix("torch."))
    return Adapter(path, factors, frozenset(modules), scale, rank, alpha, base)


def read_peft(folder: Path) -> Adapter:
    """Raises UserError if the adapter is damaged or of a kind that is no plain LoRA on linear layers."""
    config = _read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type {config.get('peft_type')} cannot be merged, only LORA")
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder / CONFIG}: bias={config['bias']!r} is not supported: only plain LoRA on linear layers is")
    for key in _NOT_PLAIN:
        if config.get(key):
            raise UserError(f"{folder / CONFIG}: {key}={config[key]!r} is not supported: only plain LoRA on linear layers is")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise UserError(f"{folder / CONFIG}: {key} is not supported: all matrices need one rank and one alpha")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGE_BASE):
        raise UserError(
            f"{folder / CONFIG}: init_lora_weights={start!r} changes the base model too: save the adapter as plain LoRA, "
            "with path_initial_model_for_weight_conversion"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}: save the adapter with save_pretrained (as safetensors)")
    rank, alpha = _rank_alpha(folder / CONFIG, config, "r", "lora_alpha")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            factors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}): copy it again") from None
    for name in factors:
        if not _FACTOR.fullmatch(name):
            raise UserError(f"{folder / WEIGHTS}: {name} is no LoRA factor of a linear layer and cannot be merged")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return _adapter(folder, factors, rank, alpha, str(config.get("base_model_name_or_path") or ""), scale)


def _rank_alpha(path: Path, settings: dict[str, Any], rank: str, alpha: str) -> tuple[int, float]:
    r, a = settings.get(rank), settings.get(alpha)
    if not isinstance(r, int) or r < 1:
        raise UserError(f"{path}: {rank} is {r!r}, not a number above 0: copy the adapter again")
    if not isinstance(a, int | float) or not abs(a) < 1e30:
        raise UserError(f"{path}: {alpha} is {a!r}, not a number: copy the adapter again")
    return r, a


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object: copy it again")
    return content


def write(factors: dict[str, torch.Tensor], rank: int, alpha: float, base: str, folder: Path) -> None:
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
    settings = _read_json(folder / CONFIG) | {"target_modules": targets}  # PEFT writes a set, in another order each time
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save({_PREFIX + name: tensor.contiguous() for name, tensor in factors.items()}, folder / WEIGHTS)
