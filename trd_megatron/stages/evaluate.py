"""Avg@k and Pass@k of the base model and of the trained student on the same problems, with the same seeds in every round."""

import shutil
from pathlib import Path
from typing import Any

from trd_megatron.builtin_models import resolve_model
from trd_megatron.chat import Chat
from trd_megatron.config import Config, benchmark_name
from trd_megatron.data import parquet
from trd_megatron.evaluate import avg_at_k, pass_at_k
from trd_megatron.records import PROBLEM, TRAJECTORY
from trd_megatron.run_dir import Manifest, RunDir, read_parquet, read_shards, write_json, write_parquet
from trd_megatron.stages import prepare
from trd_megatron.stages.generate import counts, generate, weights
from trd_megatron.stages.rollout import student_tasks


def _problems(config: Config, benchmark: str, run_dir: RunDir) -> list[dict[str, Any]]:
    if benchmark == "test":
        return [problem for problem in prepare.read(run_dir).values() if problem["split"] == "test"]
    return [dict.fromkeys(PROBLEM.names) | problem | {"task": config.task} for problem in parquet.load(parquet.locate(benchmark))]


def run_base(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    return _run(config, run_dir, folder, resolve_model(config.model.path), config.model.path, run_dir.round)


def run_student(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    return _run(config, run_dir, folder, run_dir.hf, "hf", run_dir.round + 1)


def _run(config: Config, run_dir: RunDir, folder: Path, model: Path, name: str, version: int) -> dict[str, Any]:
    settings = config.evaluate
    chat = Chat(model, config.data.prompt_format, config.student.chat_template_kwargs)
    figures: dict[str, Any] = {}
    for benchmark in settings.benchmarks:
        target = folder / f"{benchmark_name(benchmark)}.parquet"
        parts = folder / f".{target.stem}.parts"
        problems = _problems(config, benchmark, run_dir)
        tasks, skipped = student_tasks(chat, problems, settings.samples, settings.max_prompt_tokens, "evaluate.max_prompt_tokens")
        if not target.exists():
            parts.mkdir(exist_ok=True)
            generate(config, "evaluate", parts, tasks, settings, settings.shard_size, TRAJECTORY, weights(model, version), name, chat)
            write_parquet(target, read_shards(parts, TRAJECTORY), TRAJECTORY)
        shutil.rmtree(parts, ignore_errors=True)
        rows = read_parquet(target, TRAJECTORY)
        figures[target.stem] = scores(rows) | counts(rows) | {"skipped_over_budget": skipped}
    return figures


def scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Avg@k and Pass@k with k = samples per problem, in percent. A grader's error counts as not passed and is shown in verdicts."""
    outcomes: dict[str, list[bool]] = {}
    for row in rows:
        outcomes.setdefault(row["problem_id"], []).append(row["passed"] is True)
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
