"""What one call of linear_kl works with: the request (Job), its buffers, and the numbers of a row that the gradient needs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trd_megatron.divergence.spec import Divergence

_CPU_BLOCK = 16  # rows of a chunk whose elementwise work is done together on CPU, so that temporaries stay small and in cache
NO_LOGIT = -1e30  # max over no rows at all: finite, so that 0 * (a difference of maxima) is 0 and not NaN
JSD_RANGE = 60.0  # |log p - log q| beyond it changes jsd by less than e^-59 and would overflow float32


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
        """None: the full vocabulary, as is a support of all its words."""
        k = self.divergence.top_k
        return None if k is None or k >= self.vocab else k

    @property
    def wants_grad(self) -> bool:
        return self.hidden_grad or self.weight_grad

    @property
    def wants_plain(self) -> bool:
        """Whether anything at temperature 1 over the full vocabulary is asked for."""
        return self.targets is not None or self.set_columns is not None


class Buffers:
    """Named buffers of a chunk's or a block's shape, allocated once: a fresh temporary per chunk costs page faults on CPU."""

    def __init__(self, job: Job, stat_dtype: torch.dtype, device: torch.device) -> None:
        self.stat_dtype, self.device, self.vocab = stat_dtype, device, job.rows
        # An odd row length keeps half-precision products and vector loads on a GPU from being aligned.
        self._width = job.rows if device.type == "cpu" else -(-job.rows // 64) * 64
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
            self._held[name, dtype] = torch.empty(rows, self._width, dtype=dtype, device=self.device)[:, : self.vocab]
        return self._held[name, dtype]

    def blocks(self, tokens: int) -> Iterator[slice]:
        for start in range(0, tokens, self.block):
            yield slice(start, min(start + self.block, tokens))


@dataclass(frozen=True)
class RowFactors:
    """Numbers [c] of each row from which a kernel makes the gradient; q = e^(scale·(logit - max_student) - log_student), p alike.

    weight: d loss / d per_token times scale, 0 where the clip holds. centre: of reverse and jsd, what is taken off the log-ratio
    (see gradient in torch_kernels).
    """

    max_student: Tensor
    max_teacher: Tensor
    log_student: Tensor
    log_teacher: Tensor
    weight: Tensor
    centre: Tensor
