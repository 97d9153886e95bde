"""The teacher: hidden states and output weights. Logits never leave the loss.

OPSD: the student with its adapters off, so no second copy of the weights. OPD: a second frozen model of its own size; so is the frozen copy
of the starting weights that OPSD with full-parameter training needs.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from trd_megatron.errors import UserError
from trd_megatron.learner.lora import Adapters
from trd_megatron.learner.model import Model
from trd_megatron.learner.packing import Packing


class Teacher:
    """model: the student's own Model (adapters given) or another one (adapters None)."""

    def __init__(self, model: Model, student: Model, adapters: Adapters | None, *, offload: bool = False) -> None:
        """offload: the layers lie in host memory while they are not in use. Raises UserError if the vocabularies differ."""
        ours, theirs = student.architecture.vocab_size, model.architecture.vocab_size
        if ours != theirs:
            raise UserError(f"teacher.path has a vocabulary of {theirs}, the student one of {ours}: they must share it")
        self.model = model
        self._adapters = adapters
        self._host = HostCopy(model.gpt.decoder) if offload else None

    @property
    def output_weight(self) -> Tensor:
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

    def response_hidden(self, packings: Sequence[Packing]) -> Iterator[Tensor]:
        """Hidden states of the response rows of each micro-batch, [R, Ht], all of them on every context-parallel rank, without gradient.

        An offloaded teacher goes through all micro-batches at once, so that its weights travel once a step; the hidden states wait in
        host memory.
        """
        if self._host is None:
            for packing in packings:
                yield self._one(packing)
            return
        device = self.model.parallel.device
        with self._host.on(device):
            waiting = [self._one(packing).cpu() for packing in packings]
        while waiting:
            yield waiting.pop(0).to(device)

    def _one(self, packing: Packing) -> Tensor:
        parallel = self.model.parallel
        with torch.no_grad(), self._weights(), record_function("teacher forward"):
            hidden = self.model.hidden_states(packing)[packing.rows]
            if parallel.cp_size == 1:
                return hidden
            # The teacher's prompt is another one than the student's, so this rank needs rows that lie on others.
            whole = hidden.new_zeros(packing.response_tokens, hidden.shape[1])
            whole[packing.responses] = hidden
            dist.all_reduce(whole, group=parallel.cp_group)
            return whole


class HostCopy:
    """Frozen parameters of a module in host memory, page-locked where there is a GPU; `on` lends them to a device."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._parameters = list(module.parameters())
        self._host = [parameter.data.cpu() for parameter in self._parameters]
        if torch.cuda.is_available():
            self._host = [tensor.pin_memory() for tensor in self._host]
        self._take_back()

    def _take_back(self) -> None:
        for parameter, tensor in zip(self._parameters, self._host, strict=True):
            parameter.data = tensor

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """The parameters are on `device` inside."""
        for parameter, tensor in zip(self._parameters, self._host, strict=True):
            parameter.data = tensor.to(device, non_blocking=True)
        try:
            yield
        finally:
            self._take_back()
