"""The elementwise half of linear_kl: from a chunk of logits to its divergence and, in place, to the gradient. In plain torch.

Logits relative to this rank's own max of the row are called a (teacher) and b (student), both divided by the temperature.
Ranks exchange maxima and sums relative to them; `shift` moves a rank's numbers to the max over all ranks.

Shape letters: T tokens, c tokens of a chunk, V this rank's vocabulary rows without padding, R ranks, k top-k.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trd_megatron.divergence.dense import top_k_ids
from trd_megatron.divergence.spec import Divergence

_CPU_BLOCK = 16  # rows of a chunk whose elementwise work is done together on CPU, so that temporaries stay small and in cache
_NO_LOGIT = -1e30  # max over no rows at all: finite, so that 0 * (a difference of maxima) is 0 and not NaN
_JSD_RANGE = 60.0  # |log p - log q| beyond it changes jsd by less than e^-59 and would overflow float32


@dataclass(frozen=True)
class Job:
    """What linear_kl is asked for, apart from the tensors that are differentiated or multiplied."""

    divergence: Divergence
    targets: Tensor | None  # [T]
    set_columns: Tensor | None  # [n] those of this rank's rows that are in the token set
    first: int  # id of this rank's first row
    rows: int  # this rank's rows that are not padding
    vocab: int  # true size over all ranks
    group: dist.ProcessGroup | None  # None: one rank
    rank: int
    ranks: int
    chunk: int
    hidden_grad: bool
    weight_grad: bool

    @property
    def top_k(self) -> int | None:
        return None if self.divergence.top_k is None else min(self.divergence.top_k, self.vocab)

    @property
    def wants_plain(self) -> bool:
        """Whether anything at temperature 1 over the full vocabulary is asked for."""
        return self.targets is not None or self.set_columns is not None

    @property
    def plain_is_apart(self) -> bool:
        """Whether the softmax at temperature 1 over the full vocabulary is another than the divergence's own."""
        return self.divergence.temperature != 1 or self.divergence.top_k is not None


class Buffers:
    """Named buffers of a chunk's or a block's shape, allocated once: a fresh temporary per chunk costs page faults on CPU."""

    def __init__(self, job: Job, stat_dtype: torch.dtype, device: torch.device) -> None:
        self.stat_dtype, self.device, self.vocab = stat_dtype, device, job.rows
        self.block = min(_CPU_BLOCK, job.chunk) if device.type == "cpu" else job.chunk
        self._chunk = job.chunk
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def chunk(self, name: str, tokens: int, dtype: torch.dtype) -> Tensor:
        """[tokens, V], uninitialised or as last left; tokens at most the chunk size."""
        return self._get(name, self._chunk, dtype)[:tokens]

    def scratch(self, name: str, like: Tensor) -> Tensor:
        """Like a block of rows, in the statistics' dtype."""
        return self._get(name, self.block, self.stat_dtype)[: like.shape[0]]

    def _get(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        if (name, dtype) not in self._held:
            self._held[name, dtype] = torch.empty(rows, self.vocab, dtype=dtype, device=self.device)
        return self._held[name, dtype]

    def blocks(self, tokens: int) -> Iterator[slice]:
        for start in range(0, tokens, self.block):
            yield slice(start, min(start + self.block, tokens))


def chunk_rows(student: Tensor, teacher: Tensor, weights: Tensor, results: Tensor, start: int, buffers: Buffers, job: Job) -> None:
    """Fills results [5, c] and, when a gradient is wanted, turns student's logits [c, V] into d loss / d student logits.

    results: per_token, unclipped, student_logprob, teacher_logprob, teacher_set_mass (the last three only when asked for).
    weights [c]; start: index of the chunk's first token. Destroys teacher's logits. Collective over job.group.
    """
    (_full if job.top_k is None else _top_k)(student, teacher, weights, results, start, buffers, job)


def _full(student: Tensor, teacher: Tensor, weights: Tensor, results: Tensor, start: int, buffers: Buffers, job: Job) -> None:
    divergence, want_grad = job.divergence, job.hidden_grad or job.weight_grad
    scale = 1 / divergence.temperature
    parts = []
    for block in buffers.blocks(student.shape[0]):
        b, a = student[block], teacher[block]
        part = _observe(b, a, start + block.start, buffers, job)
        for x, maximum in ((b, part["max_student"]), (a, part["max_teacher"])):
            x.sub_(maximum.view(-1, 1))
            if scale != 1:
                x.mul_(scale)
        part.update(_sums(b, a, divergence.kind, buffers))
        parts.append(part)
    stats = _gather(parts, job)
    shift_s, shift_t = _shift(stats, "student") * scale, _shift(stats, "teacher") * scale  # [R, c]
    weight_s, weight_t = shift_s.exp(), shift_t.exp()
    total_s, total_t = (weight_s * stats["sum_student"]).sum(0), (weight_t * stats["sum_teacher"]).sum(0)  # [c]
    log_s, log_t = total_s.log(), total_t.log()
    own_s, own_t = shift_s[job.rank], shift_t[job.rank]

    if divergence.kind == "forward":
        cross = stats["cross"] + stats["sum_teacher"] * (shift_t - shift_s)
        value = (weight_t * cross).sum(0) / total_t + log_s - log_t
    elif divergence.kind == "reverse":
        cross = stats["cross"] + stats["sum_student"] * (shift_s - shift_t)
        value = (weight_s * cross).sum(0) / total_s + log_t - log_s
    else:
        parts = [
            _jsd_sums(student[block], teacher[block], (own_s - log_s)[block], (own_t - log_t)[block], divergence.beta, buffers)
            for block in buffers.blocks(student.shape[0])
        ]
        jsd = {name: value.sum(0) for name, value in _gather(parts, job).items()}  # [c]
        value = divergence.beta * jsd["kl_teacher"] + (1 - divergence.beta) * jsd["kl_student"]

    row = _finish(value, weights, results, stats, job) * scale
    if not want_grad:
        return
    scale_s = row * weight_s[job.rank] / total_s  # e^b * scale_s is q, weighted
    if divergence.kind == "forward":  # q - p
        scale_t = -row * weight_t[job.rank] / total_t
        for block in buffers.blocks(student.shape[0]):
            student[block].mul_(scale_s[block, None]).addcmul_(teacher[block], scale_t[block, None])
        return
    if divergence.kind == "reverse":
        # q * (log q - log p - KL) = q * (b - a - mean of b - a under q). The mean is taken relative to this rank's maxima, so
        # that a student sure of one word gets gradient 0 to the last bit, whatever the size of the logits.
        cross = stats["cross"] + stats["sum_student"] * ((shift_s - shift_t) - (own_s - own_t))
        centre = -(weight_s * cross).sum(0) / total_s
    else:  # (1 - beta) * q * (log(q/M) - KL(q‖M)); student holds q, teacher q * log(M/q)
        centre, scale_s = jsd["kl_student"], -(1 - divergence.beta) * row
    for block in buffers.blocks(student.shape[0]):
        teacher[block].addcmul_(student[block], centre[block, None])
        torch.mul(teacher[block], scale_s[block, None], out=student[block])


def _sums(b: Tensor, a: Tensor, kind: str, buffers: Buffers) -> dict[str, Tensor]:
    """Sums [1, rows] over a block; leaves what the gradient needs in place of b and a (nothing changes for jsd)."""
    scratch = buffers.scratch("scratch", b)
    if kind == "forward":  # leaves e^b, e^a
        torch.sub(a, b, out=scratch)
        sums = {"sum_student": b.exp_().sum(1), "sum_teacher": a.exp_().sum(1), "cross": scratch.mul_(a).sum(1)}
    elif kind == "reverse":  # leaves e^b, e^b * (b - a)
        sum_teacher = torch.exp(a, out=scratch).sum(1)
        torch.sub(b, a, out=a)
        sums = {"sum_student": b.exp_().sum(1), "sum_teacher": sum_teacher, "cross": a.mul_(b).sum(1)}
    else:
        sums = {"sum_student": torch.exp(b, out=scratch).sum(1), "sum_teacher": torch.exp(a, out=scratch).sum(1)}
    return {name: value[None] for name, value in sums.items()}


def _jsd_sums(b: Tensor, a: Tensor, shift_s: Tensor, shift_t: Tensor, beta: float, buffers: Buffers) -> dict[str, Tensor]:
    """KL(p‖M) and KL(q‖M) [1, rows] of this rank's part of the vocabulary; leaves q and q * log(M/q) in place of b and a.

    With d = log p - log q: log(M/q) = log(1 - beta + beta * e^d), exactly 0 at d = 0.
    """
    log_q, log_p = b.add_(shift_s[:, None]), a.add_(shift_t[:, None])
    d = torch.sub(log_p, log_q, out=buffers.scratch("scratch", b)).clamp_(-_JSD_RANGE, _JSD_RANGE)
    log_mq = torch.expm1(d, out=buffers.scratch("mixture", b)).mul_(beta).log1p_()
    kl_teacher = d.sub_(log_mq).mul_(log_p.exp_()).sum(1)
    log_q.exp_()
    kl_student = -torch.mul(log_q, log_mq, out=a).sum(1)
    return {"kl_teacher": kl_teacher[None], "kl_student": kl_student[None]}


def _top_k(student: Tensor, teacher: Tensor, weights: Tensor, results: Tensor, start: int, buffers: Buffers, job: Job) -> None:
    """Every rank offers its own top k; candidates in order of rank, then id, so that the lowest position is the lowest id."""
    assert job.top_k is not None
    k, scale = job.top_k, 1 / job.divergence.temperature
    parts, own_ids = [], []
    for block in buffers.blocks(student.shape[0]):
        b, a = student[block], teacher[block]
        part = _observe(b, a, start + block.start, buffers, job)
        ids = top_k_ids(a, min(k, job.rows))  # [rows, k], fewer on a rank with fewer rows
        for name, logits in (("candidates_student", b), ("candidates_teacher", a)):
            part[name] = logits.new_full((k, ids.shape[0]), _NO_LOGIT)
            part[name][: ids.shape[1]] = logits.gather(1, ids).t()
        own_ids.append(ids)
        parts.append(part)
    stats = _gather(parts, job)
    candidates_s, candidates_t = (
        stats[f"candidates_{side}"].permute(2, 0, 1).reshape(-1, job.ranks * k) for side in ("student", "teacher")
    )  # [c, R*k]
    chosen = top_k_ids(candidates_t, k)  # [c, k]
    log_q, log_p = ((x.gather(1, chosen) * scale).log_softmax(1) for x in (candidates_s, candidates_t))
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    value = (p * ratio).sum(1) if job.divergence.kind == "forward" else -(q * ratio).sum(1)
    row = _finish(value, weights, results, stats, job) * scale
    if not (job.hidden_grad or job.weight_grad):
        return
    gradient = (q - p if job.divergence.kind == "forward" else -q * (ratio + value[:, None])) * row[:, None]
    offered = torch.zeros_like(candidates_s).scatter_(1, chosen, gradient)  # [c, R*k], zero where not chosen
    own = torch.cat(own_ids)
    student.zero_().scatter_(1, own, offered[:, job.rank * k : job.rank * k + own.shape[1]])


def _observe(b: Tensor, a: Tensor, start: int, buffers: Buffers, job: Job) -> dict[str, Tensor]:
    """Statistics [1, rows] of a block's raw logits, before anything overwrites them."""
    part = {}
    for name, logits in (("student", b), ("teacher", a)):
        part[f"max_{name}"] = logits.amax(1) if job.rows else logits.new_full(logits.shape[:1], _NO_LOGIT)
    if job.targets is not None:
        local = job.targets[start : start + b.shape[0]] - job.first
        held = (local >= 0) & (local < job.rows)
        for name, logits in (("student", b), ("teacher", a)):
            part[f"target_{name}"] = logits.new_zeros(logits.shape[0])
            if job.rows:
                found = logits.gather(1, local.clamp(0, job.rows - 1)[:, None]).squeeze(1)
                part[f"target_{name}"] = found.masked_fill(~held, 0.0)
    if job.set_columns is not None:
        part["set_teacher"] = a[:, job.set_columns].sub_(part["max_teacher"][:, None]).exp_().sum(1)
    if job.wants_plain and job.plain_is_apart:
        for name, logits in (("student", b), ("teacher", a)):
            scratch = torch.sub(logits, part[f"max_{name}"][:, None], out=buffers.scratch("scratch", logits))
            part[f"plain_{name}"] = scratch.exp_().sum(1)
    return {name: value[None] for name, value in part.items()}


def _gather(parts: list[dict[str, Tensor]], job: Job) -> dict[str, Tensor]:
    """Blocks joined and all ranks' numbers side by side, in one all-gather: [R, c] per name ([R, k, c] for candidates)."""
    packed = torch.cat([torch.cat(list(part.values())) for part in parts], dim=1)  # [n, c]
    everyone = packed[None]
    if job.group is not None:
        everyone = packed.new_empty(job.ranks, *packed.shape)
        dist.all_gather(list(everyone.unbind()), packed, group=job.group)
    pieces = everyone.split([value.shape[0] for value in parts[0].values()], dim=1)
    return {name: piece if name.startswith("candidates") else piece[:, 0] for name, piece in zip(parts[0], pieces, strict=True)}


def _shift(stats: dict[str, Tensor], side: str) -> Tensor:
    """Each rank's max minus the max over all ranks, [R, c]."""
    return stats[f"max_{side}"] - stats[f"max_{side}"].amax(0)


def _finish(value: Tensor, weights: Tensor, results: Tensor, stats: dict[str, Tensor], job: Job) -> Tensor:
    """Writes results [5, c] and returns the factor [c] of each row's gradient: its weight, 0 where the clip holds."""
    clip = job.divergence.clip
    results[0] = value if clip is None else value.clamp(max=clip)
    results[1] = value
    if job.wants_plain:
        kept = "plain" if job.plain_is_apart else "sum"
        shares = {side: _shift(stats, side).exp() for side in ("student", "teacher")}  # [R, c]
        totals = {side: (share * stats[f"{kept}_{side}"]).sum(0) for side, share in shares.items()}
        if job.targets is not None:
            for result, side in ((results[2], "student"), (results[3], "teacher")):
                result.copy_(stats[f"target_{side}"].sum(0) - stats[f"max_{side}"].amax(0) - totals[side].log())
        if job.set_columns is not None:
            results[4] = (shares["teacher"] * stats["set_teacher"]).sum(0) / totals["teacher"]
    return weights if clip is None else weights.masked_fill(value > clip, 0.0)
