"""The losses: divergences between teacher and student over the full vocabulary, and cross entropy. Imports torch alone."""

from trd_megatron.divergence.dense import dense_kl
from trd_megatron.divergence.linear_kl import Backend, linear_cross_entropy, linear_kl
from trd_megatron.divergence.spec import Divergence, KLOutput

__all__ = ["Backend", "Divergence", "KLOutput", "dense_kl", "linear_cross_entropy", "linear_kl"]
