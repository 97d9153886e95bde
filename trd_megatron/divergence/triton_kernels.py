"""torch_kernels for a GPU: the same three functions, each one pass over the logits, which stay as they are until `gradient`.

One program per row walks over the columns a tile at a time, in float32 whatever the dtype of the logits. a and b are as in
torch_kernels. The log-ratio a - b is taken from the difference of the logits themselves, plus one number per row: it is exactly
0 where the models agree, and it does not depend on the running maxima.

With TRITON_INTERPRET=1 in the environment before triton is first imported the kernels run on a CPU, slowly, for tests.

Shape letters: c tokens of a chunk, V this rank's vocabulary rows without padding.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trd_megatron.divergence.job import JSD_RANGE, NO_LOGIT, Buffers, RowFactors
from trd_megatron.divergence.spec import Kind

# 8 columns a thread: one 16-byte load of bfloat16 each, and at temperature 1 `statistics` gets by with 64 registers a thread
# (sm_90), so that two programs fit on a multiprocessor. Chosen from the compiler's numbers, not timed.
TILE = 4096
_WARPS = 16

_LOWEST = tl.constexpr(NO_LOGIT)
_RANGE = tl.constexpr(JSD_RANGE)


@triton.jit
def _expm1(x: tl.tensor) -> tl.tensor:
    """Kahan's formula, triton having no expm1: (u - 1) / log u varies slowly, so that the rounding of u = e^x does not matter,
    and u - 1 is exact where it cancels. e^x - 1 alone has no correct digit left at x = 1e-7. Nor does the interpreter know
    libdevice. `_log1p` is the same for log(1 + x).
    """
    u = tl.exp(x)
    return tl.where(u == 1.0, x, (u - 1.0) * (x / tl.log(u)))


@triton.jit
def _log1p(x: tl.tensor) -> tl.tensor:
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def _statistics(
    student: tl.tensor,
    teacher: tl.tensor,
    out: tl.tensor,  # [7, rows]
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    rows: tl.tensor,
    vocab: tl.tensor,
    scale: tl.tensor,
    kind: tl.constexpr,
    plain: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # rows times stride can exceed 2^31
    student += row * student_stride
    teacher += row * teacher_stride
    lane = tl.arange(0, tile)
    # The sums are relative to the largest logit so far; a column of the tile adds up its own, so that a step of the loop needs
    # no reduction but the two maxima.
    max_s = tl.full((), _LOWEST, tl.float32)
    max_t = tl.full((), _LOWEST, tl.float32)
    sum_s = tl.zeros((tile,), tl.float32)
    sum_t = tl.zeros((tile,), tl.float32)
    cross = tl.zeros((tile,), tl.float32)
    plain_s = tl.zeros((tile,), tl.float32)
    plain_t = tl.zeros((tile,), tl.float32)
    for start in range(0, vocab, tile):
        column = start + lane
        held = column < vocab
        s = tl.load(student + column, mask=held, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher + column, mask=held, other=-float("inf")).to(tl.float32)
        down_s = max_s  # the old max relative to the new one
        down_t = max_t
        max_s = tl.maximum(max_s, tl.max(s, 0))
        max_t = tl.maximum(max_t, tl.max(t, 0))
        down_s -= max_s
        down_t -= max_t
        keep_s = tl.exp(down_s * scale)
        keep_t = tl.exp(down_t * scale)
        e_s = tl.exp((s - max_s) * scale)
        e_t = tl.exp((t - max_t) * scale)
        sum_s = sum_s * keep_s + e_s
        sum_t = sum_t * keep_t + e_t
        if kind == "forward":
            cross = cross * keep_t + tl.where(held, e_t * (t - s), 0.0)
        elif kind == "reverse":
            cross = cross * keep_s + tl.where(held, e_s * (s - t), 0.0)
        if plain:
            plain_s = plain_s * tl.exp(down_s) + tl.exp(s - max_s)
            plain_t = plain_t * tl.exp(down_t) + tl.exp(t - max_t)
    total_s = tl.sum(sum_s, 0)
    total_t = tl.sum(sum_t, 0)
    out += row
    tl.store(out, max_s)
    tl.store(out + rows, max_t)
    tl.store(out + 2 * rows, total_s)
    tl.store(out + 3 * rows, total_t)
    if kind == "forward":
        tl.store(out + 4 * rows, (tl.sum(cross, 0) + total_t * (max_s - max_t)) * scale)
    elif kind == "reverse":
        tl.store(out + 4 * rows, (tl.sum(cross, 0) + total_s * (max_t - max_s)) * scale)
    if plain:
        tl.store(out + 5 * rows, tl.sum(plain_s, 0))
        tl.store(out + 6 * rows, tl.sum(plain_t, 0))


@triton.jit
def _log_mixture(log_q: tl.tensor, log_p: tl.tensor, beta: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """d = log p - log q and log(M/q) = log(1 - beta + beta * e^d)."""
    d = tl.clamp(log_p - log_q, -_RANGE, _RANGE)
    return d, _log1p(beta * _expm1(d))


@triton.jit
def _jsd_statistics(
    student: tl.tensor,
    teacher: tl.tensor,
    out: tl.tensor,  # [2, rows]
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    max_student: tl.tensor,
    max_teacher: tl.tensor,
    log_student: tl.tensor,
    log_teacher: tl.tensor,
    rows: tl.tensor,
    vocab: tl.tensor,
    scale: tl.tensor,
    beta: tl.tensor,
    tile: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    max_s = tl.load(max_student + row)
    max_t = tl.load(max_teacher + row)
    log_s = tl.load(log_student + row)
    log_t = tl.load(log_teacher + row)
    lane = tl.arange(0, tile)
    kl_t = tl.zeros((tile,), tl.float32)
    kl_s = tl.zeros((tile,), tl.float32)
    for start in range(0, vocab, tile):
        column = start + lane
        held = column < vocab
        s = tl.load(student + column, mask=held, other=0.0).to(tl.float32)
        t = tl.load(teacher + column, mask=held, other=0.0).to(tl.float32)
        log_q = (s - max_s) * scale - log_s
        log_p = (t - max_t) * scale - log_t
        d, log_mq = _log_mixture(log_q, log_p, beta)
        kl_t += tl.where(held, tl.exp(log_p) * (d - log_mq), 0.0)
        kl_s -= tl.where(held, tl.exp(log_q) * log_mq, 0.0)
    tl.store(out + row, tl.sum(kl_t, 0))
    tl.store(out + rows + row, tl.sum(kl_s, 0))


@triton.jit
def _gradient(
    student: tl.tensor,
    teacher: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    max_student: tl.tensor,
    max_teacher: tl.tensor,
    log_student: tl.tensor,
    log_teacher: tl.tensor,
    weights: tl.tensor,
    centres: tl.tensor,
    vocab: tl.tensor,
    scale: tl.tensor,
    beta: tl.tensor,
    kind: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    max_s = tl.load(max_student + row)
    max_t = tl.load(max_teacher + row)
    log_s = tl.load(log_student + row)
    log_t = tl.load(log_teacher + row)
    weight = tl.load(weights + row)
    centre = tl.load(centres + row)
    lane = tl.arange(0, tile)
    for start in range(0, vocab, tile):
        column = start + lane
        held = column < vocab
        s = tl.load(student + column, mask=held, other=0.0).to(tl.float32)
        t = tl.load(teacher + column, mask=held, other=0.0).to(tl.float32)
        log_q = (s - max_s) * scale - log_s
        log_p = (t - max_t) * scale - log_t
        if kind == "forward":
            gradient = weight * (tl.exp(log_q) - tl.exp(log_p))
        elif kind == "reverse":
            # As `_statistics` does it, so that a student sure of one word gets exactly 0.
            gradient = weight * (tl.exp(log_q) * (((s - t) + (max_t - max_s)) * scale - centre))
        else:
            _, log_mq = _log_mixture(log_q, log_p, beta)
            gradient = (beta - 1.0) * weight * (tl.exp(log_q) * (log_mq + centre))
        tl.store(student + column, gradient, mask=held)  # casts to the logits' dtype


INTERPRETED = not isinstance(_statistics, triton.JITFunction)


def statistics(student: Tensor, teacher: Tensor, kind: Kind, scale: float, plain: bool, buffers: Buffers) -> dict[str, Tensor]:
    """As in torch_kernels; the logits [c, V] are left alone."""
    count, vocab = student.shape
    out = torch.empty(7, count, dtype=buffers.stat_dtype, device=student.device)
    _launch(_statistics, student, teacher, out, student.stride(0), teacher.stride(0), count, vocab, float(scale), kind=kind, plain=plain)
    stats = {"max_student": out[0], "max_teacher": out[1], "sum_student": out[2], "sum_teacher": out[3]}
    if kind != "jsd":
        stats["cross"] = out[4]
    if plain:
        stats |= {"plain_student": out[5], "plain_teacher": out[6]}
    return stats


def jsd_statistics(student: Tensor, teacher: Tensor, rows: RowFactors, beta: float, scale: float, buffers: Buffers) -> dict[str, Tensor]:
    """As in torch_kernels; the logits [c, V] are left alone."""
    count, vocab = student.shape
    out = torch.empty(2, count, dtype=buffers.stat_dtype, device=student.device)
    strides, factors = (student.stride(0), teacher.stride(0)), (rows.max_student, rows.max_teacher, rows.log_student, rows.log_teacher)
    _launch(_jsd_statistics, student, teacher, out, *strides, *factors, count, vocab, float(scale), beta)
    return {"kl_teacher": out[0], "kl_student": out[1]}


def gradient(student: Tensor, teacher: Tensor, kind: Kind, rows: RowFactors, beta: float, scale: float, buffers: Buffers) -> None:
    """As in torch_kernels, from the logits themselves: writes d loss / d student logits [c, V], in their dtype, over student."""
    strides = student.stride(0), teacher.stride(0)
    factors = rows.max_student, rows.max_teacher, rows.log_student, rows.log_teacher, rows.weight, rows.centre
    _launch(_gradient, student, teacher, *strides, *factors, student.shape[1], float(scale), beta, kind=kind)


def _launch(kernel: Any, student: Tensor, *arguments: Any, **constants: Any) -> None:
    """One program per row. Without fused multiply-add, so that equal logits give equal numbers wherever they are computed."""
    with torch.cuda.device_of(student):
        kernel[(student.shape[0],)](student, *arguments, **constants, tile=TILE, num_warps=_WARPS, enable_fp_fusion=False)
