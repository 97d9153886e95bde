"""The figures of a model on a benchmark, and of two models on the same one. Rates are in percent, deltas in points, lengths in tokens."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trd_megatron.evaluate import buckets
from trd_megatron.evaluate.metrics import Floats, intervals, pass_curves

QUANTILES = (10, 25, 50, 75, 90)


@dataclass(frozen=True)
class Samples:
    """All samples of one model on one benchmark. problem_ids are sorted; passed and tokens are [problem, sample]."""

    problem_ids: list[str]
    passed: NDArray[np.bool_]
    tokens: NDArray[np.int64]

    @staticmethod
    def of(rows: Iterable[Mapping[str, Any]]) -> "Samples":
        """rows: problem_id, sample_index, passed and response_tokens. What was not graded (a grader's error, an aborted sample)
        counts as not passed.

        Raises ValueError if there is none, or if problems have different numbers of samples.
        """
        by_problem: dict[str, list[tuple[int, bool, int]]] = {}
        for row in rows:
            sample = (row["sample_index"], row["passed"] is True, row["response_tokens"])
            by_problem.setdefault(row["problem_id"], []).append(sample)
        if len({tuple(sorted(index for index, _, _ in samples)) for samples in by_problem.values()}) != 1:
            raise ValueError("every problem of a benchmark needs the same number of samples, and there must be at least one problem")
        ids = sorted(by_problem)
        ordered = [sorted(by_problem[problem]) for problem in ids]
        passed = np.array([[ok for _, ok, _ in samples] for samples in ordered])
        return Samples(ids, passed, np.array([[tokens for _, _, tokens in samples] for samples in ordered], dtype=np.int64))

    @property
    def n(self) -> int:
        """Samples per problem."""
        return self.passed.shape[1]

    @property
    def scores(self) -> Floats:
        """[problem, 1 + n]: each problem's Avg@n, then its Pass@1 to Pass@n; between 0 and 1."""
        counts = self.passed.sum(axis=1)
        return np.column_stack([counts / self.n, pass_curves(self.n, counts.tolist())])

    def keep(self, chosen: NDArray[np.bool_]) -> "Samples":
        """Those of the chosen problems."""
        ids = [problem for problem, wanted in zip(self.problem_ids, chosen, strict=True) if wanted]
        return Samples(ids, self.passed[chosen], self.tokens[chosen])


def named(scores: Floats) -> dict[str, Any]:
    """The means over problems of the columns of Samples.scores (or of their differences), with intervals."""
    values = (100 * scores.mean(axis=0)).tolist()
    bounds = intervals(100 * scores)
    return {
        "avg_at_k": values[0],
        "avg_at_k_interval": bounds[0],
        "pass_at_k": values[-1],
        "pass_at_k_interval": bounds[-1],
        "pass_curve": values[1:],  # Pass@1, Pass@2, ...
        "pass_curve_intervals": bounds[1:],
    }


def lengths(tokens: NDArray[np.int64]) -> dict[str, Any]:
    """Distribution of response lengths: samples, mean, quantiles p10 to p90, max. Without samples only their number."""
    if not tokens.size:
        return {"samples": 0}
    quantiles = {f"p{q}": float(np.percentile(tokens, q)) for q in QUANTILES}
    return {"samples": int(tokens.size), "mean": float(tokens.mean()), **quantiles, "max": int(tokens.max())}


def of_model(samples: Samples) -> dict[str, Any]:
    """Avg@k and Pass@k with k = samples per problem, Pass@k for every k up to that, and lengths of correct and incorrect samples."""
    spread = {"correct": lengths(samples.tokens[samples.passed]), "incorrect": lengths(samples.tokens[~samples.passed])}
    return {"problems": len(samples.problem_ids), "k": samples.n, **named(samples.scores), "lengths": spread}


def comparison(base: Samples, student: Samples) -> dict[str, Any]:
    """student - base, each problem paired with itself, and both by difficulty: how many of the base's samples pass.

    Raises ValueError unless both hold the same problems and as many samples of each.
    """
    if base.problem_ids != student.problem_ids or base.n != student.n:
        raise ValueError("base and student need the same samples")
    return {"delta": named(student.scores - base.scores), "buckets": _buckets(base, student)}


def _buckets(base: Samples, student: Samples) -> list[dict[str, Any]]:
    counts = base.passed.sum(axis=1)
    lines = []
    for low, high in buckets.bounds(base.n):
        chosen = (counts >= low) & (counts <= high)
        line: dict[str, Any] = {"base_passes": buckets.name(low, high), "problems": int(chosen.sum())}
        if chosen.any():
            ours, theirs = base.keep(chosen).scores, student.keep(chosen).scores
            for label, scores in (("base", ours), ("student", theirs)):
                line[label] = {"avg_at_k": 100 * float(scores[:, 0].mean()), "pass_at_k": 100 * float(scores[:, -1].mean())}
            delta = named(theirs - ours)
            line["delta"] = {name: delta[name] for name in ("avg_at_k", "avg_at_k_interval", "pass_at_k", "pass_at_k_interval")}
        lines.append(line)
    return lines
