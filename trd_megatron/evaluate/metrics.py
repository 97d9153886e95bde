"""Avg@k and Pass@k."""

from math import comb


def avg_at_k(outcomes: list[list[bool]]) -> float:
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
