"""Cases of linear_cross_entropy and both computations of them. A module of its own: ranks find functions by name."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trd_megatron.divergence import linear_cross_entropy

PADDED = 48  # rows of the output layer: 24 each on two ranks, 16 on three


@dataclass(frozen=True)
class Case:
    tokens: int = 33
    vocab: int = 41
    chunk: int = 13
    dtype: torch.dtype = torch.float32
    scale: float = 1.0


CASES = [
    *(Case(tokens=tokens, chunk=chunk) for tokens, chunk in ((1, 5), (7, 3), (513, 129), (0, 4), (33, 1000))),
    *(Case(vocab=vocab, dtype=dtype) for vocab in (1, 19, 41, PADDED) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    Case(scale=1e4, dtype=torch.float64),
]
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 5e-2},
}


def problem(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, 6], weight [PADDED, 6], targets [T], token_weights [T]; every fifth token weighs nothing."""
    rng = torch.Generator().manual_seed(case.tokens + case.vocab)
    hidden = torch.randn(case.tokens, 6, generator=rng, dtype=torch.float64)
    weight = torch.randn(PADDED, 6, generator=rng, dtype=torch.float64) * case.scale
    targets = torch.randint(case.vocab, (case.tokens,), generator=rng)
    weights = torch.rand(case.tokens, generator=rng, dtype=torch.float64) / max(case.tokens, 1)
    weights[::5] = 0
    return hidden.to(case.dtype), weight.to(case.dtype), targets, weights


def reference(case: Case) -> list[Tensor]:
    """Loss, per token, gradient of hidden and of the whole weight in float64: padding rows are not there."""
    hidden, weight, targets, weights = problem(case)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    per_token = torch.nn.functional.cross_entropy(hidden @ weight[: case.vocab].T, targets, reduction="none")
    loss = (weights * per_token).sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), per_token.detach(), hidden.grad, weight.grad]


def ours(case: Case, **settings: Any) -> list[Tensor]:
    """The same of linear_cross_entropy; over the default group, if there is one, each rank has its rows of the weight's gradient."""
    hidden, weight, targets, weights = problem(case)
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    hidden.requires_grad_()
    part = weight.chunk(ranks)[rank].clone().requires_grad_()
    settings |= {"token_weights": weights, "vocab_size": case.vocab, "chunk_tokens": case.chunk, "tp_group": group}
    output = linear_cross_entropy(hidden, part, targets, **settings)
    output.loss.backward()
    assert output.student_logprob is not None
    torch.testing.assert_close(output.student_logprob, -output.per_token, rtol=1e-5, atol=1e-5)
    assert hidden.grad is not None
    assert part.grad is not None
    return [output.loss.detach(), output.per_token, hidden.grad, part.grad]


def on_rank(rank: int, cases: list[Case]) -> list[list[Tensor]]:
    return [ours(case) for case in cases]
