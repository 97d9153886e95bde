"""One optimizer step's loss and gradients, and the held-out KL: micro-batches in, sums over the global batch out."""

from dataclasses import asdict
from typing import cast

import torch
from torch.profiler import record_function

from trd_megatron.config import Config
from trd_megatron.divergence import Backend, Divergence, KLOutput, linear_kl
from trd_megatron.learner.diagnostics import Sums, Totals
from trd_megatron.learner.dropout import row_keys
from trd_megatron.learner.lora import Adapters
from trd_megatron.learner.model import Model
from trd_megatron.learner.packing import MicroBatch, Sample, deal, micro_batches
from trd_megatron.learner.parallel import Parallel
from trd_megatron.learner.teacher import Teacher


class Step:
    """Runs batches through teacher, student and loss under one layout."""

    def __init__(self, student: Model, teacher: Teacher, adapters: Adapters | None, config: Config, token_set: list[int]) -> None:
        """adapters None: every parameter is trained. token_set: the ids of `epistemic`."""
        self.token_set = torch.tensor(token_set, dtype=torch.int64, device=student.parallel.device)
        self.student, self.teacher, self.adapters = student, teacher, adapters
        self.learner, self.seed = config.learner, config.seed
        self.divergence = Divergence(**asdict(config.method.divergence))
        self.parallel: Parallel = student.parallel

    @record_function("data")
    def _micro_batches(self, samples: list[Sample]) -> list[MicroBatch]:
        mine = deal(samples, self.parallel.dp_size)[self.parallel.dp_rank]
        multiple = self.parallel.tp_size if self.parallel.sequence_parallel else 1
        return micro_batches(mine, self.learner.max_tokens_per_micro_batch, multiple, self.parallel.device)

    def _kl(self, batch: MicroBatch, weight: float) -> KLOutput:
        with record_function("teacher forward"):
            teacher_hidden = self.teacher.response_hidden(batch.teacher)
        with record_function("student forward"):
            student_hidden = self.student.hidden_states(batch.student)[batch.student.rows]
        with record_function("KL"):
            return linear_kl(
                student_hidden,
                self.student.output_weight,
                teacher_hidden,
                self.teacher.output_weight,
                self.divergence,
                token_weights=torch.full((len(batch.student.rows),), weight, device=student_hidden.device, dtype=torch.float64),
                targets=batch.student.targets,
                token_set=self.token_set,
                vocab_size=self.student.architecture.vocab_size,
                tp_group=self.parallel.tp_group if self.parallel.tp_size > 1 else None,
                chunk_tokens=self.learner.kl_chunk_tokens,
                backend=cast(Backend, self.learner.kl_backend),
            )

    def run(self, samples: list[Sample], *, backward: bool, number: int = 0) -> Sums:
        """The whole global batch `samples` (the same list on all ranks); gradients of the global token mean if `backward`.

        `number` of the step: dropout, which only `backward` has, drops others in each.
        Gradients are this rank's share: the optimizer adds them up over the data-parallel group.
        """
        tokens = sum(sample.response_tokens for sample in samples)
        totals = Totals(self.divergence.clip, self.parallel)
        for batch in self._micro_batches(samples):
            if self.adapters is not None:
                self.adapters.drop(row_keys(batch.student, self.seed, number) if backward else None)
            with torch.set_grad_enabled(backward):
                output = self._kl(batch, 1.0 / tokens)
                if backward:
                    with record_function("backward"):
                        output.loss.backward()
            totals.add(batch, output)
        return totals.over_ranks()
