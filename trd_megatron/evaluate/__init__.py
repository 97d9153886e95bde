"""Benchmarks' figures."""

from trd_megatron.evaluate.metrics import avg_at_k, pass_at_k

__all__ = ["avg_at_k", "pass_at_k"]
