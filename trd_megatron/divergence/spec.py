"""What is minimised per token, and what the fused loss gives back."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Kind = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True)
class Divergence:
    """A divergence between teacher and student next-token distributions, per token.

    kind: "forward" is KL(teacher‖student), "reverse" is KL(student‖teacher), "jsd" the generalised Jensen-Shannon divergence
        beta·KL(teacher‖M) + (1-beta)·KL(student‖M) with M = (1-beta)·student + beta·teacher (Agarwal et al. 2024, GKD).
    beta: of "jsd" only, inside (0, 1).
    top_k: both sides are cut to the teacher's top_k ids (of equal logits the lowest id wins) and renormalised there; None: the
        full vocabulary. More than the vocabulary is the full vocabulary. Not for "jsd".
    clip: cap of the per-token value in nats; where the cap holds the token has no gradient. None: no cap.
    temperature: both logits are divided by it; the value is not multiplied by its square.

    Raises ValueError for an unknown kind, beta outside (0, 1), top_k < 1, top_k with "jsd", clip <= 0 and temperature <= 0.
    """

    kind: Kind = "forward"
    beta: float = 0.5
    top_k: int | None = None
    clip: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(get_args(Kind))}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta is {self.beta}; it must lie inside (0, 1); at the ends use forward or reverse")
        if self.top_k is not None and self.kind == "jsd":
            raise ValueError("top_k is not defined for kind jsd; use forward or reverse, or leave top_k out")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k is {self.top_k!r}; it must be a whole number of at least 1, or None for the full vocabulary")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be above 0, or None for no cap")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 and finite")


@dataclass(frozen=True)
class KLOutput:
    """Result of linear_kl for T tokens. All but the loss are detached, in float32 (float64 for float64 hidden states), in nats.

    Under tensor parallelism every rank holds the same bits. The last three are at temperature 1 over the full true
    vocabulary, whatever the divergence; None when not asked for.
    """

    loss: Tensor  # scalar: sum(token_weights * per_token), differentiable
    per_token: Tensor  # [T] after the clip
    unclipped: Tensor  # [T]
    student_logprob: Tensor | None  # [T] of the targets
    teacher_logprob: Tensor | None  # [T] of the targets
    teacher_set_mass: Tensor | None  # [T] teacher probability of the token set
