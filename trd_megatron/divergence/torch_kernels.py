"""The work on whole rows of logits in plain in-place torch. triton_kernels has the same three functions.

Logits relative to this rank's own max of the row, divided by the temperature, are called a (teacher) and b (student).
`statistics` and `jsd_statistics` leave in place of the logits what the next function needs; nothing else may read them after.

Shape letters: c tokens of a chunk, V this rank's vocabulary rows without padding.
"""

import torch
from torch import Tensor

from trd_megatron.divergence.job import JSD_RANGE, NO_LOGIT, Buffers, RowFactors
from trd_megatron.divergence.spec import Kind


def statistics(student: Tensor, teacher: Tensor, kind: Kind, scale: float, plain: bool, buffers: Buffers) -> dict[str, Tensor]:
    """Per row [c] of logits [c, V]: max_student, max_teacher; sum_student = sum of e^b, sum_teacher = sum of e^a; cross = sum of
    e^a (a - b) for forward, of e^b (b - a) for reverse. plain: also plain_student, plain_teacher, the sums at scale 1.
    """
    blocks = [_block_statistics(student[block], teacher[block], kind, scale, plain, buffers) for block in buffers.blocks(student.shape[0])]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _block_statistics(b: Tensor, a: Tensor, kind: Kind, scale: float, plain: bool, buffers: Buffers) -> dict[str, Tensor]:
    scratch = buffers.scratch("scratch", b)
    stats = {}
    for name, x in (("student", b), ("teacher", a)):
        stats[f"max_{name}"] = maximum = x.amax(1) if x.shape[1] else x.new_full(x.shape[:1], NO_LOGIT)
        x.sub_(maximum[:, None])
        if plain:
            stats[f"plain_{name}"] = torch.exp(x, out=scratch).sum(1)
        if scale != 1:
            x.mul_(scale)
    if kind == "forward":  # leaves e^b, e^a
        torch.sub(a, b, out=scratch)
        stats |= {"sum_student": b.exp_().sum(1), "sum_teacher": a.exp_().sum(1), "cross": scratch.mul_(a).sum(1)}
    elif kind == "reverse":  # leaves e^b, e^b * (b - a)
        stats["sum_teacher"] = torch.exp(a, out=scratch).sum(1)
        torch.sub(b, a, out=a)
        stats |= {"sum_student": b.exp_().sum(1), "cross": a.mul_(b).sum(1)}
    else:  # leaves b, a
        stats |= {"sum_student": torch.exp(b, out=scratch).sum(1), "sum_teacher": torch.exp(a, out=scratch).sum(1)}
    return stats


def jsd_statistics(student: Tensor, teacher: Tensor, rows: RowFactors, beta: float, scale: float, buffers: Buffers) -> dict[str, Tensor]:
    """Per row [c]: kl_teacher = KL(p‖M) and kl_student = KL(q‖M), this rank's part. `rows` needs no weight and centre yet.

    With d = log p - log q: log(M/q) = log(1 - beta + beta * e^d), exactly 0 at d = 0. Leaves q and q * log(M/q).
    """
    parts: dict[str, list[Tensor]] = {"kl_teacher": [], "kl_student": []}
    for block in buffers.blocks(student.shape[0]):
        b, a = student[block], teacher[block]
        log_q, log_p = b.sub_(rows.log_student[block, None]), a.sub_(rows.log_teacher[block, None])
        d = torch.sub(log_p, log_q, out=buffers.scratch("scratch", b)).clamp_(-JSD_RANGE, JSD_RANGE)
        log_mq = torch.expm1(d, out=buffers.scratch("mixture", b)).mul_(beta).log1p_()
        parts["kl_teacher"].append(d.sub_(log_mq).mul_(log_p.exp_()).sum(1))
        log_q.exp_()
        parts["kl_student"].append(-torch.mul(log_q, log_mq, out=a).sum(1))
    return {name: torch.cat(values) for name, values in parts.items()}


def gradient(student: Tensor, teacher: Tensor, kind: Kind, rows: RowFactors, beta: float, scale: float, buffers: Buffers) -> None:
    """Writes d loss / d student logits over student [c, V]: weight times

    forward: q - p. reverse: q * (b - a - centre), centre being the mean of b - a under q. jsd: (1 - beta) * q * (log(q/M) -
    centre), centre being KL(q‖M).
    """
    weight_q = torch.exp(-rows.log_student) * rows.weight  # times e^b: q, weighted
    weight_p = torch.exp(-rows.log_teacher) * -rows.weight
    for block in buffers.blocks(student.shape[0]):
        b, a = student[block], teacher[block]
        if kind == "forward":
            b.mul_(weight_q[block, None]).addcmul_(a, weight_p[block, None])
        elif kind == "reverse":
            a.addcmul_(b, -rows.centre[block, None])
            torch.mul(a, weight_q[block, None], out=b)
        else:
            a.addcmul_(b, rows.centre[block, None])
            torch.mul(a, ((beta - 1) * rows.weight)[block, None], out=b)
