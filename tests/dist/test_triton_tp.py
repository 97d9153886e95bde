"""The triton kernels, in triton's interpreter, over two gloo ranks against one rank."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.dist.ranks import run_ranks
from tests.unit.test_divergence import PADDED, VOCAB, assert_gradient, assert_near, make_problem
from trd_megatron.divergence import Divergence, linear_kl

pytest.importorskip("triton")
from trd_megatron.divergence import triton_kernels

pytestmark = [
    pytest.mark.skipif(not triton_kernels.INTERPRETED, reason="triton compiles for the GPU here"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

CASES = [
    (Divergence(kind, beta=0.3, top_k=top_k, temperature=temperature), vocab, 1.0)
    for kind, top_k in (("forward", None), ("reverse", None), ("jsd", None), ("forward", 8))
    for temperature, vocab in ((0.7, VOCAB), (1.0, PADDED // 2))  # of the smaller vocabulary the second rank has only padding
] + [(Divergence(kind), VOCAB, 100.0) for kind in ("forward", "reverse", "jsd")]  # the ranks' maxima are far apart


def run_case(divergence: Divergence, vocab: int, scale: float, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    problem = make_problem(5) | {"backend": "triton", "vocab_size": vocab}
    problem |= {"targets": problem["targets"] % vocab, "token_set": [0, 3, vocab - 1]}
    rows = PADDED // ranks
    for name in ("student_weight", "teacher_weight"):
        own = problem[name].detach()[rank * rows : (rank + 1) * rows] * scale
        problem[name] = own.requires_grad_(name == "student_weight")
    got = linear_kl(**problem, divergence=divergence, tp_group=dist.group.WORLD if ranks > 1 else None, chunk_tokens=3)
    got.loss.backward()
    grads = {f"{name}_grad": problem[name].grad for name in ("student_hidden", "student_weight")}
    return {name: value.detach() for name, value in vars(got).items()} | grads


def run_all(rank: int) -> list[dict[str, Any]]:
    return [run_case(*case, rank, 2) for case in CASES]


def test_two_ranks_give_the_result_of_one() -> None:
    for case, first, second in zip(CASES, *run_ranks(2, run_all), strict=True):
        want = run_case(*case)
        scale = case[2]
        for name, value in want.items():
            if name == "student_weight_grad":
                assert_gradient(torch.cat([first[name], second[name]]), value.double(), 2e-5, 1e-6 * scale)
            elif name == "student_hidden_grad":
                assert_gradient(first[name], value.double(), 2e-5, 1e-6 * scale)
            else:
                assert_near(first[name], value, 2e-5, 3e-6 * scale)
            if name != "student_weight_grad":
                assert torch.equal(first[name], second[name]), (case, name)
