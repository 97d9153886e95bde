"""Stage 4: the chosen checkpoint as a model of its own (hf/) and, where an adapter was trained, as a PEFT folder (adapter/)."""

from pathlib import Path
from typing import Any

from trd_megatron import progress
from trd_megatron.builtin_models import resolve_model
from trd_megatron.config import Config
from trd_megatron.convert import huggingface, peft
from trd_megatron.convert.huggingface import HuggingFace
from trd_megatron.convert.mapping import entries
from trd_megatron.convert.megatron import Megatron
from trd_megatron.convert.merge_lora import Merged
from trd_megatron.convert.source import Source
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


def _chosen(config: Config, run_dir: RunDir) -> tuple[Path, int]:
    """The folder of the checkpoint to export, and its step."""
    step = choose_step(run_dir.checkpoints, config.export.checkpoint)
    return checkpoints.step_folder(run_dir.checkpoints, step), step


def run_adapter(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    checkpoint, step = _chosen(config, run_dir)
    adapter = peft.read_checkpoint(checkpoint)
    peft.write(adapter.factors, adapter.rank, adapter.alpha, config.model.path, folder)
    return {"step": step, "adapter_parameters": adapter.parameters}


def run_hf(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    checkpoint, step = _chosen(config, run_dir)
    base = HuggingFace(resolve_model(config.model.path))
    figures: dict[str, Any] = {"step": step}
    if config.learner.trainable == "full":
        source: Source = Megatron(checkpoint, base.path)
        dtype = base.dtype(next(entries(base.architecture)))
    else:
        adapter = peft.read_checkpoint(checkpoint)
        source, dtype = Merged(base, adapter), None
        figures["adapter_parameters"] = adapter.parameters
    with progress.byte_bar("writing", huggingface.nbytes(source, dtype)) as advance:
        huggingface.write(source, folder, dtype=dtype, advance=advance)
    return figures
