"""Base model and trained student on the same problems, with the same seeds in every round. evaluate/figures.py has the figures."""

import shutil
from pathlib import Path
from typing import Any

from trd_megatron.chat import Chat
from trd_megatron.config import Config
from trd_megatron.data import deduplicate, hub
from trd_megatron.engine.base import Weights
from trd_megatron.engine.engines import Engines, Role, student_weights, teacher_weights, trained_weights
from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks, figures
from trd_megatron.records import TRAJECTORY
from trd_megatron.run_dir import Manifest, RunDir, merge_shards, origins, write_json
from trd_megatron.stages import prepare
from trd_megatron.stages.generate import Author, check_version, claim, counts, generate, graded_columns
from trd_megatron.stages.rollout import student_tasks

SAMPLING = ("temperature", "top_p", "top_k", "max_prompt_tokens", "max_response_tokens")


def problems_of(config: Config, benchmark: str, run_dir: RunDir) -> list[dict[str, Any]]:
    """Rows of records.PROBLEM. benchmark: as in evaluate.benchmarks."""
    if benchmark == "test":
        return [problem for problem in prepare.read(run_dir).values() if problem["split"] == "test"]
    return benchmarks.load(benchmark, allow_unsandboxed=config.verify.code.allow_unsandboxed)


def _source(benchmark: str) -> dict[str, Any]:
    """What the benchmark is called in the settings, and the revision of the hub's repository that was read."""
    revisions = set() if benchmark == "test" else {hub.revision(path) for path in benchmarks.locate(benchmark)} - {None}
    return {"name": benchmark} | ({"hub_revision": ", ".join(sorted(map(str, revisions)))} if revisions else {})


def run_base(config: Config, run_dir: RunDir, folder: Path, engines: Engines) -> dict[str, Any]:
    return _run(config, run_dir, folder, engines, student_weights(config, run_dir), config.model.path)


def run_student(config: Config, run_dir: RunDir, folder: Path, engines: Engines) -> dict[str, Any]:
    return _run(config, run_dir, folder, engines, trained_weights(run_dir), "hf")


def run_teacher(config: Config, run_dir: RunDir, folder: Path, engines: Engines) -> dict[str, Any]:
    assert config.teacher.path is not None  # config_checks
    return _run(config, run_dir, folder, engines, teacher_weights(config, run_dir), config.teacher.path, "teacher")


def _run(
    config: Config, run_dir: RunDir, folder: Path, engines: Engines, weights: Weights, name: str, role: Role = "student"
) -> dict[str, Any]:
    settings = config.evaluate
    claim(folder, weights)
    asked = config.teacher if role == "teacher" else config.student
    chat = Chat(weights.path, config.data.prompt_format, asked.chat_template_kwargs)
    author = Author(role, weights, name, chat)
    trained = [problem for problem in prepare.read(run_dir).values() if problem["split"] == "train"]  # none with job=evaluate
    known = deduplicate.texts(trained)
    found: dict[str, Any] = {}
    for benchmark in settings.benchmarks:
        target = folder / f"{benchmarks.name(benchmark)}.parquet"
        parts = folder / f".{target.stem}.parts"
        problems = problems_of(config, benchmark, run_dir)
        plain = benchmarks.plain_prompt(benchmark)
        tasks, skipped = student_tasks(chat, problems, settings.samples, settings.max_prompt_tokens, "evaluate.max_prompt_tokens", plain)
        if not target.exists():
            parts.mkdir(exist_ok=True)
            generate(config, "evaluate", parts, tasks, settings, settings.shard_size, TRAJECTORY, engines, author)
            merge_shards(parts, target, TRAJECTORY)
        shutil.rmtree(parts, ignore_errors=True)
        check_version(target, TRAJECTORY, weights.version)
        found[target.stem] = measured(target) | {
            "skipped_over_budget": skipped,
            "in_training": sum(deduplicate.normalise(problem["problem"]) in known for problem in problems),
            "source": _source(benchmark),
            "sampling": {key: getattr(settings, key) for key in SAMPLING} | {"seed": config.seed},
        }
    return found


def measured(target: Path) -> dict[str, Any]:
    """The figures of a file of samples: scores, lengths, counts, and what drew and graded them."""
    table = graded_columns(target, TRAJECTORY)
    return figures.of_model(figures.Samples.of(table.to_pylist())) | counts(table) | origins([target])


def write_summary(first: RunDir, run_dir: RunDir, models: set[str]) -> None:
    """eval/summary.json of a round: model -> benchmark -> figures, from the manifests of `models` (base, teacher, student), those evaluated
    with the current settings; and where there are both, comparison -> benchmark -> figures.comparison.

    first: the view of round 0, where base and teacher are. Raises UserError if the two have other samples.
    """
    summary: dict[str, Any] = {}
    folders = {"base": first.eval / "base", "teacher": first.eval / "teacher", "student": run_dir.eval / "student"}
    for model in sorted(models):
        manifest = Manifest.read(folders[model])
        assert manifest is not None  # it has just been found done
        summary[model] = manifest.counts
    if {"base", "student"} <= models:
        summary["comparison"] = {
            name: compared(*(folders[model] / f"{name}.parquet" for model in ("base", "student"))) for name in summary["student"]
        }
    write_json(run_dir.eval / "summary.json", summary)


def compared(base: Path, student: Path) -> dict[str, Any]:
    """figures.comparison of two files of samples. Raises UserError if they hold other samples."""
    both = [figures.Samples.of(graded_columns(path, TRAJECTORY).to_pylist()) for path in (base, student)]
    try:
        return figures.comparison(*both)
    except ValueError as error:
        raise UserError(f"{base} and {student}: {error}; move both away and run again") from None
