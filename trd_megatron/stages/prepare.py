"""Problems from their source into problems/, split into train and test."""

import random
from pathlib import Path
from typing import Any

from trd_megatron.config import Config
from trd_megatron.data import deepscaler, parquet
from trd_megatron.errors import UserError
from trd_megatron.records import PROBLEM
from trd_megatron.run_dir import RunDir, read_shards, shard_path, write_parquet

SHARD_SIZE = 10_000


def run(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    """Raises UserError if the source is missing or damaged, empty, or smaller than the held-out part."""
    problems = load(config)
    rows = [dict.fromkeys(PROBLEM.names) | problem | {"task": config.task} for problem in problems]
    for index, start in enumerate(range(0, len(rows), SHARD_SIZE)):
        write_parquet(shard_path(folder, index), rows[start : start + SHARD_SIZE], PROBLEM)
    train = [row for row in rows if row["split"] == "train"]
    return {
        "train_problems": len(train),
        "test_problems": len(rows) - len(train),
        "with_reference_solution": sum(row["reference_solution"] is not None for row in train),
    }


def load(config: Config) -> list[dict[str, Any]]:
    """The configured problems, each with a split."""
    data = config.data
    if data.source == "arithmetic":
        from trd_megatron.data import reasoning_gym

        assert data.train_problems is not None  # config_checks
        return list(reasoning_gym.load_arithmetic(data.train_problems, data.test_problems, config.seed))
    path = None if data.path is None else parquet.locate(data.path)
    problems = parquet.load(path) if data.source == "file" and path else deepscaler.load(path)
    for problem in problems:
        if config.mode == "opsd" and not (problem.get("reference_solution") or problem["answer"]):
            raise UserError(
                f"problem '{problem['problem_id']}' has no reference_solution, which mode=opsd shows the teacher: add one, or set mode=opd"
            )
        if config.task == "math" and problem["answer"] is None:
            raise UserError(f"problem '{problem['problem_id']}' has no answer: give one, or set task=code")
    if not problems:
        raise UserError(f"{data.path or data.source} holds no problems")
    return split(problems, data.train_problems, data.test_problems, config.seed)


def split(problems: list[dict[str, Any]], train: int | None, test: int, seed: int) -> list[dict[str, Any]]:
    """Keeps the source's own split column where it has one; otherwise draws `test` problems to hold out and `train` of the others."""
    if any(problem.get("split") is not None for problem in problems):
        for problem in problems:
            if problem.get("split") not in ("train", "test"):
                raise UserError(f"problem '{problem['problem_id']}' has split '{problem.get('split')}': must be train or test")
    else:
        order = list(range(len(problems)))
        random.Random(seed).shuffle(order)
        held_out = set(order[:test])
        for index, problem in enumerate(problems):
            problem["split"] = "test" if index in held_out else "train"
    training = [problem for problem in problems if problem["split"] == "train"]
    held = [problem for problem in problems if problem["split"] == "test"]
    if not training or len(held) < test:
        raise UserError(
            f"{len(training)} training and {len(held)} test problems are left, but data.test_problems={test}: "
            "give more problems or lower data.test_problems"
        )
    if train is not None and train < len(training):
        training = [training[i] for i in sorted(random.Random(f"{seed}/train").sample(range(len(training)), train))]
    return training + held[:test]


def read(run_dir: RunDir) -> dict[str, dict[str, Any]]:
    """problem_id -> Problem, in the order of the shards."""
    return {row["problem_id"]: row for row in read_shards(run_dir.problems, PROBLEM)}
