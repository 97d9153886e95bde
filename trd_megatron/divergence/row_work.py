"""From a chunk of logits to its divergence and, in place, to the gradient: what does not depend on who reads the rows.

The kernels (torch_kernels, triton_kernels) give sums relative to this rank's own max of each row. Ranks exchange maxima and
sums in one all-gather per chunk (jsd needs the mixture and therefore a second one); `shift` moves a rank's numbers to the max
over all ranks. All ranks combine the same numbers in the same order, therefore hold the same bits.

Shape letters: T tokens, c tokens of a chunk, V this rank's vocabulary rows without padding, R ranks, k top-k.
"""

from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trd_megatron.divergence.dense import top_k_ids
from trd_megatron.divergence.job import NO_LOGIT, Buffers, Job, RowFactors
from trd_megatron.divergence.spec import Kind


class Kernels(Protocol):
    """The functions of torch_kernels and triton_kernels, described in torch_kernels."""

    def statistics(
        self, student: Tensor, teacher: Tensor, kind: Kind, scale: float, plain: bool, buffers: Buffers
    ) -> dict[str, Tensor]: ...

    def jsd_statistics(
        self, student: Tensor, teacher: Tensor, rows: RowFactors, beta: float, scale: float, buffers: Buffers
    ) -> dict[str, Tensor]: ...

    def gradient(
        self, student: Tensor, teacher: Tensor, kind: Kind, rows: RowFactors, beta: float, scale: float, buffers: Buffers
    ) -> None: ...


def chunk_rows(
    student: Tensor, teacher: Tensor, weights: Tensor, results: Tensor, start: int, kernels: Kernels, buffers: Buffers, job: Job
) -> None:
    """Fills results [5, c] and, when a gradient is wanted, turns student's logits [c, V] into d loss / d student logits.

    results: per_token, unclipped, student_logprob, teacher_logprob, teacher_set_mass (the last three only when asked for).
    weights [c]; start: index of the chunk's first token. Destroys teacher's logits. Collective over job.group.
    """
    (_full if job.top_k is None else _top_k)(student, teacher, weights, results, start, kernels, buffers, job)


def _full(
    student: Tensor, teacher: Tensor, weights: Tensor, results: Tensor, start: int, kernels: Kernels, buffers: Buffers, job: Job
) -> None:
    kind, beta, scale = job.divergence.kind, job.divergence.beta, 1 / job.divergence.temperature
    part = _statistics(student, teacher, start, kind, scale, kernels, buffers, job)
    stats = _gather(part, job)
    shift_s, shift_t = _shift(stats, "student") * scale, _shift(stats, "teacher") * scale  # [R, c]
    weight_s, weight_t = shift_s.exp(), shift_t.exp()
    total_s, total_t = (weight_s * stats["sum_student"]).sum(0), (weight_t * stats["sum_teacher"]).sum(0)  # [c]
    log_s, log_t = total_s.log(), total_t.log()
    own_s, own_t = shift_s[job.rank], shift_t[job.rank]
    centre = log_s  # unused by forward
    rows = RowFactors(part["max_student"], part["max_teacher"], log_s - own_s, log_t - own_t, weights, centre)

    if kind == "forward":
        cross = stats["cross"] + stats["sum_teacher"] * (shift_t - shift_s)
        value = (weight_t * cross).sum(0) / total_t + log_s - log_t
    elif kind == "reverse":
        cross = stats["cross"] + stats["sum_student"] * (shift_s - shift_t)
        value = (weight_s * cross).sum(0) / total_s + log_t - log_s
        # The mean is taken relative to this rank's maxima, so that a student sure of one word gets gradient 0 to the last bit,
        # whatever the size of the logits.
        cross = stats["cross"] + stats["sum_student"] * ((shift_s - shift_t) - (own_s - own_t))
        centre = (weight_s * cross).sum(0) / total_s
    else:
        sums = kernels.jsd_statistics(student, teacher, rows, beta, scale, buffers)
        jsd = {name: by_rank.sum(0) for name, by_rank in _gather(sums, job).items()}  # [c]
        value, centre = beta * jsd["kl_teacher"] + (1 - beta) * jsd["kl_student"], jsd["kl_student"]

    weight = _finish(value, weights, results, stats, job) * scale
    if job.wants_grad:
        kernels.gradient(student, teacher, kind, replace(rows, weight=weight, centre=centre), beta, scale, buffers)


def _top_k(
    student: Tensor, teacher: Tensor, weights: Tensor, results: Tensor, start: int, kernels: Kernels, buffers: Buffers, job: Job
) -> None:
    """Every rank offers its own top k; candidates in order of rank, then id, so that the lowest position is the lowest id."""
    assert job.top_k is not None
    k, scale, forward = job.top_k, 1 / job.divergence.temperature, job.divergence.kind == "forward"
    blocks = buffers.blocks(student.shape[0])
    own = torch.cat([top_k_ids(teacher[block], min(k, job.rows)) for block in blocks])  # [c, k], fewer on a rank with fewer rows
    part = {}
    for name, logits in (("student", student), ("teacher", teacher)):
        part[f"candidates_{name}"] = weights.new_full((k, own.shape[0]), NO_LOGIT)
        part[f"candidates_{name}"][: own.shape[1]] = logits.gather(1, own).t()
    if job.wants_plain:
        part |= _statistics(student, teacher, start, "jsd", 1, kernels, buffers, job)  # jsd: the sums alone
    stats = _gather(part, job)
    candidates_s, candidates_t = (
        stats[f"candidates_{side}"].permute(2, 0, 1).reshape(-1, job.ranks * k) for side in ("student", "teacher")
    )  # [c, R*k]
    chosen = top_k_ids(candidates_t, k)  # [c, k]
    log_q, log_p = ((x.gather(1, chosen) * scale).log_softmax(1) for x in (candidates_s, candidates_t))
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    value = (p * ratio).sum(1) if forward else -(q * ratio).sum(1)
    weight = _finish(value, weights, results, stats, job) * scale
    if not job.wants_grad:
        return
    gradient = (q - p if forward else -q * (ratio + value[:, None])) * weight[:, None]
    offered = torch.zeros_like(candidates_s).scatter_(1, chosen, gradient)  # [c, R*k], zero where not chosen
    student.zero_().scatter_(1, own, offered[:, job.rank * k : job.rank * k + own.shape[1]].to(student.dtype))


def _statistics(
    student: Tensor,
    teacher: Tensor,
    start: int,
    kind: Kind,
    scale: float,
    kernels: Kernels,
    buffers: Buffers,
    job: Job,
) -> dict[str, Tensor]:
    """The kernels' statistics [c] of this rank and what was asked for beside the divergence; the kernels overwrite the logits."""
    part = {}
    if job.targets is not None:
        local = job.targets[start : start + student.shape[0]] - job.first
        held = (local >= 0) & (local < job.rows)
        for name, logits in (("student", student), ("teacher", teacher)):
            part[f"target_{name}"] = torch.zeros(held.shape, dtype=buffers.stat_dtype, device=held.device)
            if job.rows:
                found = logits.gather(1, local.clamp(0, job.rows - 1)[:, None]).squeeze(1)
                part[f"target_{name}"] += found.masked_fill(~held, 0.0)
    in_set = None if job.set_columns is None else teacher[:, job.set_columns].to(buffers.stat_dtype)  # [c, n]
    part |= kernels.statistics(student, teacher, kind, scale, job.wants_plain and scale != 1, buffers)
    if in_set is not None:
        part["set_teacher"] = (in_set - part["max_teacher"][:, None]).exp_().sum(1)
    return part


def _gather(part: dict[str, Tensor], job: Job) -> dict[str, Tensor]:
    """All ranks' numbers side by side, in one all-gather: [R, c] per name, [R, k, c] for candidates."""
    packed = torch.cat([value.reshape(-1, value.shape[-1]) for value in part.values()])  # [n, c]
    everyone = packed[None]
    if job.group is not None:
        everyone = packed.new_empty(job.ranks, *packed.shape)
        dist.all_gather(list(everyone.unbind()), packed, group=job.group)
    pieces = everyone.split([1 if value.dim() == 1 else value.shape[0] for value in part.values()], dim=1)
    return {name: piece[:, 0] if part[name].dim() == 1 else piece for name, piece in zip(part, pieces, strict=True)}


def _shift(stats: dict[str, Tensor], side: str) -> Tensor:
    """Each rank's max minus the max over all ranks, [R, c]."""
    return stats[f"max_{side}"] - stats[f"max_{side}"].amax(0)


def _finish(value: Tensor, weights: Tensor, results: Tensor, stats: dict[str, Tensor], job: Job) -> Tensor:
    """Writes results [5, c] and returns the factor [c] of each row's gradient: its weight, 0 where the clip holds."""
    clip = job.divergence.clip
    results[0] = value if clip is None else value.clamp(max=clip)
    results[1] = value
    if job.wants_plain:
        kept = "plain" if "plain_student" in stats else "sum"
        shares = {side: _shift(stats, side).exp() for side in ("student", "teacher")}  # [R, c]
        totals = {side: (share * stats[f"{kept}_{side}"]).sum(0) for side, share in shares.items()}
        if job.targets is not None:
            for result, side in ((results[2], "student"), (results[3], "teacher")):
                result.copy_(stats[f"target_{side}"].sum(0) - stats[f"max_{side}"].amax(0) - totals[side].log())
        if job.set_columns is not None:
            results[4] = (shares["teacher"] * stats["set_teacher"]).sum(0) / totals["teacher"]
    return weights if clip is None else weights.masked_fill(value > clip, 0.0)
