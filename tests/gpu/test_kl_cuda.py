"""NUM_GPUS = 1. linear_kl with the triton kernels at the size of a real vocabulary, about 10 GB of GPU memory.

The CPU runs the same bodies in triton's interpreter at a small size: three tiles of a row, the last one cut short.
"""

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import trd_megatron.divergence as divergence_package
from tests.gpu.devices import cpu, cuda
from trd_megatron.divergence import Divergence, KLOutput, dense_kl, linear_kl
from trd_megatron.divergence.linear_kl import _choose_kernels

pytest.importorskip("triton")
from trd_megatron.divergence import triton_kernels

# numpy runs the interpreter: inf - inf and 0 / 0 in lanes whose result is not taken
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

LACKS = None if triton_kernels.INTERPRETED else "triton compiles for the GPU here: the interpreter runs where there is none"
ON_CPU = cpu(lacks=LACKS)
HIDDEN = 64
LEAVES = ("student_hidden", "student_weight")
KINDS = ("forward", "reverse", "jsd")


class Size(NamedTuple):
    tokens: int
    chunk: int
    rows: int  # of the output layers
    vocab: int  # an odd row length: no two rows are aligned alike


SIZES = {"cuda": Size(513, 100, 151_936, 151_669), "cpu": Size(5, 2, 9_024, 8_997)}


def make_problem(device: str, dtype: torch.dtype, tokens: int | None = None, exact: bool = False) -> dict[str, Any]:
    """Random models whose logits have a standard deviation of about 1; of 2, their rounding to bfloat16 alone would cost 2e-2.

    exact: logits are multiples of 1/8 up to 8, which every dtype holds, with hundreds of ties in each row.
    """
    size = SIZES[device]
    tokens = tokens or size.tokens
    rng = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        if exact:
            return torch.randint(-1, 2, shape, generator=rng, device=device).to(dtype)
        return torch.randn(*shape, generator=rng, device=device).to(dtype)

    return {
        "student_hidden": draw(tokens, HIDDEN).requires_grad_(),
        "student_weight": (draw(size.rows, HIDDEN) / 8).requires_grad_(),
        "teacher_hidden": draw(tokens, HIDDEN),
        "teacher_weight": draw(size.rows, HIDDEN) / 8,
        "token_weights": torch.rand(tokens, generator=rng, device=device),
        "targets": torch.randint(0, size.vocab, (tokens,), generator=rng, device=device),
        "token_set": [0, 3, size.vocab - 1],
        "vocab_size": size.vocab,
        "chunk_tokens": size.chunk,
    }


def run(problem: dict[str, Any], divergence: Divergence, backend: str) -> tuple[KLOutput, tuple[Tensor, ...]]:
    got = linear_kl(**problem, divergence=divergence, backend=backend)
    return got, torch.autograd.grad(got.loss, [problem[name] for name in LEAVES])


def reference(problem: dict[str, Any], divergence: Divergence) -> tuple[Tensor, list[Tensor]]:
    """per_token [T] and the gradients in float64, from whole logits of 32 tokens at a time."""
    student_hidden, student_weight = leaves = [problem[name].detach().double().requires_grad_() for name in LEAVES]
    vocab = problem["vocab_size"]
    teacher_weight = problem["teacher_weight"].double()[:vocab]
    values = []
    for block in torch.arange(len(student_hidden), device=student_hidden.device).split(32):
        teacher = problem["teacher_hidden"][block].double() @ teacher_weight.t()
        value = dense_kl(student_hidden[block] @ student_weight[:vocab].t(), teacher, divergence)
        (problem["token_weights"][block].double() * value).sum().backward()
        values.append(value.detach())
    return torch.cat(values), [leaf.grad for leaf in leaves]


def assert_gradients(got: tuple[Tensor, ...], want: Any, relative: float) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.isfinite().all()
        assert (one.double() - other.double()).norm() <= relative * other.double().norm()


DTYPES = [torch.bfloat16, torch.float32, torch.float64]
CASES = [  # of jsd there is no top-k
    *itertools.product(KINDS, (None,), (1.0, 1.5)),
    *itertools.product(("forward", "reverse"), (32,), (1.0, 1.5)),
]
BOUNDS = {torch.bfloat16: (1e-2, 2e-2), torch.float32: (2e-5, 2e-5)}  # of the loss and of a gradient in norm, relative


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", [cpu(), cuda()])
def test_auto_picks_triton_on_a_gpu_but_for_float64(device: str, dtype: torch.dtype) -> None:
    name = "triton_kernels" if device == "cuda" and dtype != torch.float64 else "torch_kernels"
    assert _choose_kernels("auto", torch.empty(1, dtype=dtype, device=device)) is getattr(divergence_package, name)


@pytest.mark.parametrize(("kind", "top_k", "temperature"), CASES)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("device", [ON_CPU, cuda()])
def test_triton_equals_the_torch_backend_and_the_float64_reference(
    device: str, dtype: torch.dtype, kind: Any, top_k: int | None, temperature: float
) -> None:
    """Top-k on exact logits: every backend must choose the same words, of equal logits the lowest ids."""
    loss_error, gradient_error = BOUNDS[dtype]
    problem, divergence = make_problem(device, dtype, exact=top_k is not None), Divergence(kind, 0.3, top_k, temperature=temperature)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    got, got_grads = run(problem, divergence, "triton")
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == tf32
    want, want_grads = run(problem, divergence, "torch")
    for name, value in vars(got).items():
        torch.testing.assert_close(value.detach(), getattr(want, name).detach(), rtol=2e-5, atol=1e-5)
    assert_gradients(got_grads, want_grads, gradient_error)
    per_token, grads = reference(problem, divergence)
    loss = (problem["token_weights"].double() * per_token).sum()
    torch.testing.assert_close(got.loss.detach().double(), loss, rtol=loss_error, atol=0)
    assert_gradients(got_grads, grads, gradient_error)
    if top_k is not None:
        torch.testing.assert_close(got.per_token.double(), per_token, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("device", [ON_CPU, cuda()])
def test_identical_models_have_zero_divergence(device: str, temperature: float, kind: Any) -> None:
    problem = make_problem(device, torch.float32)
    problem |= {"teacher_hidden": problem["student_hidden"].detach(), "teacher_weight": problem["student_weight"].detach()}
    got, (hidden_grad, _) = run(problem, Divergence(kind, temperature=temperature), "triton")
    assert got.unclipped.abs().max() <= 1e-6
    assert hidden_grad.abs().max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("device", [cuda()])
def test_memory_stays_at_a_few_chunks_of_logits(device: str, backend: str, dtype: torch.dtype, kind: Any) -> None:
    """What docs/divergence.md says, and one chunk more; [T, V] would be five for each model."""
    problem, size = make_problem(device, dtype), SIZES[device]
    problem["student_weight"].requires_grad_(False)
    for _ in range(2):  # the first run also takes the memory that cuBLAS keeps
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_kl(**problem, divergence=Divergence(kind), backend=backend).loss.backward()  # type: ignore[arg-type]
        peak = torch.cuda.max_memory_allocated() - before
    numbers = 3 * dtype.itemsize
    if backend == "torch":  # logits and scratch in float32, the product in the inputs' dtype
        numbers = 4 * (3 + (2 if kind == "jsd" else 1)) + (dtype.itemsize if dtype != torch.float32 else 0)
    assert peak < numbers * size.chunk * size.vocab


@pytest.mark.parametrize(("device", "beyond"), [cpu(0, lacks=LACKS), cuda(2**31)])
def test_a_chunk_of_more_than_two_to_the_31_logits(device: str, beyond: int) -> None:
    """chunk_tokens does not change the result, even where the last rows begin beyond the range of int32 (on a GPU alone)."""
    size = SIZES[device]
    tokens = beyond // size.vocab + (200 if beyond else size.tokens)
    problem = make_problem(device, torch.bfloat16, tokens)
    problem["student_weight"].requires_grad_(False)
    runs = []
    for chunk in (tokens, size.chunk):
        got = linear_kl(**problem | {"chunk_tokens": chunk}, divergence=Divergence("reverse"), backend="triton")
        runs.append((got.per_token, torch.autograd.grad(got.loss, problem["student_hidden"])))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-4)
    assert_gradients(runs[0][1], runs[1][1], 1e-2)
