"""Many runs side by side: the paper's tables with deltas and intervals, figure 3, and what each method cost.

Runs are pooled over their seeds; methods are the rows, and any other setting in which runs differ makes sections of its own. Rates are in
percent, differences in points, times in seconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from trd_megatron.config import Config, from_dict, get, leaves
from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks, figures
from trd_megatron.evaluate.figures import Samples
from trd_megatron.evaluate.metrics import RESAMPLES, Floats
from trd_megatron.learner.log import read_metrics
from trd_megatron.report import curves, html, plots, reading, tables
from trd_megatron.run_dir import Manifest, RunDir, atomic_write, read_config, write_json

METHODS = ("forward_kl", "forward_kl_clip", "reverse_kl", "reverse_kl_topk", "reverse_kl_top8", "trd")  # the paper's order
VANILLA, OURS = "forward_kl", "trd"
METRICS = ("avg_at_k", "pass_at_k")
FILES = ("report.html", "report.json", "report.md")


@dataclass(frozen=True)
class Run:
    """One finished run, in the view of its last round."""

    path: Path
    config: Config
    view: RunDir

    @staticmethod
    def read(path: Path) -> "Run":
        """Raises UserError if `path` is no run, or not finished."""
        config = from_dict(read_config(path))
        whole = RunDir(path, config.name)
        run = Run(path, config, whole.in_round(config.rounds - 1, config.rounds))
        for model, manifest in run.evaluations.items():
            if manifest is None or manifest.status != "done":
                raise UserError(f"{path} has not been evaluated yet ({model}): finish it first, `trd run` with its settings")
        return run

    @property
    def trains(self) -> bool:
        return self.config.job != "evaluate"

    @property
    def distils(self) -> bool:
        return self.config.job == "distill"

    @property
    def method(self) -> str:
        """The row that it belongs to."""
        return self.config.method.name if self.distils else self.config.job

    @cached_property
    def first(self) -> RunDir:
        """The view of round 0, where base and teacher were evaluated."""
        return RunDir(self.path, self.config.name).in_round(0, self.config.rounds)

    def folder(self, model: str) -> Path:
        return (self.view if model == "student" else self.first).eval / model

    @cached_property
    def evaluations(self) -> dict[str, Manifest | None]:
        """Model (base, teacher, student) -> the manifest of its evaluation."""
        wanted = ["base", *(["teacher"] if self.config.evaluate.teacher else []), *(["student"] if self.trains else [])]
        return {model: Manifest.read(self.folder(model)) for model in wanted}

    def samples(self, model: str, benchmark: str) -> Samples:
        return Samples.of(reading.graded([self.folder(model) / f"{benchmark}.parquet"]))

    @property
    def benchmarks(self) -> list[str]:
        return [benchmarks.name(spec) for spec in self.config.evaluate.benchmarks]

    def manifests(self) -> dict[str, Manifest]:
        """Stage -> manifest, of the stages that cost something, over all rounds."""
        found = {}
        for number in range(self.config.rounds):
            view = self.first.in_round(number, self.config.rounds)
            for stage, folder in zip(tables.COSTS, (view.rollouts, view.refined, view.train), strict=True):
                manifest = Manifest.read(folder)
                if manifest is not None and (stage != "refine" or self.config.method.trajectory == "refined"):
                    found[f"{number}/{stage}"] = manifest
        return found


def write(paths: Sequence[Path], folder: Path) -> None:
    """Writes report.html, report.json and report.md into `folder`.

    Raises UserError if a path is no finished run, a file is damaged, or runs of one section were evaluated on other problems.
    """
    if not paths:
        raise UserError("name at least one run to compare: trd report --compare RUN...")
    runs = [Run.read(path) for path in paths]
    found = compare(runs)
    drawn = _plots(found["sections"])
    public = {**found, "sections": [{key: value for key, value in one.items() if key != "curves"} for one in found["sections"]]}
    page = html.render(found, drawn, "compare.html.j2")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", public)
    for name, text in (("report.md", markdown(found)), ("report.html", page)):
        with atomic_write(folder / name) as file:
            file.write(text)


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """All figures: title, sections, and the runs behind them."""
    keys = _differing([run for run in runs if run.trains])
    grouped: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        of = tuple(html.setting(get(run.config, key)) for key in keys) if run.trains else ("evaluate", str(run.config.model.path))
        grouped.setdefault(of, []).append(run)
    sections = []
    for values, members in grouped.items():
        trains = members[0].trains
        settings = dict(zip(keys, values, strict=True)) if trains else {"model.path": values[1]}
        sections.append({"settings": settings} | _section(members))
    return {
        "title": ", ".join(dict.fromkeys(run.config.name for run in runs)),
        "resamples": RESAMPLES,
        "sections": sections,
        "runs": [_described(run, keys) for run in runs],
    }


def _differing(runs: Sequence[Run]) -> list[str]:
    """Keys of the result-changing settings, besides method and seed, in which runs differ."""
    found = []
    for key, field in leaves():
        if field.metadata["layout"] or key in ("name", "seed") or key.startswith("method."):
            continue
        if len({html.setting(get(run.config, key)) for run in runs}) > 1:
            found.append(key)
    return found


def _described(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    manifests = {model: manifest for model, manifest in run.evaluations.items() if manifest is not None}
    manifests |= {stage.split("/")[1]: manifest for stage, manifest in run.manifests().items()}
    return {
        "run": str(run.path),
        "task": run.config.task,
        "method": run.method,
        "seed": run.config.seed,
        "settings": {key: get(run.config, key) for key in keys},
        "fingerprints": {stage: manifest.fingerprint[:16] for stage, manifest in manifests.items()},
        "versions": {library: version for manifest in manifests.values() for library, version in manifest.versions.items()},
    }


def _section(runs: Sequence[Run]) -> dict[str, Any]:
    """Tables of runs that differ in method and seed alone."""
    methods: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.config.seed):
        of = methods.setdefault(run.method, [])
        if of and of[-1].config.seed == run.config.seed:
            raise UserError(f"{of[-1].path} and {run.path} have the same method, seed and settings: leave one out")
        of.append(run)
    order = [name for name in METHODS if name in methods] + [name for name in methods if name not in METHODS]
    methods = {name: methods[name] for name in order}
    if not runs[0].trains:
        methods = {"base": list(runs)}
    common = [name for name in runs[0].benchmarks if all(name in run.benchmarks for run in runs)]
    section: dict[str, Any] = {
        "methods": {name: [run.config.seed for run in of] for name, of in methods.items()},
        "benchmarks": [_benchmark(name, runs, methods) for name in common],
    }
    distilled = {name: of for name, of in methods.items() if of[0].distils}
    if distilled:
        section["trajectories"] = {name: _trajectories(of) for name, of in distilled.items()}
        section["costs"] = _costs(distilled)
        section["curves"] = {name: curves.seed_mean([read_metrics(run.view.train / "metrics.jsonl") for run in of])
                             for name, of in distilled.items()}  # fmt: skip
        section["diagnostics"] = {name: curves.start(lines) for name, lines in section["curves"].items()}
    return section


@dataclass(frozen=True)
class _Scores:
    """What one row of a table is made of. scores: [problem, 1 + k], the mean over seeds."""

    per_seed: list[Samples]

    @cached_property
    def scores(self) -> Floats:
        return np.mean([samples.scores for samples in self.per_seed], axis=0)

    def figures(self) -> dict[str, Any]:
        correct = np.concatenate([samples.tokens[samples.passed] for samples in self.per_seed])
        incorrect = np.concatenate([samples.tokens[~samples.passed] for samples in self.per_seed])
        return figures.named(self.scores) | {
            "seeds": [dict(zip(METRICS, (100 * one.scores[:, [0, -1]].mean(axis=0)).tolist(), strict=True)) for one in self.per_seed],
            "lengths": {"correct": figures.lengths(correct), "incorrect": figures.lengths(incorrect)},
        }


def _benchmark(name: str, runs: Sequence[Run], methods: dict[str, list[Run]]) -> dict[str, Any]:
    """One benchmark's table: base, teacher and every method, with their differences."""
    read: dict[tuple[Path, str], Samples] = {}
    shape: tuple[list[str], int] | None = None
    for run in runs:
        for model in run.evaluations:
            samples = read[run.path, model] = run.samples(model, name)
            shape = shape or (samples.problem_ids, samples.n)
            if (samples.problem_ids, samples.n) != shape:
                raise UserError(f"{run.path} and {runs[0].path} were evaluated on other problems or samples of {name}: compare them apart")
    assert shape is not None

    def scores(of: Iterable[Run], model: str) -> _Scores:
        return _Scores([read[run.path, model] for run in of])

    seeds = {run.config.seed: run for run in runs}  # the base of a seed is the same in each of its runs
    base = scores(seeds.values(), "base")
    table: dict[str, Any] = {"benchmark": name, "problems": len(shape[0]), "k": shape[1], "base": base.figures(), "methods": {}}
    taught = [run for run in seeds.values() if "teacher" in run.evaluations]
    if taught:
        table["teacher"] = scores(taught, "teacher").figures()
    students = {method: scores(of, "student") for method, of in methods.items() if of[0].trains}
    for method, student in students.items():
        of_base = scores(methods[method], "base")
        table["methods"][method] = student.figures() | {
            "delta": figures.named(student.scores - of_base.scores),
            "buckets": _buckets(of_base, student),
        }
    others = [method for method in students if method != OURS]
    if OURS in students and others:
        table["against_best"] = {}
        for metric in METRICS:
            best = max(others, key=lambda method: table["methods"][method][metric])
            gap = figures.named(students[OURS].scores - students[best].scores)
            table["against_best"][metric] = {"method": best, "delta": gap[metric], "interval": gap[f"{metric}_interval"]}
    for metric in METRICS:
        of = {method: table["methods"][method][metric] for method in students} | {"base": table["base"][metric]}
        table[f"best_{metric}"] = [method for method, value in of.items() if value == max(of.values())]
    return table


def _buckets(base: _Scores, student: _Scores) -> list[dict[str, Any]]:
    """Avg@k by how many of the base's samples pass, over the problems of all seeds."""
    lines: list[dict[str, Any]] = []
    pairs = [figures.comparison(ours, theirs)["buckets"] for ours, theirs in zip(base.per_seed, student.per_seed, strict=True)]
    for of_seeds in zip(*pairs, strict=True):
        problems = sum(line["problems"] for line in of_seeds)
        line = {"base_passes": of_seeds[0]["base_passes"], "problems": problems}
        if problems:
            for model in ("base", "student"):
                weighted = [one["problems"] * one[model]["avg_at_k"] for one in of_seeds if one["problems"]]
                line[model] = sum(weighted) / problems
        lines.append(line)
    return lines


def _trajectories(runs: Sequence[Run]) -> dict[str, Any]:
    """y_o and y_r over all seeds: pass rates, lengths and joint outcomes of all samples together."""
    found = []
    for run in runs:
        refined = reading.graded(reading.shards(run.view.refined)) if run.config.method.trajectory == "refined" else None
        found.append(tables.trajectories(reading.graded(reading.shards(run.view.rollouts)), refined))
    merged: dict[str, Any] = {}
    for name in ("rollouts", "refined"):
        parts = [one[name] for one in found if name in one]
        if parts:
            samples, graded, passed = (sum(part[key] for part in parts) for key in ("samples", "graded", "passed"))
            tokens = sum(part["samples"] * part["mean_tokens"] for part in parts) / samples
            merged[name] = {"samples": samples, "pass_rate": tables.percent(passed, graded), "mean_tokens": tokens}
    if "refined" in merged:
        merged["joint_outcomes"] = {name: sum(one["joint_outcomes"][name] for one in found) for name in tables.OUTCOMES}
    return merged


def _costs(methods: dict[str, list[Run]]) -> dict[str, Any]:
    """Seconds per stage, the mean over seeds, and TRD's over vanilla forward KL's (the paper's tables 11 and 12)."""
    found: dict[str, Any] = {}
    for method, runs in methods.items():
        parts = [{stage: _seconds(run, stage) for stage in tables.COSTS} for run in runs]
        stages = {stage: mean(part[stage] for part in parts) for stage in tables.COSTS if any(part[stage] for part in parts)}
        found[method] = stages | {"total": sum(stages.values())}
    costs: dict[str, Any] = {"methods": found}
    if OURS in found and VANILLA in found and found[VANILLA]["total"]:
        costs["ratio"] = found[OURS]["total"] / found[VANILLA]["total"]
    return costs


def _seconds(run: Run, stage: str) -> float:
    return sum(manifest.seconds for name, manifest in run.manifests().items() if name.endswith(f"/{stage}"))


def _plots(sections: Sequence[dict[str, Any]]) -> dict[str, str]:
    drawn = {}
    for number, section in enumerate(sections):
        for table in section["benchmarks"]:
            lines = _ours_first(table["methods"]) | {"base": table["base"]}
            drawn[f"{number}/pass_curve/{table['benchmark']}"] = plots.pass_curve(lines)
        if "curves" in section:
            drawn |= {f"{number}/{name}": svg for name, svg in curves.diagnostics(_ours_first(section["curves"])).items()}
    return drawn


def _ours_first(methods: dict[str, Any]) -> dict[str, Any]:
    """So that it has the plain line."""
    return {name: methods[name] for name in sorted(methods, key=lambda name: name != OURS)}


def markdown(found: dict[str, Any]) -> str:
    """The main tables, for a note or a README."""
    lines = [f"# {_cell(found['title'])}", ""]
    for section in found["sections"]:
        if section["settings"]:
            lines += [", ".join(f"{key}={_cell(str(value))}" for key, value in section["settings"].items()), ""]
        for table in section["benchmarks"]:
            k = table["k"]
            lines += [f"{_cell(table['benchmark'])}, {table['problems']} problems", ""]
            lines += [f"| | Avg@{k} | Δ | Pass@{k} | Δ | seeds |", "|---|---|---|---|---|---|"]
            lines.append(_line("Base", table, "base", table["base"], None))
            for method, of in table["methods"].items():
                lines.append(_line(_cell(method), table, method, of, of["delta"]))
            if "teacher" in table:
                lines.append(_line("Teacher", table, "", table["teacher"], None))
            lines.append("")
    return "\n".join(lines)


def _line(label: str, table: dict[str, Any], name: str, of: dict[str, Any], delta: dict[str, Any] | None) -> str:
    cells = []
    for metric in METRICS:
        text = html.number(of[metric], 1)
        cells.append(f"**{text}**" if name in table[f"best_{metric}"] else text)
        cells.append("" if delta is None else f"{html.signed(delta[metric])} {html.interval(delta[f'{metric}_interval'])}".strip())
    return f"| {label} | {' | '.join(cells)} | {len(of['seeds'])} |"


def _cell(text: str) -> str:
    """Text that cannot break a Markdown table, nor become HTML in it."""
    for char in "\\`*_[]|":
        text = text.replace(char, f"\\{char}")
    return html.visible(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
