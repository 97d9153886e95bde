"""The train stage of job=sft: cross entropy of worked solutions under the student's prompt."""

from pathlib import Path
from typing import Any

from trd_megatron.builtin_models import resolve_model
from trd_megatron.chat import Chat
from trd_megatron.config import Config, to_dict
from trd_megatron.errors import UserError
from trd_megatron.learner.job import SAMPLES, Job
from trd_megatron.prompts import student_prompt
from trd_megatron.records import SAMPLE
from trd_megatron.run_dir import RunDir, write_parquet
from trd_megatron.stages import prepare
from trd_megatron.stages.train import Prepared, announce, learn, step_count


def build_samples(config: Config, run_dir: RunDir) -> tuple[list[dict[str, Any]], int, int]:
    """(rows of records.SAMPLE, how many of the last are the fixed held-out batch, problems left out).

    A response is the solution and the end of turn. The fixed batch is the first learner.held_out_samples test problems with a solution,
    or, where there are none, drawn from the others (0). Left out is what is over rollout.max_prompt_tokens or
    rollout.max_response_tokens.
    """
    chat = Chat(resolve_model(config.model.path), config.data.prompt_format, config.student.chat_template_kwargs)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    left_out = 0
    for problem in prepare.read(run_dir).values():
        of_split = rows[problem["split"]]
        if problem["split"] == "test" and len(of_split) == config.learner.held_out_samples:
            continue
        prompt = chat.prompt_ids(student_prompt(problem["task"], problem["problem"], problem["starter_code"]))
        response = chat.solution_ids(problem["reference_solution"])
        if len(prompt) > config.rollout.max_prompt_tokens or len(response) > config.rollout.max_response_tokens:
            left_out += 1
            continue
        of_split.append(
            {
                "problem_id": problem["problem_id"],
                "sample_index": 0,
                "student_prompt_ids": prompt,
                "teacher_prompt_ids": [],
                "response_ids": response,
                "rollout_passed": None,
                "source": problem["source"],
            }
        )
    return rows["train"] + rows["test"], len(rows["test"]), left_out


def run(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    """Raises UserError if there are too few solutions, LearnerFailedError if the ranks fail."""
    rows, held_out, left_out = build_samples(config, run_dir)
    drawn = 0 if held_out else config.learner.held_out_samples
    if len(rows) - held_out <= drawn:
        raise UserError(
            f"{len(rows) - held_out} worked solutions to train on ({left_out} are over rollout.max_prompt_tokens or "
            f"rollout.max_response_tokens), of which {drawn} are held out: lower learner.held_out_samples, or raise the budgets"
        )
    write_parquet(folder / SAMPLES, rows, SAMPLE)
    Job(to_dict(config), str(resolve_model(config.model.path)), None, [], objective="sft", held_out=held_out).write(folder)
    steps = step_count(len(rows) - held_out - drawn, config.learner)
    counts = {"left_out_over_budget": left_out, "layers": announce(config.learner)}
    [(summary, _)] = learn([Prepared(folder, config.learner, steps, counts)])
    return summary
