"""Stage 2: the teacher rewrites y_o into y_r."""

from pathlib import Path
from typing import Any

from trd_megatron.builtin_models import resolve_model
from trd_megatron.chat import Chat, teacher_prompt_ids
from trd_megatron.config import Config
from trd_megatron.errors import UserError
from trd_megatron.records import REFINED, TRAJECTORY
from trd_megatron.run_dir import RunDir
from trd_megatron.stages import prepare
from trd_megatron.stages.generate import Task, drawn, generate, seed_name, weights


def teacher_version(config: Config, run_dir: RunDir) -> int:
    """Which weights refine: those of a teacher of its own never change, in OPSD they are the round's student."""
    return 0 if config.teacher.path else run_dir.round


def run(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    """Skips and counts rollouts that were aborted, or whose problem alone is over the budget."""
    name = config.teacher.path or config.model.path
    model = resolve_model(name)
    chat = Chat(model, config.data.prompt_format, config.teacher.chat_template_kwargs)
    problems = prepare.read(run_dir)
    tasks, aborted, over = [], 0, 0
    for row in drawn(run_dir.rollouts, TRAJECTORY, run_dir.round):
        problem = problems[row["problem_id"]]
        if row["finish_reason"] == "abort":
            aborted += 1
            continue
        ids = teacher_prompt_ids(config, chat, problem, row["response"])
        if ids is None:
            over += 1
            continue
        extra = {"initial_response": row["response"], "initial_passed": row["passed"]}
        tasks.append(Task(problem, row["sample_index"], chat.decode(ids, special=True), ids, extra))
    if not tasks:
        raise UserError(f"no rollout can be refined: {over} prompts are over refine.max_prompt_tokens={config.refine.max_prompt_tokens}")
    seeds, served = seed_name("refine", run_dir.round), weights(model, teacher_version(config, run_dir))
    figures = generate(config, seeds, folder, tasks, config.refine, config.refine.shard_size, REFINED, served, name, chat)
    return figures | {"skipped_over_budget": over, "skipped_aborted": aborted}
