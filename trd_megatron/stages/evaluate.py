"""Avg@k and Pass@k of the base model and of the trained student on the same problems, with the same seeds in every round."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from trd_megatron.chat import Chat
from trd_megatron.config import Config, benchmark_name
from trd_megatron.data import parquet
from trd_megatron.engine.base import Weights
from trd_megatron.engine.engines import Engines, student_weights, trained_weights
from trd_megatron.evaluate import avg_at_k, pass_at_k
from trd_megatron.records import PROBLEM, TRAJECTORY
from trd_megatron.run_dir import Manifest, RunDir, merge_shards, write_json
from trd_megatron.stages import prepare
from trd_megatron.stages.generate import Author, check_version, claim, counts, generate, graded_columns
from trd_megatron.stages.rollout import student_tasks


def _problems(config: Config, benchmark: str, run_dir: RunDir) -> list[dict[str, Any]]:
    if benchmark == "test":
        return [problem for problem in prepare.read(run_dir).values() if problem["split"] == "test"]
    return [dict.fromkeys(PROBLEM.names) | problem | {"task": config.task} for problem in parquet.load(parquet.locate(benchmark))]


def run_base(config: Config, run_dir: RunDir, folder: Path, engines: Engines) -> dict[str, Any]:
    return _run(config, run_dir, folder, engines, student_weights(config, run_dir), config.model.path)


def run_student(config: Config, run_dir: RunDir, folder: Path, engines: Engines) -> dict[str, Any]:
    return _run(config, run_dir, folder, engines, trained_weights(run_dir), "hf")


def _run(config: Config, run_dir: RunDir, folder: Path, engines: Engines, weights: Weights, name: str) -> dict[str, Any]:
    settings = config.evaluate
    claim(folder, weights)
    chat = Chat(weights.path, config.data.prompt_format, config.student.chat_template_kwargs)
    author = Author("student", weights, name, chat)
    figures: dict[str, Any] = {}
    for benchmark in settings.benchmarks:
        target = folder / f"{benchmark_name(benchmark)}.parquet"
        parts = folder / f".{target.stem}.parts"
        problems = _problems(config, benchmark, run_dir)
        tasks, skipped = student_tasks(chat, problems, settings.samples, settings.max_prompt_tokens, "evaluate.max_prompt_tokens")
        if not target.exists():
            parts.mkdir(exist_ok=True)
            generate(config, "evaluate", parts, tasks, settings, settings.shard_size, TRAJECTORY, engines, author)
            merge_shards(parts, target, TRAJECTORY)
        shutil.rmtree(parts, ignore_errors=True)
        check_version(target, TRAJECTORY, weights.version)
        table = graded_columns(target, TRAJECTORY)
        figures[target.stem] = scores(table) | counts(table) | {"skipped_over_budget": skipped}
    return figures


def scores(table: pa.Table) -> dict[str, Any]:
    """Avg@k and Pass@k with k = samples per problem, in percent. What was not graded (a grader's error, an aborted sample) counts
    as not passed and is shown in verdicts."""
    outcomes: dict[str, list[bool]] = {}
    for problem_id, passed in zip(table["problem_id"].to_pylist(), table["passed"].to_pylist(), strict=True):
        outcomes.setdefault(problem_id, []).append(passed is True)
    k = len(next(iter(outcomes.values())))
    passing = [pass_at_k(len(results), sum(results), k) for results in outcomes.values()]
    return {
        "problems": len(outcomes),
        "k": k,
        "avg_at_k": 100 * avg_at_k(list(outcomes.values())),
        "pass_at_k": 100 * sum(passing) / len(passing),
    }


def write_summary(run_dir: RunDir, models: set[str]) -> None:
    """eval/summary.json: model -> benchmark -> figures, from the manifests of `models`, those evaluated with the current settings."""
    manifests = {name: Manifest.read(run_dir.eval / name) for name in sorted(models)}
    write_json(run_dir.eval / "summary.json", {name: manifest.counts for name, manifest in manifests.items() if manifest is not None})
