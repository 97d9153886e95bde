"""The sides of `trd bench kl`: each computes one forward KL, summed over the tokens, and its gradient in the student's hidden states.

The output layers are frozen. Shape letters: T tokens, V this rank's vocabulary rows, H hidden.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trd_megatron.divergence import Divergence, linear_kl
from trd_megatron.divergence.products import mm_into

Call = Callable[[], Tensor | None]  # forward and backward; returns the loss, None where there is none
TOP_K = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """What every side gets. Only student_hidden requires grad."""

    student_hidden: Tensor  # [T, H]
    student_weight: Tensor  # [V, H]
    teacher_hidden: Tensor  # [T, H]
    teacher_weight: Tensor  # [V, H]
    chunk: int  # tokens per chunk of the sides that are products alone
    group: dist.ProcessGroup | None  # over which the vocabulary is split


def write_inputs(folder: Path, tokens: int, hidden: int, vocab: int, dtype: str, seed: int) -> None:
    """Draws hidden states (standard normal) and weights (normal, 0.05) into files of `folder` that load_inputs maps."""
    generator = torch.Generator().manual_seed(seed)
    for side in ("student", "teacher"):
        for name, rows, scale in (("hidden", tokens, 1.0), ("weight", vocab, 0.05)):
            _map(folder, f"{side}_{name}", rows, hidden, dtype).normal_(0, scale, generator=generator)
            with (folder / f"{side}_{name}").open("rb") as file:
                os.fsync(file.fileno())  # not while something is timed


def load_inputs(
    folder: Path, tokens: int, hidden: int, vocab: int, dtype: str, device: str, chunk: int, group: dist.ProcessGroup | None
) -> Inputs:
    """Maps what this rank needs of the files of write_inputs; no copy on CPU."""
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)

    def load(name: str, first: int, rows: int) -> Tensor:
        return _map(folder, name, first + rows, hidden, dtype)[first:].to(device)

    hiddens = [load(f"{side}_hidden", 0, tokens) for side in ("student", "teacher")]
    weights = [load(f"{side}_weight", rank * (vocab // ranks), vocab // ranks) for side in ("student", "teacher")]
    return Inputs(hiddens[0].requires_grad_(), weights[0], hiddens[1], weights[1], chunk, group)


@torch.no_grad()
def touch(inputs: Inputs) -> None:
    """Reads all of the inputs, so that they are in this process's memory: Linux may take mapped pages away from a process that waits."""
    for tensor in (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight):
        tensor.sum()


def _map(folder: Path, name: str, rows: int, columns: int, dtype: str) -> Tensor:
    return torch.from_file(str(folder / name), shared=True, size=rows * columns, dtype=DTYPES[dtype]).view(rows, columns)


def _mm(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=out)


def _products(inputs: Inputs, multiply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """The three matrix products that every chunked way needs: student logits, teacher logits, hidden gradient."""
    hidden_s, hidden_t = inputs.student_hidden.detach(), inputs.teacher_hidden
    tokens, vocab = hidden_s.shape[0], inputs.student_weight.shape[0]
    student = hidden_s.new_empty(min(inputs.chunk, tokens), vocab)
    teacher, gradient = torch.empty_like(student), torch.empty_like(hidden_s)

    def call() -> None:
        for start in range(0, tokens, inputs.chunk):
            end = min(start + inputs.chunk, tokens)
            multiply(student[: end - start], hidden_s[start:end], inputs.student_weight.t())
            multiply(teacher[: end - start], hidden_t[start:end], inputs.teacher_weight.t())
            multiply(gradient[start:end], student[: end - start], inputs.student_weight)

    return call


def _linear_kl(inputs: Inputs, divergence: Divergence) -> Call:
    token_weights = torch.ones(inputs.student_hidden.shape[0], device=inputs.student_hidden.device)

    def call() -> Tensor:
        loss = linear_kl(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            divergence,
            token_weights=token_weights,
            tp_group=inputs.group,
        ).loss
        loss.backward()
        return loss.detach()

    return call


def _logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """[T, V] of student and teacher."""
    student = inputs.student_hidden @ inputs.student_weight.t()
    with torch.no_grad():
        return student, inputs.teacher_hidden @ inputs.teacher_weight.t()


def _plain(inputs: Inputs) -> Call:
    def call() -> Tensor:
        student, teacher = _logits(inputs)
        loss = F.kl_div(F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), reduction="none", log_target=True).sum()
        loss.backward()
        return loss.detach()

    return call


def _trl(inputs: Inputs) -> Call:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def call() -> Tensor:
        student, teacher = _logits(inputs)
        loss = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=0, reduction="sum")
        loss.backward()
        return loss.detach()

    return call


def _liger(inputs: Inputs, **options: bool) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    tokens = inputs.student_hidden.shape[0]
    labels = torch.zeros(tokens, dtype=torch.long, device=inputs.student_hidden.device)  # all valid
    loss_function = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, **options)

    def call() -> Tensor:
        loss = loss_function(inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight, labels)
        loss.backward()
        return loss.detach() * tokens  # it gives the mean over the tokens

    return call


def _top64(inputs: Inputs) -> Call:
    """As NeMo-RL's DistillationLossFn computes it on one rank; nemo-rl itself is not on PyPI."""

    def call() -> Tensor:
        with torch.no_grad():
            teacher, ids = torch.topk(inputs.teacher_hidden @ inputs.teacher_weight.t(), TOP_K, dim=-1)  # [T, k]
        student = (inputs.student_hidden @ inputs.student_weight.t()).float().gather(-1, ids)
        logprob_s, logprob_t = F.log_softmax(student, dim=-1), F.log_softmax(teacher.float(), dim=-1)
        loss = (logprob_t.exp() * (logprob_t - logprob_s)).sum()
        loss.backward()
        return loss.detach()

    return call


@dataclass(frozen=True)
class Side:
    """make: called once, after memory is first read. agrees: which loss it gives. module: imported before memory is first read."""

    make: Callable[[Inputs], Call]
    agrees: str | None = "full"
    module: str | None = None

    @property
    def installed(self) -> bool:
        return self.module is None or importlib.util.find_spec(self.module.split(".")[0]) is not None


SIDES = {
    "products": Side(partial(_products, multiply=_mm), agrees=None),
    "products_fast": Side(partial(_products, multiply=mm_into), agrees=None),
    "linear_kl": Side(partial(_linear_kl, divergence=Divergence("forward"))),
    "plain": Side(_plain),
    "trl": Side(_trl, module="trl.experimental.gkd.gkd_trainer"),
    "liger": Side(_liger, module="liger_kernel.chunked_loss"),
    "liger_eager": Side(partial(_liger, compiled=False), module="liger_kernel.chunked_loss"),
    "top64": Side(_top64, agrees="top64"),
    "linear_kl_top64": Side(partial(_linear_kl, divergence=Divergence("forward", top_k=TOP_K)), agrees="top64"),
}
