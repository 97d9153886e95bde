"""Many runs side by side: the paper's tables with deltas and intervals, figure 3, and what each method cost.

Runs are pooled over their seeds; methods and filters are the rows, and any other setting in which runs differ makes sections of its own.
Rates are in percent, differences in points, lengths in tokens, times in seconds.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from trd_megatron.config import get, leaves
from trd_megatron.errors import UserError
from trd_megatron.evaluate import buckets, figures
from trd_megatron.evaluate.figures import Samples
from trd_megatron.evaluate.metrics import RESAMPLES, Floats
from trd_megatron.report import compare_page, tables
from trd_megatron.report.compare_runs import Run
from trd_megatron.run_dir import atomic_write, write_json

METHODS = (
    "forward_kl",
    "forward_kl_clip",
    "reverse_kl",
    "reverse_kl_topk",
    "reverse_kl_top8",
    "trd",
)  # the paper's order; others come after
OURS, VANILLA = "trd", "forward_kl"
METRICS = ("avg_at_k", "pass_at_k")
# Settings in which runs of one section may differ: rows and pooled seeds, and what changes no figure of a benchmark that runs share.
NO_SECTION = ("name", "run_dir", "job", "seed", "method", "data.filter", "evaluate.benchmarks", "evaluate.teacher")
OF_THE_TEACHER = ("mode", "teacher", "engine.teacher", "refine.max_prompt_tokens")  # in which OPD and OPSD of one student differ
TITLE = ("mode", "model.path")  # said of every section
DIAGNOSTICS = ("kl_passed", "kl_failed", "perplexity_gap", "epistemic_mass")  # of metrics.jsonl, the paper's figure 3
FIRST_SHARE = 0.1  # of the steps: the start of training


def write(runs: Sequence[Path], folder: Path) -> None:
    """Writes report.html, report.json and report.md about these run directories into `folder`.

    Raises UserError if there is no run, one is not finished or was made with other settings than its config.yaml says, a file is damaged,
    two runs are the same, or runs that belong together share no benchmark or were asked other problems.
    """
    if not runs:
        raise UserError("no run to compare: trd report --compare RUN...")
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run, whose own report would be lost: choose another --output FOLDER")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --output FOLDER")
    found = compare([Run.read(path) for path in {path.resolve(): path for path in runs}.values()])
    texts = {"report.md": compare_page.markdown(found), "report.html": compare_page.page(found)}
    write_json(folder / "report.json", found)
    for name, text in texts.items():
        with atomic_write(folder / name) as file:
            file.write(text)


# Which runs belong together


def _under(name: str, keys: Iterable[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that report.json holds: sections of runs that differ in method and seed alone; models that were evaluated alone; OPD, OPSD
    and their teachers; and the runs behind all that."""
    trained = [run for run in runs if run.config.job != "evaluate"]
    alone = [run for run in runs if run.config.job == "evaluate"]
    keys = _section_keys(trained)
    groups = _grouped(trained, keys)
    usual = _usual([dict(of) for of, _ in groups])
    sections = [
        {"settings": dict(of), "unusual": {key: value for key, value in of if usual[key] != value and key not in TITLE}} | _section(members)
        for of, members in groups
    ]
    keys_alone = [key for key in _differing(alone) if key != "model.path"]
    return {
        "title": ", ".join(dict.fromkeys(run.config.name for run in runs)),
        "tasks": sorted({run.config.task for run in runs}),
        "resamples": RESAMPLES,
        "methods": _in_order(run.method for run in trained),
        "sections": sections,
        "evaluated": [{"settings": dict(of)} | _evaluated(members) for of, members in _grouped(alone, keys_alone)],
        "teachers": _teachers(trained, alone, keys),
        "runs": [_described(run, dict.fromkeys(["model.path", *(keys_alone if run in alone else keys)])) for run in runs],
    }


def _differing(runs: Sequence[Run], layout: bool = False) -> list[str]:
    """Keys of the result-changing settings, besides NO_SECTION, in which runs differ; or of those that change no result."""
    return [
        key
        for key, field in leaves()
        if field.metadata["layout"] is layout
        and not _under(key, NO_SECTION)
        and len({json.dumps(get(run.config, key)) for run in runs}) > 1
    ]


def _section_keys(runs: Sequence[Run]) -> list[str]:
    """The settings that make sections: those that change results, and layouts where runs differ in nothing else."""
    keys = _differing(runs)
    twins: dict[str, list[Run]] = {}
    for number, (_, members) in enumerate(_grouped(runs, keys)):
        for run in members:
            twins.setdefault(f"{number} {run.seed} {run.method}", []).append(run)
    return list(dict.fromkeys([*keys, *(key for of in twins.values() for key in _differing(of, layout=True))]))


def _usual(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The most frequent value of each key, the first of equals."""
    found: dict[str, Any] = {}
    for key in settings[0] if settings else ():
        values = [of[key] for of in settings]
        found[key] = max(values, key=values.count)
    return found


def _in_order(methods: Iterable[str]) -> list[str]:
    """Each once, in the paper's order, others after; those with a filter follow their method."""
    known = list(dict.fromkeys(methods))
    order = list(dict.fromkeys([*METHODS, *map(unfiltered, known)]))
    return sorted(known, key=lambda name: (order.index(unfiltered(name)), name != unfiltered(name)))


def unfiltered(method: str) -> str:
    """trd of "trd (fail)"."""
    return method.partition(" (")[0]


def _grouped(runs: Iterable[Run], keys: Sequence[str]) -> list[tuple[list[tuple[str, Any]], list[Run]]]:
    """((key, value) of each key, the runs that have them), in the order of the runs."""
    found: dict[str, tuple[list[tuple[str, Any]], list[Run]]] = {}
    for run in runs:
        of = [(key, get(run.config, key)) for key in keys]
        found.setdefault(json.dumps(of), (of, []))[1].append(run)
    return list(found.values())


def _described(run: Run, keys: Iterable[str]) -> dict[str, Any]:
    versions: dict[str, list[str]] = {}
    for manifest in run.stages.values():
        for library, version in manifest.versions.items():
            known = versions.setdefault(library, [])
            known += [version] if version not in known else []
    return {
        "run": str(run.path),
        "name": run.config.name,
        "method": run.method,
        "seed": run.seed,
        "settings": {key: get(run.config, key) for key in keys},
        "fingerprints": {label: manifest.fingerprint for label, manifest in run.stages.items()},
        "finished": max(manifest.finished for manifest in run.stages.values()),
        "versions": versions,
    }


def _by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """method -> its runs by seed, in the paper's order. Raises UserError if two runs have the same method and seed."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        of = found.setdefault(run.method, [])
        if of and of[-1].seed == run.seed:
            raise UserError(f"{of[-1].path} and {run.path} have the same method, seed and settings: leave one out")
        of.append(run)
    return {name: found[name] for name in _in_order(found)}


def _common(runs: Sequence[Run]) -> list[str]:
    """The benchmarks that all runs have. Raises UserError if there is none."""
    common = runs[0].benchmarks
    for run in runs[1:]:
        left = [name for name in common if name in run.benchmarks]
        if not left:
            raise UserError(
                f"{run.path} was evaluated on {', '.join(run.benchmarks) or 'nothing'} and {runs[0].path} on "
                f"{', '.join(runs[0].benchmarks) or 'nothing'}: runs of one table need a benchmark in common (evaluate.benchmarks)"
            )
        common = left
    if not common:
        raise UserError(f"{runs[0].path} was evaluated on no benchmark (evaluate.benchmarks): there is nothing to compare")
    return common


# Scores


@dataclass(frozen=True)
class Scores:
    """What one row of a table is made of: the samples of a model under each seed."""

    by_seed: Mapping[int, Samples]

    @cached_property
    def problem_ids(self) -> list[str]:
        return sorted({problem for samples in self.by_seed.values() for problem in samples.problem_ids})

    @cached_property
    def values(self) -> Floats:
        """[problem, 1 + k]: Samples.scores, of each problem the mean over the seeds that asked it."""
        return _seed_mean(self.problem_ids, [(samples.problem_ids, samples.scores) for samples in self.by_seed.values()])

    def figures(self) -> dict[str, Any]:
        """Means with intervals, each seed's own, and lengths of all samples together."""
        tokens = {
            "correct": [samples.tokens[samples.passed] for samples in self.by_seed.values()],
            "incorrect": [samples.tokens[~samples.passed] for samples in self.by_seed.values()],
        }
        seeds = [
            {"seed": seed} | dict(zip(METRICS, (100 * samples.scores[:, [0, -1]].mean(axis=0)).tolist(), strict=True))
            for seed, samples in self.by_seed.items()
        ]
        return figures.named(self.values) | {
            "seeds": seeds,
            "lengths": {name: figures.lengths(np.concatenate(parts)) for name, parts in tokens.items()},
        }


def _seed_mean(ids: Sequence[str], parts: Iterable[tuple[Sequence[str], Floats]]) -> Floats:
    """[problem, column] in the order of ids: of each problem the mean over the parts ([its problem, column]) that have it."""
    place = {problem: index for index, problem in enumerate(ids)}
    sums, counts = None, np.zeros((len(ids), 1))
    for problem_ids, scores in parts:
        rows = [place[problem] for problem in problem_ids]
        sums = np.zeros((len(ids), scores.shape[1])) if sums is None else sums
        sums[rows] += scores
        counts[rows] += 1
    assert sums is not None
    return sums / counts


def _delta(base: Scores, student: Scores) -> dict[str, Any]:
    """student - base under each seed, problem by problem; then as in Scores."""
    parts = [(of.problem_ids, of.scores - base.by_seed[seed].scores) for seed, of in student.by_seed.items()]
    return figures.named(_seed_mean(student.problem_ids, parts))


def _against(baseline: Scores, ours: Scores) -> dict[str, Any]:
    """ours - baseline over the problems that both were asked, each the mean over its seeds."""
    common = sorted(set(baseline.problem_ids) & set(ours.problem_ids))
    values = [of.values[np.isin(of.problem_ids, common)] for of in (ours, baseline)]
    return figures.named(values[0] - values[1]) if common else {}


class _Asked:
    """Checks that samples of one benchmark belong into one table: k is the same, and so are the problems. The run's own held-out problems
    (test) may be others under another seed, which draws them."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self.first: dict[int, tuple[Run, Samples]] = {}  # by seed

    def read(self, run: Run, model: str) -> Samples:
        samples = run.samples(model, self.benchmark)
        ((other, known),) = [self.first.setdefault(run.seed, (run, samples))]
        if self.benchmark != "test" or known.n != samples.n:
            other, known = next(iter(self.first.values()))
        if known.n != samples.n:
            raise UserError(
                f"{other.path} and {run.path} ({model}) have {known.n} and {samples.n} samples of each problem of {self.benchmark}: "
                "compare them apart"
            )
        if known.problem_ids != samples.problem_ids:
            raise UserError(f"{other.path} and {run.path} ({model}) were asked other problems of {self.benchmark}: compare them apart")
        return samples

    @property
    def differs(self) -> bool:
        """Whether seeds have other problems."""
        return len({tuple(samples.problem_ids) for _, samples in self.first.values()}) > 1


def _section(runs: Sequence[Run]) -> dict[str, Any]:
    """Tables of runs that differ in method and seed alone."""
    methods = _by_method(runs)
    common = _common(runs)
    config = runs[0].config
    found: dict[str, Any] = {
        "title": f"{config.mode.upper()}, {config.model.path}",
        "methods": {name: [run.seed for run in of] for name, of in methods.items()},
        "benchmarks": [_benchmark(name, methods) for name in common],
        "left_out": sorted({name for run in runs for name in run.benchmarks} - set(common)),
    }
    if len(common) > 1:
        found["mean"] = _mean(found["benchmarks"])
    distilled = {name: of for name, of in methods.items() if of[0].config.job == "distill"}
    if distilled:
        found["trajectories"] = {name: _trajectories(of) for name, of in distilled.items()}
        found["costs"] = _costs(distilled)
        found["curves"] = {name: _curves([run.metrics() for run in of]) for name, of in distilled.items()}
        found["diagnostics"] = {name: _start(lines) for name, lines in found["curves"].items()}
    return found


def _benchmark(name: str, methods: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """One benchmark's table: base, teacher where it was evaluated, and every method, with their differences."""
    asked = _Asked(name)
    bases = {method: Scores({run.seed: asked.read(run, "base") for run in of}) for method, of in methods.items()}
    students = {method: Scores({run.seed: asked.read(run, "student") for run in of}) for method, of in methods.items()}
    taught = {run.seed: run for of in methods.values() for run in of if run.evaluated("teacher")}
    base = Scores({seed: samples for of in reversed(bases.values()) for seed, samples in of.by_seed.items()})
    ours = next(iter(base.by_seed.values()))
    table: dict[str, Any] = {
        "benchmark": name,
        "problems": len(base.problem_ids),
        "k": ours.n,
        "problems_differ": asked.differs,
        "base": base.figures(),
        "methods": {},
    }
    for method, student in students.items():
        whole = students.get(unfiltered(method))  # what a row with a filter is held against, if it has the same seeds
        against = whole if whole is not None and whole is not student and whole.by_seed.keys() >= student.by_seed.keys() else None
        table["methods"][method] = student.figures() | {
            "delta": _delta(bases[method] if against is None else against, student),
            "against": "base" if against is None else unfiltered(method),
            "buckets": _buckets(bases[method], student),
        }
    if taught:
        table["teacher"] = Scores({seed: asked.read(run, "teacher") for seed, run in taught.items()}).figures()
    others = [method for method in students if method != OURS and method == unfiltered(method)]
    if OURS in students and others:
        table["against_best"] = {}
        for metric in METRICS:
            best = max(others, key=lambda method: table["methods"][method][metric])
            gap = _against(students[best], students[OURS])
            if gap:
                table["against_best"][metric] = {"method": best, "delta": gap[metric], "interval": gap[f"{metric}_interval"]}
    for metric in METRICS:
        table[f"best_{metric}"] = best_of({"base": table["base"][metric]} | {row: of[metric] for row, of in table["methods"].items()})
    return table


def best_of(values: Mapping[str, float]) -> list[str]:
    """The rows that are best as they are shown, with one decimal."""
    best = max(round(value, 1) for value in values.values())
    return [row for row, value in values.items() if round(value, 1) == best]


def _mean(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The unweighted means over benchmarks."""
    found: dict[str, Any] = {"base": {metric: mean(line["base"][metric] for line in lines) for metric in METRICS}, "methods": {}}
    for method in lines[0]["methods"]:
        of = [line["methods"][method] for line in lines]
        found["methods"][method] = {metric: mean(line[metric] for line in of) for metric in METRICS}
        found["methods"][method]["delta"] = {metric: mean(line["delta"][metric] for line in of) for metric in METRICS}
    for metric in METRICS:
        values = {"base": found["base"][metric]} | {method: of[metric] for method, of in found["methods"].items()}
        found[f"best_{metric}"] = best_of(values)
    return found


def _buckets(base: Scores, student: Scores) -> list[dict[str, Any]]:
    """Both by how many of the base's samples pass; a problem counts once for each seed."""
    lines = []
    n = next(iter(student.by_seed.values())).n
    for low, high in buckets.bounds(n):
        parts: dict[str, list[Floats]] = {"base": [], "student": []}
        for seed, of in student.by_seed.items():
            counts = base.by_seed[seed].passed.sum(axis=1)
            chosen = (counts >= low) & (counts <= high)
            parts["base"].append(base.by_seed[seed].scores[chosen])
            parts["student"].append(of.scores[chosen])
        values = {model: np.concatenate(of)[:, [0, -1]] for model, of in parts.items()}
        line: dict[str, Any] = {"base_passes": buckets.name(low, high), "problems": len(values["base"])}
        if line["problems"]:
            line |= {model: dict(zip(METRICS, (100 * of.mean(axis=0)).tolist(), strict=True)) for model, of in values.items()}
        lines.append(line)
    return lines


# Training


def _trajectories(runs: Sequence[Run]) -> dict[str, Any]:
    """tables.trajectories of all seeds together."""
    pairs = [run.trajectories() for run in runs]
    refined = [row for _, rows in pairs for row in rows or ()]
    return tables.trajectories([row for rows, _ in pairs for row in rows], refined if pairs[0][1] is not None else None)


def _costs(methods: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Seconds of each part, the mean over seeds, and TRD's over those of forward KL (the paper's tables 11 and 12)."""
    found: dict[str, dict[str, float]] = {}
    for method, runs in methods.items():
        parts = [run.costs() for run in runs]
        seconds = {name: [part[name]["seconds"] for part in parts] for name in parts[0]}
        found[method] = {name: mean(of) for name, of in seconds.items() if None not in of}
    costs: dict[str, Any] = {"methods": found}
    if OURS in found and VANILLA in found:
        pairs = {name: (found[OURS][name], of) for name, of in found[VANILLA].items() if name in found[OURS]}
        costs["ratio"] = {name: ours / theirs for name, (ours, theirs) in pairs.items() if theirs}
    return costs


def _curves(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A line for each step that all runs have: each diagnostic's mean over those that have a value there, None if none has."""
    found: list[dict[str, Any]] = []
    for lines in zip(*runs, strict=False):
        values = {name: [line[name] for line in lines if line.get(name) is not None] for name in DIAGNOSTICS}
        found.append({"step": lines[0]["step"]} | {name: mean(of) if of else None for name, of in values.items()})
    return found


def _start(lines: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Each diagnostic's mean over the first tenth of the steps, before much is learned."""
    first = lines[: max(round(FIRST_SHARE * len(lines)), 1)]
    values = {name: [line[name] for line in first if line[name] is not None] for name in DIAGNOSTICS}
    return {name: mean(of) if of else None for name, of in values.items()}


# Models that are no student


def _evaluated(runs: Sequence[Run]) -> dict[str, Any]:
    """Benchmarks of models that were evaluated alone, pooled over seeds."""
    models: dict[str, list[Run]] = {}
    for run in runs:
        models.setdefault(str(run.config.model.path), []).append(run)
    ordered = {path: _by_method(of)["evaluate"] for path, of in models.items()}
    lines = []
    for name in _common(runs):
        asked = _Asked(name)
        scores = {path: Scores({run.seed: asked.read(run, "base") for run in of}) for path, of in ordered.items()}
        first = next(iter(scores.values()))
        line = {"benchmark": name, "problems": len(first.problem_ids), "k": next(iter(first.by_seed.values())).n}
        lines.append(line | {"models": {path: of.figures() for path, of in scores.items()}})
    return {"benchmarks": lines}


def _teachers(trained: Sequence[Run], alone: Sequence[Run], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The paper's table 5: TRD from another model (OPD), from itself (OPSD) and the teachers themselves, where at least two of these are
    there under otherwise the same settings, on the benchmarks that all have."""
    found = []
    ours = [run for run in trained if run.method == OURS]
    for of, runs in _grouped(ours, [key for key in keys if not _under(key, OF_THE_TEACHER)]):
        rows: dict[str, list[tuple[Run, str]]] = {}
        for path in dict.fromkeys(run.config.teacher.path for run in runs if run.config.teacher.path is not None):
            scored = [(run, "teacher") for run in runs if run.config.teacher.path == path and run.evaluated("teacher")]
            rows[f"Teacher {path}"] = scored or [(run, "base") for run in alone if _evaluates(run, path, runs[0])]
        rows["Base"] = [(run, "base") for run in runs]
        for differs, members in _grouped(runs, [key for key in keys if _under(key, OF_THE_TEACHER)]):
            more = ", ".join(f"{key}={value}" for key, value in differs if value and key != "mode")
            rows[f"{members[0].config.mode.upper()} {more}".strip()] = [(run, "student") for run in members]
        rows = {label: row for label, row in rows.items() if row}
        if len(rows) < 3:
            continue
        lines = []
        for name in runs[0].benchmarks:
            if all(name in run.benchmarks for row in rows.values() for run, _ in row):
                asked = _Asked(name)
                scores = {
                    label: Scores({run.seed: asked.read(run, model) for run, model in reversed(row)}).figures()
                    for label, row in rows.items()
                }
                lines.append({"benchmark": name, "k": len(scores["Base"]["pass_curve"]), "rows": scores})
        if lines:
            found.append({"settings": dict(of), "rows": list(rows), "benchmarks": lines})
    return found


def _evaluates(run: Run, path: str, like: Run) -> bool:
    """Whether this run evaluated the model at `path` as the other run evaluates."""
    same = dataclasses.replace(run.config.evaluate, benchmarks=[]) == dataclasses.replace(like.config.evaluate, benchmarks=[])
    return run.config.model.path == path and same
