"""Stage 2: the teacher rewrites y_o into y_r."""

from pathlib import Path
from typing import Any

from trd_megatron.chat import Chat, teacher_prompt_ids
from trd_megatron.config import Config
from trd_megatron.engine.engines import Engines, teacher_weights
from trd_megatron.errors import UserError
from trd_megatron.records import REFINED, TRAJECTORY
from trd_megatron.run_dir import RunDir
from trd_megatron.stages import prepare
from trd_megatron.stages.generate import Author, Task, claim, drawn, generate, packed, seed_name

READ = ("problem_id", "sample_index", "response", "finish_reason", "abort_reason", "passed")  # of a rollout


def run(config: Config, run_dir: RunDir, folder: Path, engines: Engines) -> dict[str, Any]:
    """In OPSD the student's own servers refine. Skips and counts rollouts that were aborted, or whose problem alone is over the budget."""
    name = config.teacher.path or config.model.path
    weights = teacher_weights(config, run_dir)
    claim(folder, weights)
    chat = Chat(weights.path, config.data.prompt_format, config.teacher.chat_template_kwargs)
    problems = prepare.read(run_dir)
    tasks, aborted, over = [], [], 0
    for row in drawn(run_dir.rollouts, TRAJECTORY, run_dir.round, READ):
        problem = problems[row["problem_id"]]
        if row["finish_reason"] == "abort":
            aborted.append(row["abort_reason"])
            continue
        ids = teacher_prompt_ids(config, chat, problem, row["response"])
        if ids is None:
            over += 1
            continue
        extra = {"initial_response": row["response"], "initial_passed": row["passed"]}
        tasks.append(Task(problem, row["sample_index"], None, packed(ids), extra))
    if not tasks:
        causes = [f"{over} prompts are over refine.max_prompt_tokens={config.refine.max_prompt_tokens}"] if over or not aborted else []
        if aborted:
            causes.append(f"{len(aborted)} rollouts were aborted, the first because of {aborted[0]}")
        raise UserError(f"no rollout can be refined: {'; '.join(causes)}")
    author = Author("teacher" if config.teacher.path else "student", weights, name, chat)
    seeds = seed_name("refine", run_dir.round)
    figures = generate(config, seeds, folder, tasks, config.refine, config.refine.shard_size, REFINED, engines, author)
    return figures | {"skipped_over_budget": over, "skipped_aborted": len(aborted)}
