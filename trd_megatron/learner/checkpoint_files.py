"""Names and states of checkpoints on disk. Imports neither Megatron nor torch, so that other stages can look."""

import json
import shutil
from pathlib import Path
from typing import Any

from trd_megatron.errors import UserError

STATE = "state.json"


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    names = [path.name.removeprefix("step_") for path in checkpoints.glob("step_*") if (path / STATE).exists()]
    return sorted(int(name) for name in names if name.isdigit())


def read_state(checkpoints: Path, step: int) -> dict[str, Any]:
    """Loop state of a checkpoint: step, kl_before, held_out_kl (by step), tokens, seconds, lora (rank, alpha, base;
    None: every parameter was trained), files (bytes by name).

    Raises UserError if it is damaged.
    """
    path = step_folder(checkpoints, step) / STATE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete that checkpoint folder and run again") from None


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint but its state, which records them."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file() and path.name != STATE}


def damage(checkpoints: Path, step: int) -> str | None:
    """What is wrong with the files of a checkpoint, or None: each must be as long as when it was saved."""
    try:
        state = read_state(checkpoints, step)
    except UserError as error:
        return str(error)
    found = file_sizes(step_folder(checkpoints, step))
    if "files" not in state:
        return f"{step_folder(checkpoints, step)} was saved by an earlier version"
    for name, size in state["files"].items():
        if found.get(name) != size:
            return f"{step_folder(checkpoints, step) / name} has {found.get(name, 0)} of {size} bytes"
    return None


def best_step(state: dict[str, Any], checkpoints: Path) -> int | None:
    """The saved step with the lowest held-out KL, None if no saved step was measured."""
    saved = set(saved_steps(checkpoints))
    measured = {int(step): kl for step, kl in state["held_out_kl"].items() if int(step) in saved}
    return min(measured, key=lambda step: (measured[step], step)) if measured else None


def prune(checkpoints: Path, keep: int, best: int | None) -> None:
    """Deletes the oldest checkpoints beyond `keep`, never the best one or the last one."""
    steps = saved_steps(checkpoints)
    spare = [step for step in steps[:-1] if step != best]
    for step in spare[: max(len(steps) - keep, 0)]:
        shutil.rmtree(step_folder(checkpoints, step))
