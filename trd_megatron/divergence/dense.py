"""The divergences as one would write them down, on whole logits, with autograd: the reference for linear_kl."""

import math

import torch
from torch import Tensor

from trd_megatron.divergence.spec import Divergence


def dense_kl(student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence) -> Tensor:
    """Per-token divergence [T] from logits [T, V], differentiable in both; definitions as in Divergence.

    float64 stays float64, everything else is computed in float32. A column that is -inf on both sides (vocabulary padding)
    counts for nothing and gets gradient 0. Raises ValueError when the shapes differ.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(f"student_logits {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)} must both be [T, V]")
    if divergence.top_k is not None:
        ids = top_k_ids(teacher_logits.detach(), min(divergence.top_k, teacher_logits.shape[1]))
        student_logits, teacher_logits = student_logits.gather(1, ids), teacher_logits.gather(1, ids)
    student, teacher = (
        (logits if logits.dtype == torch.float64 else logits.float()).div(divergence.temperature).log_softmax(dim=1)
        for logits in (student_logits, teacher_logits)
    )
    if divergence.kind == "forward":
        value = _kl(teacher, student)
    elif divergence.kind == "reverse":
        value = _kl(student, teacher)
    else:
        beta = divergence.beta
        padding = student.isneginf() & teacher.isneginf()
        safe_teacher = teacher.masked_fill(padding, 0.0)  # logaddexp(-inf, -inf) has a NaN gradient
        mixture = torch.logaddexp(student + math.log1p(-beta), safe_teacher + math.log(beta))
        value = beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)
    return value if divergence.clip is None else value.clamp(max=divergence.clip)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) of each row of log-probabilities [T, V], with 0·log 0 = 0."""
    return (log_p.exp() * (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)).sum(dim=1)


def top_k_ids(logits: Tensor, k: int) -> Tensor:
    """Ids [T, k] of the k largest logits [T, V] of each row, in ascending order of id; of equal logits the lowest ids win.

    torch.topk leaves open which of equal values it takes. Equal values inside the top k are all taken, so only rows whose
    k-th and (k+1)-th values are equal need care.
    """
    vocab = logits.shape[1]
    values, ids = logits.topk(min(k + 1, vocab), dim=1)
    chosen = ids[:, :k]
    if k < vocab:
        every_tied = (values[:, k - 1] == values[:, k]).nonzero().squeeze(1)
        for tied in every_tied.split(16) if every_tied.numel() else ():  # a few rows at a time: bfloat16 logits tie in most of them
            border = values[tied, k - 1, None]  # [n, 1]
            id_order = -torch.arange(vocab, dtype=torch.int32, device=logits.device)
            lowest_equal = torch.where(logits[tied] == border, id_order, -vocab).topk(k, dim=1).indices  # [n, k] ascending ids
            above = (values[tied, :k] > border).sum(dim=1, keepdim=True)  # [n, 1]
            slot = torch.arange(k, device=logits.device)
            chosen[tied] = torch.where(slot < above, chosen[tied], lowest_equal.gather(1, (slot - above).clamp(min=0)))
    return chosen.sort(dim=1).values
