"""One optimizer step's loss and gradients, and the held-out loss: micro-batches in, sums over the global batch out."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from trd_megatron.config import Config
from trd_megatron.divergence import Divergence, KLOutput, linear_cross_entropy, linear_kl
from trd_megatron.learner.diagnostics import Sums, Totals
from trd_megatron.learner.dropout import row_keys
from trd_megatron.learner.lora import Adapters
from trd_megatron.learner.model import Model
from trd_megatron.learner.packing import Cut, MicroBatch, Sample, deal, micro_batches
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.stack import token_multiple
from trd_megatron.learner.teacher import Teacher


class Step:
    """Runs batches through teacher, student and loss under one layout."""

    def __init__(self, student: Model, teacher: Teacher | None, adapters: Adapters | None, config: Config, token_set: list[int]) -> None:
        """teacher None: cross entropy of the responses. adapters None: every parameter is trained. token_set: the ids of `epistemic`."""
        self.token_set = torch.tensor(token_set, dtype=torch.int64, device=student.parallel.device)
        self.student, self.teacher, self.adapters = student, teacher, adapters
        self.learner, self.seed = config.learner, config.seed
        self.divergence = Divergence(**asdict(config.method.divergence))
        self.parallel: Parallel = student.parallel
        self.cut = Cut(token_multiple(config.learner, self.parallel), self.parallel.cp_size, self.parallel.cp_rank)

    @record_function("data")
    def _micro_batches(self, mine: list[Sample]) -> list[MicroBatch]:
        return micro_batches(
            mine, self.learner.max_tokens_per_micro_batch, self.cut, self.parallel.device, with_teacher=self.teacher is not None
        )

    def _loss(self, batch: MicroBatch, teacher_hidden: Tensor | None, weight: float) -> KLOutput:
        """teacher_hidden: [R, Ht] of all response tokens of the micro-batch."""
        with record_function("student forward"):
            student_hidden = self.student.hidden_states(batch.student)[batch.student.rows]
        settings: dict[str, Any] = {
            "token_weights": torch.full((len(batch.student.rows),), weight, device=student_hidden.device, dtype=torch.float64),
            "vocab_size": self.student.architecture.vocab_size,
            "tp_group": self.parallel.tp_group if self.parallel.tp_size > 1 else None,
            "chunk_tokens": self.learner.kl_chunk_tokens,
            "backend": self.learner.kl_backend,
        }
        weights, targets = self.student.output_weight, batch.student.targets
        if self.teacher is None or teacher_hidden is None:
            with record_function("cross entropy"):
                return linear_cross_entropy(student_hidden, weights, targets, **settings)
        if self.parallel.cp_size > 1:
            teacher_hidden = teacher_hidden[batch.student.responses]
        teacher = (teacher_hidden, self.teacher.output_weight)
        with record_function("KL"):
            return linear_kl(student_hidden, weights, *teacher, self.divergence, targets=targets, token_set=self.token_set, **settings)

    def run(
        self, samples: list[Sample], *, backward: bool, number: int = 0, before_last_backward: Callable[[], None] = lambda: None
    ) -> Sums:
        """The whole global batch `samples` (the same list on all ranks); gradients of the global token mean if `backward`.

        `number` of the step: dropout, which only `backward` has, drops others in each.
        Gradients are this rank's share: the optimizer adds them up over the ranks that hold the same weights. `before_last_backward` is
        called before the backward of the last micro-batch, on all of these ranks or, when one of them has no sample, on none.
        """
        tokens = sum(sample.response_tokens for sample in samples)
        supervised = self.teacher is None
        wanted = samples if supervised and not backward else None
        totals = Totals(None if supervised else self.divergence.clip, self.parallel, supervised=supervised, of_samples=wanted)
        dealt = deal(samples, self.parallel.dp_size)
        batches = self._micro_batches(dealt[self.parallel.dp_rank])
        for model in (self.student, *(() if self.teacher is None else (self.teacher.model,))):
            model.gpt.set_is_first_microbatch()  # Transformer Engine keeps fp8 weights from here to the next step
        teacher_hidden: Iterable[Tensor | None] = [None] * len(batches)
        if self.teacher is not None:
            teacher_hidden = self.teacher.response_hidden([batch.teacher for batch in batches if batch.teacher is not None])
        for index, (batch, target) in enumerate(zip(batches, teacher_hidden, strict=True)):
            if self.adapters is not None:
                self.adapters.drop(row_keys(batch.student, self.seed, number) if backward else None)
            with torch.set_grad_enabled(backward):
                output = self._loss(batch, target, 1.0 / tokens)
                if backward:
                    if index == len(batches) - 1 and all(dealt):
                        before_last_backward()
                    with record_function("backward"):
                        output.loss.backward()
            totals.add(batch, output)
        return totals.over_ranks()
