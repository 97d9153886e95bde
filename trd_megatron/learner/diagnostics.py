"""What the curves of training are drawn from: sums over a global batch (figure 3 of the paper) and quantiles of the per-token KL."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trd_megatron.divergence import KLOutput
from trd_megatron.learner.packing import MicroBatch, Sample
from trd_megatron.learner.parallel import Parallel

QUANTILES = {"kl_p50": 0.5, "kl_p95": 0.95, "kl_p99": 0.99, "kl_max": 1.0}
_COUNTED = ("tokens", "loss", "kl", "student_nll", "teacher_nll", "epistemic", "clipped", "kl_passed", "tokens_passed", "kl_failed",
            "tokens_failed")  # fmt: skip


@dataclass(frozen=True)
class Sums:
    """Sums over the response tokens of a global batch, equal on all ranks: what is divided is summed first."""

    tokens: int
    loss: float  # per-token values after the clip
    kl: float  # before the clip
    student_nll: float
    teacher_nll: float
    epistemic: float  # teacher probability of the epistemic ids
    clipped: float  # tokens on which the clip holds
    kl_passed: float  # over tokens of samples whose rollout passed the verifier
    tokens_passed: float
    kl_failed: float
    tokens_failed: float
    per_token: Tensor  # [tokens] float32, before the clip, in no particular order
    supervised: bool = False  # no teacher: loss, kl and student_nll are one number, what tells of a teacher is 0
    sample_logprobs: Tensor | None = None  # [samples] float64, of whole responses in the batch's order; only where they were asked for

    def metrics(self) -> dict[str, Any]:
        """Means per response token and quantiles; None where no token counts or a float cannot hold the value.

        Without a teacher: loss and student_nll, which are the same, and perplexity.
        """
        if self.supervised:
            nll = self.student_nll / self.tokens
            return {"loss": self.loss / self.tokens, "student_nll": nll, "perplexity": perplexity(nll)}
        means = {name: getattr(self, name) / self.tokens for name in ("loss", "kl", "student_nll", "teacher_nll")}
        split = {
            f"kl_{name}": kl / tokens if tokens else None
            for name, kl, tokens in (("passed", self.kl_passed, self.tokens_passed), ("failed", self.kl_failed, self.tokens_failed))
        }
        ordered = self.per_token.sort().values
        ranks = {name: math.ceil(q * self.tokens) - 1 for name, q in QUANTILES.items()}
        quantiles = {name: float(ordered[index]) for name, index in ranks.items()}
        gap = float(torch.tensor([means["student_nll"], means["teacher_nll"]], dtype=torch.float64).exp().diff().neg())
        shares = {"epistemic_mass": self.epistemic / self.tokens, "clipped_share": self.clipped / self.tokens}
        return means | split | quantiles | shares | {"perplexity_gap": gap if math.isfinite(gap) else None}


def perplexity(nll: float) -> float | None:
    """e^nll; None where a float cannot hold it."""
    value = float(torch.tensor(nll, dtype=torch.float64).exp())
    return value if math.isfinite(value) else None


def probabilities(samples: Sequence[Sample], logprobs: Tensor) -> dict[str, float]:
    """source -> mean probability of its whole responses: how often the model would write exactly these. logprobs: [samples]."""
    found: dict[str, list[float]] = {}
    for sample, probability in zip(samples, logprobs.exp().tolist(), strict=True):
        if sample.source is not None:
            found.setdefault(sample.source, []).append(probability)
    return {source: sum(values) / len(values) for source, values in sorted(found.items())}


class Totals:
    """Collects a rank's micro-batches; `over_ranks` adds up the ranks that hold other tokens."""

    def __init__(
        self, clip: float | None, parallel: Parallel, *, supervised: bool = False, of_samples: Sequence[Sample] | None = None
    ) -> None:
        """of_samples: the global batch, if `sample_logprobs` is wanted."""
        self.clip, self.parallel, self.supervised = clip, parallel, supervised
        self._places = None if of_samples is None else {id(sample): index for index, sample in enumerate(of_samples)}
        self._logprobs = torch.zeros(len(self._places or ()), dtype=torch.float64, device=parallel.device)
        self._sums = torch.zeros(len(_COUNTED), dtype=torch.float64, device=parallel.device)
        self._per_token: list[Tensor] = []

    def add(self, batch: MicroBatch, output: KLOutput) -> None:
        assert output.student_logprob is not None and output.teacher_logprob is not None
        mass = torch.zeros_like(output.unclipped) if output.teacher_set_mass is None else output.teacher_set_mass
        kl = output.unclipped.double()
        passed, failed = (batch.of_rows([sample.rollout_passed is outcome for sample in batch.samples]) for outcome in (True, False))
        clipped = output.unclipped > (math.inf if self.clip is None else self.clip)
        columns = (
            torch.ones_like(kl), output.per_token, kl, -output.student_logprob, -output.teacher_logprob, mass, clipped,
            kl * passed, passed, kl * failed, failed,
        )  # fmt: skip
        self._sums += torch.stack([column.double().sum() for column in columns])
        self._per_token.append(output.unclipped.float())
        if self._places is not None:
            places = batch.of_rows([self._places[id(sample)] for sample in batch.samples])
            self._logprobs.index_add_(0, places, output.student_logprob.double())

    def over_ranks(self) -> Sums:
        device = self.parallel.device
        mine = torch.cat(self._per_token) if self._per_token else torch.empty(0, device=device)
        if self.parallel.dp_cp_size > 1:
            group = self.parallel.dp_cp_group
            dist.all_reduce(self._sums, group=group)
            if self._places is not None:  # a context-parallel rank has parts of its responses
                dist.all_reduce(self._logprobs, group=group)
            lengths = torch.zeros(self.parallel.dp_cp_size, dtype=torch.int64, device=device)
            lengths[self.parallel.dp_cp_rank] = len(mine)
            dist.all_reduce(lengths, group=group)
            longest = int(lengths.max())
            parts = [mine.new_empty(longest) for _ in lengths]
            dist.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=group)
            mine = torch.cat([part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)])
        values = dict(zip(_COUNTED, self._sums.tolist(), strict=True))
        logprobs = None if self._places is None else self._logprobs.cpu()
        counted = values | {"tokens": round(values["tokens"])}
        return Sums(**counted, per_token=mine.cpu(), supervised=self.supervised, sample_logprobs=logprobs)
