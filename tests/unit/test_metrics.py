"""Avg@k, Pass@k, intervals, deltas, buckets and lengths, against values found by hand and by trying everything."""

import itertools
import random
from typing import Any

import numpy as np
import pytest

from trd_megatron.evaluate import avg_at_k, buckets, figures, pass_at_k
from trd_megatron.evaluate.metrics import RESAMPLES, intervals, pass_curves


def rows(outcomes: dict[str, list[bool | None]], tokens: int = 10) -> list[dict[str, Any]]:
    return [
        {"problem_id": name, "sample_index": index, "passed": passed, "response_tokens": tokens + index}
        for name, results in outcomes.items()
        for index, passed in enumerate(results)
    ]


def samples(outcomes: dict[str, list[bool | None]]) -> figures.Samples:
    return figures.Samples.of(rows(outcomes))


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_draws(n: int) -> None:
    """Every way to draw k of n samples, tried out."""
    for c in range(n + 1):
        results = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(results, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
    assert pass_curves(n, list(range(n + 1))).tolist() == [[pass_at_k(n, c, k) for k in range(1, n + 1)] for c in range(n + 1)]


def test_pass_at_k_of_16_by_hand() -> None:
    assert pass_at_k(16, 1, 4) == pytest.approx(4 / 16)
    assert pass_at_k(16, 2, 2) == pytest.approx(1 - 14 * 13 / (16 * 15))
    assert [pass_at_k(16, 1, 16), pass_at_k(16, 0, 16), pass_at_k(16, 15, 2)] == [1, 0, 1]
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5)  # binomials beyond floats
    for bad in ((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)):
        with pytest.raises(ValueError, match="pass_at_k needs"):
            pass_at_k(*bad)


def test_avg_at_k() -> None:
    assert avg_at_k([[True, False], [True, True]]) == 0.75
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="at least one"):
            avg_at_k(nothing)


def test_a_model_s_figures_by_hand() -> None:
    found = figures.of_model(samples({"b": [True, False, False, None], "a": [True, True, False, False]}))
    assert (found["problems"], found["k"]) == (2, 4)
    assert found["avg_at_k"] == pytest.approx(100 * (1 / 4 + 2 / 4) / 2)
    assert found["pass_curve"] == pytest.approx([37.5, 100 * (1 / 2 + 5 / 6) / 2, 100 * (3 / 4 + 1) / 2, 100])
    assert found["pass_at_k"] == found["pass_curve"][-1] == 100
    assert found["avg_at_k_interval"] == [25, 50]
    assert found["pass_curve_intervals"][-1] is None  # no spread
    assert found["lengths"]["correct"] == {
        "samples": 3, "mean": pytest.approx(31 / 3), "p10": 10, "p25": 10, "p50": 10, "p75": 10.5, "p90": 10.8, "max": 11
    }  # fmt: skip
    assert found["lengths"]["incorrect"]["samples"] == 5  # what could not be graded is not correct
    assert figures.of_model(samples({"a": [False]}))["lengths"]["correct"] == {"samples": 0}


def test_uneven_samples_are_refused() -> None:
    for wrong in ({}, {"a": [True], "b": [True, False]}):
        with pytest.raises(ValueError, match="same number of samples"):
            samples(wrong)
    shifted = [*rows({"a": [True, True]}), *[row | {"sample_index": row["sample_index"] + 1} for row in rows({"b": [True, True]})]]
    with pytest.raises(ValueError, match="same number of samples"):
        figures.Samples.of(shifted)


def test_order_of_rows_does_not_matter() -> None:
    ordered = rows({f"p{n}": [n % 2 == 0, n % 3 == 0, True, None] for n in range(9)})
    shuffled = random.Random(0).sample(ordered, len(ordered))
    assert figures.of_model(figures.Samples.of(ordered)) == figures.of_model(figures.Samples.of(shuffled))


def test_interval_of_two_values_is_that_of_all_resamples() -> None:
    """Of 12 problems of which 6 pass, the resampled mean is binomial: its exact quantiles are known."""
    [bounds] = intervals(np.array([[0.0], [1.0]] * 6))
    exact = [sum(np.random.default_rng(5).binomial(12, 0.5, 400_000) <= c) / 400_000 for c in range(13)]
    assert bounds == [next(c for c in range(13) if exact[c] >= tail) / 12 for tail in (0.025, 0.975)]


def test_interval_is_near_the_normal_one_and_seeded() -> None:
    values = np.random.default_rng(3).normal(40, 10, size=(400, 3))
    found = intervals(values)
    assert found == intervals(values)
    for column, bounds in enumerate(found):
        assert bounds is not None
        half = 1.96 * values[:, column].std() / 20
        assert bounds == pytest.approx([values[:, column].mean() - half, values[:, column].mean() + half], abs=0.1)
    assert intervals(values[:, :1])[0] == pytest.approx(found[0])  # the same problems are drawn for every column
    assert intervals(np.ones((1, 2))) == [None, None]
    assert intervals(np.column_stack([np.arange(5.0), np.ones(5)]))[1] is None
    assert RESAMPLES == 10_000


def test_intervals_cover_the_truth() -> None:
    """In 200 made-up benchmarks of 60 problems whose true mean is one half, about 95 of 100 intervals hold it."""
    generator = np.random.default_rng(7)
    chances = generator.beta(1, 1, size=(60, 200))
    bounds = intervals(generator.binomial(16, chances) / 16)
    covered = sum(low <= 0.5 <= high for low, high in filter(None, bounds))
    assert 181 <= covered <= 198


def test_deltas_are_paired() -> None:
    """A student that gains one sample on every problem: the scores spread widely, their differences not at all."""
    base = samples({f"p{n}": [index < n for index in range(8)] for n in range(7)})
    student = samples({f"p{n}": [index < n + 1 for index in range(8)] for n in range(7)})
    assert figures.of_model(base)["avg_at_k_interval"] is not None
    delta = figures.comparison(base, student)["delta"]
    assert (delta["avg_at_k"], delta["avg_at_k_interval"]) == (pytest.approx(12.5), None)
    assert delta["pass_at_k"] == pytest.approx(100 / 7)
    assert delta["pass_at_k_interval"][0] == 0
    back = figures.comparison(student, base)["delta"]
    assert back["pass_curve"] == pytest.approx([-value for value in delta["pass_curve"]])


def test_deltas_by_hand() -> None:
    base, student = samples({"a": [True, False], "b": [False, False]}), samples({"a": [True, True], "b": [True, False]})
    delta = figures.comparison(base, student)["delta"]
    assert delta["pass_curve"] == [50, 50]
    assert (delta["pass_curve_intervals"][0], delta["pass_at_k_interval"]) == (None, [0, 100])
    for other in (samples({"a": [True, True]}), samples({"a": [True], "b": [True]})):
        with pytest.raises(ValueError, match="the same samples"):
            figures.comparison(base, other)


def test_buckets_are_the_paper_s() -> None:
    assert [buckets.name(*bound) for bound in buckets.bounds(16)] == ["0", "1-8", "9-16"]
    assert buckets.bounds(1) == [(0, 0), (1, 1)]
    assert buckets.bounds(2) == [(0, 0), (1, 1), (2, 2)]
    assert buckets.bounds(5) == [(0, 0), (1, 2), (3, 5)]
    for n in range(1, 40):  # every count of passes is in one bucket
        assert [sum(low <= c <= high for low, high in buckets.bounds(n)) for c in range(n + 1)] == [1] * (n + 1)


def test_problems_are_sorted_by_the_base_alone() -> None:
    base = samples({"never": [False] * 4, "some": [True, True, False, False], "most": [True, True, True, False], "all": [True] * 4})
    student = samples({"never": [True, False, False, False], "some": [False] * 4, "most": [True] * 4, "all": [True] * 4})
    none, some, most = figures.comparison(base, student)["buckets"]
    assert [bucket["base_passes"] for bucket in (none, some, most)] == ["0", "1-2", "3-4"]
    assert [bucket["problems"] for bucket in (none, some, most)] == [1, 1, 2]
    assert (none["base"], none["student"]) == ({"avg_at_k": 0, "pass_at_k": 0}, {"avg_at_k": 25, "pass_at_k": 100})
    assert (some["delta"]["avg_at_k"], some["delta"]["pass_at_k"]) == (-50, -100)
    assert (most["delta"]["avg_at_k"], most["delta"]["avg_at_k_interval"]) == (12.5, [0, 25])
    empty = figures.comparison(student, student)["buckets"][1]
    assert empty == {"base_passes": "1-2", "problems": 1} | {key: empty[key] for key in ("base", "student", "delta")}
