"""Exact full-vocabulary divergence from hidden states and (sharded) output layers, one chunk of tokens at a time.

No [T, V] tensor ever exists: logits live in two buffers [chunk, V_local], and the gradient is written into one of them while
they are there, so that backward only scales what the forward saved. Per chunk: three matrix products (student logits, teacher
logits, hidden gradient; a fourth when the output layer is trained) and, under tensor parallelism, one all-gather (two for jsd)
of a few numbers per token. Each rank sends its own max and its sums relative to that max; all ranks combine the same numbers
in the same order, therefore hold the same bits.

Shape letters: T tokens, c tokens of a chunk, V this rank's vocabulary rows without padding, R ranks, H hidden, k top-k.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trd_megatron.divergence import torch_kernels
from trd_megatron.divergence.job import NO_LOGIT, Buffers, Job
from trd_megatron.divergence.products import mm_into
from trd_megatron.divergence.row_work import Kernels, chunk_rows
from trd_megatron.divergence.spec import Divergence, KLOutput

Backend = Literal["auto", "torch", "triton"]
_ROWS = 8192  # of a half-precision weight gradient that are added up in float32 at a time


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: Divergence,
    *,
    token_weights: Tensor,
    targets: Tensor | None = None,
    token_set: Tensor | Sequence[int] | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 256,
    backend: Backend = "auto",
) -> KLOutput:
    """Divergence between teacher and student at every given token; section 3 of the paper, definitions in Divergence.

    student_hidden [T, Hs], teacher_hidden [T, Ht]: whole sequences (gathered when sequence parallel is on), the same on all
    ranks of tp_group. student_weight [V_local, Hs], teacher_weight [V_local, Ht]: rank r's rows [r*V_local, (r+1)*V_local) of
    the output layers. token_weights [T] float32 or float64: loss = sum(token_weights * per_token); no gradient flows into them or into
    the teacher. targets [T]: ids whose log-probabilities are wanted. token_set: ids (duplicates count once) whose teacher
    probability is wanted. vocab_size: ids from here on are padding, -inf on both sides; None: no padding.
    chunk_tokens: tokens per chunk; memory grows with it, the result does not change.

    The loss is differentiable in student_hidden (its gradient is summed over tp_group: every rank gets the whole of it) and
    in student_weight (this rank's rows) where they require grad. Statistics are in float32, float64 for float64 hidden states.
    Collective over tp_group; all ranks must pass the same but for the weights. Raises ValueError for shapes, dtypes, ids or
    settings that do not fit together, and for backend "triton" without a GPU, without triton or for float64.
    """
    if not isinstance(divergence, Divergence):
        raise ValueError(f"divergence is {divergence!r}; pass a Divergence, e.g. Divergence('forward')")
    _check_tensors(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weights)
    teacher = (teacher_hidden, teacher_weight)
    settings = (token_weights, targets, token_set, vocab_size, tp_group, chunk_tokens, backend)
    return _compute(student_hidden, student_weight, teacher, divergence, *settings)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 256,
    backend: Backend = "auto",
) -> KLOutput:
    """Cross entropy -log q(target) of every token: forward KL against a teacher that is sure of the target, in linear_kl's own passes.

    hidden [T, H], weight [V_local, H], targets [T] int64; the rest, what is differentiable and what is raised as in linear_kl.
    In the result per_token and unclipped are the negative log-likelihood, teacher_logprob is 0 and teacher_set_mass None.
    """
    _check_tensors(hidden, weight, hidden, weight, token_weights)
    return _compute(hidden, weight, None, Divergence("forward"), token_weights, targets, None, vocab_size, tp_group, chunk_tokens, backend)


def _compute(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    divergence: Divergence,
    token_weights: Tensor,
    targets: Tensor | None,
    token_set: Tensor | Sequence[int] | None,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    chunk_tokens: int,
    backend: Backend,
) -> KLOutput:
    """teacher: its hidden states and output layer; None: all its probability lies on the targets."""
    kernels = _choose_kernels(backend, student_hidden)
    ranks = 1 if tp_group is None else dist.get_world_size(tp_group)
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    tokens, local_vocab = student_hidden.shape[0], student_weight.shape[0]
    vocab = ranks * local_vocab if vocab_size is None else vocab_size
    if not 1 <= vocab <= ranks * local_vocab:
        raise ValueError(f"vocab_size is {vocab}; the output layers have {ranks * local_vocab} rows over {ranks} ranks")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    if targets is not None:
        if targets.dtype != torch.int64:
            raise ValueError(f"targets is {targets.dtype}; ids are int64")
        if targets.shape != (tokens,):
            raise ValueError(f"targets has shape {list(targets.shape)}; expected [{tokens}], one id per token")
        _check_ids("targets", targets, vocab)
    first = rank * local_vocab
    rows = min(max(vocab - first, 0), local_vocab)
    set_columns = None
    if token_set is not None:
        ids = torch.as_tensor(token_set, device=student_hidden.device)
        if ids.numel() and ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"token_set is {ids.dtype}; ids are whole numbers")
        ids = ids.long().unique()
        _check_ids("token_set", ids, vocab)
        set_columns = ids[(ids >= first) & (ids < first + rows)] - first
    grad = torch.is_grad_enabled()
    job = Job(
        divergence=divergence,
        targets=targets,
        set_columns=set_columns,
        first=first,
        rows=rows,
        vocab=vocab,
        group=tp_group if ranks > 1 else None,
        rank=rank,
        ranks=ranks,
        chunk=max(1, min(chunk_tokens, tokens)),
        hidden_grad=grad and student_hidden.requires_grad,
        weight_grad=grad and student_weight.requires_grad,
    )
    return KLOutput(*_LinearKL.apply(student_hidden, student_weight, *(teacher or (None, None)), token_weights, job, kernels))


def _choose_kernels(backend: Backend, hidden: Tensor) -> Kernels:
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(get_args(Backend))}")
    if backend == "torch" or (backend == "auto" and (hidden.device.type != "cuda" or hidden.dtype == torch.float64)):
        return torch_kernels
    if hidden.dtype == torch.float64:
        raise ValueError("backend 'triton' computes in float32; pass backend 'torch' for float64 hidden states")
    try:
        from trd_megatron.divergence import triton_kernels
    except ImportError as error:
        raise ValueError(
            f"backend {backend!r} on {hidden.device.type} needs triton ({error}); install it or pass backend 'torch'"
        ) from None
    if hidden.device.type != "cuda" and not triton_kernels.INTERPRETED:
        raise ValueError("backend 'triton' needs a GPU; pass backend 'torch' (to test the kernels on a CPU set TRITON_INTERPRET=1)")
    return triton_kernels


def _check_tensors(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, token_weights: Tensor
) -> None:
    for name, hidden, weight in (("student", student_hidden, student_weight), ("teacher", teacher_hidden, teacher_weight)):
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(f"{name}_hidden {list(hidden.shape)} and {name}_weight {list(weight.shape)} must be [T, H] and [V_local, H]")
        if hidden.dtype != weight.dtype:
            raise ValueError(f"{name}_hidden is {hidden.dtype} and {name}_weight {weight.dtype}; they must be of one dtype")
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(f"student_hidden has {student_hidden.shape[0]} tokens and teacher_hidden {teacher_hidden.shape[0]}")
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"student_weight has {student_weight.shape[0]} rows and teacher_weight {teacher_weight.shape[0]}; "
            "pad the smaller vocabulary and pass vocab_size"
        )
    others = {"student_weight": student_weight, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    for name, tensor in (others | {"token_weights": token_weights}).items():
        if tensor.device != student_hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, student_hidden on {student_hidden.device}")
    for name, tensor in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            raise ValueError(f"{name} is {tensor.dtype}; it must be float32, bfloat16 or float64 (float16 cannot hold a token's gradient)")
    if token_weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"token_weights is {token_weights.dtype}; it must be float32 or float64")
    if token_weights.shape != student_hidden.shape[:1]:
        raise ValueError(f"token_weights has shape {list(token_weights.shape)}; expected [{student_hidden.shape[0]}]")


def _check_ids(name: str, ids: Tensor, vocab: int) -> None:
    if ids.numel() and bool(((ids < 0) | (ids >= vocab)).any()):
        raise ValueError(f"{name} has ids from {int(ids.min())} to {int(ids.max())}; they must lie between 0 and {vocab - 1}")


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,  # None, as the weight: the teacher is sure of the targets
        teacher_weight: Tensor | None,
        token_weights: Tensor,
        job: Job,
        kernels: Kernels,
    ) -> tuple[Tensor | None, ...]:
        tokens = student_hidden.shape[0]
        stat_dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
        buffers = Buffers(job, stat_dtype, student_hidden.device)
        # The torch kernels work in the statistics' dtype; triton's read and write the inputs' own.
        convert = kernels is torch_kernels
        # Padding rows never enter a product: cutting them off is the same as -inf on both sides.
        weight_s = student_weight[: job.rows]
        results = torch.empty(5, tokens, dtype=stat_dtype, device=student_hidden.device)
        grad_hidden = torch.empty_like(student_hidden, memory_format=torch.contiguous_format) if job.hidden_grad else None
        grad_weight = torch.zeros_like(student_weight, dtype=stat_dtype) if job.weight_grad else None

        for start in range(0, tokens, job.chunk):
            chunk = slice(start, min(start + job.chunk, tokens))
            student = _logits("student", student_hidden[chunk], weight_s, convert, buffers)  # [c, V]
            if teacher_hidden is None or teacher_weight is None:
                teacher = _sure_logits(chunk, student.dtype, buffers, job)
            else:
                teacher = _logits("teacher", teacher_hidden[chunk], teacher_weight[: job.rows], convert, buffers)
            chunk_rows(student, teacher, token_weights[chunk].to(stat_dtype), results[:, chunk], start, kernels, buffers, job)
            gradient = student
            if job.wants_grad and student.dtype != student_hidden.dtype:
                gradient = buffers.chunk("product", student.shape[0], student_hidden.dtype).copy_(student)
            if grad_hidden is not None:
                mm_into(grad_hidden[chunk], gradient, weight_s)
            if grad_weight is not None:
                _add_product(grad_weight[: job.rows], gradient.t(), student_hidden[chunk])

        if grad_hidden is not None and job.group is not None and tokens:
            dist.all_reduce(grad_hidden, group=job.group)
        if grad_weight is not None:
            grad_weight = grad_weight.to(student_weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        per_token, unclipped = results[0], results[1]
        loss = (token_weights.to(stat_dtype) * per_token).sum()
        logprobs = (results[2], results[3]) if job.targets is not None else (None, None)
        outputs = (loss, per_token, unclipped, *logprobs, results[4] if job.set_columns is not None else None)
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = (None if saved is None else saved * grad_loss for saved in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None, None, None


def _logits(name: str, hidden: Tensor, weight: Tensor, convert: bool, buffers: Buffers) -> Tensor:
    """[c, V] in the inputs' dtype, or converted to the statistics'; the product itself is in the inputs' dtype."""
    if not convert or hidden.dtype == buffers.stat_dtype:
        return mm_into(buffers.chunk(name, hidden.shape[0], hidden.dtype), hidden, weight.t())
    logits = buffers.chunk(name, hidden.shape[0], buffers.stat_dtype)
    return logits.copy_(mm_into(buffers.chunk("product", hidden.shape[0], hidden.dtype), hidden, weight.t()))


def _sure_logits(chunk: slice, dtype: torch.dtype, buffers: Buffers, job: Job) -> Tensor:
    """[c, V] of a teacher whose whole probability lies on the targets: 0 there, where this rank holds it, NO_LOGIT elsewhere."""
    assert job.targets is not None
    local = job.targets[chunk] - job.first
    logits = buffers.chunk("teacher", len(local), dtype).fill_(NO_LOGIT)
    if job.rows:
        held = (local >= 0) & (local < job.rows)
        logits.scatter_(1, local.clamp(0, job.rows - 1)[:, None], torch.where(held, 0.0, NO_LOGIT).to(dtype)[:, None])
    return logits


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [V, H] += left [V, c] @ right [c, H]; a half-precision product is added up in float32, in blocks of rows."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for start in range(0, total.shape[0], _ROWS):
        total[start : start + _ROWS] += left[start : start + _ROWS] @ right
