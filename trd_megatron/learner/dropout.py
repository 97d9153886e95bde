"""Dropout whose masks depend on what is dropped, not on where it is computed.

A mask is a hash of seed, step, sample, position, layer and column, so that no packing, micro-batch or layout of ranks changes it and
recomputation sees the same one. torch's generators cannot give that: they hand out numbers in the order of the calls.
"""

import zlib

from torch import Tensor

from trd_megatron.learner.packing import Packing

_BITS = 0xFFFFFFFF


def key(*parts: object) -> int:
    """32 bits that stand for `parts`."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def row_keys(packing: Packing, seed: int, step: int) -> Tensor:
    """[T] int64: a key of every position of a packed batch."""
    return _mix(packing.sample_keys ^ _mix(packing.positions + key(seed, step)))


def keep_mask(rows: Tensor, columns: Tensor, layer: int, probability: float) -> Tensor:
    """[T, width] bool, True with 1 - probability, from row keys [T], column numbers [width] and a layer's key."""
    bits = _mix(rows[:, None] ^ _mix(columns + layer))
    return bits >= int(probability * (_BITS + 1))


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer (Appleby, 2011) on int64: every bit of the input changes half of the output's."""
    x = x & _BITS
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _BITS
    return x ^ (x >> 16)
