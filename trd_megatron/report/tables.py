"""The figures of the report, computed from rows, metrics and manifests. Pure functions; report.json holds what they return.

A row is a trajectory without its texts: problem_id, sample_index, finish_reason, passed (None: not graded), verdict and
response_tokens. Rates are in percent, differences in percentage points, lengths in tokens.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from trd_megatron.evaluate import figures

Row = Mapping[str, Any]
Key = tuple[str, int]

NOT_GRADED = "not graded"
OUTCOMES = ("fail → pass", "pass → fail", "pass → pass", "fail → fail", NOT_GRADED)  # of y_o → y_r
TOKENS = {"rollout": "response_tokens", "refine": "response_tokens", "train": "tokens"}  # stage -> its count of response tokens


def percent(part: float, whole: float) -> float | None:
    """None where there is nothing to divide by."""
    return 100 * part / whole if whole else None


def key(row: Row) -> Key:
    return row["problem_id"], row["sample_index"]


def describe(rows: Sequence[Row]) -> dict[str, Any]:
    """Pass rate over the graded rows, lengths, finish reasons and verdicts of a set of trajectories."""
    tokens = [row["response_tokens"] for row in rows]
    graded = sum(row["passed"] is not None for row in rows)
    passed = sum(row["passed"] is True for row in rows)
    return {
        "samples": len(rows),
        "graded": graded,
        "passed": passed,
        "pass_rate": percent(passed, graded),
        "mean_tokens": mean(tokens) if tokens else None,
        "median_tokens": median(tokens) if tokens else None,
        "max_tokens": max(tokens, default=None),
        "truncated_rate": percent(sum(row["finish_reason"] == "length" for row in rows), len(rows)),
        "aborted_rate": percent(sum(row["finish_reason"] == "abort" for row in rows), len(rows)),
        "unparsable_rate": percent(sum(row["verdict"] == "no_answer" for row in rows), len(rows)),
        "error_rate": percent(sum(row["verdict"] == "error" for row in rows), len(rows)),
        "finish_reasons": _counted(row["finish_reason"] for row in rows),
        "verdicts": _counted(row["verdict"] or NOT_GRADED for row in rows),
    }


def _counted(values: Iterable[str]) -> dict[str, int]:
    """Counts in the order of the names, so that the same rows always give the same text."""
    return dict(sorted(Counter(values).items()))


def benchmark(name: str, base: Sequence[Row], method: Sequence[Row] | None) -> dict[str, Any]:
    """One line of the Base / method table, k = samples per problem, and the figures behind it. method None: only the base was evaluated.

    Raises ValueError unless both hold the same samples and every problem has as many.
    """
    ours = figures.Samples.of(base)
    line: dict[str, Any] = {"benchmark": name, "problems": len(ours.problem_ids), "k": ours.n}
    line["base"] = figures.of_model(ours) | {"samples": describe(base)}
    if method is not None:
        theirs = figures.Samples.of(method)
        line["method"] = figures.of_model(theirs) | {"samples": describe(method)}
        line |= figures.comparison(ours, theirs)
    return line


def kl_change(summary: Mapping[str, Any]) -> dict[str, Any]:
    """KL per token on the fixed held-out batch before and after training; change_percent is negative where it fell."""
    before, after = summary["kl_fixed_batch_before"], summary["kl_fixed_batch_after"]
    return {"before": before, "after": after, "change_percent": percent(after - before, before)}


def one_round(
    number: int, rollouts: Sequence[Row], refined: Sequence[Row] | None, summary: Mapping[str, Any], benchmarks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One line of the table of rounds. benchmarks: the `benchmark` lines of the round's student."""
    return {
        "round": number,
        "rollout_pass_rate": describe(rollouts)["pass_rate"],
        "refined_pass_rate": None if refined is None else describe(refined)["pass_rate"],
        "kl_fixed_batch": kl_change(summary),
        "benchmarks": {line["benchmark"]: {name: line["method"][name] for name in ("avg_at_k", "pass_at_k")} for line in benchmarks},
    }


def outcome(before: bool | None, after: bool | None) -> str:
    """One of OUTCOMES."""
    if before is None or after is None:
        return NOT_GRADED
    return f"{'pass' if before else 'fail'} → {'pass' if after else 'fail'}"


def trajectories(rollouts: Sequence[Row], refined: Sequence[Row] | None) -> dict[str, Any]:
    """y_o and y_r, how each pair came out, and lengths by outcome: of each by its own verdict, and of the pairs by how they came out.
    refined None: the method trains on y_o. Raises KeyError on a y_r without y_o."""
    found: dict[str, Any] = {"rollouts": describe(rollouts), "lengths": {"rollouts": _lengths_by_verdict(rollouts)}}
    if refined is not None:
        by_key = {key(row): row for row in rollouts}
        pairs = [(by_key[key(row)], row) for row in refined]
        joint = Counter(outcome(before["passed"], after["passed"]) for before, after in pairs)
        found["refined"] = describe(refined)
        found["not_refined"] = len(rollouts) - len(refined)
        found["rollout_pass_rate_of_the_refined"] = describe([before for before, _ in pairs])["pass_rate"]
        found["joint_outcomes"] = {name: joint[name] for name in OUTCOMES}
        found["lengths"]["refined"] = _lengths_by_verdict(refined)
        found["joint_lengths"] = {}
        for name in OUTCOMES:
            alike = [pair for pair in pairs if outcome(pair[0]["passed"], pair[1]["passed"]) == name]
            found["joint_lengths"][name] = {
                "rollouts": _lengths(before for before, _ in alike),
                "refined": _lengths(after for _, after in alike),
            }
    return found


def _lengths(rows: Iterable[Row]) -> dict[str, Any]:
    return figures.lengths(np.array([row["response_tokens"] for row in rows], dtype=np.int64))


def _lengths_by_verdict(rows: Sequence[Row]) -> dict[str, Any]:
    return {name: _lengths(row for row in rows if row["passed"] is passed) for name, passed in (("passed", True), ("failed", False))}


def by_reference(rollouts: Sequence[Row], refined: Sequence[Row] | None, worked: Collection[str]) -> dict[str, dict[str, Any]]:
    """`trajectories` of the problems with a worked reference solution (their ids) and of the others, which have an answer at most; and how
    many problems those are. As in the paper's section B.1."""
    found = {}
    for name, wanted in (("worked", True), ("answer_only", False)):
        parts = [None if rows is None else [row for row in rows if (row["problem_id"] in worked) is wanted] for rows in (rollouts, refined)]
        assert parts[0] is not None
        found[name] = {"problems": len({row["problem_id"] for row in parts[0]}), **trajectories(parts[0], parts[1])}
    return found


def pick_samples(rollouts: Sequence[Row], refined: Sequence[Row] | None, limit: int) -> list[tuple[Key, str]]:
    """(key, outcome) of at most `limit` samples, each of another problem: in turn one of every outcome, in the rows' order."""
    if refined is None:
        names = {True: "pass", False: "fail", None: NOT_GRADED}
        labelled = [(key(row), names[row["passed"]]) for row in rollouts]
        order: tuple[str, ...] = tuple(names.values())
    else:
        before = {key(row): row["passed"] for row in rollouts}
        labelled = [(key(row), outcome(before[key(row)], row["passed"])) for row in refined]
        order = OUTCOMES
    waiting = {name: iter([which for which, label in labelled if label == name]) for name in order}
    chosen: list[tuple[Key, str]] = []
    problems: set[str] = set()
    while waiting and len(chosen) < limit:
        for name in list(waiting):
            which = next((found for found in waiting[name] if found[0] not in problems), None)
            if which is None:
                del waiting[name]
            elif len(chosen) < limit:
                problems.add(which[0])
                chosen.append((which, name))
    return sorted(chosen, key=lambda item: order.index(item[1]))


def stage(name: str, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """One line of the stage table from the fields of a manifest (None: the stage has none)."""
    if manifest is None:
        return {"stage": name, "status": "missing"}
    counts, seconds = manifest["counts"], manifest["seconds"]
    parts = list(counts.values()) if name.startswith("evaluate/") else [counts]  # evaluate counts by benchmark
    samples = sum(part.get("samples", 0) for part in parts)
    tokens = sum(part.get(TOKENS.get(name, "response_tokens"), 0) for part in parts)
    return {
        "stage": name,
        "status": manifest["status"],
        "seconds": seconds,
        "samples": samples or None,
        "response_tokens": tokens or None,
        "samples_per_second": samples / seconds if samples and seconds else None,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "started": manifest["started"],
        "finished": manifest["finished"],
        "skipped": _skipped(parts),
        "counts": counts,
    }


COSTED = ("rollout", "refine", "train")  # the columns of the paper's table 11, whose sum is its total


def costs(manifests: Iterable[tuple[str, Mapping[str, Any] | None]]) -> dict[str, dict[str, Any]]:
    """What making the student took, as in the paper's table 11: rollout, refine, train and their total, all rounds together; and apart
    from the total `evaluate`, as in its table 12.

    manifests: (stage, fields of its manifest; None where it has none) of every stage in every round. Seconds are working time without
    server_start_seconds; share is of the total, in percent; response_tokens are those generated or trained on. None where nothing is known.
    A method without refinement has no `refine`.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, manifest in manifests:
        group = name.split("/")[0]
        if group in (*COSTED, "evaluate"):
            starts = None if manifest is None else manifest["server_start_seconds"]
            lines.setdefault(group, []).append({"seconds": None} | stage(name, manifest) | {"server_start_seconds": starts})
    found = {name: _cost(lines[name]) for name in COSTED if name in lines}
    found["total"] = _cost([line for name in found for line in lines[name]])
    if "evaluate" in lines:
        found["evaluate"] = _cost(lines["evaluate"])
    for name in (*COSTED, "total"):
        if name in found:
            seconds, total = found[name]["seconds"], found["total"]["seconds"]
            found[name]["share"] = None if seconds is None or total is None else percent(seconds, total)
    return found


def _cost(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of lines of the stage table; None where one of them has no value."""

    def total(name: str) -> Any:
        values = [line.get(name) for line in lines]
        return None if None in values else sum(values)

    seconds, tokens = total("seconds"), total("response_tokens")
    return {
        "seconds": seconds,
        "server_start_seconds": total("server_start_seconds"),
        "response_tokens": tokens,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
    }


def _skipped(parts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """reason -> samples or problems that a stage could not use, where there are any."""
    found: Counter[str] = Counter()
    for part in parts:
        for name, count in part.items():
            if name.startswith(("skipped_", "left_out_")):
                found[name.replace("_", " ")] += count
    return {name: count for name, count in found.items() if count}


def library_versions(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """library -> version -> the stages that ran with it."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, manifest in manifests.items():
        for library, version in manifest["versions"].items():
            found.setdefault(library, {}).setdefault(version, []).append(name)
    return found
