"""The triton kernels in triton's interpreter against torch_kernels and dense_kl in float64; and that they compile for a GPU."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.test_divergence import CLIP, PADDED, VOCAB, assert_gradient, assert_near, check, make_problem, reference
from trd_megatron.divergence import Divergence, linear_kl, torch_kernels
from trd_megatron.divergence.job import NO_LOGIT, Buffers, RowFactors

pytest.importorskip("triton")
import triton

from trd_megatron.divergence import triton_kernels

pytestmark = [
    pytest.mark.skipif(not triton_kernels.INTERPRETED, reason="triton compiles for the GPU here: see tests/gpu/test_kl_cuda.py"),
    # numpy runs the interpreter: inf - inf and 0 / 0 in lanes whose result is not taken
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

KINDS = ("forward", "reverse", "jsd")
KINDS_AND_TOP_K = [("forward", None), ("forward", 8), ("reverse", None), ("reverse", 8), ("jsd", None)]


@pytest.fixture
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """VOCAB is then two tiles and nine columns of a third."""
    monkeypatch.setattr(triton_kernels, "TILE", 16)
    assert 2 * triton_kernels.TILE < VOCAB < 3 * triton_kernels.TILE


def on_triton(tokens: int, dtype: torch.dtype = torch.float32, **change: Any) -> dict[str, Any]:
    return make_problem(tokens, dtype, seed=tokens) | {"backend": "triton"} | change


def buffers(vocab: int = VOCAB, chunk: int = 4) -> Buffers:
    return Buffers(SimpleNamespace(rows=vocab, chunk=chunk), torch.float32, torch.device("cpu"))


def random_logits(tokens: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(vocab)
    student, teacher = (torch.randn(tokens, vocab, generator=rng) * 3 for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def row_factors(stats: dict[str, Tensor], weight: float, centre: float) -> RowFactors:
    ones = torch.ones_like(stats["max_student"])
    logs = stats["sum_student"].log(), stats["sum_teacher"].log()
    return RowFactors(stats["max_student"], stats["max_teacher"], *logs, ones * weight, ones * centre)


def run_kernels(kernels: Any, student: Tensor, teacher: Tensor, kind: Any, scale: float) -> tuple[dict[str, Tensor], Tensor]:
    """All numbers that the three functions give for logits [c, V], and the gradient; the kernels get copies of their own."""
    student, teacher, own = student.clone(), teacher.clone(), buffers(student.shape[1], student.shape[0])
    stats = kernels.statistics(student, teacher, kind, scale, scale != 1, own)
    factors = row_factors(stats, 0.7, 0.2)
    if kind == "jsd":
        stats |= kernels.jsd_statistics(student, teacher, factors, 0.3, scale, own)
    kernels.gradient(student, teacher, kind, factors, 0.3, scale, own)
    return stats, student


@pytest.mark.parametrize(("kind", "top_k"), KINDS_AND_TOP_K)
def test_linear_kl_equals_the_float64_reference(kind: Any, top_k: int | None, small_tile: None) -> None:
    for temperature, clip in itertools.product((0.7, 1.0, 2.0), (None, CLIP[kind])):
        check(on_triton(5), Divergence(kind, beta=0.3, top_k=top_k, clip=clip, temperature=temperature), 3)


@pytest.mark.parametrize(("kind", "top_k"), KINDS_AND_TOP_K)
def test_linear_kl_equals_the_torch_backend(kind: Any, top_k: int | None) -> None:
    """The vocabulary is smaller than a tile."""
    problem, divergence = on_triton(5), Divergence(kind, beta=0.3, top_k=top_k, clip=CLIP[kind], temperature=2.0)
    leaves = [problem["student_hidden"], problem["student_weight"]]
    got, want = (linear_kl(**problem | {"backend": backend}, divergence=divergence, chunk_tokens=3) for backend in ("triton", "torch"))
    assert (got.unclipped > got.per_token).any()
    assert (got.unclipped == got.per_token).any()
    for name, value in vars(got).items():
        assert_near(value.detach(), getattr(want, name).detach(), 2e-5, 2e-6)
    for one, other in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want.loss, leaves), strict=True):
        assert_gradient(one, other.double(), 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_equals_the_float64_reference(
    kind: Any, dtype: torch.dtype, small_tile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    gradient = triton_kernels.gradient
    monkeypatch.setattr(triton_kernels, "gradient", lambda student, *rest: seen.append(student.dtype) or gradient(student, *rest))
    problem = on_triton(33, dtype)
    got = linear_kl(**problem, divergence=Divergence(kind), chunk_tokens=16)
    got.loss.backward()
    want, hidden_grad, weight_grad = reference(problem, Divergence(kind))
    assert got.per_token.dtype == torch.float32
    assert_near(got.loss.detach(), want.loss, 1e-2, 0)
    for name, expected in (("student_hidden", hidden_grad), ("student_weight", weight_grad)):
        assert problem[name].grad.dtype == dtype
        assert_gradient(problem[name].grad, expected, 2e-2)
    assert seen == [dtype] * 3  # no copy in float32


@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_and_top_k_equal_the_torch_backend(kind: Any, dtype: torch.dtype) -> None:
    """Not the float64 reference: the rounding of the logits decides which of two is among the largest."""
    problem, divergence = on_triton(33, dtype), Divergence(kind, top_k=8)
    leaves = [problem["student_hidden"], problem["student_weight"]]
    got, want = (linear_kl(**problem | {"backend": backend}, divergence=divergence, chunk_tokens=16) for backend in ("triton", "torch"))
    assert_near(got.per_token, want.per_token, 1e-5, 1e-6)
    for one, other in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want.loss, leaves), strict=True):
        assert_gradient(one, other.double(), 1e-2)


@pytest.mark.parametrize(("kind", "top_k"), KINDS_AND_TOP_K)
def test_logits_of_ten_thousand(kind: Any, top_k: int | None, small_tile: None) -> None:
    """Hidden size 1 and hidden state 1: the logits are the weights. Here the student is sure of one word: gradient 0."""
    rng = torch.Generator().manual_seed(3)
    for scale in (100.0, 1e4):
        problem = on_triton(4) | {
            "student_hidden": torch.tensor([[1.0], [-1.0], [0.5], [0.0]], requires_grad=True),
            "student_weight": ((torch.rand(PADDED, 1, generator=rng) * 2 - 1) * scale).requires_grad_(),
            "teacher_hidden": torch.tensor([[1.0], [1.0], [0.0], [-1.0]]),
            "teacher_weight": (torch.rand(PADDED, 1, generator=rng) * 2 - 1) * scale,
        }
        check(problem, Divergence(kind, top_k=top_k), 3, relative=1e-3, absolute=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, -1])
def test_tiles_far_above_and_far_below_the_others(kind: Any, order: int, small_tile: None) -> None:
    """Steps of 40 (each tile barely counts beside the next) and of 1000 (not at all), upwards or downwards."""
    for step in (40.0, 1000.0):
        student, teacher = random_logits(4, VOCAB)
        stairs = (torch.arange(VOCAB) // 16).float() * step * order
        got, got_gradient = run_kernels(triton_kernels, student + stairs, teacher + stairs, kind, 1.0)
        want, want_gradient = run_kernels(torch_kernels, student + stairs, teacher + stairs, kind, 1.0)
        for name in want:
            assert_near(got[name], want[name], 1e-5, 1e-3 * step / 1000)
        assert_gradient(got_gradient, want_gradient.double(), 1e-4)


@pytest.mark.parametrize(("kind", "top_k"), KINDS_AND_TOP_K)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_identical_models_have_exactly_zero_divergence(kind: Any, top_k: int | None, temperature: float, small_tile: None) -> None:
    problem = on_triton(9)
    problem |= {"teacher_hidden": problem["student_hidden"].detach(), "teacher_weight": problem["student_weight"].detach()}
    got = linear_kl(**problem, divergence=Divergence(kind, top_k=top_k, temperature=temperature), chunk_tokens=5)
    got.loss.backward()
    assert not got.unclipped.any()
    assert problem["student_hidden"].grad.abs().max() <= 1e-6


def test_jsd_of_nearly_identical_models_keeps_its_digits(small_tile: None) -> None:
    """Logits that differ by 1e-4: log(1 - beta + beta * e^d) as it stands would be off by more than the whole value."""
    rng = torch.Generator().manual_seed(5)
    logits = torch.randn(PADDED, 1, generator=rng)
    problem = on_triton(1) | {
        "student_hidden": torch.ones(1, 1, requires_grad=True),
        "student_weight": logits + torch.randn(PADDED, 1, generator=rng) * 1e-4,
        "teacher_hidden": torch.ones(1, 1),
        "teacher_weight": logits,
    }
    divergence = Divergence("jsd", beta=0.3)
    got = linear_kl(**problem, divergence=divergence)
    got.loss.backward()
    want, hidden_grad, _ = reference(problem, divergence)
    assert 0 < want.per_token.item() < 1e-8
    assert_near(got.per_token, want.per_token, 2e-2, 0)
    assert_gradient(problem["student_hidden"].grad, hidden_grad, 2e-2, 0)


@pytest.mark.parametrize(("kind", "top_k"), KINDS_AND_TOP_K)
def test_zero_weights_and_clipped_rows_have_no_gradient(kind: Any, top_k: int | None) -> None:
    problem = on_triton(6)
    got = linear_kl(**problem, divergence=Divergence(kind, top_k=top_k, clip=1e-9), chunk_tokens=4)
    got.loss.backward()
    assert (got.unclipped > 1e-3).all()
    assert not problem["student_hidden"].grad.any()
    assert not problem["student_weight"].grad.any()
    problem = on_triton(6, token_weights=torch.tensor([0.0, 1.0, 0.0] * 2))
    got = linear_kl(**problem, divergence=Divergence(kind, top_k=top_k), chunk_tokens=4)
    got.loss.backward()
    assert torch.equal(problem["student_hidden"].grad.any(1), problem["token_weights"] != 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1 / 0.7])
@pytest.mark.parametrize(("tokens", "tiles"), [(1, 0.5), (2, 2), (3, 2.4)])
def test_the_functions_give_the_numbers_of_the_torch_kernels(kind: Any, scale: float, tokens: int, tiles: float) -> None:
    student, teacher = random_logits(tokens, int(tiles * triton_kernels.TILE))
    got, got_gradient = run_kernels(triton_kernels, student, teacher, kind, scale)
    want, want_gradient = run_kernels(torch_kernels, student, teacher, kind, scale)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == torch.float32
        assert got[name].shape == (tokens,)
        assert_near(got[name], want[name], 2e-5, 1e-6)
    assert_gradient(got_gradient, want_gradient.double(), 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_rank_without_rows_gives_empty_sums(kind: Any, scale: float) -> None:
    empty = torch.empty(3, 0)
    stats = triton_kernels.statistics(empty, empty, kind, scale, scale != 1, buffers(0))
    factors = row_factors(stats, 1.0, 0.0)
    if kind == "jsd":
        stats |= triton_kernels.jsd_statistics(empty, empty, factors, 0.5, scale, buffers(0))
    for name, value in stats.items():
        assert torch.equal(value, torch.full((3,), NO_LOGIT if "max" in name else 0.0)), name
    triton_kernels.gradient(empty, empty, kind, factors, 0.5, scale, buffers(0))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_gradient_writes_and_only_inside_strided_rows(kind: Any, small_tile: None) -> None:
    wide_student, wide_teacher = random_logits(4, VOCAB + 9, torch.bfloat16)[0], random_logits(4, VOCAB + 20, torch.bfloat16)[1]
    student, teacher = wide_student[:, 4 : 4 + VOCAB], wide_teacher[:, :VOCAB]
    before_student, before_teacher = wide_student.clone(), wide_teacher.clone()
    _, want = run_kernels(torch_kernels, student.float(), teacher.float(), kind, 1.0)
    stats = triton_kernels.statistics(student, teacher, kind, 1.0, False, buffers())
    factors = row_factors(stats, 0.7, 0.2)
    triton_kernels.jsd_statistics(student, teacher, factors, 0.3, 1.0, buffers())
    assert torch.equal(wide_student, before_student)
    triton_kernels.gradient(student, teacher, kind, factors, 0.3, 1.0, buffers())
    assert_near(student, want, 2**-7, 1e-6)  # the interpreter cuts bfloat16 off, a GPU rounds it
    student.copy_(before_student[:, 4 : 4 + VOCAB])
    assert torch.equal(wide_student, before_student)
    assert torch.equal(wide_teacher, before_teacher)


def test_rows_beyond_the_range_of_int32() -> None:
    """4 GiB of address space, of which only three rows are touched."""
    stride, want = 2**30, random_logits(3, VOCAB, torch.bfloat16)[0]
    far = torch.empty(2 * stride + VOCAB, dtype=torch.bfloat16).as_strided((3, VOCAB), (stride, 1))
    far.copy_(want)
    stats = triton_kernels.statistics(far, want, "forward", 1.0, False, buffers())
    assert torch.equal(stats["max_student"], stats["max_teacher"])
    assert torch.equal(stats["sum_student"], stats["sum_teacher"])
    factors = row_factors(stats, 1.0, 0.0)
    assert not triton_kernels.jsd_statistics(want, far, factors, 0.5, 1.0, buffers())["kl_teacher"].any()
    triton_kernels.gradient(far, want, "forward", factors, 0.5, 1.0, buffers())
    assert not far.any()


def test_the_triton_backend_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a GPU"):
        linear_kl(**on_triton(3), divergence=Divergence("forward"))


def test_the_triton_backend_refuses_float64() -> None:
    with pytest.raises(ValueError, match="float64"):
        linear_kl(**on_triton(3, torch.float64), divergence=Divergence("forward"))


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes what the compiler does not. In a process of its own: triton reads TRITON_INTERPRET once."""
    command = [sys.executable, "-c", f"from {__name__} import compile_kernels; compile_kernels()"]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)})


def compile_kernels() -> None:
    for logits, kind in (("*bf16", "forward"), ("*fp16", "reverse"), ("*fp32", "jsd")):
        for kernel in (triton_kernels._statistics, triton_kernels._jsd_statistics, triton_kernels._gradient):
            types = {"student": logits, "teacher": logits, "scale": "fp32", "beta": "fp32"}
            types |= dict.fromkeys(("student_stride", "teacher_stride", "rows", "vocab"), "i32")
            constants = {"kind": kind, "plain": True, "tile": triton_kernels.TILE}
            types |= dict.fromkeys(constants, "constexpr")
            names = [parameter.name for parameter in kernel.params]
            source = triton.compiler.ASTSource(
                fn=kernel,
                signature={name: types.get(name, "*fp32") for name in names},
                constexprs={name: value for name, value in constants.items() if name in names},
            )
            triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 80, 32), options={"num_warps": triton_kernels._WARPS})
