"""Stage 3: trajectories under both prompts go to the learner's ranks; the student's adapters come out."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trd_megatron.builtin_models import resolve_model
from trd_megatron.chat import Chat, teacher_prompt_ids
from trd_megatron.config import Config, LearnerConfig, to_dict
from trd_megatron.engine.engines import teacher_version
from trd_megatron.errors import UserError
from trd_megatron.learner.job import SAMPLES, Job, run_all
from trd_megatron.learner.stack import Installed, choose
from trd_megatron.progress import bar, console
from trd_megatron.records import REFINED, SAMPLE, TRAJECTORY
from trd_megatron.run_dir import RunDir, write_parquet
from trd_megatron.stages import prepare
from trd_megatron.stages.generate import drawn, packed


def build_samples(config: Config, run_dir: RunDir, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Rows of records.SAMPLE, a shard of them in memory at a time. left_out: counts the "aborted", "filtered" and "over_budget"
    trajectories that are not among them.

    The student's prompt is the one its rollout was drawn under, the response ids are the engine's own. The teacher's
    prompt follows method.teacher_prompt: vanilla, or refine with y_o in it. Raises UserError if a trajectory was drawn from other
    weights than its round's.
    """
    chat = Chat(resolve_model(config.teacher.path or config.model.path), config.data.prompt_format, config.teacher.chat_template_kwargs)
    problems = prepare.read(run_dir)
    refined, shows_rollout = config.method.trajectory == "refined", config.method.teacher_prompt == "refine"
    columns = ["problem_id", "sample_index", "finish_reason", "passed", "prompt_ids", "response_ids"]
    if refined:
        of_rollouts = drawn(run_dir.rollouts, TRAJECTORY, run_dir.round, ["problem_id", "sample_index", "passed", "prompt_ids"])
        rollouts = {(row["problem_id"], row["sample_index"]): (packed(row["prompt_ids"]), row["passed"]) for row in of_rollouts}
        trajectories = drawn(run_dir.refined, REFINED, teacher_version(config, run_dir), columns)
    else:
        trajectories = drawn(run_dir.rollouts, TRAJECTORY, run_dir.round, [*columns, "response"])
    for row in trajectories:
        key = row["problem_id"], row["sample_index"]
        prompt_ids, rollout_passed = rollouts[key] if refined else (row["prompt_ids"], row["passed"])
        if row["finish_reason"] == "abort":
            left_out["aborted"] += 1
            continue
        if not _kept(config.data.filter, rollout_passed, row["passed"]):
            left_out["filtered"] += 1
            continue
        if refined and shows_rollout:
            teacher_ids = row["prompt_ids"]
        else:
            shown = row["response"] if shows_rollout else None  # a rewrite is scored under its own prompt, above
            teacher_ids = teacher_prompt_ids(config, chat, problems[row["problem_id"]], shown)
        if teacher_ids is None:
            left_out["over_budget"] += 1
            continue
        yield {
            "problem_id": row["problem_id"],
            "sample_index": row["sample_index"],
            "student_prompt_ids": prompt_ids,
            "teacher_prompt_ids": teacher_ids,
            "response_ids": row["response_ids"],
            "rollout_passed": rollout_passed,
        }


def _kept(filter: str, rollout_passed: bool | None, passed: bool | None) -> bool:
    """The corpus filters of the paper's section B.3. What was not graded neither passed nor failed: only `all` keeps it."""
    if filter == "all":
        return True
    if filter == "succ":
        return rollout_passed is True
    return rollout_passed is False and (filter == "fail" or passed is True)


@dataclass(frozen=True)
class Prepared:
    """A training whose job lies in `folder`. counts: what the stage's manifest gets besides the learner's summary."""

    folder: Path
    learner: LearnerConfig
    steps: int
    counts: dict[str, Any]


def run(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    """Raises UserError if there are fewer samples than held out, LearnerFailedError if the ranks fail."""
    [(summary, _)] = learn([write(config, run_dir, folder)])
    return summary


def write(config: Config, run_dir: RunDir, folder: Path) -> Prepared:
    """Writes the job. Raises UserError if there are fewer samples than held out."""
    left_out = Counter(aborted=0, filtered=0, over_budget=0)
    count = write_parquet(folder / SAMPLES, build_samples(config, run_dir, left_out), SAMPLE)
    held_out = config.learner.held_out_samples
    if left_out["filtered"] and not count:
        raise UserError(
            f"data.filter={config.data.filter} leaves no trajectory to train on: it drops {left_out['filtered']}; set data.filter=all"
        )
    if count <= held_out:
        dropped = f" (data.filter={config.data.filter} drops {left_out['filtered']})" if left_out["filtered"] else ""
        raise UserError(f"{count} trajectories to train on{dropped}, of which learner.held_out_samples={held_out} are held out: lower it")
    teacher = str(resolve_model(config.teacher.path)) if config.teacher.path else None
    student = resolve_model(config.model.path)
    chat = Chat(student, config.data.prompt_format, config.student.chat_template_kwargs)
    Job(to_dict(config), str(student), teacher, chat.epistemic_ids(config.task)).write(folder)
    counts: dict[str, Any] = {f"left_out_{name}": left for name, left in left_out.items()}
    counts["layers"] = announce(config.learner)
    return Prepared(folder, config.learner, step_count(count - held_out, config.learner), counts)


def announce(learner: LearnerConfig) -> str:
    """What the layers are made of; says what a GPU goes without."""
    stack = choose(learner, Installed.find())
    for note in stack.notes:
        console.print(f"  train: {note}", highlight=False, markup=False)
    return "Transformer Engine" if stack.transformer_engine else "local"


def step_count(samples: int, learner: LearnerConfig) -> int:
    """Optimizer steps, the last of an epoch with what is left."""
    steps = -(-samples // learner.global_batch_size) * learner.epochs
    return min(steps, learner.max_steps or steps)


def learn(jobs: Sequence[Prepared]) -> Iterator[tuple[dict[str, Any], float]]:
    """Trains one after the other in one group of ranks; gives (summary, seconds) of each as it ends, an equal share of the start among
    them. Raises UserError or LearnerFailedError if the ranks fail."""
    if not jobs:
        return
    began = time.monotonic()
    start: float | None = None  # seconds until the first step began
    ended = 0

    def summary() -> tuple[dict[str, Any], float]:
        nonlocal began
        now, job = time.monotonic(), jobs[ended]
        share = 0.0 if start is None else start / len(jobs)
        seconds, began = now - began + share - (start or 0.0 if ended == 0 else 0.0), now
        return json.loads((job.folder / "summary.json").read_text(encoding="utf-8")) | job.counts, seconds

    with bar("train", sum(job.steps for job in jobs), "steps") as progress:
        shown = 0
        for number, metrics in run_all([job.folder for job in jobs], jobs[0].learner):
            if start is None:
                start = time.monotonic() - began - metrics["seconds"]
            while ended < number:
                yield summary()
                ended += 1
            step = sum(job.steps for job in jobs[:number]) + metrics["step"]
            progress.advance(step - shown)  # the first may be far on; after a rank was lost it goes back
            shown = step
            progress.tokens(metrics["response_tokens"])
            progress.note(f"kl {metrics['kl']:.4f}" if "kl" in metrics else f"loss {metrics['loss']:.4f}")
        while ended < len(jobs):
            yield summary()
            ended += 1
