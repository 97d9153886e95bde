"""Last stage: report.json, the figures of the run, and report.html, the same for people. In a run of several rounds both compare the
rounds, and show the last one: its trajectories, its training, and its student beside the base of round 0."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trd_megatron import paper
from trd_megatron.config import Config, get, leaves
from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks
from trd_megatron.evaluate.metrics import RESAMPLES
from trd_megatron.report import curves, differences, html, plots, repetition, tables
from trd_megatron.run_dir import Manifest, RunDir, atomic_write, origins, write_json

SAMPLES_SHOWN = 6
GRADED = ("problem_id", "sample_index", "finish_reason", "passed", "verdict")
TEXTS = ("problem_id", "sample_index", "response", "extracted_answer")
SAMPLING = ("temperature", "top_p", "top_k", "max_prompt_tokens", "max_response_tokens")
TRAINED_WITH = (
    "seed", "mode", "teacher.path", "data.filter", "method.name", "method.trajectory", "method.teacher_prompt", "method.divergence.kind",
    "method.divergence.top_k", "method.divergence.clip", "learner.trainable", "learner.learning_rate", "learner.global_batch_size",
    "learner.epochs",
)  # fmt: skip
CURVES = ("step", "loss", "kl", "kl_passed", "kl_failed", "perplexity_gap", "epistemic_mass", "grad_norm", "lr")


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
    figures = {
        "experiment": config.name,
        "job": config.job,
        "student": config.model.path,
        "seed": config.seed,
        "benchmarks": lines[-1],
        "resamples": RESAMPLES,
        "stages": [tables.stage(name, done.get(label)) | {"stage": label} for label, (name, _) in stages.items()],
        "versions": tables.library_versions(done),
        "settings": {name: get(config, name) for name, _ in leaves()},
        "paper": paper.describe(config),
    }
    samples: list[dict[str, Any]] = []
    if distils:
        trained, plotted, samples = _training(config, run_dir, views, lines)
        figures, drawn = figures | trained, drawn | plotted
        figures["costs"] = tables.costs((name, done.get(label)) for label, (name, _) in stages.items())
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
    rollouts = _rows(_shards(run_dir.rollouts))
    refined = _rows(_shards(run_dir.refined)) if refines else None
    drawn_in = {"rollouts": run_dir.rollouts} | ({"refined": run_dir.refined} if refines else {})
    summary = json.loads(_text(run_dir.train / "summary.json"))
    metrics = [json.loads(line) for line in _text(run_dir.train / "metrics.jsonl").splitlines()]
    exported = Manifest.read(run_dir.hf)
    figures = {
        "method": config.method.name,
        "trajectory": config.method.trajectory,
        "mode": config.mode,
        "teacher": config.teacher.path,
        "kl_fixed_batch": tables.kl_change(summary),
        "training": summary,
        "exported_step": None if exported is None else exported.counts["step"],
        "trajectories": tables.trajectories(rollouts, refined),
        "by_reference": tables.by_reference(rollouts, refined, _worked(run_dir.problems)),
        "repetition": {name: repetition.measure(_response_ids(folder)) for name, folder in drawn_in.items()},
        "curves": {name: [line[name] for line in metrics] for name in CURVES},
        "made": _made(config, drawn_in),
    }
    if len(views) > 1:
        figures["rounds"] = [_round(view, refines, scores) for view, scores in zip(views, lines, strict=True)]
    by_method = {config.method.name: metrics}
    drawn = {
        "kl": plots.kl(metrics),
        "held_out": plots.held_out(summary["kl_fixed_batch_before"], metrics),
        "gradient_norm": plots.gradient_norm(metrics, config.learner.clip_grad),
        "learning_rate": plots.learning_rate(metrics),
        "kl_by_outcome": curves.kl_by_outcome(by_method),
        "perplexity_gap": curves.perplexity_gap(by_method),
        "epistemic_mass": curves.epistemic_mass(by_method),
        "lengths": plots.lengths(_lengths(rollouts), None if refined is None else _lengths(refined)),
    }
    if refined:
        drawn["joint_outcomes"] = plots.joint_outcomes(figures["trajectories"]["joint_outcomes"])
    picked = tables.pick_samples(rollouts, refined, SAMPLES_SHOWN)
    samples = _samples(run_dir, picked, rollouts, refined, of_lab=config.data.source == "lab")
    kept = ("problem_id", "sample_index", "outcome", "first_different_word", "first_wrong_step")
    figures["samples"] = [{name: sample[name] for name in kept} for sample in samples]
    return figures, drawn, samples


def _supervised(config: Config, run_dir: RunDir) -> tuple[dict[str, Any], dict[str, str]]:
    """(figures, plots) of job=sft's training."""
    summary = json.loads(_text(run_dir.train / "summary.json"))
    metrics = [json.loads(line) for line in _text(run_dir.train / "metrics.jsonl").splitlines()]
    exported = Manifest.read(run_dir.hf)
    drawn = {
        "loss": plots.loss(metrics),
        "held_out": plots.held_out(summary["nll_fixed_batch_before"], metrics, "held_out_nll"),
        "gradient_norm": plots.gradient_norm(metrics, config.learner.clip_grad),
        "learning_rate": plots.learning_rate(metrics),
    }
    return {"method": "sft", "training": summary, "exported_step": None if exported is None else exported.counts["step"]}, drawn


def _worked(folder: Path) -> set[str]:
    """The problems that have a worked reference solution, not just an answer."""
    read = [_read(path, ("problem_id", "reference_solution")) for path in _shards(folder)]
    # Compared where they are: a null is neither, and so is not kept.
    kept = [table.filter(pc.not_equal(table["reference_solution"], "")) for table in read]
    return {name for table in kept for name in table["problem_id"].to_pylist()}


def _made(config: Config, drawn_in: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What is behind the figures of trajectories and of training: settings and seed, and who drew and graded the samples."""
    made: dict[str, dict[str, Any]] = {}
    for name, folder in drawn_in.items():
        sampling = config.rollout if name == "rollouts" else config.refine
        settings = {key: getattr(sampling, key) for key in SAMPLING} | {"samples_per_problem": config.rollout.samples_per_problem}
        made[name] = {"sampling": settings | {"seed": config.seed}, **origins(_shards(folder))}
    return made | {"training": {key: get(config, key) for key in TRAINED_WITH}}


def _response_ids(folder: Path) -> Iterator[pa.ListArray]:
    """The token ids of a folder's responses, a shard in memory at a time."""
    return (chunk for path in _shards(folder) for chunk in _read(path, ("response_ids",))["response_ids"].chunks)


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
    rows = [_rows([folder / f"{name}.parquet"]) for folder in folders.values()]
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
    rollouts, refined = _rows(_shards(view.rollouts)), _rows(_shards(view.refined)) if refines else None
    return tables.one_round(view.round, rollouts, refined, json.loads(_text(view.train / "summary.json")), lines)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: move {path.parent} away and run again") from None


def _shards(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("part-*.parquet"))
    if not shards:
        raise UserError(f"{folder} holds no part-*.parquet: move it away and run again")
    return shards


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(columns)).select(list(columns))
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        reason = str(error.args[0] if error.args else error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}): move {path.parent} away and run again") from None


def _rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Trajectories as report.tables takes them. Ids and texts, nearly all of the bytes, do not become Python objects."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        table = _read(path, (*GRADED, "response_ids"))
        lengths = pc.list_value_length(table["response_ids"])
        rows += table.select(list(GRADED)).append_column("response_tokens", lengths).to_pylist()
    return rows


def _lengths(rows: Sequence[tables.Row]) -> list[int]:
    return [row["response_tokens"] for row in rows]


def _texts(paths: Sequence[Path], columns: Sequence[str], problem_ids: set[str]) -> list[dict[str, Any]]:
    """The rows of these problems."""
    wanted = pa.array(sorted(problem_ids), pa.string())
    tables_read = (_read(path, columns) for path in paths)
    return [row for table in tables_read for row in table.filter(pc.is_in(table["problem_id"], wanted)).to_pylist()]


def _samples(
    run_dir: RunDir,
    picked: list[tuple[tables.Key, str]],
    rollouts: Sequence[tables.Row],
    refined: Sequence[tables.Row] | None,
    of_lab: bool,
) -> list[dict[str, Any]]:
    """The picked samples with their texts: outcome, problem_id, problem, answer, attempts (y_o, then y_r if there is one), where they
    differ (_mark)."""
    ids = {problem_id for (problem_id, _), _ in picked}
    found = _texts(_shards(run_dir.problems), ("problem_id", "problem", "answer", "reference_solution"), ids)
    problems = {row["problem_id"]: row for row in found}
    sources = [(run_dir.rollouts, rollouts)] if refined is None else [(run_dir.rollouts, rollouts), (run_dir.refined, refined)]
    attempts = []
    for folder, rows in sources:
        texts = {tables.key(row): row for row in _texts(_shards(folder), TEXTS, ids)}
        attempts.append({tables.key(row): {**row, **texts[tables.key(row)]} for row in rows if row["problem_id"] in ids})
    samples = [
        {**problems[which[0]], "outcome": outcome, "sample_index": which[1], "attempts": [each[which] for each in attempts]}
        for which, outcome in picked
    ]
    for sample in samples:
        _mark(sample, of_lab)
    return samples


def _mark(sample: dict[str, Any], of_lab: bool) -> None:
    """Adds to a sample first_wrong_step (of y_o, from 1, the answer being the last; None where it has none or it is not known) and
    first_different_word (of y_r, from 1; None where it says the same, or is not there), and to its attempts the pieces of their texts:
    marked is the step, in both, if one is wrong, else where y_r leaves y_o."""
    texts = [attempt["response"] for attempt in sample["attempts"]]
    spans: list[differences.Span | None] = [None] * len(texts)
    sample["first_different_word"] = sample["first_wrong_step"] = None
    if len(texts) == 2 and (found := differences.first_difference(*texts)) is not None:
        word, *spans = found
        sample["first_different_word"] = word + 1
    if of_lab and (wrong := differences.wrong_step(sample["problem"], sample["reference_solution"], texts[0])) is not None:
        step, place = wrong
        sample["first_wrong_step"] = step + 1
        spans = [place, *(differences.same_step(sample["problem"], text, step) for text in texts[1:])]
    for attempt, span in zip(sample["attempts"], spans, strict=True):
        attempt["pieces"] = differences.pieces(attempt["response"], span)


def _help() -> dict[str, str]:
    """setting -> what it means."""
    return {name: field.metadata["help"] for name, field in leaves()}
