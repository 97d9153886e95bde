"""Stage 1: the student's own attempts, y_o."""

from pathlib import Path
from typing import Any

from trd_megatron.chat import Chat
from trd_megatron.config import Config
from trd_megatron.engine.engines import Engines, student_weights
from trd_megatron.errors import UserError
from trd_megatron.prompts import student_prompt
from trd_megatron.records import TRAJECTORY
from trd_megatron.run_dir import RunDir
from trd_megatron.stages import prepare
from trd_megatron.stages.generate import Author, Task, claim, generate, packed, seed_name


def student_tasks(
    chat: Chat, problems: list[dict[str, Any]], samples: int, budget: int, key: str, plain: bool = False
) -> tuple[list[Task], int]:
    """(tasks, problems skipped because their prompt is over `budget` tokens). plain: a problem's text is the whole prompt.

    Raises UserError naming `key` if no problem is left.
    """
    tasks, skipped = [], 0
    for problem in problems:
        prompt = problem["problem"] if plain else student_prompt(problem["task"], problem["problem"], problem["starter_code"])
        ids = packed(chat.prompt_ids(prompt))
        if len(ids) > budget:
            skipped += 1
        else:
            tasks += [Task(problem, sample, prompt, ids) for sample in range(samples)]
    if not tasks:
        raise UserError(f"all {skipped} prompts are over {key}={budget}: raise it")
    return tasks, skipped


def run(config: Config, run_dir: RunDir, folder: Path, engines: Engines) -> dict[str, Any]:
    weights = student_weights(config, run_dir)
    claim(folder, weights)
    chat = Chat(weights.path, config.data.prompt_format, config.student.chat_template_kwargs)
    stage = config.rollout
    problems = [problem for problem in prepare.read(run_dir).values() if problem["split"] == "train"]
    tasks, skipped = student_tasks(chat, problems, stage.samples_per_problem, stage.max_prompt_tokens, "rollout.max_prompt_tokens")
    if len(tasks) <= config.learner.held_out_samples:  # training would say so, after hours
        raise UserError(
            f"{len(tasks)} attempts to train on (data.train_problems, rollout.samples_per_problem), of which "
            f"learner.held_out_samples={config.learner.held_out_samples} would be held out: lower it, or draw more"
        )
    author = Author("student", weights, config.model.path, chat)
    name = seed_name("rollout", run_dir.round)
    figures = generate(config, name, folder, tasks, stage, stage.shard_size, TRAJECTORY, engines, author)
    return figures | {"skipped_over_budget": skipped}
