"""The figures of the report, computed from rows, metrics and manifests. Pure functions; report.json holds what they return.

A row is a trajectory without its texts: problem_id, sample_index, finish_reason, passed (None: not graded), verdict,
response_tokens and repetition (reading.repetition). Rates are in percent, differences in percentage points, lengths in tokens.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from statistics import mean, median
from typing import Any

from trd_megatron.evaluate import figures
from trd_megatron.report.reading import Row

Key = tuple[str, int]

NOT_GRADED = "not graded"
OUTCOMES = ("fail → pass", "pass → fail", "pass → pass", "fail → fail", NOT_GRADED)  # of y_o → y_r
COSTS = ("rollout", "refine", "train")
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
    repeated = [row["repetition"] for row in rows if row["repetition"] is not None]
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
        "repetition_rate": 100 * mean(repeated) if repeated else None,
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


def trajectories(rollouts: Sequence[Row], refined: Sequence[Row] | None, worked: Set[str] = frozenset()) -> dict[str, Any]:
    """y_o and y_r, and how each pair came out. refined None: the method trains on y_o. worked: the problems with a worked reference
    solution, by which all is told apart (paper, section B.1). Raises KeyError on a y_r without y_o."""
    found = _pairs(rollouts, refined)
    parts = {}
    for name, has in (("worked", True), ("answer_only", False)):
        of = [row for row in rollouts if (row["problem_id"] in worked) is has]
        if of:
            parts[name] = _pairs(of, None if refined is None else [row for row in refined if (row["problem_id"] in worked) is has])
    if len(parts) == 2:
        found["by_reference"] = parts
    return found


def _pairs(rollouts: Sequence[Row], refined: Sequence[Row] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"rollouts": describe(rollouts)}
    if refined is not None:
        by_key = {key(row): row for row in rollouts}
        pairs = [(by_key[key(row)], row) for row in refined]
        joint = Counter(outcome(before["passed"], after["passed"]) for before, after in pairs)
        found["refined"] = describe(refined)
        found["not_refined"] = len(rollouts) - len(refined)
        found["rollout_pass_rate_of_the_refined"] = describe([before for before, _ in pairs])["pass_rate"]
        found["joint_outcomes"] = {name: joint[name] for name in OUTCOMES}
        lengths: dict[str, list[tuple[int, int]]] = {}
        for before, after in pairs:
            lengths.setdefault(outcome(before["passed"], after["passed"]), []).append((before["response_tokens"], after["response_tokens"]))
        found["mean_tokens_by_outcome"] = {
            name: [mean(of) for of in zip(*lengths[name], strict=True)] for name in OUTCOMES if name in lengths
        }  # outcome -> [y_o, y_r]
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


def costs(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a method cost, from the lines of the stage table (paper, tables 11 and 12): seconds, response tokens and share of the total
    of rollout, refine and train over all rounds; without evaluation and the start of servers."""
    found: dict[str, Any] = {}
    for name in COSTS:
        lines = [line for line in stages if line["stage"].split("/")[-1] == name and line["status"] != "missing"]
        if lines:
            tokens = sum(line["response_tokens"] or 0 for line in lines)
            seconds = sum(line["seconds"] for line in lines)
            found[name] = {"seconds": seconds, "response_tokens": tokens, "tokens_per_second": tokens / seconds if seconds else None}
    total = sum(of["seconds"] for of in found.values())
    return {name: of | {"percent": percent(of["seconds"], total)} for name, of in found.items()} | {"total_seconds": total}


def diverging(first: str, second: str) -> int | None:
    """Where `first` leaves `second`: the place in it of the first word that stands otherwise there; None if it does nowhere."""
    words, others = (re.finditer(r"\S+", text) for text in (first, second))
    for word in words:
        other = next(others, None)
        if other is None or other[0] != word[0]:
            return word.start()
    return None


def marked(text: str, place: int | None) -> list[str]:
    """[what comes before the word at `place`, that word, what follows]; all of it before where there is no place."""
    if place is None:
        return [text, "", ""]
    end = place + len(text[place:].split(maxsplit=1)[0])
    return [text[:place], text[place:end], text[end:]]


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
