"""Problems from their source into problems/, split into train and test."""

import random
from pathlib import Path
from typing import Any

from trd_megatron.config import Config
from trd_megatron.data import deduplicate, hub, sources
from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks
from trd_megatron.records import PROBLEM
from trd_megatron.run_dir import RunDir, read_shards, shard_path, write_parquet

SHARD_SIZE = 10_000


def run(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    """Raises UserError if the source is missing or damaged, empty, or smaller than the held-out part."""
    problems, figures = collect(config)
    rows = [dict.fromkeys(PROBLEM.names) | {"task": config.task} | problem for problem in problems]
    for index, start in enumerate(range(0, len(rows), SHARD_SIZE)):
        write_parquet(shard_path(folder, index), rows[start : start + SHARD_SIZE], PROBLEM)
    train = [row for row in rows if row["split"] == "train"]
    return {
        "train_problems": len(train),
        "test_problems": len(rows) - len(train),
        "with_reference_solution": sum(row["reference_solution"] is not None for row in train),
    } | figures


def load(config: Config) -> list[dict[str, Any]]:
    """The configured problems, each with a split."""
    return collect(config)[0]


def collect(config: Config) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The configured problems, each with a split, and what the manifest says of them: files (with the hub's revision), dropped (reason
    -> rows of the source that are no usable problem), in_benchmarks (benchmark -> problems that were left out because they occur in it).
    """
    data = config.data
    if data.source == "arithmetic":
        from trd_megatron.data import reasoning_gym

        assert data.train_problems is not None  # config_checks
        return list(reasoning_gym.load_arithmetic(data.train_problems, data.test_problems, config.seed)), {}
    if data.source == "lab":
        from trd_megatron.data import lab

        assert data.train_problems is not None  # config_checks
        return lab.load_lab(data.world, data.train_problems, data.test_problems, config.seed), {}
    paths = sources.locate(data)
    problems, dropped = sources.SOURCES[data.source].load(paths)
    usable = []
    for problem in problems:
        lacks = _lacks(config, problem)
        if lacks is None:
            usable.append(problem)
        elif data.source == "file":
            raise UserError(f"problem '{problem['problem_id']}' has no {lacks}")
        else:
            reason = f"no {lacks.split(',')[0].split(':')[0]}"
            dropped[reason] = dropped.get(reason, 0) + 1
    usable, in_benchmarks = exclude(usable, data.exclude_benchmarks)
    if not usable:
        why = ", ".join(f"{reason} ({count})" for reason, count in {**dropped, **in_benchmarks}.items() if count)
        raise UserError(f"{data.path or data.source} holds no problems" + (f" that can be used: {why}" if why else ""))
    revisions = {revision for path in paths if (revision := hub.revision(path))}
    figures: dict[str, Any] = {"dropped": dropped, "in_benchmarks": in_benchmarks}
    if revisions:
        figures["hub_revision"] = {str(sources.SOURCES[data.source].hub): ", ".join(sorted(revisions))}
    return split(usable, data.train_problems, data.test_problems, config.seed), figures


def _lacks(config: Config, problem: dict[str, Any]) -> str | None:
    """What a problem would need to be trained on, with the way out; None if it lacks nothing."""
    if config.job == "sft" and problem.get("reference_solution") is None:
        return "reference_solution, which job=sft trains on: add one"
    graded = config.job == "distill" or "test" in config.evaluate.benchmarks
    if graded and config.task != "code" and problem.get("answer") is None:
        return "answer: give one, or set task=code"
    if graded and config.task == "code" and problem.get("tests") is None:
        return "tests: give some, or set task=math"
    if config.job == "distill" and config.mode == "opsd" and not (problem.get("reference_solution") or problem.get("answer")):
        return "reference_solution, which mode=opsd shows the teacher: add one, or set mode=opd"
    return None


def exclude(problems: list[dict[str, Any]], specs: list[str]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The problems that occur in none of the benchmarks, and how many occur in each; what the source itself holds out is kept."""
    known = {benchmarks.name(spec): deduplicate.texts(benchmarks.texts(spec)) for spec in specs}
    found = dict.fromkeys(known, 0)
    kept = []
    for problem in problems:
        text = deduplicate.normalise(problem["problem"]) if known and problem.get("split") != "test" else None
        inside = [name for name, texts in known.items() if text in texts]
        for name in inside:
            found[name] += 1
        if not inside:
            kept.append(problem)
    return kept, found


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
