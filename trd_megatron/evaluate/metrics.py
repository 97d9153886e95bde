"""Avg@k, Pass@k and confidence intervals over problems."""

from collections.abc import Sequence
from functools import cache
from math import comb

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
_SEED = 0  # of the resampling: the same outcomes always give the same interval
_AT_ONCE = 4_000_000  # numbers in memory while resampling
_ROUNDING = 1e-9  # a spread below it is that of floats

Floats = NDArray[np.float64]


def avg_at_k(outcomes: Sequence[Sequence[bool]]) -> float:
    """Mean over problems of the mean over samples (paper, section C.2), between 0 and 1. Raises ValueError on nothing."""
    if not outcomes or not all(outcomes):
        raise ValueError("avg_at_k needs at least one problem, and at least one sample of each")
    return sum(sum(results) / len(results) for results in outcomes) / len(outcomes)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples of a problem passes, from c passes in n (Chen et al., 2021, section 2.1).

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - comb(n - c, k) / comb(n, k)


@cache
def _pass_table(n: int) -> Floats:
    """[c, k - 1] -> pass_at_k(n, c, k)."""
    return np.array([[pass_at_k(n, c, k) for k in range(1, n + 1)] for c in range(n + 1)])


def pass_curves(n: int, passes: Sequence[int]) -> Floats:
    """[problem, k - 1] for k from 1 to n. passes: of the n samples of each problem."""
    return _pass_table(n)[np.asarray(passes, dtype=int)]


def intervals(values: Floats) -> list[list[float] | None]:
    """For each column of `values` [problems, columns] the [low, high] of the 95 % confidence interval of its mean over problems.

    Percentile bootstrap (Efron and Tibshirani, 1993, section 13.3): RESAMPLES times as many problems are drawn with replacement, the same
    ones for every column. None where there are fewer than two problems or a column shows no spread: nothing can be said then.
    """
    problems, columns = values.shape
    generator = np.random.default_rng(_SEED)
    means = np.empty((RESAMPLES, columns))
    step = max(1, _AT_ONCE // max(problems, 1))
    for start in range(0, RESAMPLES if problems > 1 else 0, step):
        size = min(step, RESAMPLES - start)
        drawn = generator.integers(problems, size=(size, problems), dtype=np.int32)
        rows = np.arange(size, dtype=np.int64)[:, None] * problems
        times = np.bincount((drawn + rows).ravel(), minlength=size * problems).reshape(size, problems)  # each problem was drawn
        means[start : start + size] = times @ values / problems
    tail = (1 - CONFIDENCE) / 2
    return [
        [float(bound) for bound in np.quantile(means[:, column], [tail, 1 - tail])]
        if problems > 1 and np.ptp(values[:, column]) > _ROUNDING
        else None
        for column in range(columns)
    ]
