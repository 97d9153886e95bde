"""The lab's base models: what lab_models gives is pretrained on a world's texts, by the learner's supervised objective, once.

A base has the misconceptions of its world's writers, and the abilities of a teacher that has to be trusted: it rewrites attempts without
errors. It is good enough by what it does with problems of the part "check", not after a number of steps; then the learning rate falls.
"""

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from trd_megatron.cache import cache_dir
from trd_megatron.chat import Chat
from trd_megatron.config import Config, LearnerConfig, load, to_dict
from trd_megatron.convert import huggingface
from trd_megatron.convert.megatron import Megatron
from trd_megatron.data.lab import STUDENT_MIX, TEACHER_MIX, WORLDS, Example, checks, corpus
from trd_megatron.errors import UserError
from trd_megatron.learner.checkpoint_files import step_folder
from trd_megatron.learner.job import SAMPLES, Job, run_ranks
from trd_megatron.progress import bar, console
from trd_megatron.records import SAMPLE
from trd_megatron.run_dir import digest, versions, write_json, write_parquet

CHECKS = 200  # held-out problems of each kind
EVERY = 100  # steps between two looks at them
RECORD = "pretraining"  # folder inside the base's: how it was made


@dataclass(frozen=True)
class Recipe:
    """How one base is made. good_enough: kind of text -> mean probability of the right one on held-out problems."""

    world: str
    start: str  # the model of random weights
    mix: Mapping[str, float]
    good_enough: Mapping[str, float]
    learning_rate: float
    decay_steps: int
    max_steps: int = 2000
    batch_size: int = 32
    seed: int = 0

    @property
    def label(self) -> str:
        """Changes with everything that shapes the weights."""
        return digest([dataclasses.asdict(self), dataclasses.asdict(WORLDS[self.world]), versions()])[:10]


RECIPES = {
    "lab-base": Recipe("lab", "builtin:lab-student", STUDENT_MIX, {"solve": 0.3, "refine_opsd": 0.9}, 3e-3, 300),
    "lab_mini-base": Recipe("lab_mini", "builtin:lab-student", STUDENT_MIX, {"solve": 0.3, "refine_opsd": 0.9}, 3e-3, 150),
    "lab_control-base": Recipe(
        "lab_control", "builtin:lab-student", STUDENT_MIX, {"solve": 0.3, "refine_opsd": 0.9, "vanilla_opsd": 0.8}, 3e-3, 300
    ),
    "lab-opd-teacher": Recipe("lab", "builtin:lab-teacher", TEACHER_MIX, {"refine_opd": 0.9}, 2e-3, 250),
}


def configuration(recipe: Recipe) -> Config:
    """The learner's settings: those of experiment=lab but for what a recipe says."""
    config = load(["experiment=lab", "task=lab", f"data.world={recipe.world}"])
    learner = dataclasses.replace(
        config.learner,
        learning_rate=recipe.learning_rate,
        global_batch_size=recipe.batch_size,
        max_steps=recipe.max_steps,
        warmup_ratio=EVERY / recipe.max_steps,
        decay_when=dict(recipe.good_enough),
        decay_steps=recipe.decay_steps,
        eval_interval=EVERY,
        checkpoint_interval=EVERY,
        keep_checkpoints=1,
        trainable="full",
    )
    return dataclasses.replace(config, name="lab pretraining", job="sft", seed=recipe.seed, learner=learner)


def samples(recipe: Recipe, chat: Chat, count: int) -> Iterator[dict[str, Any]]:
    """Rows of records.SAMPLE: `count` texts to learn, then those of the checks."""
    world = WORLDS[recipe.world]
    texts = islice(corpus(world, dict(recipe.mix), recipe.seed), count)
    for number, example in enumerate(texts):
        yield _row(chat, f"{number}", example, None)
    for number, example in enumerate(checks(world, list(recipe.good_enough), CHECKS)):
        yield _row(chat, f"check-{number}", example, example.kind)


def _row(chat: Chat, name: str, example: Example, source: str | None) -> dict[str, Any]:
    return {
        "problem_id": name,
        "sample_index": 0,
        "student_prompt_ids": chat.prompt_ids(example.prompt) + (chat.encode(example.given) if example.given else []),
        "teacher_prompt_ids": [],
        "response_ids": chat.solution_ids(example.response),
        "rollout_passed": None,
        "source": source,
    }


def _folder(name: str) -> Path:
    return cache_dir() / "pretraining" / f"{name}-{RECIPES[name].label}"


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Waits until no other process makes the base `name`, and keeps others waiting."""
    lock = _folder(name).with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(name: str, start: Path, folder: Path) -> None:
    """Pretrains the base `name` from the model in `start` and writes it into `folder`; an interrupted pretraining goes on. To be called
    under `alone`.

    Raises UserError if it does not become good enough, LearnerFailedError if the ranks fail.
    """
    recipe = RECIPES[name]
    work = _folder(name)
    work.mkdir(parents=True, exist_ok=True)
    config = configuration(recipe)
    if not (work / "job.json").exists():
        console.print(f"builtin:{name} is pretrained, once: a few minutes", highlight=False)
        rows = list(samples(recipe, Chat(start, config.data.prompt_format, {}), recipe.max_steps * recipe.batch_size))
        write_parquet(work / SAMPLES, rows, SAMPLE)
        held_out = sum(row["source"] is not None for row in rows)
        Job(to_dict(config), str(start), None, [], objective="sft", held_out=held_out).write(work)
    _train(name, work, config.learner)
    summary = json.loads((work / "summary.json").read_text(encoding="utf-8"))
    if summary["decay_from"] is None:
        raise UserError(f"builtin:{name} did not become good enough in {recipe.max_steps} steps: see {work / 'metrics.jsonl'}")
    base = Megatron(step_folder(work / "checkpoints", summary["steps"]), start)
    huggingface.write(base, folder, dtype=torch.float32)
    (folder / RECORD).mkdir()
    for file in ("summary.json", "metrics.jsonl"):
        shutil.copy(work / file, folder / RECORD)
    write_json(folder / RECORD / "recipe.json", dataclasses.asdict(recipe) | {"versions": versions()})
    shutil.rmtree(work)


def _train(name: str, work: Path, learner: LearnerConfig) -> None:
    assert learner.max_steps is not None
    with bar(name, learner.max_steps, "steps") as progress:
        shown = 0
        for metrics in run_ranks(work, learner):
            progress.advance(metrics["step"] - shown)
            shown = metrics["step"]
            progress.tokens(metrics["response_tokens"])
            reached = [f"{key.split('/')[1]} {value:.2f}" for key, value in metrics.items() if key.startswith("held_out_probability/")]
            if reached:
                progress.note(", ".join(reached))
