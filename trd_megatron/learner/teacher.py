"""The teacher: hidden states and output weights. Logits never leave the loss.

OPSD: the student with its adapters off, so no second copy of the weights. OPD: a second frozen model of its own size.
"""

import contextlib
from collections.abc import Iterator

import torch

from trd_megatron.errors import UserError
from trd_megatron.learner.lora import Adapters
from trd_megatron.learner.model import Model
from trd_megatron.learner.packing import Packing


class Teacher:
    """model: the student's own Model (OPSD, adapters given) or another one (OPD, adapters None)."""

    def __init__(self, model: Model, student: Model, adapters: Adapters | None) -> None:
        ours, theirs = student.architecture.vocab_size, model.architecture.vocab_size
        if ours != theirs:
            raise UserError(f"teacher.path has a vocabulary of {theirs}, the student one of {ours}: they must share it")
        self.model = model
        self._adapters = adapters

    @property
    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the teacher's output layer, [V_local, Ht]."""
        return self.model.output_weight

    @contextlib.contextmanager
    def _weights(self) -> Iterator[None]:
        if self._adapters is None:
            yield
            return
        self._adapters.enable(False)
        try:
            yield
        finally:
            self._adapters.enable(True)

    def response_hidden(self, packing: Packing) -> torch.Tensor:
        """Hidden states of the response rows, [R, Ht], without gradient."""
        with torch.no_grad(), self._weights():
            return self.model.hidden_states(packing)[packing.rows]
