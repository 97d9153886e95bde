"""Stage 4: the chosen checkpoint as a model of its own (hf/) and, where an adapter was trained, as a PEFT folder (adapter/)."""

from pathlib import Path
from typing import Any

import torch

from trd_megatron.builtin_models import resolve_model
from trd_megatron.config import Config
from trd_megatron.convert import adapter
from trd_megatron.convert.parameters import write_parameters
from trd_megatron.errors import UserError
from trd_megatron.learner import checkpoint_files as checkpoints
from trd_megatron.run_dir import RunDir


def choose_step(folder: Path, wanted: str) -> int:
    """The step of export.checkpoint=last|best|STEP. Raises UserError that lists the saved steps."""
    saved = checkpoints.saved_steps(folder)
    if not saved:
        raise UserError(f"{folder} holds no checkpoint: run the train stage first")
    if wanted == "last":
        return saved[-1]
    if wanted == "best":
        best = checkpoints.best_step(checkpoints.read_state(folder, saved[-1]), folder)
        if best is None:
            raise UserError("no saved step has a held-out KL: set learner.checkpoint_interval to a multiple of learner.eval_interval")
        return best
    if int(wanted) not in saved:
        raise UserError(f"export.checkpoint={wanted}: saved steps are {', '.join(map(str, saved))}")
    return int(wanted)


def _factors(config: Config, run_dir: RunDir) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(the chosen step's LoRA factors, figures for the manifest)"""
    step = choose_step(run_dir.checkpoints, config.export.checkpoint)
    factors = adapter.read_factors(checkpoints.step_folder(run_dir.checkpoints, step))
    return factors, {"step": step, "adapter_parameters": sum(t.numel() for t in factors.values())}


def run_adapter(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    factors, figures = _factors(config, run_dir)
    lora = config.learner.lora
    adapter.write_peft(factors, lora.rank, lora.alpha, config.model.path, folder)
    return figures


def run_hf(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    if config.learner.trainable == "full":
        step = choose_step(run_dir.checkpoints, config.export.checkpoint)
        write_parameters(resolve_model(config.model.path), checkpoints.step_folder(run_dir.checkpoints, step), folder)
        return {"step": step}
    factors, figures = _factors(config, run_dir)
    lora = config.learner.lora
    adapter.merge(resolve_model(config.model.path), factors, lora.alpha / lora.rank, folder)
    return figures
