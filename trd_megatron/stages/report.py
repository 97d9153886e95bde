"""Last stage: report.json, the figures of the run, and report.html, the same for people. In a run of several rounds both compare the
rounds, and show the last one: its trajectories, its training, and its student beside the base of round 0."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trd_megatron.config import Config, get, leaves
from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks
from trd_megatron.evaluate.metrics import RESAMPLES
from trd_megatron.report import curves, html, plots, reading, tables
from trd_megatron.run_dir import Manifest, RunDir, atomic_write, write_json
from trd_megatron.verify.lab import first_error, word_place

SAMPLES_SHOWN = 6
TEXTS = ("problem_id", "sample_index", "response", "extracted_answer")


def run(config: Config, run_dir: RunDir, folder: Path) -> dict[str, Any]:
    """run_dir: the view of the last round. Raises UserError if an output of an earlier stage is missing or damaged."""
    views = [run_dir.in_round(number, config.rounds) for number in range(config.rounds)]
    distils, trains = config.job == "distill", config.job != "evaluate"
    scores = [
        [_benchmark(views[0], view if trains else None, benchmarks.name(name)) for name in config.evaluate.benchmarks] for view in views
    ]
    stages = _stages(views, config)
    done = {label: dataclasses.asdict(manifest) for label, (_, manifest) in stages.items() if manifest is not None}
    drawn = {}
    for line, rows in scores[-1]:
        models = {"base": line["base"]} | ({"student": line["method"]} if trains else {})
        drawn[f"pass_curve/{line['benchmark']}"] = plots.pass_curve(models)
        drawn[f"success_lengths/{line['benchmark']}"] = plots.success_lengths(dict(zip(models, rows, strict=True)))
    lines = [[line for line, _ in of_round] for of_round in scores]
    lines_of_stages = [tables.stage(name, done.get(label)) | {"stage": label} for label, (name, _) in stages.items()]
    figures: dict[str, Any] = {
        "experiment": config.name,
        "job": config.job,
        "student": config.model.path,
        "seed": config.seed,
        "benchmarks": lines[-1],
        "resamples": RESAMPLES,
        "stages": lines_of_stages,
        "versions": tables.library_versions(done),
        "settings": {name: get(config, name) for name, _ in leaves()},
    }
    samples: list[dict[str, Any]] = []
    if distils:
        figures["costs"] = tables.costs(lines_of_stages)
        trained, plotted, samples = _training(config, run_dir, views, lines)
        figures, drawn = figures | trained, drawn | plotted
    elif trains:
        trained, plotted = _supervised(config, run_dir)
        figures, drawn = figures | trained, drawn | plotted
    page = html.render(figures | {"samples": samples, "help": _help()}, drawn)
    write_json(run_dir.path / "report.json", figures)
    with atomic_write(run_dir.path / "report.html") as file:
        file.write(page)
    return {"samples_shown": len(samples), "html_bytes": len(page.encode())}


def _training(
    config: Config, run_dir: RunDir, views: Sequence[RunDir], lines: Sequence[Sequence[dict[str, Any]]]
) -> tuple[dict[str, Any], dict[str, str], list[dict[str, Any]]]:
    """(figures, plots, samples) of the last round's trajectories and training, and the comparison of rounds."""
    refines = config.method.trajectory == "refined"
    rollouts = reading.graded(reading.shards(run_dir.rollouts))
    refined = reading.graded(reading.shards(run_dir.refined)) if refines else None
    summary = json.loads(reading.text(run_dir.train / "summary.json"))
    metrics = [json.loads(line) for line in reading.text(run_dir.train / "metrics.jsonl").splitlines()]
    exported = Manifest.read(run_dir.hf)
    figures = {
        "method": config.method.name,
        "trajectory": config.method.trajectory,
        "mode": config.mode,
        "teacher": config.teacher.path,
        "kl_fixed_batch": tables.kl_change(summary),
        "training": summary,
        "exported_step": None if exported is None else exported.counts["step"],
        "trajectories": tables.trajectories(rollouts, refined, _worked(run_dir)),
        "diagnostics_at_start": curves.start(metrics),
    }
    if len(views) > 1:
        figures["rounds"] = [_round(view, refines, scores) for view, scores in zip(views, lines, strict=True)]
    drawn = {
        "kl": plots.kl(metrics),
        "held_out": plots.held_out(summary["kl_fixed_batch_before"], metrics),
        "gradient_norm": plots.gradient_norm(metrics, config.learner.clip_grad),
        "learning_rate": plots.learning_rate(metrics),
        **curves.diagnostics({config.method.name: metrics}),
        "lengths": plots.lengths(reading.lengths(rollouts), None if refined is None else reading.lengths(refined)),
    }
    if refined:
        drawn["joint_outcomes"] = plots.joint_outcomes(figures["trajectories"]["joint_outcomes"])
    picked = tables.pick_samples(rollouts, refined, SAMPLES_SHOWN)
    return figures, drawn, _samples(run_dir, picked, rollouts, refined)


def _supervised(config: Config, run_dir: RunDir) -> tuple[dict[str, Any], dict[str, str]]:
    """(figures, plots) of job=sft's training."""
    summary = json.loads(reading.text(run_dir.train / "summary.json"))
    metrics = [json.loads(line) for line in reading.text(run_dir.train / "metrics.jsonl").splitlines()]
    exported = Manifest.read(run_dir.hf)
    drawn = {
        "loss": plots.loss(metrics),
        "held_out": plots.held_out(summary["nll_fixed_batch_before"], metrics, "held_out_nll"),
        "gradient_norm": plots.gradient_norm(metrics, config.learner.clip_grad),
        "learning_rate": plots.learning_rate(metrics),
    }
    return {"method": "sft", "training": summary, "exported_step": None if exported is None else exported.counts["step"]}, drawn


def _stages(views: Sequence[RunDir], config: Config) -> dict[str, tuple[str, Manifest | None]]:
    """What a stage is called (with several rounds 1/rollout) -> the stage and its manifest, of all left of this one."""
    if config.job == "evaluate":
        return {"evaluate/base": ("evaluate/base", Manifest.read(views[0].eval / "base"))}
    found = {"prepare": ("prepare", Manifest.read(views[0].problems))}
    for view in views:
        folders = {"rollout": view.rollouts, "refine": view.refined, "train": view.train, "export": view.hf}
        folders |= {"evaluate/base": view.eval / "base", "evaluate/student": view.eval / "student"}
        if config.method.trajectory != "refined" or config.job == "sft":
            del folders["refine"]
        if config.job == "sft":
            del folders["rollout"]
            if not config.evaluate.benchmarks:
                del folders["evaluate/base"], folders["evaluate/student"]
        if view.round:
            del folders["evaluate/base"]
        elif config.evaluate.teacher:
            folders["evaluate/teacher"] = view.eval / "teacher"
        prefix = f"{view.round}/" if len(views) > 1 else ""
        found |= {prefix + name: (name, Manifest.read(folder)) for name, folder in folders.items()}
    return found


def _benchmark(first: RunDir, view: RunDir | None, name: str) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """(figures, rows) of the base of round 0 and, where it is given, of the student of a round."""
    folders = {"base": first.eval / "base"} | ({} if view is None else {"student": view.eval / "student"})
    rows = [reading.graded([folder / f"{name}.parquet"]) for folder in folders.values()]
    try:
        line = tables.benchmark(name, rows[0], rows[1] if view else None)
    except ValueError as error:
        raise UserError(f"{(view or first).eval}: {error}; move it away and run again") from None
    manifests = {model: Manifest.read(folder) for model, folder in folders.items()}
    line["made"] = {
        model: {key: manifest.counts[name][key] for key in ("source", "sampling", "engines", "graders")}
        for model, manifest in manifests.items()
        if manifest is not None and name in manifest.counts
    }
    base = manifests["base"]
    line["in_training"] = base.counts[name]["in_training"] if base is not None and name in base.counts else None
    return line, rows


def _round(view: RunDir, refines: bool, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table of rounds."""
    rollouts, refined = reading.graded(reading.shards(view.rollouts)), reading.graded(reading.shards(view.refined)) if refines else None
    return tables.one_round(view.round, rollouts, refined, json.loads(reading.text(view.train / "summary.json")), lines)


def _worked(run_dir: RunDir) -> set[str]:
    """The problems with a worked reference solution."""
    found: set[str] = set()
    for path in reading.shards(run_dir.problems):
        table = reading.read(path, ("problem_id", "reference_solution"))
        found.update(table.filter(table["reference_solution"].is_valid())["problem_id"].to_pylist())
    return found


def _samples(
    run_dir: RunDir, picked: list[tuple[tables.Key, str]], rollouts: Sequence[tables.Row], refined: Sequence[tables.Row] | None
) -> list[dict[str, Any]]:
    """The picked samples with their texts: outcome, problem_id, problem, answer, attempts (y_o, then y_r if there is one)."""
    ids = {problem_id for (problem_id, _), _ in picked}
    columns = ("problem_id", "task", "problem", "answer", "reference_solution")
    found = reading.of_problems(reading.shards(run_dir.problems), columns, ids)
    problems = {row["problem_id"]: row for row in found}
    sources = [(run_dir.rollouts, rollouts)] if refined is None else [(run_dir.rollouts, rollouts), (run_dir.refined, refined)]
    attempts = []
    for folder, rows in sources:
        texts = {tables.key(row): row for row in reading.of_problems(reading.shards(folder), TEXTS, ids)}
        attempts.append({tables.key(row): {**row, **texts[tables.key(row)]} for row in rows if row["problem_id"] in ids})
    return [
        {**problems[which[0]], "outcome": outcome, "sample_index": which[1]}
        | {"attempts": _with_parts(problems[which[0]], [each[which] for each in attempts])}
        for which, outcome in picked
    ]


def _with_parts(problem: dict[str, Any], attempts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each attempt with its response in three parts: before the first step that diverges, its first word, and the rest. In the lab a
    response diverges where it is wrong; elsewhere y_o and y_r do where they part."""
    texts = [attempt["response"] for attempt in attempts]
    if problem["task"] == "lab":
        errors = [first_error(problem["problem"], problem["reference_solution"], text) for text in texts]
        places = [None if error is None else word_place(text, error[1]) for text, error in zip(texts, errors, strict=True)]
    elif len(texts) == 2:
        places = [tables.diverging(texts[0], texts[1]), tables.diverging(texts[1], texts[0])]
    else:
        places = [None]
    return [attempt | {"parts": tables.marked(text, place)} for attempt, text, place in zip(attempts, texts, places, strict=True)]


def _help() -> dict[str, str]:
    """setting -> what it means."""
    return {name: field.metadata["help"] for name, field in leaves()}
